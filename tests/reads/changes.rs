//! `snapshot_next_change` for all pairs of states of one image, against whole disks by `qemu-img
//! convert`: what is in no run is equal, and with `compare` the runs are the sectors that differ.

use super::files::{at, R};
use super::generate::QEMU;
use super::qemu::Tools;
use super::rng::Rng;
use qcow2_snapshot::io::file::FileStorage;
use qcow2_snapshot::io::{Run, Storage};
use qcow2_snapshot::{Change, Image, Mapping, OpenFlags};
use std::fmt;

#[derive(Default)]
pub struct Counts {
    pairs: u64,
    calls: u64,
    runs: u64,
    exact: u64,
    parts: u64,
    beyond: u64,
    refused: u64,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} calls of next_change for {} pairs of states: {} runs by tables, {} exact ones, {} of both behind the end of the older \
             state, {} parts of disks asked for; comparing {} encrypted pairs refused",
            self.calls, self.pairs, self.runs, self.exact, self.beyond, self.parts, self.refused
        )
    }
}

/// One state of the disk, and all its bytes as qemu-img reads them.
struct State {
    name: Option<Vec<u8>>,
    size: u64,
    bytes: FileStorage,
    /// qemu-img shows a snapshot no longer than today's disk; the rest is read by us.
    shown: u64,
    rest: Image,
}

const SECTOR: u64 = 512;

/// All pairs of some of the states of the image in the folder of `tools`.
pub fn image(rng: &mut Rng, tools: &mut Tools, names: &[Vec<u8>], counts: &mut Counts) -> R<()> {
    let path = tools.dir.join(QEMU);
    let mut image = ours(Image::open(&path, OpenFlags::read_only()))?;
    let sizes: Vec<u64> = match image.snapshot_list() {
        Ok(list) => list.iter().map(|s| s.disk_size & !511).collect(),
        // An external data file: no snapshots, and no changes either.
        Err(_) => {
            let refused = image.snapshot_next_change(None, None, 0, u64::MAX, false);
            return match refused.map_err(|e| e.errno()) {
                Err(libc::ENOTSUP) => Ok(()),
                other => Err(format!("changes with a data file: {other:?}")),
            };
        }
    };
    let ids: Vec<Vec<u8>> = ours(image.snapshot_list())?
        .iter()
        .map(|s| s.id.clone())
        .collect();
    let mut states = vec![state(tools, 0, None, image.length())?];
    for (index, (name, size)) in names.iter().zip(sizes).enumerate().take(4) {
        // Only what the name alone finds for both, and what can be read at all.
        let first = names.iter().position(|n| n == name) == Some(index);
        let plain = first && !name.is_empty() && !ids.contains(name) && !name.contains(&b',');
        if plain && image.snapshot_load_tmp(None, Some(name)).is_ok() {
            states.push(state(tools, index + 1, Some(name), size)?);
        }
    }
    drop(image);
    for from in 0..states.len() {
        for to in 0..states.len() {
            // Of many pairs, some.
            if states.len() > 3 && rng.chance(50) {
                continue;
            }
            let what = |s: &State| {
                s.name
                    .as_deref()
                    .map(String::from_utf8_lossy)
                    .map(|n| n.into_owned())
            };
            let shown = format!("{:?} to {:?}", what(&states[from]), what(&states[to]));
            pair(rng, tools, &mut states, (from, to), counts)
                .map_err(|e| format!("changes {shown}: {e}"))?;
            counts.pairs += 1;
        }
    }
    for index in 0..states.len() {
        let _ = std::fs::remove_file(tools.dir.join(format!("state{index}.raw")));
    }
    Ok(())
}

fn ours<T>(r: qcow2_snapshot::Result<T>) -> R<T> {
    r.map_err(|e| format!("ours: {e}"))
}

fn state(tools: &mut Tools, index: usize, name: Option<&[u8]>, size: u64) -> R<State> {
    let out = format!("state{index}.raw");
    let mut args = vec![b"convert".to_vec(), b"-O".to_vec(), b"raw".to_vec()];
    if let Some(name) = name {
        args.push(b"-l".to_vec());
        args.push([b"snapshot.name=", name].concat());
    }
    let args: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
    let done = tools.on("qemu-img", &args, QEMU, &[out.as_bytes()])?;
    if !done.ok {
        return Err(format!("qemu-img convert: {}", done.stderr));
    }
    let options = Image::file_options(OpenFlags::NO_LOCK);
    let mut bytes = ours(FileStorage::open_path(&tools.dir.join(out), &options))?;
    let shown = at("length", bytes.length())?.min(size);
    let mut rest = ours(Image::open(&tools.dir.join(QEMU), OpenFlags::NO_LOCK))?;
    if name.is_some() {
        ours(rest.snapshot_load_tmp(None, name))?;
    }
    Ok(State {
        name: name.map(<[u8]>::to_vec),
        size,
        bytes,
        shown,
        rest,
    })
}

fn pair(
    rng: &mut Rng,
    tools: &mut Tools,
    states: &mut [State],
    (from, to): (usize, usize),
    counts: &mut Counts,
) -> R<()> {
    let path = tools.dir.join(QEMU);
    let (old, new) = (states[from].name.clone(), states[to].name.clone());
    let (old, new) = (old.as_deref(), new.as_deref());
    let (from_size, to_size) = (states[from].size, states[to].size);
    // Dirty and corrupt images open read-only alone.
    let writable = Image::open(&path, OpenFlags::RDWR | OpenFlags::NO_LOCK).ok();
    let mut image = match writable.filter(|_| rng.chance(30)) {
        Some(image) => image,
        None => {
            let mut image = ours(Image::open(&path, OpenFlags::read_only()))?;
            // It shows something else: that changes nothing, and stays.
            let shown = states[rng.below(states.len() as u64) as usize].name.clone();
            if let Some(shown) = shown {
                ours(image.snapshot_load_tmp(None, Some(&shown)))?;
            }
            image
        }
    };
    let length = image.length();
    if tools.luks {
        let refused = image.snapshot_next_change(old, new, 0, u64::MAX, true);
        if refused.map_err(|e| e.errno()) != Err(libc::ENOTSUP) {
            return Err("encrypted data was compared".into());
        }
        counts.refused += 1;
    }
    let truth = differing(states, (from, to), tools.luks)?;
    for compare in [false, true] {
        if compare && tools.luks {
            break;
        }
        let mut all: Vec<Change> = Vec::new();
        for change in image.snapshot_changes(old, new, compare) {
            all.push(ours(change)?);
        }
        // One more says that there is none.
        counts.calls += all.len() as u64 + 1;
        in_order(&all, from_size, to_size)?;
        // Sectors in runs, and those that differ, below the end of both.
        let mut covered = Vec::new();
        for c in all.iter().filter(|c| c.from != Mapping::Beyond) {
            add(&mut covered, c.start, c.start + c.length);
        }
        if compare && covered != truth {
            return Err(format!(
                "compared {covered:?}\nbut what differs is {truth:?}"
            ));
        }
        if let Some(missing) = truth
            .iter()
            .find(|t| !covered.iter().any(|c| c.0 <= t.0 && t.1 <= c.1))
        {
            return Err(format!("{missing:?} differs, but the runs are {covered:?}"));
        }
        if from == to && !all.is_empty() {
            return Err(format!("a state differs from itself: {all:?}"));
        }
        let behind: u64 = all
            .iter()
            .filter(|c| c.from == Mapping::Beyond)
            .map(|c| c.length)
            .sum();
        if behind != to_size.saturating_sub(from_size) {
            return Err(format!(
                "{behind} bytes are said to be behind the end of the older state"
            ));
        }
        *(if compare {
            &mut counts.exact
        } else {
            &mut counts.runs
        }) += all.len() as u64;
        counts.beyond += all.iter().filter(|c| c.from == Mapping::Beyond).count() as u64;
        as_mapped(tools, &all, old, new)?;
        parts(rng, &mut image, &all, (old, new), to_size, compare, counts)?;
    }
    if image.length() != length {
        return Err("another disk is shown afterwards".into());
    }
    Ok(())
}

/// Runs follow one another, none is empty, and neighbours are not alike.
fn in_order(all: &[Change], from_size: u64, to_size: u64) -> R<()> {
    let mut last: Option<Change> = None;
    for c in all {
        let end = c.start + c.length;
        let beyond = c.from == Mapping::Beyond;
        let alike =
            last.is_some_and(|l| l.start + l.length == c.start && (l.from, l.to) == (c.from, c.to));
        if c.length == 0
            || last.is_some_and(|l| c.start < l.start + l.length)
            || end > to_size
            || alike
            || c.to == Mapping::Beyond
            || beyond != (end > from_size)
            || (beyond && c.start < from_size)
        {
            return Err(format!("{c:?} after {last:?}"));
        }
        last = Some(*c);
    }
    Ok(())
}

/// What is said of both sides is what each state's own map says there.
fn as_mapped(tools: &Tools, all: &[Change], old: Option<&[u8]>, new: Option<&[u8]>) -> R<()> {
    // The layer behind is not looked at: the map says of it only that it is not this one's.
    for (name, side) in [(old, 0), (new, 1)] {
        let mut image = ours(Image::open(&tools.dir.join(QEMU), OpenFlags::read_only()))?;
        if name.is_some() {
            ours(image.snapshot_load_tmp(None, name))?;
        }
        for c in all {
            let said = [c.from, c.to][side];
            let (mut at, end) = (c.start, c.start + c.length);
            while at < end && said != Mapping::Beyond {
                let s = ours(image.block_status(at, end - at))?;
                let mapped = match (s.present && s.depth == 0, s.data, s.compressed) {
                    (false, ..) => Mapping::Unallocated,
                    (_, false, _) => Mapping::Zero,
                    (_, _, false) => Mapping::Data,
                    _ => Mapping::Compressed,
                };
                if mapped != said {
                    return Err(format!("{c:?}, but at {at} {name:?} has {s:?}"));
                }
                at += s.length;
            }
        }
    }
    Ok(())
}

/// Parts of the disk, asked for in any order: the same runs, as far as they are in the part.
fn parts(
    rng: &mut Rng,
    image: &mut Image,
    all: &[Change],
    (old, new): (Option<&[u8]>, Option<&[u8]>),
    size: u64,
    compare: bool,
    counts: &mut Counts,
) -> R<()> {
    for _ in 0..6 {
        let offset = match (rng.below(4), all.is_empty()) {
            (0, _) | (_, true) => rng.below(size + 4096),
            (_, false) => {
                let c = all[rng.below(all.len() as u64) as usize];
                (c.start + rng.below(c.length + 1000)).saturating_sub(rng.below(700))
            }
        };
        let bytes = *rng.pick(&[0, 1, 513, 4096, 70_000, 1 << 30, u64::MAX]);
        let end = offset.saturating_add(bytes).min(size);
        let wanted = all
            .iter()
            .find(|c| c.start < end && c.start + c.length > offset && offset < end)
            .map(|c| {
                let (start, stop) = (c.start.max(offset), (c.start + c.length).min(end));
                Change {
                    start,
                    length: stop - start,
                    ..*c
                }
            });
        let found = ours(image.snapshot_next_change(old, new, offset, bytes, compare))?;
        if found != wanted {
            return Err(format!(
                "compare {compare}, {bytes} bytes from {offset}: {found:?} instead of {wanted:?}"
            ));
        }
        counts.parts += 1;
        counts.calls += 1;
    }
    Ok(())
}

fn add(runs: &mut Vec<(u64, u64)>, start: u64, end: u64) {
    match runs.last_mut() {
        Some(last) if last.1 == start => last.1 = end,
        _ => runs.push((start, end)),
    }
}

/// The sectors in which two disks differ, as far as qemu-img shows both; what both files have as
/// holes is passed over. Of encrypted disks, what qemu-img shows.
fn differing(states: &mut [State], (from, to): (usize, usize), luks: bool) -> R<Vec<(u64, u64)>> {
    let shown = states[from].shown.min(states[to].shown);
    let end = match luks {
        true => shown,
        false => states[from].size.min(states[to].size),
    };
    let mut runs = Vec::new();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let mut from_byte = 0;
    while from_byte < end {
        let mut hole = shown.saturating_sub(from_byte);
        for s in [from, to] {
            hole = match states[s].bytes.run(from_byte) {
                Some(Run::Hole(n)) => hole.min(n.unwrap_or(u64::MAX)),
                _ => 0,
            };
        }
        if hole > 0 {
            from_byte += hole;
            continue;
        }
        let left = if from_byte < shown { shown } else { end } - from_byte;
        let n = left.min(1 << 20) as usize;
        for (s, buf) in [(from, &mut a), (to, &mut b)] {
            buf.resize(n, 0);
            if from_byte < shown {
                at("read", states[s].bytes.read(from_byte, buf))?;
            } else {
                ours(states[s].rest.read(from_byte, buf))?;
            }
        }
        for (i, (a, b)) in a.chunks(512).zip(b.chunks(512)).enumerate() {
            if a != b {
                let start = from_byte + i as u64 * SECTOR;
                add(&mut runs, start, start + SECTOR);
            }
        }
        from_byte += n as u64;
    }
    Ok(runs)
}
