//! `export`: the disk that a snapshot holds, as a sparse raw file.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use clap::ArgMatches;
use qcow2_snapshot::{Error, Image, OpenFlags};

use crate::progress;
use crate::signals::Asked;
use crate::stop::{without_number, Stop};

/// Read at once.
const CHUNK: usize = 2 << 20;
/// Zeros in pieces of this size, aligned, become holes: `qemu-img convert` does the same.
const PIECE: usize = 4096;
/// The tables are asked about so much at once, so that Ctrl-C is seen in between.
const STRETCH: u64 = 64 << 30;
const INTERRUPTED: &str = "Interrupted; nothing is left of the output";
static ZEROS: [u8; CHUNK] = [0; CHUNK];

pub(crate) fn run(m: &ArgMatches) -> Result<(), Stop> {
    let operand = |id| m.get_one::<OsString>(id).map_or(OsStr::new(""), |o| o);
    let (name, snapshot, out) = (operand("IMAGE"), operand("SNAPSHOT"), operand("OUT"));
    let flags = match m.get_flag("force-share") {
        true => OpenFlags::FORCE_SHARE,
        false => OpenFlags::read_only(),
    };
    let flags = match m.get_flag("no-lock") {
        true => flags | OpenFlags::NO_LOCK,
        false => flags,
    };
    let mut image = Image::open(name.as_ref(), flags)
        .map_err(|e| Stop::failed(format!("Could not open '{}': {e}", name.to_string_lossy())))?;
    show(&mut image, snapshot.as_bytes()).map_err(|e| {
        let text = format!(
            "Could not export snapshot '{}': {e}",
            snapshot.to_string_lossy()
        );
        Stop::failed(text)
    })?;
    write(&mut image, out.as_ref(), m.get_flag("quiet"))
}

/// The snapshot with this ID, else with this name, as with `-a`.
fn show(image: &mut Image, wanted: &[u8]) -> qcow2_snapshot::Result<()> {
    match image.snapshot_load_tmp(Some(wanted), None) {
        Err(Error::NotFound(_)) => image.snapshot_load_tmp(None, Some(wanted)),
        other => other,
    }
}

/// Write the disk now seen to a new file. It gets its name when it is complete; until then, and
/// whatever goes wrong, there is at most a temporary file beside it, which is removed.
fn write(image: &mut Image, out: &Path, quiet: bool) -> Result<(), Stop> {
    let failed = |e: &io::Error| {
        let text = format!("Could not write '{}': {}", out.display(), without_number(e));
        Stop::failed(text)
    };
    if out.symlink_metadata().is_ok() {
        return Err(failed(&io::Error::from_raw_os_error(libc::EEXIST)));
    }
    let folder = match out.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    // From here on a signal ends the work between two requests.
    let asked = Asked::watch()?;
    let file = tempfile::Builder::new()
        .prefix(".qcow2-snapshot-")
        .suffix(".partial")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .map_err(|e| failed(&e))?;
    copy(image, file.as_file(), &asked, quiet, &failed)?;
    file.as_file().sync_all().map_err(|e| failed(&e))?;
    asked.check(INTERRUPTED)?;
    file.persist_noclobber(out).map_err(|e| failed(&e.error))?;
    Ok(())
}

fn copy(
    image: &mut Image,
    file: &File,
    asked: &Asked,
    quiet: bool,
    failed: &dyn Fn(&io::Error) -> Stop,
) -> Result<(), Stop> {
    let length = image.length();
    file.set_len(length).map_err(|e| failed(&e))?;
    let bar = progress::bytes(length, quiet);
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    // Everything before this is data, as far as the image's tables say.
    let mut data_end = 0;
    while at < length {
        asked
            .check(INTERRUPTED)
            .inspect_err(|_| bar.finish_and_clear())?;
        if at >= data_end {
            let status = image.block_status(at, STRETCH).map_err(unreadable)?;
            data_end = at + status.length.max(1);
            if status.zero {
                at = data_end.min(length);
                bar.set_position(at);
                continue;
            }
        }
        let n = (data_end.min(length) - at).min(CHUNK as u64) as usize;
        let chunk = buffer.get_mut(..n).unwrap_or_default();
        image.read(at, chunk).map_err(unreadable)?;
        write_data(file, at, chunk).map_err(|e| failed(&e))?;
        at += n as u64;
        bar.set_position(at);
    }
    bar.finish_and_clear();
    Ok(())
}

fn unreadable(e: Error) -> Stop {
    Stop::failed(format!("Could not read the snapshot: {e}"))
}

/// Write what is not zeros; neighbouring pieces go out together.
fn write_data(file: &File, at: u64, chunk: &[u8]) -> io::Result<()> {
    if ZEROS.starts_with(chunk) {
        return Ok(());
    }
    let mut start = 0;
    while start < chunk.len() {
        let rest = chunk.get(start..).unwrap_or_default();
        let zero = |piece: &[u8]| ZEROS.starts_with(piece);
        let empty = rest.chunks(PIECE).take_while(|p| zero(p)).count() * PIECE;
        let rest = rest.get(empty..).unwrap_or_default();
        let full = rest.chunks(PIECE).take_while(|p| !zero(p)).count() * PIECE;
        let data = rest.get(..full.min(rest.len())).unwrap_or_default();
        file.write_all_at(data, at + (start + empty) as u64)?;
        start += empty + full;
    }
    Ok(())
}
