//! `qcow2-snapshot`: what `qemu-img snapshot` does, by the library instead of QEMU.
//!
//! ```text
//!   main ── link        started as `qemu-img`: which calls are ours, who gets the others
//!    │
//!    ├── getopt ── cli  the options; getopt's words for what is wrong with them
//!    ├── target         which file is meant, and what is in it
//!    ├── actions        list, create, apply, delete: QEMU's messages
//!    │    └── listing   the table and its JSON form
//!    ├── export         a snapshot's disk as a raw file
//!    ├── check          check and repair
//!    └── signals        Ctrl-C: what can be broken off, is
//! ```

mod actions;
mod check;
mod cli;
mod export;
mod getopt;
mod link;
mod listing;
#[cfg(test)]
mod manual;
mod progress;
mod signals;
mod stop;
mod target;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use stop::Stop;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let called = args.next().unwrap_or_else(|| cli::NAME.into());
    let args: Vec<OsString> = args.collect();
    if Path::new(&called).file_name() == Some(OsStr::new(link::NAME)) {
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
    let command = cli::command();
    let matches = getopt::parse(command, args, cli::NAME)?;
    actions::run(&cli::Request::new(&matches), false)
}

/// `export` and `completions`: nothing that QEMU has, so clap's own words are good.
fn subcommand(args: &[OsString]) -> Result<(), Stop> {
    let name = OsString::from(cli::NAME);
    let words = std::iter::once(&name).chain(args);
    let matches = cli::command().try_get_matches_from(words)?;
    match matches.subcommand() {
        Some(("export", m)) => export::run(m),
        Some(("check", m)) => check::run(m),
        Some(("completions", m)) => {
            let shell = m.get_one::<clap_complete::Shell>("SHELL").copied();
            let mut script = Vec::new();
            if let Some(shell) = shell {
                clap_complete::generate(shell, &mut cli::command(), cli::NAME, &mut script);
            }
            stop::print(&script)
        }
        _ => Ok(()),
    }
}

/// Say on the standard error what went wrong, in QEMU's form; the exit code is QEMU's.
fn report(prefix: &str, help: &str, result: Result<(), Stop>) -> ExitCode {
    let mut text = Vec::new();
    let code = match result {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Stop::Help(page)) => {
            // Nobody is there to be told when the output is closed.
            let _ = stop::print(page.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(Stop::Options(line)) => {
            text.extend_from_slice(&line);
            text.extend_from_slice(format!("\nTry '{help}' for more information\n").as_bytes());
            1
        }
        Err(Stop::Usage(line)) => {
            text = [prefix.as_bytes(), b": ", line.as_bytes()].concat();
            text.extend_from_slice(format!("\nTry '{help}' for more information\n").as_bytes());
            1
        }
        Err(Stop::Failed(lines)) => {
            for line in lines {
                text.extend_from_slice(&[prefix.as_bytes(), b": ", &line, b"\n"].concat());
            }
            1
        }
        Err(Stop::NotServed(line)) => {
            text = [prefix.as_bytes(), b": ", &line, b"\n"].concat();
            1
        }
        Err(Stop::Code(code, line)) => {
            if !line.is_empty() {
                text = [prefix.as_bytes(), b": ", line.as_bytes(), b"\n"].concat();
            }
            i32::from(code)
        }
        Err(Stop::Clap(e)) => {
            let _ = e.print();
            i32::from(e.use_stderr())
        }
        Err(Stop::Interrupted(signal, line)) => {
            text = [prefix.as_bytes(), b": ", &line, b"\n"].concat();
            128 + i32::from(signal) // as shells say it
        }
    };
    // One write, so that messages of programs that run side by side do not mix.
    let _ = std::io::stderr().write_all(&text);
    ExitCode::from(code as u8)
}
