//! `qcow2-snapshot`: what `qemu-img snapshot` does, by the library instead of QEMU.
//!
//! ```text
//!   main ── link        started as `qemu-img`: which calls are ours, who gets the others
//!    │
//!    ├── getopt ── cli  the options; getopt's words for what is wrong with them
//!    ├── target         which file is meant, and what is in it
//!    ├── actions        list, create, apply, delete: QEMU's messages
//!    │    └── listing   the table and its JSON form
//!    ├── delete, du     many snapshots: which (select), what they hold, what goes
//!    ├── revert, rename
//!    ├── export         a snapshot's disk as a file
//!    │    ├── thin      what of it goes into a qcow2 file: all, what changed, every snapshot
//!    │    ├── qcow2     a new qcow2 file, from its first cluster to its last
//!    │    ├── reflink   blocks shared with the image instead of copied
//!    │    └── output    the file that is written, by a thread of its own
//!    ├── check          check and repair
//!    ├── diff           what changed between two snapshots
//!    ├── flatten        let go of the backing file
//!    ├── complete       what the completion scripts of the shells ask for
//!    └── signals        Ctrl-C: what can be broken off, is
//! ```

#![forbid(unsafe_code)]

mod actions;
mod check;
mod cli;
mod complete;
mod delete;
mod diff;
mod du;
mod export;
mod flatten;
mod getopt;
mod link;
mod listing;
#[cfg(test)]
mod manual;
mod output;
mod progress;
mod qcow2;
mod reflink;
mod rename;
mod revert;
mod select;
mod signals;
mod stop;
mod target;
mod thin;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use cli::{Action, Request};
use stop::Stop;

fn main() -> ExitCode {
    signals::outlive_the_file_size_limit();
    let mut args = std::env::args_os();
    let called = args.next().unwrap_or_else(|| cli::NAME.into());
    let args: Vec<OsString> = args.collect();
    if link::is_name(&called) {
        return link::run(&called, &args);
    }
    let usage = format!("{} --help", cli::NAME);
    report(cli::NAME, &usage, run(&args))
}

/// The tool under its own name.
fn run(args: &[OsString]) -> Result<(), Stop> {
    let word = args.first().and_then(|a| a.to_str()).unwrap_or_default();
    // In qemu-img's place the first word may also be an image with such a name.
    let alone = args.len() == 1 && Path::new(word).exists();
    if cli::SUBCOMMANDS.contains(&word) && !alone {
        return subcommand(args);
    }
    if word == complete::WORD && args.len() > 1 {
        return complete::run(args.get(1..).unwrap_or_default());
    }
    let command = cli::command();
    getopt::parse(command, args, cli::NAME)
        .and_then(|matches| actions::run(&cli::Request::new(&matches), false))
        .map_err(|stop| match (&stop, meant(word)) {
            (Stop::Usage(_) | Stop::NotServed(_), Some(hint)) => Stop::Usage(hint),
            _ => stop,
        })
}

/// What somebody may have meant by a first word that is neither an image nor a subcommand.
fn meant(word: &str) -> Option<String> {
    let instead = match word {
        "ls" => "list IMAGE",
        "apply" | "goto" => "revert IMAGE SNAPSHOT",
        "remove" | "rm" => "delete IMAGE SNAPSHOT",
        // As in "qemu-img snapshot -l FILE".
        "snapshot" => "-l|-c|-a|-d ... FILE",
        _ => return None,
    };
    let hint = format!(
        "'{word}' is not a subcommand; use '{} {instead}'",
        cli::NAME
    );
    (!Path::new(word).exists()).then_some(hint)
}

/// Words that `qemu-img snapshot` does not have, so clap's own messages are good.
fn subcommand(args: &[OsString]) -> Result<(), Stop> {
    let name = OsString::from(cli::NAME);
    let words = std::iter::once(&name).chain(args);
    let matches = cli::command().try_get_matches_from(words)?;
    match matches.subcommand() {
        Some(("list", m)) => actions::run(&Request::of(m, Action::List), false),
        Some(("create", m)) => {
            let name = m.get_one::<OsString>("NAME").map_or(OsStr::new(""), |n| n);
            actions::run(&Request::of(m, Action::Create(name)), false)
        }
        Some(("revert", m)) => revert::run(m),
        Some(("delete", m)) => delete::run(m),
        Some(("rename", m)) => rename::run(m),
        Some(("du", m)) => du::run(m),
        Some(("export", m)) => export::run(m),
        Some(("check", m)) => check::run(m),
        Some(("diff", m)) => diff::run(m),
        Some(("flatten", m)) => flatten::run(m),
        Some(("completions", m)) => stop::print(complete::script(m).as_bytes()),
        _ => Ok(()),
    }
}

/// Say on the standard error what went wrong, in QEMU's form; the exit code is QEMU's.
fn report(prefix: &str, help: &str, result: Result<(), Stop>) -> ExitCode {
    let more = format!("Try '{help}' for more information");
    match result {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Stop::Help(page)) => {
            // Nobody is there to be told when the output is closed.
            let _ = stop::print(page.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(Stop::Options(line)) => {
            // getopt has put the name before it.
            let text = [&line, b"\n".as_slice(), more.as_bytes(), b"\n"].concat();
            let _ = std::io::stderr().write_all(&text);
        }
        Err(Stop::Usage(line)) => {
            let text = format!("{prefix}: {line}\n{more}\n");
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
        Err(Stop::Failed(lines) | Stop::NotServed(lines)) => stop::say(prefix, &lines),
        Err(Stop::Clap(e)) if e.use_stderr() => {
            let text = e.render().to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            let text = format!("{prefix}: {text}");
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
        Err(Stop::Code(code, line)) => {
            if !line.is_empty() {
                stop::say(prefix, &[line.into_bytes()]);
            }
            return ExitCode::from(code);
        }
        Err(Stop::Clap(e)) => {
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
        Err(Stop::Interrupted(signal, line)) => {
            stop::say(prefix, &[line]);
            return ExitCode::from(128 + signal); // as shells say it
        }
    }
    ExitCode::FAILURE
}
