//! Started under the name `qemu-img`: `snapshot` is served here, and everything else by the next
//! `qemu-img` in PATH, or by the one that dpkg-divert(1) has put aside.

use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::stop::{without_number, Stop};
use crate::{actions, cli, getopt};

/// The name that is stood in for.
pub(crate) const NAME: &str = "qemu-img";

/// CloudStack looks for this name first.
const CLOUD: &str = "cloud-qemu-img";

/// What dpkg-divert calls the real one, where the link has its name in its folder.
const DIVERTED: &str = "qemu-img.distrib";

/// Is this one of the names under which the program stands in for qemu-img?
pub(crate) fn is_name(called: &OsStr) -> bool {
    let name = Path::new(called).file_name();
    [NAME, CLOUD].iter().any(|n| name == Some(OsStr::new(n)))
}

/// The files that had this call already, as `device:inode` with blanks between: several copies of this
/// program, or scripts that call `qemu-img` again, must not send it around in a circle.
const PASSED: &str = "QCOW2_SNAPSHOT_PASSED";

/// Serve the call or pass it on.
pub(crate) fn run(called: &OsStr, args: &[OsString]) -> ExitCode {
    let who = format!("{} snapshot", called.to_string_lossy());
    let result = match args.split_first() {
        Some((word, rest)) if word == "snapshot" => serve(&who, rest),
        _ => Err(Stop::not_served(
            "Only 'snapshot' is served here, and there is no other qemu-img in PATH",
        )),
    };
    let result = match result {
        Err(Stop::NotServed(why)) => pass_on(called, args, why),
        other => other,
    };
    crate::report(NAME, &format!("{who} --help"), result)
}

fn serve(who: &str, args: &[OsString]) -> Result<(), Stop> {
    let matches = getopt::parse(cli::link_command(), args, who)?;
    actions::run(&cli::Request::new(&matches), true)
}

/// Become the next `qemu-img`. Comes back only when that does not work.
fn pass_on(called: &OsStr, args: &[OsString], why: Vec<Vec<u8>>) -> Result<(), Stop> {
    let before = std::env::var(PASSED).unwrap_or_default();
    let mut passed: Vec<String> = before.split(' ').map(str::to_owned).collect();
    if let Ok(own) = std::fs::metadata("/proc/self/exe") {
        passed.push(identity(&own));
    }
    let own_name = Path::new(called).file_name();
    let names = own_name.into_iter();
    let mut names = names.chain([OsStr::new(NAME), OsStr::new(DIVERTED)]);
    let next = names.find_map(|name| next_in_path(name, &passed));
    let Some((next, id)) = next else {
        return Err(Stop::NotServed(why));
    };
    passed.push(id);
    let error = Command::new(&next)
        .arg0(called)
        .args(args)
        .env(PASSED, passed.join(" ").trim())
        .exec();
    Err(Stop::failed(format!(
        "Could not run '{}': {}",
        next.display(),
        without_number(&error)
    )))
}

/// The first program of this name that has not had the call yet. Only in absolute folders: an empty
/// or relative part of PATH would run what somebody has put into the current folder.
fn next_in_path(name: &OsStr, passed: &[String]) -> Option<(PathBuf, String)> {
    let path = std::env::var_os("PATH")?;
    let mut folders = std::env::split_paths(&path).filter(|folder| folder.is_absolute());
    folders.find_map(|folder| {
        let file = folder.join(name);
        let found = std::fs::metadata(&file).ok()?;
        let id = identity(&found);
        let runs = found.is_file() && found.permissions().mode() & 0o111 != 0;
        (runs && !passed.contains(&id)).then_some((file, id))
    })
}

fn identity(file: &Metadata) -> String {
    format!("{}:{}", file.dev(), file.ino())
}
