//! One image, by qemu and by the library.

use super::changes;
use super::files::{at, R};
use super::generate::QEMU;
use super::qemu::Tools;
use super::qimg::Qcow;
use super::rng::Rng;
use qcow2_snapshot::io::file::FileStorage;
use qcow2_snapshot::io::{Run, Storage};
use qcow2_snapshot::{BlockStatus, Image, OpenFlags};
use std::fmt;

#[derive(Default)]
pub struct Counts {
    disks: u64,
    bytes: u64,
    maps: u64,
    extents: u64,
    served: u64,
    ahead: u64,
    vm_ranges: u64,
    encrypted: u64,
    not_mapped: u64,
    changes: changes::Counts,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} disks and snapshots read ({} MiB), {} maps ({} extents), {} of them of snapshots also \
             as qemu-nbd shows them ({} with holes of the file), {} ranges of VM state; \
             not compared: {} encrypted images, offsets of {} snapshots that goto refuses; {}",
            self.disks,
            self.bytes >> 20,
            self.maps,
            self.extents,
            self.served,
            self.ahead,
            self.vm_ranges,
            self.encrypted,
            self.not_mapped,
            self.changes
        )
    }
}

/// Larger disks are read only where somebody sees data.
const WHOLE: u64 = 48 << 20;

const COPY: &str = "copy.qcow2";

/// What changed between states, and nothing else.
pub fn changes_only(rng: &mut Rng, tools: &mut Tools, counts: &mut Counts) -> R<()> {
    let names = names(tools)?;
    changes::image(rng, tools, &names, &mut counts.changes)
}

fn names(tools: &Tools) -> R<Vec<Vec<u8>>> {
    Ok(Qcow::open(&tools.dir.join(QEMU))?
        .snaps
        .into_iter()
        // As in C, and so for qemu-img, a name ends at its NUL.
        .map(|s| {
            s.name
                .split(|b| *b == 0)
                .next()
                .unwrap_or_default()
                .to_vec()
        })
        .collect())
}

pub fn image(rng: &mut Rng, tools: &mut Tools, counts: &mut Counts) -> R<()> {
    let path = tools.dir.join(QEMU);
    let names = names(tools)?;
    changes::image(rng, tools, &names, &mut counts.changes)?;
    if tools.luks {
        let mut image = ours(Image::open(&path, OpenFlags::read_only()))?;
        let refused =
            image.length() == 0 || image.read(0, &mut [0]).is_err_and(|e| e.errno() == 95);
        counts.encrypted += 1;
        return if refused {
            Ok(())
        } else {
            Err("encrypted data was read".into())
        };
    }
    disk(rng, tools, counts, None)?;
    for name in &names {
        disk(rng, tools, counts, Some(name))?;
    }
    Ok(())
}

fn ours<T>(r: qcow2_snapshot::Result<T>) -> R<T> {
    r.map_err(|e| format!("ours: {e}"))
}

fn disk(rng: &mut Rng, tools: &mut Tools, counts: &mut Counts, name: Option<&[u8]>) -> R<()> {
    let shown = name.map_or("the disk".into(), |n| {
        String::from_utf8_lossy(n).into_owned()
    });
    let mut image = ours(Image::open(&tools.dir.join(QEMU), OpenFlags::read_only()))?;
    let l;
    let mut convert = vec!["convert", "-O", "raw"];
    let mut loaded = Ok(());
    if let Some(name) = name {
        l = format!("snapshot.name={}", String::from_utf8_lossy(name));
        convert.extend(["-l", &l]);
        loaded = ours(image.snapshot_load_tmp(None, Some(name)));
    }
    convert.extend([QEMU, "theirs.raw"]);
    if let Err(e) = loaded {
        return match tools.must("qemu-img", &convert) {
            Ok(_) => Err(format!("{shown}: {e}, but qemu-img reads it")),
            Err(_) => Ok(()),
        };
    }
    tools.must("qemu-img", &convert)?;
    same_bytes(rng, tools, &mut image, counts).map_err(|e| format!("{shown}: {e}"))?;
    counts.disks += 1;

    let mine = extents(&mut image)?;
    if let Some(name) = name {
        as_served(tools, name, &mine, counts).map_err(|e| format!("{shown}: {e}"))?;
    }
    // qemu-img maps the disk only, so for offsets and depths a snapshot becomes the disk of a copy.
    let mut mapped = QEMU;
    if let Some(name) = name {
        at(
            "copy",
            std::fs::copy(tools.dir.join(QEMU), tools.dir.join(COPY)),
        )?;
        if tools.snapshot("-a", name, COPY)?.is_err() {
            counts.not_mapped += 1;
            return Ok(());
        }
        mapped = COPY;
    }
    let theirs = map(tools, mapped)?;
    // Which stored clusters are holes of the file is another question for the copy, which takes
    // other space. The snapshot's own answer is compared above, and the copy's here.
    let again = if name.is_some() && mine != theirs {
        let mut copy = ours(Image::open(&tools.dir.join(COPY), OpenFlags::read_only()))?;
        let of_copy = extents(&mut copy)?;
        if merged(&of_copy) != merged(&mine) {
            return Err(format!(
                "{shown}: map of the snapshot {mine:?}\nof the disk after goto {of_copy:?}"
            ));
        }
        of_copy
    } else {
        mine
    };
    if again != theirs {
        let first = again.iter().zip(&theirs).position(|(a, b)| a != b);
        return Err(format!(
            "{shown}: maps differ, first at {first:?}: ours {:?}, theirs {:?} (of {} and {})",
            first.map(|i| again[i]),
            first.map(|i| theirs[i]),
            again.len(),
            theirs.len()
        ));
    }
    counts.maps += 1;
    counts.extents += theirs.len() as u64;
    vm_state(rng, tools, &mut image, mapped, counts).map_err(|e| format!("{shown}: {e}"))
}

/// Data and zeros of the snapshot in this very file, with its holes as they are: `qemu-nbd -l` serves
/// the snapshot and `qemu-img map` shows what it is told. It keeps today's size of the disk.
fn as_served(tools: &mut Tools, name: &[u8], mine: &[BlockStatus], counts: &mut Counts) -> R<()> {
    let snapshot = format!("snapshot.name={}", String::from_utf8_lossy(name));
    // It ends when its client has gone, and removes its socket a little later: a new name for each.
    let serve = ["--fork", "-r", "-f", "qcow2", "-k"];
    let number = counts.served;
    let socket = tools.dir.join(format!("socket{number}"));
    let socket = socket.display().to_string();
    let args = [&serve[..], &[&socket, "-l", &snapshot, QEMU]].concat();
    tools.must("qemu-nbd", &args)?;
    let theirs = map(tools, &format!("nbd+unix:///?socket=socket{number}"))?;
    let length = |all: &[BlockStatus]| all.last().map_or(0, |e| e.start + e.length);
    let end = length(mine).min(length(&theirs));
    let (mine, theirs) = (kinds(mine, end), kinds(&theirs, end));
    if mine != theirs {
        return Err(format!(
            "data and zeros of the snapshot {mine:?}\nas qemu-nbd serves it {theirs:?}"
        ));
    }
    counts.served += 1;
    counts.ahead += u64::from(theirs.iter().any(|(_, data, zero)| *data && *zero));
    Ok(())
}

/// Where data and zeros begin, up to `end`: (start, data, zero).
fn kinds(all: &[BlockStatus], end: u64) -> Vec<(u64, bool, bool)> {
    let mut out: Vec<_> = all
        .iter()
        .filter(|e| e.start < end)
        .map(|e| (e.start, e.data, e.zero))
        .collect();
    out.dedup_by_key(|(_, data, zero)| (*data, *zero));
    out
}

/// The map without what tells a hole of the file from data.
fn merged(all: &[BlockStatus]) -> Vec<BlockStatus> {
    let mut out: Vec<BlockStatus> = Vec::new();
    for one in all {
        let mut one = *one;
        one.zero &= !one.data;
        match out.last_mut() {
            Some(last)
                if last.data
                    && one.data
                    && (last.compressed, last.depth) == (one.compressed, one.depth)
                    && last.offset.map(|o| o + last.length) == one.offset =>
            {
                last.length += one.length
            }
            _ => out.push(one),
        }
    }
    out
}

fn same_bytes(rng: &mut Rng, tools: &Tools, image: &mut Image, counts: &mut Counts) -> R<()> {
    let options = Image::file_options(OpenFlags::NO_LOCK);
    let mut theirs = ours(FileStorage::open_path(
        &tools.dir.join("theirs.raw"),
        &options,
    ))?;
    let end = image.length().min(at("length", theirs.length())?);
    let mut from = 0;
    let (mut a, mut b) = (Vec::new(), Vec::new());
    while from < end {
        if end > WHOLE {
            if let (Some(Run::Hole(hole)), status) =
                (theirs.run(from), ours(image.block_status(from, end))?)
            {
                if status.zero && !status.data {
                    from += hole.unwrap_or(u64::MAX).min(status.length).min(end - from);
                    continue;
                }
            }
        }
        let most = *rng.pick(&[1, 512, 5000, 70_000, 1 << 20, 1 << 20, 1 << 22]);
        let n = rng.range(1, most).min(end - from) as usize;
        let n = if n < 512 && end > 1 << 20 {
            512.min((end - from) as usize)
        } else {
            n
        };
        a.resize(n, 0);
        b.resize(n, 0);
        a.fill(0xee);
        ours(image.read(from, &mut a))?;
        at("read", theirs.read(from, &mut b))?;
        if let Some(i) = (0..n).find(|i| a[*i] != b[*i]) {
            return Err(format!(
                "byte {}: ours {:#x}, theirs {:#x} (read {n} from {from})",
                from + i as u64,
                a[i],
                b[i]
            ));
        }
        from += n as u64;
        counts.bytes += n as u64;
    }
    Ok(())
}

fn extents(image: &mut Image) -> R<Vec<BlockStatus>> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < image.length() {
        let next = ours(image.block_status(at, u64::MAX))?;
        if next.length == 0 || next.start != at {
            return Err(format!("block_status({at}) = {next:?}"));
        }
        at += next.length;
        all.push(next);
    }
    Ok(all)
}

/// `qemu-img map --output=json`, one entry a line.
fn map(tools: &mut Tools, file: &str) -> R<Vec<BlockStatus>> {
    let out = tools.must("qemu-img", &["map", "--output=json", file])?;
    let value = |line: &str, key: &str| -> Option<String> {
        let (_, rest) = line.split_once(&format!("\"{key}\": "))?;
        Some(rest.split([',', '}']).next()?.trim().to_owned())
    };
    let mut all = Vec::new();
    for line in out.stdout.lines().filter(|l| l.contains("\"start\"")) {
        let number = |key: &str| value(line, key).and_then(|v| v.parse::<u64>().ok());
        let flag = |key: &str| value(line, key).as_deref() == Some("true");
        all.push(BlockStatus {
            start: number("start").ok_or("no start")?,
            length: number("length").ok_or("no length")?,
            data: flag("data"),
            zero: flag("zero"),
            compressed: flag("compressed"),
            present: flag("present"),
            depth: number("depth").ok_or("no depth")? as u32,
            offset: number("offset"),
        });
    }
    // Of an empty disk qemu-img shows one entry of no bytes.
    all.retain(|e| e.length > 0);
    Ok(all)
}

/// A few ranges of VM state, as `qemu-io` dumps them.
fn vm_state(
    rng: &mut Rng,
    tools: &mut Tools,
    image: &mut Image,
    file: &str,
    counts: &mut Counts,
) -> R<()> {
    for _ in 0..2 {
        let reach = *rng.pick(&[4096, 1 << 17, 1 << 21]);
        // qemu-io takes whole sectors only.
        let from = rng.below(reach) / 512 * 512;
        let n = rng.range(1, 3) as usize * 512;
        let command = format!("read -b -v {from} {n}");
        let out = tools.must("qemu-io", &["-r", "-c", &command, file])?;
        let mut mine = vec![0xee; n];
        ours(image.load_vmstate(from, &mut mine))?;
        if let Some(theirs) = dumped(&out.stdout, n) {
            if theirs != mine {
                return Err(format!("VM state differs in {n} bytes from {from}"));
            }
            counts.vm_ranges += 1;
        } else {
            return Err(format!("qemu-io dumped something else: {}", out.stdout));
        }
    }
    Ok(())
}

/// The bytes of qemu-io's dump: lines of "offset:  xx xx ...  text".
pub fn dumped(text: &str, n: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for line in text.lines() {
        let Some((place, rest)) = line.split_once(":  ") else {
            continue;
        };
        if place.len() < 8 || u64::from_str_radix(place, 16).is_err() {
            continue;
        }
        let left = (n - bytes.len()).min(16);
        for word in rest.split(' ').take(left) {
            bytes.push(u8::from_str_radix(word, 16).ok()?);
        }
    }
    (bytes.len() == n).then_some(bytes)
}
