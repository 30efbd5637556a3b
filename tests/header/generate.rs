//! Makes the C header from `src/capi`, by cbindgen. It is committed in include/, so that who builds
//! the library needs no cbindgen: `tests/header.rs` compares the two, `make header` writes it.

use super::toolbox::root;
use std::fs;
use std::path::Path;

/// The sources of the header, in the order in which it presents them.
const SOURCES: [&str; 13] = [
    "src/capi/types.rs",
    "src/capi/guard.rs",
    "src/capi/open.rs",
    "src/capi/verbs.rs",
    "src/capi/changes.rs",
    "src/capi/space.rs",
    "src/capi/flatten.rs",
    "src/capi/progress.rs",
    "src/capi/check.rs",
    "src/capi/layout.rs",
    "src/capi/error.rs",
    "src/capi/last.rs",
    "src/capi/api.rs",
];

/// The header as it is to be.
pub fn header() -> String {
    let root = root();
    let mut config =
        cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml is valid");
    config.header = config
        .header
        .map(|text| with_example(&text, &root.join("examples/list.c")));
    config.after_includes = Some(version_macros());
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in SOURCES {
        builder = builder.with_src(root.join(file));
    }
    let mut text = Vec::new();
    builder
        .generate()
        .expect("cbindgen understands src/capi")
        .write(&mut text);
    let text = String::from_utf8(text).expect("cbindgen writes UTF-8");
    // cbindgen puts the semicolon of a conditional member behind the #endif, which leaves a
    // stray one where the member is left out: not C99.
    let text = text.replace("\n#endif\n    ;\n", ";\n#endif\n");
    let lines: Vec<String> = text
        .lines()
        .map(|line| for_c89(&flag_in_hex(line)) + "\n")
        .collect();
    guard_prototypes(&with_sections(lines).concat())
}

/// The parts of the header: what the first declaration of each begins with, and its title.
const SECTIONS: &[(&str, &str)] = &[
    ("#define QCOW2_O_RDWR ", "Flags of the opens"),
    (
        "#define QCOW2_BLOCK_DATA ",
        "What a run of bytes is made of",
    ),
    (
        "#define QCOW2_OUTCOME_NONE ",
        "What a verb did to the image",
    ),
    ("#define QCOW2_PROGRESS_CHECK ", "Stages of a verb"),
    ("#define QCOW2_CHANGED_SIZE ", "What a verb changed"),
    ("typedef struct Qcow2Error ", "Types"),
    ("const char *qcow2_version(", "Version"),
    ("int qcow2_open(", "Opening and closing"),
    ("int qcow2_read_snapshots(", "Snapshots: QEMU's functions"),
    ("int64_t qcow2_getlength(", "Reading disks and VM state"),
    (
        "int qcow2_snapshot_next_change(",
        "What changed between two states",
    ),
    (
        "int qcow2_snapshot_usage(",
        "What snapshots hold; many at once",
    ),
    ("int qcow2_flatten(", "Letting go of the backing file"),
    ("int qcow2_set_progress(", "Progress"),
    (
        "int qcow2_snapshot_layout(",
        "Embedding: where the tables are",
    ),
    ("const char *qcow2_error_get_pretty(", "Errors and outcomes"),
    (
        "const struct Qcow2Api *qcow2_api(",
        "All functions in one table",
    ),
];

/// A comment before the documentation of the first declaration of each part.
fn with_sections(mut lines: Vec<String>) -> Vec<String> {
    for (start, title) in SECTIONS {
        let declared = lines
            .iter()
            .position(|line| line.starts_with(start))
            .unwrap_or_else(|| panic!("the header has no {start:?}, which begins a section"));
        let documented = lines[..declared].iter().rposition(|line| line == "/**\n");
        let rule = format!("/* ---- {title} ");
        lines.insert(
            documented.expect("every declaration is documented"),
            format!("{rule:-<89} */\n\n"),
        );
    }
    lines
}

/// Functions can be left out: for a program whose own have the same names.
fn guard_prototypes(text: &str) -> String {
    let (begin, end) = (
        "extern \"C\" {\n#endif /* __cplusplus */\n",
        "#ifdef __cplusplus\n} /* extern \"C\" */",
    );
    let guarded = format!("{begin}\n#ifndef QCOW2_SNAPSHOT_NO_PROTOTYPES\n");
    assert!(text.contains(begin) && text.contains(end), "C++ guards");
    text.replace(begin, &guarded).replace(
        end,
        &format!("#endif /* QCOW2_SNAPSHOT_NO_PROTOTYPES */\n\n{end}"),
    )
}

/// cbindgen ends its C++ guards with "// ...", which is not C before C99.
fn for_c89(line: &str) -> String {
    match line.split_once("// ") {
        Some((code, words)) if line.starts_with(['#', '}']) => {
            format!("{} /* {words} */", code.trim_end())
        }
        _ => line.to_owned(),
    }
}

/// The example in the opening comment is a program that the tests compile and run.
fn with_example(text: &str, example: &Path) -> String {
    let program = fs::read_to_string(example).expect("examples/list.c is there");
    let program: Vec<&str> = program.lines().collect();
    text.replace("@EXAMPLE@", &program.join("\n *     "))
        .replace("\n *     \n", "\n *\n")
}

fn version_macros() -> String {
    format!(
        "/**\n \
          * The version of this header. Compare qcow2_version(), the one of the library.\n \
          */\n\
         #define QCOW2_SNAPSHOT_VERSION_MAJOR {}\n\
         #define QCOW2_SNAPSHOT_VERSION_MINOR {}\n\
         #define QCOW2_SNAPSHOT_VERSION_PATCH {}\n\
         #define QCOW2_SNAPSHOT_VERSION \"{}\"",
        env!("CARGO_PKG_VERSION_MAJOR"),
        env!("CARGO_PKG_VERSION_MINOR"),
        env!("CARGO_PKG_VERSION_PATCH"),
        env!("CARGO_PKG_VERSION"),
    )
}

/// cbindgen writes every constant in decimal, which nobody can read in a bit mask.
fn flag_in_hex(line: &str) -> String {
    for (prefix, width) in [
        ("#define QCOW2_O_", 10),
        ("#define QCOW2_BLOCK_", 4),
        ("#define QCOW2_CHANGED_", 3),
        ("#define QCOW2_CHANGE_", 3),
    ] {
        let flag = line
            .strip_prefix(prefix)
            .and_then(|rest| rest.split_once(' '))
            .and_then(|(name, value)| Some((name, value.parse::<u32>().ok()?)));
        if let Some((name, value)) = flag {
            return format!("{prefix}{name} {value:#0width$x}");
        }
    }
    line.to_owned()
}
