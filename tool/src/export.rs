//! `export`: the disk that a snapshot holds, as a file or on the standard output.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use clap::ArgMatches;
use qcow2_snapshot::{Error, Image, OpenFlags};
use tempfile::NamedTempFile;

use crate::output::{Kind, Output, CHUNK, PACKED_CHUNK};
use crate::progress;
use crate::reflink::Reflink;
use crate::signals::Asked;
use crate::stop::{explained, without_number, Stop};
use crate::target::{not_opened, open_words};
use crate::thin;

/// The tables are asked about so much at once, so that Ctrl-C is seen in between.
pub(crate) const STRETCH: u64 = 64 << 30;
pub(crate) const GONE: &str = "Interrupted; nothing is left of the output";

pub(crate) fn run(m: &ArgMatches) -> Result<(), Stop> {
    let given = |id| m.get_one::<OsString>(id).map(OsString::as_os_str);
    let name = given("IMAGE").unwrap_or_default();
    let flags = match m.get_flag("force-share") {
        true => OpenFlags::FORCE_SHARE,
        false => OpenFlags::read_only(),
    };
    let flags = match m.get_flag("no-lock") {
        true => flags | OpenFlags::NO_LOCK,
        false => flags,
    };
    let format = m.get_one::<String>("format").map(String::as_str);
    let (since, all) = (given("since"), given("all"));
    if format == Some("raw") && (since.is_some() || all.is_some()) {
        let text = "--since and --all make qcow2 files: '-O raw' does not go with them";
        return Err(Stop::Usage(text.into()));
    }
    let qcow2 = format == Some("qcow2") || since.is_some();
    let out = given("OUT").unwrap_or_default();
    if qcow2 && out == "-" {
        let text =
            "Only a raw disk can be written to the standard output (a file of that name is './-')";
        return Err(Stop::failed(text));
    }

    let mut image = Image::open(name.as_ref(), flags).map_err(|e| {
        let words = open_words(&e, name.as_ref());
        Stop::Failed(explained(&e, &words, not_opened(name, &words)))
    })?;
    let quiet = m.get_flag("quiet");
    if let Some(folder) = all {
        return thin::all(&mut image, folder.as_ref(), quiet);
    }
    let snapshot = given("SNAPSHOT").unwrap_or_default();
    show(&mut image, snapshot)?;
    if out == "-" {
        return print(&mut image, quiet);
    }
    let backing = match since.zip(given("backing")) {
        None => None,
        Some((since, backing)) => {
            let format = m.get_one::<String>("backing-format");
            let format = format.map(String::as_str).unwrap_or_default();
            Some(thin::Backing::of(
                &mut image, name, since, out, backing, format,
            )?)
        }
    };
    // From here on a signal ends the work between two requests.
    let asked = Asked::watch()?;
    new_file(out.as_ref(), &asked, |file| match qcow2 {
        true => thin::write(&mut image, snapshot, backing.as_ref(), file, &asked, quiet),
        false => {
            let shared = match m.get_flag("no-reflink") {
                true => None,
                false => Reflink::to(file, folder_of(out.as_ref())),
            };
            file.set_len(image.length())?;
            let out = Output::new(file.try_clone()?, Kind::Sparse)?;
            copy(&mut image, out, Kind::Sparse, shared, &asked, quiet)
        }
    })
}

/// What ends an export before its end.
pub(crate) enum Halt {
    /// The output cannot be written.
    Output(io::Error),
    Other(Stop),
}

impl From<io::Error> for Halt {
    fn from(e: io::Error) -> Halt {
        Halt::Output(e)
    }
}

impl From<Stop> for Halt {
    fn from(stop: Stop) -> Halt {
        Halt::Other(stop)
    }
}

impl From<Error> for Halt {
    /// Reading has failed.
    fn from(e: Error) -> Halt {
        Halt::Other(explain(&e, "Could not read the snapshot"))
    }
}

impl Halt {
    /// As it is said of an output of this name.
    pub(crate) fn of(self, out: &Path) -> Stop {
        match self {
            Halt::Other(stop) => stop,
            Halt::Output(e) => Stop::failed(format!(
                "Could not write '{}': {}",
                out.display(),
                without_number(&e)
            )),
        }
    }
}

/// A failure of the library, in one line if it is not damage.
fn explain(e: &Error, what: &str) -> Stop {
    let sentence = e.to_string();
    let line = format!("{what}: {sentence}");
    Stop::Failed(explained(e, &sentence, line.into()))
}

/// Let the image show the snapshot with this ID, else with this name, as with `-a`.
pub(crate) fn show(image: &mut Image, snapshot: &OsStr) -> Result<(), Stop> {
    let wanted = Some(snapshot.as_bytes());
    let shown = match image.snapshot_load_tmp(wanted, None) {
        Err(Error::NotFound(_)) => image.snapshot_load_tmp(None, wanted),
        other => other,
    };
    shown.map_err(|e| {
        let name = snapshot.to_string_lossy();
        explain(&e, &format!("Could not export snapshot '{name}'"))
    })
}

/// The folder that a file is to be made in.
pub(crate) fn folder_of(out: &Path) -> &Path {
    match out.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Make a new file. It gets its name when it is complete; until then, and whatever goes wrong, there
/// is at most a temporary file beside it, which is removed.
fn new_file(
    out: &Path,
    asked: &Asked,
    write: impl FnOnce(&File) -> Result<(), Halt>,
) -> Result<(), Stop> {
    let made = || -> Result<(), Halt> {
        if out.symlink_metadata().is_ok() {
            return Err(io::Error::from_raw_os_error(libc::EEXIST).into());
        }
        let file = tempfile::Builder::new()
            .prefix(".qcow2-snapshot-")
            .suffix(".partial")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder_of(out))?;
        write(file.as_file())?;
        file.as_file().sync_all()?;
        asked.check(GONE)?;
        Ok(give_name(file, out)?)
    };
    made().map_err(|halt| halt.of(out))
}

/// Nobody else's file is replaced, and after a power cut there is the whole file or none.
fn give_name(file: NamedTempFile, out: &Path) -> io::Result<()> {
    match file.persist_noclobber(out) {
        Ok(_) => {}
        Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => return Err(e.error),
        Err(e) => replace_own(e.file, out)?,
    }
    keep_names(folder_of(out))
}

/// Where the file system can neither link nor rename without replacing: first a file is made that was not
/// there, and that one is replaced.
fn replace_own(file: NamedTempFile, out: &Path) -> io::Result<()> {
    File::create_new(out)?;
    file.persist(out).map(|_| ()).map_err(|e| {
        // Our own empty one; the error that matters is the first.
        let _ = std::fs::remove_file(out);
        e.error
    })
}

/// A file is stable when its name is: who deletes a snapshot that was exported must not lose both. A folder that
/// may not be read, or that cannot be synced at all, is left to the file system.
pub(crate) fn keep_names(folder: &Path) -> io::Result<()> {
    match File::open(folder).and_then(|f| f.sync_all()) {
        Err(e) if e.raw_os_error() == Some(libc::EIO) => Err(e),
        _ => Ok(()),
    }
}

/// Write the disk now seen to the standard output, zeros and all.
fn print(image: &mut Image, quiet: bool) -> Result<(), Stop> {
    if io::stdout().is_terminal() {
        return Err(Stop::failed("Could not write the output: it is a terminal"));
    }
    let asked = Asked::watch()?;
    let mut printed = || -> Result<(), Halt> {
        // Without the buffer, which looks for the ends of lines.
        let out = io::stdout().as_fd().try_clone_to_owned()?;
        let out = Output::new(File::from(out), Kind::Stream)?;
        copy(image, out, Kind::Stream, None, &asked, quiet)
    };
    printed().map_err(|halt| match halt {
        Halt::Other(stop) => stop,
        Halt::Output(e) => {
            let text = format!("Could not write the output: {}", without_number(&e));
            Stop::failed(text)
        }
    })
}

fn copy(
    image: &mut Image,
    mut out: Output,
    kind: Kind,
    shared: Option<Reflink>,
    asked: &Asked,
    quiet: bool,
) -> Result<(), Halt> {
    let length = image.length();
    let interrupted = match kind {
        Kind::Sparse => GONE,
        Kind::Stream => "Interrupted; the output is not complete",
    };
    let bar = progress::bytes(length, quiet);
    let mut at = 0;
    while at < length {
        asked.check(interrupted)?;
        // Data or zeros, as far as the image's tables say.
        let status = image.block_status(at, STRETCH)?;
        let end = (at + status.length.max(1)).min(length);
        if let (Kind::Sparse, true) = (kind, status.zero) {
            at = end;
        } else if let Some(shared) = &shared {
            at += shared.share(image, &status);
        }
        while at < end {
            asked.check(interrupted)?;
            bar.set_position(at);
            let most = match status.compressed {
                true => PACKED_CHUNK,
                false => CHUNK,
            };
            let n = (end - at).min(most as u64);
            let mut buffer = out.buffer();
            buffer.resize(n as usize, 0);
            match status.zero {
                true => buffer.fill(0),
                false => image.read(at, &mut buffer)?,
            }
            out.write(at, buffer)?;
            at += n;
        }
    }
    Ok(out.finish()?)
}
