//! What could stand at the cursor. The scripts in `completions/` ask for it, so that there is one
//! answer for all shells, and so that it can name the snapshots of an image.
//!
//! A script calls `qcow2-snapshot __complete SHELL INDEX WORD...`: the words of the command line, the
//! program first, and the index of the one at the cursor. The answer's first line is `words`, or `files`, a tab
//! and how the files' names begin. One line for each candidate follows, with a tab and a few words about it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::{Arg, ArgMatches, Command, ValueHint};
use qcow2_snapshot::{OpenFlags, Snapshot};

use crate::cli::{self, Request};
use crate::stop::{print, Stop};
use crate::target::{Opened, Target};
use crate::{getopt, listing};

/// The first word of such a call.
pub(crate) const WORD: &str = "__complete";

/// The script for a shell.
pub(crate) fn script(m: &ArgMatches) -> &'static str {
    match m.get_one::<String>("SHELL").map(String::as_str) {
        Some("zsh") => include_str!("../completions/zsh"),
        Some("fish") => include_str!("../completions/fish"),
        _ => include_str!("../completions/bash"),
    }
}

/// Answer. A call that makes no sense has no candidates; a shell shows no errors here.
pub(crate) fn run(args: &[OsString]) -> Result<(), Stop> {
    let bytes: Vec<Vec<u8>> = args.iter().map(|a| a.as_bytes().to_vec()).collect();
    let [shell, index, words @ ..] = bytes.as_slice() else {
        return Ok(());
    };
    let index = std::str::from_utf8(index).ok().and_then(|i| i.parse().ok());
    let Some(index) = index.filter(|i| (1..words.len()).contains(i)) else {
        return Ok(());
    };
    let line = match shell.as_slice() {
        b"bash" => Line::of_bash(words, index),
        b"fish" => Line::of_fish(words, index),
        _ => Line::new(words, index),
    };
    print(&line.answer())
}

/// A command line.
struct Line {
    before: Vec<Vec<u8>>,
    current: Vec<u8>,
    after: Vec<Vec<u8>>,
    /// So much of the current word stays as it is.
    kept: usize,
    /// Candidates need quotes as bash has them; the quote that is open.
    bash: Option<Option<u8>>,
}

/// How far the options and operands before the cursor have come.
#[derive(Default)]
struct Walk<'a> {
    /// An option that wants a value.
    pending: Option<&'a Arg>,
    /// "--" was there.
    ended: bool,
    image_opts: bool,
    operands: Vec<&'a [u8]>,
}

impl Line {
    fn new(words: &[Vec<u8>], index: usize) -> Line {
        let (before, rest) = words.split_at(index);
        let (current, after) = rest.split_first().unzip();
        Line {
            before: before.to_vec(),
            current: current.cloned().unwrap_or_default(),
            after: after.unwrap_or_default().to_vec(),
            kept: 0,
            bash: None,
        }
    }

    /// fish gives the word at the cursor as it was typed.
    fn of_fish(words: &[Vec<u8>], index: usize) -> Line {
        let mut line = Line::new(words, index);
        (line.current, _) = unquoted(&line.current);
        line
    }

    /// bash gives words as they were typed, and takes `=` and `:` for words of their own.
    fn of_bash(words: &[Vec<u8>], index: usize) -> Line {
        let breaks = |w: &[u8]| !w.is_empty() && w.iter().all(|b| matches!(b, b'=' | b':'));
        let (mut whole, mut at): (Vec<Vec<u8>>, usize) = (Vec::new(), 0);
        let (mut kept, mut quote, mut broken) = (0, None, false);
        for (i, word) in words.iter().enumerate() {
            let (plain, open) = unquoted(word);
            let is_break = breaks(word);
            let glued = (broken || is_break) && whole.len() > 1;
            if !glued {
                whole.push(Vec::new());
            }
            let last = whole.len() - 1;
            if let Some(word) = whole.last_mut() {
                if i == index {
                    (at, quote) = (last, open);
                    kept = word.len() + if is_break { plain.len() } else { 0 };
                }
                // What follows the cursor's word is no part of it.
                if !(glued && i > index && last == at) {
                    word.extend_from_slice(&plain);
                }
            }
            broken = is_break;
        }
        let mut line = Line::new(&whole, at);
        (line.kept, line.bash) = (kept, Some(quote));
        line
    }

    fn answer(&self) -> Vec<u8> {
        let mut command = cli::command();
        let subcommand = self.before.get(1).and_then(|w| std::str::from_utf8(w).ok());
        let (top, first) = match subcommand.and_then(|w| command.find_subcommand(w)) {
            Some(sub) => {
                command = sub.clone();
                (false, 2)
            }
            None => (true, 1),
        };
        let mut walk = Walk::default();
        walk.over(&command, self.before.get(first..).unwrap_or_default());
        let (pending, ended, nth) = (walk.pending.take(), walk.ended, walk.operands.len());
        walk.over(&command, &self.after);

        let mut files = false;
        let mut found: Vec<(Vec<u8>, String)> = Vec::new();
        let mut long_value = None;
        if let (Some(at), false, None) =
            (self.current.iter().position(|b| *b == b'='), ended, pending)
        {
            let (name, _) = self.current.split_at(at);
            let arg = name.strip_prefix(b"--").and_then(|n| long(&command, n));
            long_value = arg.map(|arg| (arg, at + 1));
        }
        if let Some((arg, kept)) = long_value {
            let head = self.current.get(..kept).unwrap_or_default();
            values(arg, &walk, &mut found);
            found
                .iter_mut()
                .for_each(|(word, _)| *word = [head, word].concat());
        } else if let Some(arg) = pending {
            files = values(arg, &walk, &mut found);
        } else if self.current.starts_with(b"-") && !ended {
            options(&command, &mut found);
        } else if let Some(arg) = operand(&command, nth) {
            if top && self.before.len() == 1 {
                found.extend(command.get_subcommands().map(|s| {
                    let about = s.get_about().map(ToString::to_string);
                    (s.get_name().into(), about.unwrap_or_default())
                }));
            }
            files = values(arg, &walk, &mut found);
        }

        let rest = self.current.get(self.kept..).unwrap_or_default();
        let mut out = match files {
            true => [b"files\t", rest, b"\n"].concat(),
            false => b"words\n".to_vec(),
        };
        for (word, about) in found {
            let control = std::str::from_utf8(&word).is_ok_and(|w| w.contains(char::is_control));
            if !word.starts_with(&self.current) || control {
                continue;
            }
            let word = word.get(self.kept..).unwrap_or_default();
            match self.bash {
                Some(open) => out.extend(quoted(word, open)),
                None => out.extend_from_slice(word),
            }
            out.extend_from_slice(format!("\t{about}\n").as_bytes());
        }
        out
    }
}

impl<'a> Walk<'a> {
    fn over(&mut self, command: &'a Command, words: &'a [Vec<u8>]) {
        for word in words {
            if self.pending.take().is_some() {
                continue;
            }
            match word.as_slice() {
                word if self.ended || word == b"-" || !word.starts_with(b"-") => {
                    self.operands.push(word);
                }
                b"--" => self.ended = true,
                word => match word.strip_prefix(b"--") {
                    Some(name) => self.long(command, name),
                    None => self.short(command, word.get(1..).unwrap_or_default()),
                },
            }
        }
    }

    fn long(&mut self, command: &'a Command, word: &[u8]) {
        let name = word.split(|b| *b == b'=').next().unwrap_or_default();
        let Some(arg) = long(command, name) else {
            return;
        };
        self.image_opts |= arg.get_id() == "image-opts";
        if arg.get_action().takes_values() && !word.contains(&b'=') {
            self.pending = Some(arg);
        }
    }

    fn short(&mut self, command: &'a Command, mut cluster: &[u8]) {
        while let Some((&c, after)) = cluster.split_first() {
            cluster = after;
            let is = |a: &&Arg| a.get_short() == Some(char::from(c));
            let arg = command.get_opts().find(is);
            if let Some(arg) = arg.filter(|a| a.get_action().takes_values()) {
                // What follows in the same word is the value.
                self.pending = Some(arg).filter(|_| after.is_empty());
                return;
            }
        }
    }
}

/// The operand at this place: the last one may stand for many.
fn operand(command: &Command, nth: usize) -> Option<&Arg> {
    let many = |arg: &&Arg| matches!(arg.get_action(), clap::ArgAction::Append);
    let mut all = command.get_positionals();
    all.nth(nth)
        .or_else(|| command.get_positionals().last().filter(many))
}

/// The option with this long name, or with one that only it begins with.
fn long<'a>(command: &'a Command, name: &[u8]) -> Option<&'a Arg> {
    let named = |a: &&Arg| a.get_long().map(str::as_bytes) == Some(name);
    let begins = |a: &&Arg| a.get_long().is_some_and(|l| l.as_bytes().starts_with(name));
    let mut short = command.get_arguments().filter(begins);
    command
        .get_arguments()
        .find(named)
        .or_else(|| short.next().filter(|_| short.next().is_none()))
}

fn options(command: &Command, found: &mut Vec<(Vec<u8>, String)>) {
    let about = |a: &Arg| a.get_help().map(ToString::to_string).unwrap_or_default();
    for arg in command.get_arguments() {
        let short = arg.get_short().map(|c| format!("-{c}"));
        let long = arg.get_long().map(|l| format!("--{l}"));
        for word in [short, long].into_iter().flatten() {
            found.push((word.into_bytes(), about(arg)));
        }
    }
}

/// What this option or operand may be. Returns whether that is a file.
fn values(arg: &Arg, walk: &Walk, found: &mut Vec<(Vec<u8>, String)>) -> bool {
    let name = arg.get_value_names().and_then(|n| n.first());
    let name = name.map_or(arg.get_id().as_str(), |n| n.as_str());
    match (name, arg.get_value_hint()) {
        (_, ValueHint::FilePath) => return true,
        ("SNAPSHOT" | "FROM" | "TO", ValueHint::Other) => {
            let list = snapshots(walk).unwrap_or_default();
            // -d looks at names only.
            let by_id = arg.get_id() != "delete";
            for s in list {
                let id = String::from_utf8_lossy(&listing::visible(&s.id)).into_owned();
                match (s.name.is_empty(), by_id) {
                    (false, _) => found.push((s.name, format!("ID {id}"))),
                    (true, true) => found.push((s.id, "no name".into())),
                    (true, false) => {}
                }
            }
        }
        ("FMT", _) => found.extend([
            (b"qcow2".to_vec(), String::new()),
            (b"raw".to_vec(), String::new()),
        ]),
        _ => found.extend(arg.get_possible_values().iter().map(|v| {
            let help = v.get_help().map(ToString::to_string).unwrap_or_default();
            (v.get_name().into(), help)
        })),
    }
    false
}

/// The snapshots of the image that the line names: its first operand.
fn snapshots(walk: &Walk) -> Option<Vec<Snapshot>> {
    let file = OsStr::from_bytes(walk.operands.first()?);
    let mut words = vec![OsString::from("--force-share")];
    if walk.image_opts {
        words.push("--image-opts".into());
    }
    words.extend(["--".into(), with_home(file)]);
    let matches = getopt::parse(cli::command(), &words, cli::NAME).ok()?;
    let target = Target::of(&Request::new(&matches)).ok()?;
    match target.open(file, OpenFlags::read_only()).ok()? {
        Opened::Image(mut image) => Some(image.snapshot_list().ok()?.to_vec()),
        Opened::Other { .. } => None,
    }
}

/// What a shell makes of "~/" before it calls a program.
fn with_home(file: &OsStr) -> OsString {
    match (
        file.as_bytes().strip_prefix(b"~/"),
        std::env::var_os("HOME"),
    ) {
        (Some(rest), Some(mut home)) => {
            home.push("/");
            home.push(OsStr::from_bytes(rest));
            home
        }
        _ => file.to_owned(),
    }
}

/// A word as the program would get it, and the quote that is still open at its end.
fn unquoted(word: &[u8]) -> (Vec<u8>, Option<u8>) {
    let (mut out, mut open) = (Vec::new(), None);
    let mut bytes = word.iter().copied().peekable();
    while let Some(b) = bytes.next() {
        match (b, open) {
            (b'\\', None) => out.extend(bytes.next()),
            (b'\\', Some(b'"')) => {
                let escaped = bytes.next_if(|b| matches!(b, b'"' | b'\\' | b'$' | b'`'));
                out.push(escaped.unwrap_or(b));
            }
            (b'"' | b'\'', None) => open = Some(b),
            (b, Some(quote)) if b == quote => open = None,
            _ => out.push(b),
        }
    }
    (out, open)
}

/// A word as it has to be typed in bash, behind this open quote.
fn quoted(word: &[u8], open: Option<u8>) -> Vec<u8> {
    let needs = |b: u8| match open {
        None => !(b.is_ascii_alphanumeric() || b >= 0x80 || b"_-./:=@%+,".contains(&b)),
        Some(b'"') => b"\"\\$`".contains(&b),
        Some(_) => false,
    };
    let mut out = Vec::new();
    for b in word {
        if needs(*b) {
            out.push(b'\\');
        }
        out.push(*b);
    }
    out
}
