//! Makes the manual pages of section 3 from the header and `examples/manual.c`: what is said
//! of a function is said once, in `src/capi`.

use std::collections::BTreeMap;

/// Page names with their texts, sorted.
pub fn pages(header: &str, examples: &str) -> BTreeMap<String, String> {
    let header = Header::parse(header);
    let examples = examples_by_function(examples);
    let mut pages: BTreeMap<String, String> = header
        .functions
        .iter()
        .map(|f| {
            let example = examples
                .get(&f.name)
                .unwrap_or_else(|| panic!("examples/manual.c has no EXAMPLE {}", f.name));
            (f.name.clone(), function_page(&header, f, example))
        })
        .collect();
    for name in examples.keys() {
        assert!(
            pages.contains_key(name),
            "the header has no {name}, examples/manual.c has"
        );
    }
    pages.insert("libqcow2_snapshot".to_owned(), overview(&header));
    pages
}

struct Documented {
    /// What the C compiler sees, without documentation.
    code: Vec<String>,
    name: String,
    doc: Vec<String>,
}

struct Header {
    version: String,
    /// The comment at the top: the program in it, and paragraphs "Title. Text".
    program: Vec<String>,
    topics: Vec<(String, Vec<String>)>,
    constants: Vec<Documented>,
    types: Vec<Documented>,
    functions: Vec<Documented>,
}

/// The text of a line of a comment.
fn comment_text(line: &str) -> &str {
    let line = line.trim_start();
    line.strip_prefix("* ")
        .or(line.strip_prefix("*"))
        .unwrap_or(line)
}

impl Header {
    fn parse(text: &str) -> Header {
        let mut header = Header {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            program: Vec::new(),
            topics: Vec::new(),
            constants: Vec::new(),
            types: Vec::new(),
            functions: Vec::new(),
        };
        let mut lines = text.lines().peekable();
        header.read_top(&mut lines);
        while let Some(line) = lines.next() {
            if line != "/**" {
                continue;
            }
            let doc: Vec<String> = lines
                .by_ref()
                .take_while(|l| l.trim() != "*/")
                .map(|l| comment_text(l).to_owned())
                .collect();
            // The declaration: to a semicolon outside of braces, or one line of #define.
            let mut code = Vec::new();
            for line in lines.by_ref() {
                code.push(line.to_owned());
                let whole = code.join("\n");
                let open = whole.matches('{').count() > whole.matches('}').count();
                if line.starts_with("#define") || (!open && line.ends_with(';')) {
                    break;
                }
            }
            header.add(doc, code);
        }
        header
    }

    fn read_top<'a>(&mut self, lines: &mut impl Iterator<Item = &'a str>) {
        let mut text = String::new();
        for line in lines
            .skip_while(|l| *l != "/*")
            .skip(1)
            .take_while(|l| *l != " */")
        {
            let line = comment_text(line);
            // The first paragraph says what the file is.
            match line.strip_prefix("    ") {
                Some(code) if self.topics.is_empty() => self.program.push(code.to_owned()),
                _ if line.is_empty() && self.topics.is_empty() && !self.program.is_empty() => {
                    self.program.push(String::new());
                }
                _ => {
                    // A topic: not indented, "Title. Text" or "Title, something:".
                    let title = line.split_once(['.', ',']).map(|(title, _)| title);
                    match title {
                        Some(title)
                            if !self.program.is_empty() && line.starts_with(char::is_uppercase) =>
                        {
                            let rest = line[title.len()..].trim_start_matches(['.', ' ', ',']);
                            let title = title.to_owned();
                            self.topics.push((title, vec![rest.to_owned()]));
                        }
                        _ => match self.topics.last_mut() {
                            Some((_, body)) => {
                                body.push(line.strip_prefix("  ").unwrap_or(line).to_owned());
                            }
                            None => text += line,
                        },
                    }
                }
            }
        }
        while self.program.last().is_some_and(String::is_empty) {
            self.program.pop();
        }
    }

    fn add(&mut self, doc: Vec<String>, code: Vec<String>) {
        let first = &code[0];
        if let Some(rest) = first.strip_prefix("#define ") {
            let (name, value) = rest.split_once(' ').expect("a constant has a value");
            if name.starts_with("QCOW2_SNAPSHOT_VERSION") {
                return;
            }
            self.constants.push(Documented {
                name: name.to_owned(),
                code: vec![value.to_owned()],
                doc,
            });
        } else if first.starts_with("typedef") {
            let end = code.last().expect("a type has an end");
            let name = end.trim_end_matches(';').rsplit([' ', '}']).next();
            self.types.push(Documented {
                name: name.unwrap_or_default().to_owned(),
                code,
                doc,
            });
        } else {
            let before = first.split('(').next().unwrap_or_default();
            let name = before.rsplit([' ', '*']).next().unwrap_or_default();
            self.functions.push(Documented {
                name: name.to_owned(),
                code: prototype(&code),
                doc,
            });
        }
    }
}

/// One parameter a line where the prototype is long, without the word "struct".
fn prototype(code: &[String]) -> Vec<String> {
    let one = code
        .iter()
        .map(|l| l.trim())
        .collect::<Vec<_>>()
        .join(" ")
        .replace("struct ", "");
    if one.len() <= 72 {
        return vec![one];
    }
    let (head, rest) = one.split_once('(').expect("a function");
    let indent = " ".repeat(head.len() + 1);
    let parameters: Vec<&str> = rest.split(", ").collect();
    let last = parameters.len() - 1;
    parameters
        .iter()
        .enumerate()
        .map(|(i, p)| {
            let start = if i == 0 {
                format!("{head}(")
            } else {
                indent.clone()
            };
            format!("{start}{p}{}", if i == last { "" } else { "," })
        })
        .collect()
}

fn examples_by_function(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut examples = BTreeMap::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(names) = line.strip_prefix("/* EXAMPLE ") else {
            continue;
        };
        let code: Vec<String> = lines
            .by_ref()
            .take_while(|l| *l != "/* END */")
            .map(str::to_owned)
            .collect();
        for name in names.trim_end_matches(" */").split(' ') {
            let again = examples.insert(name.to_owned(), code.clone());
            assert!(again.is_none(), "two examples for {name}");
        }
    }
    examples
}

// ---- roff ---------------------------------------------------------------------------------

struct Page(String);

impl Page {
    fn new(name: &str, version: &str) -> Page {
        Page(format!(
            ".\\\" Made by tests/man.rs from the header: do not edit, run \"make header\".\n\
             .TH {name} 3 \"\" \"qcow2-snapshot {version}\" \"Library Functions Manual\"\n"
        ))
    }

    fn request(&mut self, request: &str) {
        self.0 += request;
        self.0.push('\n');
    }

    /// Text that the formatter fills.
    fn text(&mut self, text: &str) {
        let mut width = 0;
        let mut line = String::new();
        for word in marked_up(text).split_whitespace() {
            if width > 0 && width + 1 + word.len() > 88 {
                self.line(&line);
                line.clear();
                width = 0;
            }
            if width > 0 {
                line.push(' ');
                width += 1;
            }
            line += word;
            width += word.len();
        }
        if !line.is_empty() {
            self.line(&line);
        }
    }

    fn line(&mut self, line: &str) {
        if line.starts_with(['.', '\'']) {
            self.0 += "\\&";
        }
        self.0 += line;
        self.0.push('\n');
    }

    fn code<S: AsRef<str>>(&mut self, lines: &[S]) {
        self.request(".EX");
        for line in lines {
            let line = verbatim(line.as_ref());
            self.line(&line);
        }
        self.request(".EE");
    }

    /// Paragraphs, and code where it is indented by four.
    fn body(&mut self, lines: &[String]) {
        let mut first = true;
        for block in lines.split(|l| l.is_empty()) {
            if block.is_empty() {
                continue;
            }
            if !first {
                self.request(".PP");
            }
            first = false;
            if block.iter().all(|l| l.starts_with("    ")) {
                let code: Vec<&str> = block.iter().map(|l| &l[4..]).collect();
                self.request(".RS 4");
                self.code(&code);
                self.request(".RE");
            } else {
                self.text(&block.join(" "));
            }
        }
    }
}

fn verbatim(text: &str) -> String {
    text.replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('^', "\\(ha")
        .replace('~', "\\(ti")
        .replace('\'', "\\(aq")
        .replace('`', "\\(ga")
}

/// Names of functions and constants in bold, those in backquotes too; hyphens that are part
/// of a name or a sign as such.
fn marked_up(text: &str) -> String {
    let mut out = Vec::new();
    for word in text.split_whitespace() {
        let core = word.trim_matches(|c: char| !(c.is_alphanumeric() || "_-`".contains(c)));
        let start = word.find(core).unwrap_or_default();
        let (before, after) = (&word[..start], &word[start + core.len()..]);
        let bare = core.trim_matches('`');
        let function = bare.starts_with("qcow2_") && after.starts_with("()");
        let marked = if core.is_empty() {
            String::new()
        } else if function {
            format!("\\fB{}\\fR(3)", verbatim(bare))
        } else if core.starts_with('`')
            || (bare.starts_with("QCOW2_") && !bare.contains(char::is_lowercase))
            || (bare.starts_with("-E") && bare[1..].chars().all(|c| c.is_ascii_uppercase()))
        {
            format!("\\fB{}\\fR", verbatim(bare))
        } else if bare.starts_with('-') || bare.starts_with("qemu-") {
            verbatim(bare)
        } else {
            bare.replace('\\', "\\e")
        };
        let after = if function { &after[2..] } else { after };
        let escape = |s: &str| {
            s.replace('\\', "\\e")
                .replace('`', "")
                .replace('\'', "\\(aq")
        };
        out.push(format!("{}{}{}", escape(before), marked, escape(after)));
    }
    out.join(" ")
}

/// The first sentence of a description.
fn summary(doc: &[String]) -> String {
    let paragraph: Vec<&str> = doc
        .iter()
        .map(String::as_str)
        .take_while(|l| !l.is_empty())
        .collect();
    let text = paragraph.join(" ");
    let end = text.find(". ").unwrap_or(text.len());
    let text = text[..end].trim_end_matches(['.', ':']);
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

// ---- the page of a function ---------------------------------------------------------------

/// The documentation of a function, taken apart.
#[derive(Default)]
struct Parts {
    description: Vec<String>,
    parameters: Vec<(String, String)>,
    returns: String,
    errors: Vec<(String, String)>,
    errors_end: String,
    qemu: String,
}

impl Parts {
    fn of(doc: &[String]) -> Parts {
        let mut parts = Parts::default();
        let tags = doc.iter().position(|l| l.starts_with('@'));
        let tags = tags.unwrap_or(doc.len());
        let qemu = doc.iter().position(|l| l.starts_with("QEMU: "));
        let qemu = qemu.unwrap_or(doc.len());
        parts.description = doc[..tags.min(qemu)].to_vec();
        parts.qemu = doc[qemu..]
            .join(" ")
            .trim_start_matches("QEMU: ")
            .to_owned();
        let mut tagged: Vec<Vec<&str>> = Vec::new();
        for line in &doc[tags.min(qemu)..qemu] {
            if line.starts_with('@') {
                tagged.push(vec![line]);
            } else if let Some(last) = tagged.last_mut() {
                last.push(line);
            }
        }
        for lines in tagged {
            if let Some(rest) = lines[0].strip_prefix("@param ") {
                let (name, text) = rest.trim().split_once(' ').expect("a parameter has a text");
                let mut text = vec![text.trim()];
                text.extend(lines[1..].iter().map(|l| l.trim()));
                parts.parameters.push((name.to_owned(), text.join(" ")));
            } else {
                parts.take_return(&lines);
            }
        }
        parts
    }

    /// `@return`: text, then one line or more for each errno, indented more from the second.
    fn take_return(&mut self, lines: &[&str]) {
        let rest = lines[0].strip_prefix("@return").expect("the other tag");
        let base = lines[0].len() - rest.trim_start().len();
        let mut errors: Vec<(String, String)> = Vec::new();
        let mut ended = false;
        self.returns.push_str(rest.trim());
        for line in lines[1..].iter().filter(|l| !l.trim().is_empty()) {
            let at_base = line.len() - line.trim_start().len() == base;
            let text = line.trim();
            if at_base && text.starts_with("-E") {
                errors.push(codes(text));
                continue;
            }
            ended |= at_base && !errors.is_empty();
            let where_to = match errors.last_mut() {
                _ if ended => &mut self.errors_end,
                Some((_, words)) => words,
                None => &mut self.returns,
            };
            if !where_to.is_empty() {
                where_to.push(' ');
            }
            where_to.push_str(text);
        }
        // "-ENOMEM, -EBUSY, and what the I/O functions return": each by itself.
        for (codes, text) in errors {
            let loose = text.is_empty() || text.starts_with("and what");
            if !loose {
                self.errors.push((codes, text));
                continue;
            }
            for code in codes.split(", ") {
                self.errors.push((code.to_owned(), usual(code).to_owned()));
            }
            if !text.is_empty() {
                self.errors_end = text;
            }
        }
    }
}

/// Split `-EA, -EB, rest` or `-EA   rest`.
fn codes(text: &str) -> (String, String) {
    let mut codes = Vec::new();
    let mut rest = text;
    while rest.starts_with("-E") {
        let end = rest[1..]
            .find(|c: char| !c.is_ascii_alphanumeric())
            .map_or(rest.len(), |n| n + 1);
        codes.push(&rest[..end]);
        rest = rest[end..].trim_start_matches([',', ' ']);
    }
    (codes.join(", "), rest.to_owned())
}

/// The errnos that any function may give have their words in the overview.
fn usual(code: &str) -> &'static str {
    match code {
        "-ENOMEM" => "There is not enough memory.",
        "-EBUSY" => "One of the caller's own functions calls back into the handle.",
        _ => panic!("the documentation leaves {code} without words"),
    }
}

/// With a capital and a full stop. `names` are what a capital would spoil.
fn sentence(text: &str, names: &[(String, String)]) -> String {
    let text = match text.trim().strip_suffix("and:") {
        Some(text) => format!("{text}and those below"),
        None => text
            .trim()
            .trim_end_matches([':', ';', ',', '.'])
            .to_owned(),
    };
    let first = text.split([' ', ',', ';']).next().unwrap_or_default();
    let is_name =
        first == "and" || first.contains('_') || names.iter().any(|(name, _)| name == first);
    let mut chars = text.chars();
    match chars.next() {
        Some(letter) if !is_name => letter.to_uppercase().chain(chars).collect::<String>() + ".",
        _ => text + ".",
    }
}

fn function_page(header: &Header, function: &Documented, example: &[String]) -> String {
    let parts = Parts::of(&function.doc);
    let mut page = Page::new(&function.name, &header.version);
    page.request(".SH NAME");
    page.request(&format!(
        "{} \\- {}",
        function.name,
        marked_up(&summary(&function.doc))
    ));
    page.request(".SH SYNOPSIS");
    page.request(".B #include <qcow2_snapshot.h>");
    page.request(".PP");
    page.request(".EX");
    for line in &function.code {
        page.request(&format!("\\fB{}\\fR", verbatim(line)));
    }
    page.request(".EE");
    page.request(".PP");
    page.text("Link with pkg-config qcow2_snapshot, or");
    page.request(".IR \\-lqcow2_snapshot .");
    page.request(".SH DESCRIPTION");
    page.body(&parts.description);
    for (name, text) in &parts.parameters {
        page.request(".TP");
        page.request(&format!(".I {}", verbatim(name)));
        page.text(&sentence(text, &parts.parameters));
    }
    page.request(".SH RETURN VALUE");
    if parts.returns.is_empty() {
        page.text("None.");
    } else {
        page.text(&sentence(&parts.returns, &parts.parameters));
    }
    page.request(".SH ERRORS");
    if !parts.errors.is_empty() {
        for (code, text) in &parts.errors {
            page.request(".TP");
            page.request(&format!(".B {}", verbatim(code)));
            page.text(&sentence(text, &parts.parameters));
        }
        if !parts.errors_end.is_empty() {
            page.request(".PP");
            page.text(&sentence(&parts.errors_end, &parts.parameters));
        }
    } else if parts.returns.contains("errno") || parts.returns.contains("-E") {
        page.text("Those named under RETURN VALUE.");
    } else {
        page.text("None: it does not fail.");
    }
    if !parts.qemu.is_empty() {
        page.request(".SH NOTES");
        page.text(&format!(
            "In QEMU: {}",
            sentence(&parts.qemu, &parts.parameters)
        ));
    }
    page.request(".SH EXAMPLE");
    page.code(example);
    page.request(".SH SEE ALSO");
    let mut also = vec!["libqcow2_snapshot".to_owned()];
    for other in &header.functions {
        let named = format!("{}()", other.name);
        if other.name != function.name && function.doc.iter().any(|l| l.contains(&named)) {
            also.push(other.name.clone());
        }
    }
    see_also(&mut page, &also, "qemu-img");
    page.0
}

fn see_also(page: &mut Page, section_3: &[String], last: &str) {
    for name in section_3 {
        page.request(&format!(".BR {name} (3),"));
    }
    page.request(&format!(".BR {} (1)", verbatim(last)));
}

// ---- the overview -------------------------------------------------------------------------

fn overview(header: &Header) -> String {
    let mut page = Page::new("libqcow2_snapshot", &header.version);
    page.request(".SH NAME");
    page.request("libqcow2_snapshot \\- internal snapshots of qcow2 images, in-process");
    page.request(".SH SYNOPSIS");
    page.request(".B #include <qcow2_snapshot.h>");
    page.request(".PP");
    page.request(".B cc program.c $(pkg\\-config \\-\\-cflags \\-\\-libs qcow2_snapshot)");
    page.request(".SH DESCRIPTION");
    page.text(
        "The library creates, lists, reverts to, loads and deletes the internal snapshots of \
         qcow2 images, byte for byte as QEMU does, and reads the disk and the VM state of each. \
         Each function has a page of its own.",
    );
    page.request(".PP");
    page.text(
        "It is for 64-bit Linux with glibc, whose headers a C compiler needs too (Debian: libc6-dev). \
         musl is not supported.",
    );
    page.request(".SS Functions");
    for function in &header.functions {
        page.request(".TP");
        page.request(&format!(".BR {} (3)", function.name));
        page.text(&sentence(&summary(&function.doc), &[]));
    }
    for (title, lines) in &header.topics {
        page.request(&format!(".SS {title}"));
        // "MACRO  text" with the text indented further below: a list.
        let mut text = Vec::new();
        for line in lines {
            let item = line.split_once("  ").filter(|(name, _)| {
                !name.is_empty()
                    && name
                        .chars()
                        .all(|c| c.is_ascii_uppercase() || "_0123456789".contains(c))
            });
            if let Some((name, first)) = item {
                let before = text.join(" ");
                let colon = if before.trim().ends_with(':') {
                    ":"
                } else {
                    "."
                };
                page.text(&(sentence(&before, &[]).trim_end_matches('.').to_owned() + colon));
                text = vec![first.trim()];
                page.request(".TP");
                page.request(&format!(".B {}", verbatim(name)));
            } else {
                text.push(line.trim());
            }
        }
        page.text(&sentence(&text.join(" "), &[]));
    }
    page.request(".SH CONSTANTS");
    for constant in &header.constants {
        page.request(".TP");
        page.request(&format!(
            ".BR {} \" ({})\"",
            constant.name,
            verbatim(&constant.code[0])
        ));
        page.body(&constant.doc);
    }
    page.request(".SH TYPES");
    for kind in &header.types {
        page.request(&format!(".SS {}", kind.name));
        page.body(&kind.doc);
        members(&mut page, &kind.code);
    }
    page.request(".SH EXAMPLE");
    page.code(&header.program);
    page.request(".SH SEE ALSO");
    let names: Vec<String> = header.functions.iter().map(|f| f.name.clone()).collect();
    for name in &names {
        page.request(&format!(".BR {name} (3),"));
    }
    page.request(".BR qcow2\\-snapshot (1),");
    page.request(".BR qemu\\-img (1)");
    page.0
}

/// The members of a struct, each with its words.
fn members(page: &mut Page, code: &[String]) {
    let mut doc: Vec<String> = Vec::new();
    let mut lines = code.iter().skip(1);
    while let Some(line) = lines.next() {
        let text = line.trim();
        if text == "/**" {
            doc = lines
                .by_ref()
                .take_while(|l| l.trim() != "*/")
                .map(|l| comment_text(l).to_owned())
                .collect();
        } else if !text.starts_with('#') && !text.starts_with('}') && !text.is_empty() {
            let mut member = text.to_owned();
            while !member.ends_with(';') {
                let more = lines.next().expect("a member ends with a semicolon");
                member = format!("{member} {}", more.trim());
            }
            page.request(".TP");
            page.request(&format!(
                "\\fB{}\\fR",
                verbatim(&member.replace("struct ", ""))
            ));
            page.text(&doc.join(" "));
        }
    }
}
