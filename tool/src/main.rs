//! `qcow2-snapshot`: what `qemu-img snapshot` does, by the library instead of QEMU.
//!
//! ```text
//!   main ── link        started as `qemu-img`: which calls are ours, who gets the others
//!    │
//!    ├── getopt ── cli  the options; getopt's words for what is wrong with them
//!    ├── target         which file is meant, and what is in it
//!    ├── actions        list, create, apply, delete: QEMU's messages
//!    │    └── listing   the table and its JSON form
//!    ├── export         a snapshot's disk as a file
//!    │    ├── thin      what of it goes into a qcow2 file: all, what changed, every snapshot
//!    │    ├── qcow2     a new qcow2 file, from its first cluster to its last
//!    │    ├── reflink   blocks shared with the image instead of copied
//!    │    └── output    the file that is written, by a thread of its own
//!    ├── diff           what changed between two snapshots
//!    ├── complete       what the completion scripts of the shells ask for
//!    └── signals        Ctrl-C: what can be broken off, is
//! ```

#![forbid(unsafe_code)]

mod actions;
mod cli;
mod complete;
mod diff;
mod export;
mod getopt;
mod link;
mod listing;
#[cfg(test)]
mod manual;
mod output;
mod progress;
mod qcow2;
mod reflink;
mod signals;
mod stop;
mod target;
mod thin;

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

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
        "list" | "ls" => "-l FILE",
        "create" => "-c SNAPSHOT FILE",
        "apply" | "revert" | "goto" => "-a SNAPSHOT FILE",
        "delete" | "remove" | "rm" => "-d SNAPSHOT FILE",
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

/// `export`, `diff` and `completions`: nothing that QEMU has, so clap's own words are good.
fn subcommand(args: &[OsString]) -> Result<(), Stop> {
    let name = OsString::from(cli::NAME);
    let words = std::iter::once(&name).chain(args);
    let matches = cli::command().try_get_matches_from(words)?;
    match matches.subcommand() {
        Some(("export", m)) => export::run(m),
        Some(("diff", m)) => diff::run(m),
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
