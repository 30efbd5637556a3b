//! What goes into a new qcow2 file: a snapshot's disk, or what of it changed since another snapshot.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use qcow2_snapshot::{Image, OpenFlags, PackedRun, Snapshot};

use crate::export::{folder_of, keep_names, show, Halt, GONE, STRETCH};
use crate::listing;
use crate::output::{is_zero, Kind, Output, CHUNK, PACKED_CHUNK};
use crate::progress;
use crate::qcow2::{Form, NewImage};
use crate::signals::Asked;
use crate::stop::{without_number, Stop};
use crate::target::open_words;

/// What an overlay lies over.
pub(crate) struct Backing<'a> {
    /// The snapshot whose disk it holds.
    since: &'a [u8],
    name: &'a [u8],
    format: &'a str,
    /// Bytes of its disk.
    length: u64,
}

impl<'a> Backing<'a> {
    /// A backing file for the new file `out`, over which the snapshot that `image` shows will lie. It must
    /// be there, and can be neither of the two.
    pub(crate) fn of(
        image: &mut Image,
        image_name: &OsStr,
        since: &'a OsStr,
        out: &OsStr,
        name: &'a OsStr,
        format: &'a str,
    ) -> Result<Backing<'a>, Stop> {
        let size = disk_size(image, since)?;
        let shown = name.to_string_lossy();
        let failed = |text: &str| {
            let line = format!("Could not use the backing file '{shown}': {text}");
            Stop::failed(line)
        };
        let system = |e: io::Error| failed(&without_number(&e));
        let head = name.as_bytes().split(|b| *b == b'/').next();
        if name.is_empty() || head.is_some_and(|h| h.contains(&b':')) {
            return Err(failed(
                "it is not a plain file name (a colon needs './' before it)",
            ));
        }
        // As whoever opens the new file will look for it.
        let folder = folder_of(out.as_ref());
        let path = folder.join(name);
        let in_folder = |p: &Path| {
            let folder = folder_of(p).canonicalize().ok()?;
            Some(folder.join(p.file_name()?))
        };
        if in_folder(&path).is_some_and(|p| in_folder(out.as_ref()) == Some(p)) {
            return Err(failed("it is the output itself"));
        }
        let meta = path.metadata().map_err(system)?;
        if !meta.is_file() {
            return Err(failed("it is not a regular file"));
        }
        let of_image = Path::new(image_name).metadata().map_err(system)?;
        if (meta.dev(), meta.ino()) == (of_image.dev(), of_image.ino()) {
            return Err(failed(
                "it is the image itself, whose disk goes on changing",
            ));
        }
        let length = match format {
            "raw" => meta.len().next_multiple_of(512),
            _ => {
                let mut backing = Image::open(&path, OpenFlags::read_only())
                    .map_err(|e| failed(&open_words(&e, &path)))?;
                let opened = backing.open_backing_files();
                opened.map_err(|e| failed(&e.to_string()))?;
                backing.length()
            }
        };
        if length < size.min(image.length()) {
            let text = format!(
                "its disk has {length} bytes and that of snapshot '{}' {size}",
                since.to_string_lossy()
            );
            return Err(failed(&text));
        }
        Ok(Backing {
            since: since.as_bytes(),
            name: name.as_bytes(),
            format,
            length,
        })
    }
}

/// How long the disk of a snapshot is.
fn disk_size(image: &mut Image, snapshot: &OsStr) -> Result<u64, Stop> {
    let wanted = snapshot.as_bytes();
    let failed = |text: String| {
        let name = snapshot.to_string_lossy();
        Stop::failed(format!("Could not compare with snapshot '{name}': {text}"))
    };
    let list = image.snapshot_list().map_err(|e| failed(e.to_string()))?;
    let found = list.iter().find(|s| s.id == wanted);
    let found = found.or_else(|| list.iter().find(|s| s.name == wanted));
    let found = found.ok_or_else(|| failed("Can't find snapshot".into()))?;
    Ok(found.disk_size & !511)
}

/// Write the snapshot that `image` shows, which has this name, to a new qcow2 file.
pub(crate) fn write(
    image: &mut Image,
    snapshot: &OsStr,
    backing: Option<&Backing>,
    file: &File,
    asked: &Asked,
    quiet: bool,
) -> Result<(), Halt> {
    let size = image.length();
    let form = Form {
        geometry: image.geometry(),
        compression: image.compression(),
        size,
        backing: backing.map(|b| (b.name, b.format)),
    };
    let out = Output::new(file.try_clone()?, Kind::Sparse)?;
    let mut copy = Copy {
        new: NewImage::new(out, &form)?,
        image,
        packed: PackedRun::default(),
        buffer: Vec::new(),
        shows: backing.map_or(0, |b| b.length),
        asked,
    };
    let bar = progress::bytes(size, quiet);
    match backing {
        None => copy.range(0, size, &bar)?,
        Some(backing) => {
            let unit = copy.new.unit();
            // Changes are found from `next` on; everything before `done` is written.
            let (mut next, mut done) = (0, 0);
            let (from, to) = (Some(backing.since), Some(snapshot.as_bytes()));
            while next < size {
                asked.check(GONE)?;
                let found = copy
                    .image
                    .snapshot_next_change(from, to, next, STRETCH, false);
                let Some(change) = found? else {
                    next = next.saturating_add(STRETCH);
                    continue;
                };
                next = change.start + change.length;
                let start = (change.start / unit * unit).max(done);
                done = next.next_multiple_of(unit);
                copy.range(start, done.min(size), &bar)?;
            }
        }
    }
    let length = copy.new.finish()?;
    Ok(file.set_len(length)?)
}

/// From an image to a new one.
struct Copy<'a> {
    image: &'a mut Image,
    new: NewImage,
    packed: PackedRun,
    buffer: Vec<u8>,
    /// The backing file shows something up to here, which zeros must hide.
    shows: u64,
    asked: &'a Asked,
}

impl Copy<'_> {
    /// What stands from `at`, where a unit begins, to `end`, where one or the disk ends.
    fn range(&mut self, mut at: u64, end: u64, bar: &indicatif::ProgressBar) -> Result<(), Halt> {
        let unit = self.new.unit();
        while at < end {
            self.asked.check(GONE)?;
            bar.set_position(at);
            let status = self.image.block_status(at, (end - at).min(STRETCH))?;
            let mut stop = at + status.length.max(1);
            let whole = match stop {
                _ if stop >= end => end,
                _ => stop / unit * unit,
            };
            if status.zero && whole > at {
                self.zeros(at, whole)?;
                at = whole;
                continue;
            }
            while at < stop {
                self.asked.check(GONE)?;
                bar.set_position(at);
                let mut most = (CHUNK as u64).max(unit);
                if status.compressed {
                    let done = self.as_stored(at, stop)?;
                    at += done;
                    if done > 0 {
                        continue;
                    }
                    // What cannot be taken over is unpacked; what is behind is looked at again.
                    stop = stop.min(at + PACKED_CHUNK as u64);
                    most = PACKED_CHUNK as u64;
                }
                // What is no whole unit of anything is read as a unit.
                let n = (stop - at).next_multiple_of(unit).min(most).min(end - at);
                self.plain(at, n)?;
                at += n;
            }
        }
        Ok(())
    }

    /// Units of data, the last of which may end where the disk ends.
    fn plain(&mut self, mut at: u64, n: u64) -> Result<(), Halt> {
        let unit = self.new.unit();
        self.buffer.resize(n as usize, 0);
        self.image.read(at, &mut self.buffer)?;
        self.buffer.resize(n.next_multiple_of(unit) as usize, 0);
        let parts = || self.buffer.chunks(unit as usize);
        if !parts().any(is_zero) && self.new.put_clusters(at, &mut self.buffer)? {
            return Ok(());
        }
        for part in self.buffer.chunks(unit as usize) {
            match is_zero(part) {
                true if at < self.shows => self.new.put_zero(at)?,
                true => {}
                false => self.new.put_data(at, part)?,
            }
            at += unit;
        }
        Ok(())
    }

    fn zeros(&mut self, at: u64, end: u64) -> io::Result<()> {
        let unit = self.new.unit();
        let mut at = at;
        while at < end.min(self.shows) {
            self.new.put_zero(at)?;
            at += unit;
        }
        Ok(())
    }

    /// Compressed clusters as they are stored. Returns how many bytes of the disk that were.
    fn as_stored(&mut self, at: u64, stop: u64) -> Result<u64, Halt> {
        let size = self.image.geometry().cluster_size();
        let most = (stop - at).min(PACKED_CHUNK as u64);
        let done = self.image.read_packed(at, most, &mut self.packed)?;
        let run = std::mem::take(&mut self.packed);
        let (mut guest, mut before, end) = (at, 0..0, at + done);
        for cluster in &run.clusters {
            let range = cluster.range.clone();
            // It begins in the last sector of the one before.
            let shared = match before.contains(&range.start) {
                true => before.end - range.start,
                false => 0,
            };
            before = 0..0;
            let bytes = run.bytes.get(range.clone()).unwrap_or_default();
            let part = size.min(end - guest);
            if cluster.zero {
                self.zeros(guest, guest + part)?;
            } else if self.new.put_packed(guest, bytes, shared)? {
                before = range;
            } else {
                self.plain(guest, part)?;
            }
            guest += part;
        }
        self.packed = run;
        Ok(done)
    }
}

/// Every snapshot, each over the one before, in a new folder, which gets its name when all is there.
pub(crate) fn all(image: &mut Image, out: &Path, quiet: bool) -> Result<(), Stop> {
    let asked = Asked::watch()?;
    chain(image, out, &asked, quiet).map_err(|halt| halt.of(out))
}

fn chain(image: &mut Image, out: &Path, asked: &Asked, quiet: bool) -> Result<(), Halt> {
    if out.symlink_metadata().is_ok() {
        return Err(io::Error::from_raw_os_error(libc::EEXIST).into());
    }
    let list: Vec<Snapshot> = image.snapshot_list()?.to_vec();
    for (n, s) in list.iter().enumerate() {
        if list.iter().skip(n + 1).any(|other| other.id == s.id) {
            let id = String::from_utf8_lossy(&s.id);
            let text = format!("Could not export the snapshots: two of them have the ID '{id}'");
            return Err(Stop::failed(text).into());
        }
    }
    let folder = tempfile::Builder::new()
        .prefix(".qcow2-snapshot-")
        .suffix(".partial")
        .permissions(Permissions::from_mode(0o777))
        .tempdir_in(folder_of(out))?;
    let mut index = Vec::new();
    // The snapshot before: its ID, its file and its disk's length.
    let mut before: Option<(&[u8], String, u64)> = None;
    for (n, s) in list.iter().enumerate() {
        // IDs may be any bytes; a number is a good name everywhere.
        let name = format!("{:04}.qcow2", n + 1);
        let id = OsString::from_vec(s.id.clone());
        show(image, &id)?;
        let backing = before.as_ref().map(|(since, name, length)| Backing {
            since,
            name: name.as_bytes(),
            format: "qcow2",
            length: *length,
        });
        let file = File::create_new(folder.path().join(&name))?;
        write(image, &id, backing.as_ref(), &file, asked, quiet)?;
        file.sync_all()?;

        let mut fields = listing::fields(s);
        fields.push(format!("\"virtual-size\": {}", image.length()));
        fields.push(format!("\"filename\": \"{name}\""));
        if let Some((_, backing, _)) = &before {
            fields.push(format!("\"backing-filename\": \"{backing}\""));
        }
        index.push(listing::object(&fields));
        before = Some((&s.id, name, image.length()));
    }
    let mut file = File::create_new(folder.path().join("index.json"))?;
    file.write_all(listing::array(&index).as_bytes())?;
    file.sync_all()?;
    keep_names(folder.path())?;
    asked.check(GONE)?;
    // An empty folder that was made meanwhile may be replaced, nothing else.
    std::fs::rename(folder.path(), out)?;
    // It is not there any more under its old name.
    let _ = folder.keep();
    Ok(keep_names(folder_of(out))?)
}
