//! The bytes of a qcow2 file, read by the specification into an [`Image`].
//!
//! Only what small images need: no encryption, no bitmaps, entries of 8 bytes; where the header names a
//! backing file, it is [`backing`].
//!
//! Sound means: structures lie in the file's clusters and do not overlap; each cluster is counted at
//! least as often as it is named; and no COPIED flag that the active L1 table reaches is on a cluster
//! that a snapshot names, for there a guest writes in place. Counted more often is a leak, and a
//! missing COPIED flag costs one copy: both are counted, not refused.

use std::collections::BTreeMap;

use super::{Content, Disk, Image, Snapshot};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const MAGIC: u64 = 0x5146_49fb;

/// What was read.
#[derive(Debug)]
pub struct Reading {
    pub image: Image,
    /// Counts above the number of references, summed over all clusters.
    pub leaks: u64,
    /// Those of them that lie behind the end of the file.
    pub leaks_behind: u64,
    /// COPIED flags in the active L1 and its L2 tables that do not say "counted once".
    pub odd_flags: u64,
    /// Clusters that the active disk has in the file for what lies behind its end.
    pub vm_state: u64,
    /// For [`read_damaged`]: the states (the active disk last) that reach the cluster.
    pub hang: Vec<bool>,
}

/// One cluster whose count is too low, and the states that are not asked for: an ID, or nothing for
/// the active disk.
#[derive(Clone, Copy)]
pub struct Damage<'a> {
    pub cluster: u64,
    pub skip: &'a [Vec<u8>],
}

/// What a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Nothing,
    Header,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    L1,
    L2,
    Data,
}

/// A digest of bytes: words, mixed.
pub fn digest(bytes: &[u8]) -> u64 {
    let mut h = 0x9e37_79b9_7f4a_7c15 ^ bytes.len() as u64;
    let mut mix = |word: u64| {
        h = (h ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        h ^= h >> 32;
    };
    let mut words = bytes.chunks_exact(8);
    for w in words.by_ref() {
        mix(u64::from_be_bytes(w.try_into().unwrap()));
    }
    for b in words.remainder() {
        mix(u64::from(*b));
    }
    h
}

/// What the backing file holds: some of the first table, and of the next one up to the middle of a cluster.
pub fn backing() -> Vec<u8> {
    let data = |i: usize| (!(1536..32768).contains(&i)).then_some((i * 7 / 512 + i) as u8 | 1);
    (0..33000).map(|i| data(i).unwrap_or(0)).collect()
}

struct File<'a> {
    bytes: &'a [u8],
    cluster: u64,
    backing: Vec<u8>,
}

impl File<'_> {
    /// A big-endian number; zeros behind the end of the file.
    fn number(&self, at: u64, bytes: u64) -> u64 {
        let at = at as usize;
        match self.bytes.get(at..at + bytes as usize) {
            Some(all) => all.iter().fold(0, |n, b| n << 8 | u64::from(*b)),
            None => (at..at + bytes as usize)
                .map(|i| self.bytes.get(i).copied().unwrap_or(0))
                .fold(0, |n, b| n << 8 | u64::from(b)),
        }
    }

    fn word(&self, at: u64) -> u64 {
        match self.bytes.get(at as usize..at as usize + 8) {
            Some(whole) => u64::from_be_bytes(whole.try_into().unwrap()),
            None => self.number(at, 8),
        }
    }

    fn slice(&self, at: u64, length: u64) -> Vec<u8> {
        let length = length as usize;
        let there = self.bytes.iter().skip(at as usize).take(length);
        let mut out: Vec<u8> = there.copied().collect();
        out.resize(length, 0);
        out
    }

    /// What shows where a disk of `size` bytes has nothing at this cluster.
    fn behind(&self, guest: u64, size: u64) -> Option<Content> {
        let at = guest * self.cluster;
        let there = self.backing.get(at as usize..).filter(|_| at < size)?;
        let zeros = there.iter().copied().chain(std::iter::repeat(0));
        let shown: Vec<u8> = zeros.take(self.cluster as usize).collect();
        shown
            .iter()
            .any(|b| *b != 0)
            .then(|| Content::Bytes(digest(&shown)))
    }

    fn digest(&self, at: u64, length: u64) -> u64 {
        match self.bytes.get(at as usize..(at + length) as usize) {
            Some(whole) => digest(whole),
            None => digest(&self.slice(at, length)),
        }
    }
}

/// Who names which cluster, and how often.
struct References {
    cluster: u64,
    uses: Vec<Use>,
    count: Vec<u64>,
    by_snapshot: Vec<bool>,
    /// Overlaps and counts are not asked for; was this cluster named?
    damaged: Option<u64>,
    hit: bool,
}

impl References {
    /// One more reference to each cluster of a range. A structure belongs to one owner; L2 tables and
    /// data may be named by several.
    fn add(&mut self, what: Use, at: u64, bytes: u64) -> Result<(), String> {
        if bytes == 0 {
            return Ok(());
        }
        let (first, last) = (at / self.cluster, (at + bytes - 1) / self.cluster);
        self.hit |= self.damaged.is_some_and(|c| (first..=last).contains(&c));
        if last >= 1 << 16 {
            return Err(format!("{what:?} at {at:#x}: far behind the file"));
        }
        if last as usize >= self.count.len() {
            self.count.resize(last as usize + 1, 0);
            self.uses.resize(last as usize + 1, Use::Nothing);
            self.by_snapshot.resize(last as usize + 1, false);
        }
        for c in first as usize..=last as usize {
            let shared = self.uses[c] == what && matches!(what, Use::L2 | Use::Data);
            if self.uses[c] != Use::Nothing && !shared && self.damaged.is_none() {
                return Err(format!("{what:?} at {at:#x} overlaps {:?}", self.uses[c]));
            }
            self.uses[c] = what;
            self.count[c] += 1;
        }
        Ok(())
    }

    fn structure(&mut self, what: Use, at: u64, bytes: u64) -> Result<(), String> {
        if at % self.cluster != 0 {
            return Err(format!("{what:?} at {at:#x} is not at a cluster"));
        }
        self.add(what, at, bytes)
    }
}

/// What an L2 entry says.
enum Entry {
    Nothing,
    Zeros,
    Data { host: u64, zeros: bool },
    Packed { host: u64, bytes: u64 },
}

fn entry(word: u64, cluster: u64) -> Entry {
    let bits = u64::from(cluster.trailing_zeros());
    if word & COMPRESSED != 0 {
        let width = 62 - (bits - 8);
        let host = word & ((1 << width) - 1);
        let sectors = (word >> width & ((1 << (bits - 8)) - 1)) + 1;
        let end = (host & !511) + sectors * 512;
        return Entry::Packed {
            host,
            bytes: end - host,
        };
    }
    match (word & OFFSET, word & 1 != 0) {
        (0, false) => Entry::Nothing,
        (0, true) => Entry::Zeros,
        (host, zeros) => Entry::Data { host, zeros },
    }
}

/// Read and judge an image.
pub fn read(bytes: &[u8]) -> Result<Reading, String> {
    read_with(bytes, None)
}

/// Read what is left of an image with a count that is too low: counts and overlaps are not judged.
pub fn read_damaged(bytes: &[u8], damage: Damage) -> Result<Reading, String> {
    read_with(bytes, Some(damage))
}

fn read_with(bytes: &[u8], damage: Option<Damage>) -> Result<Reading, String> {
    let skipped = |id: &[u8]| damage.is_some_and(|d| d.skip.iter().any(|s| s == id));
    let mut file = File {
        bytes,
        cluster: 0,
        backing: vec![],
    };
    let version = file.number(4, 4);
    if file.number(0, 4) != MAGIC || !(2..=3).contains(&version) {
        return Err("no qcow2 header".into());
    }
    let order = if version == 2 { 4 } else { file.number(96, 4) };
    let foreign = version == 3 && (file.word(72) != 0 || file.word(88) != 0);
    if foreign || file.number(32, 4) != 0 || order > 6 {
        return Err("header: a feature that this model does not know".into());
    }
    if file.word(8) != 0 {
        file.backing = backing();
    }
    file.cluster = 1 << file.number(20, 4).min(21);
    let clusters = bytes.len() / file.cluster as usize + 1;
    let mut refs = References {
        cluster: file.cluster,
        uses: vec![Use::Nothing; clusters],
        count: vec![0; clusters],
        by_snapshot: vec![false; clusters],
        damaged: damage.map(|d| d.cluster),
        hit: false,
    };
    refs.structure(Use::Header, 0, file.cluster)?;

    // Counts.
    let (table, table_clusters) = (file.word(48), file.number(56, 4));
    if table_clusters == 0 || table_clusters > 64 {
        return Err(format!("refcount table of {table_clusters} clusters"));
    }
    refs.structure(Use::RefcountTable, table, table_clusters * file.cluster)?;
    let mut blocks = vec![];
    for i in 0..table_clusters * file.cluster / 8 {
        let block = file.word(table + i * 8);
        if block != 0 {
            refs.structure(Use::RefcountBlock, block, file.cluster)?;
        }
        blocks.push(block);
    }
    let per_block = (file.cluster * 8) >> order;
    let count = |cluster: u64| -> u64 {
        let block = match blocks.get((cluster / per_block) as usize) {
            None | Some(0) => return 0,
            Some(block) => *block,
        };
        let (bits, i) = (1u64 << order, cluster % per_block);
        match bits {
            8.. => file.number(block + i * bits / 8, bits / 8),
            _ => file.number(block + i * bits / 8, 1) >> (i * bits % 8) & ((1 << bits) - 1),
        }
    };

    // The list, then what each L1 table reaches: the snapshots' first, to know what they name.
    let mut snapshots = list(&file, &mut refs)?;
    let (all, mut hang) = (refs.hit, vec![]);
    for (snapshot, l1, length) in &mut snapshots {
        if skipped(&snapshot.id) {
            continue;
        }
        refs.hit = all;
        refs.structure(Use::L1, *l1, *length * 8)?;
        let (l1, size) = ((*l1, *length), snapshot.disk.size);
        snapshot.disk.clusters = walk(&file, &mut refs, l1, size, true, &mut |_, _| Ok(()))?.0;
        hang.push(refs.hit);
    }
    let (l1, length, size) = (file.word(40), file.number(36, 4), file.word(24));
    let per_table = file.cluster / 8;
    if length * per_table * file.cluster < size {
        return Err(format!(
            "an active L1 table of {length} entries for a disk of {size:#x} bytes"
        ));
    }
    let length = if skipped(b"") { 0 } else { length };
    refs.hit = all;
    refs.structure(Use::L1, l1, length * 8)?;
    let named = std::mem::take(&mut refs.by_snapshot);
    refs.by_snapshot = vec![false; named.len()];
    let mut odd_flags = 0;
    let l1 = (l1, length);
    let (clusters, guests) = walk(&file, &mut refs, l1, size, false, &mut |word, at| {
        let by_snapshot = named.get(at as usize).is_some_and(|n| *n);
        if word & COPIED != 0 && by_snapshot && damage.is_none() {
            return Err(format!("COPIED on cluster {at}, which a snapshot names"));
        }
        odd_flags += u64::from((word & COPIED != 0) != (count(at) == 1));
        Ok(())
    })?;
    hang.push(refs.hit);

    let (mut leaks, mut leaks_behind) = (0, 0);
    let counted = blocks
        .iter()
        .rposition(|b| *b != 0)
        .map_or(0, |i| (i as u64 + 1) * per_block);
    for c in 0..counted.max(refs.count.len() as u64) {
        let want = refs.count.get(c as usize).copied().unwrap_or(0);
        let have = count(c);
        match (have < want, damage) {
            (true, Some(_)) => continue,
            (true, None) => return Err(format!("cluster {c} is counted {have} times, not {want}")),
            (false, _) => {}
        }
        leaks += have - want;
        if c * file.cluster >= bytes.len() as u64 {
            leaks_behind += have - want;
        }
    }
    Ok(Reading {
        image: Image {
            active: Disk { size, clusters },
            snapshots: snapshots.into_iter().map(|s| s.0).collect(),
        },
        leaks,
        leaks_behind,
        odd_flags,
        vm_state: guests.iter().filter(|g| **g >= size / file.cluster).count() as u64,
        hang,
    })
}

/// The snapshot table: each entry, and where its L1 table is.
fn list(file: &File, refs: &mut References) -> Result<Vec<(Snapshot, u64, u64)>, String> {
    let (n, start) = (file.number(60, 4), file.word(64));
    let (mut at, mut out) = (start, vec![]);
    if n > 64 {
        return Err(format!("{n} snapshots"));
    }
    for i in 0..n {
        at = at.next_multiple_of(8);
        let (id, name) = (file.number(at + 12, 2), file.number(at + 14, 2));
        let (extra, length) = (file.number(at + 36, 4), file.number(at + 8, 4));
        if !(24..=1024).contains(&extra) || length > 1024 || at as usize > file.bytes.len() {
            return Err(format!("entry {i} of the snapshot table is no entry"));
        }
        let mut rest: Vec<u64> = [16, 24, 56].iter().map(|i| file.word(at + i)).collect();
        rest.extend((24..extra).map(|i| file.number(at + 40 + i, 1)));
        let snapshot = Snapshot {
            id: file.slice(at + 40 + extra, id),
            name: file.slice(at + 40 + extra + id, name),
            vm_state_size: file.word(at + 40),
            disk: Disk {
                size: file.word(at + 48),
                clusters: BTreeMap::new(),
            },
            rest,
        };
        out.push((snapshot, file.word(at), length));
        at += 40 + extra + id + name;
    }
    if n > 0 {
        refs.structure(Use::SnapshotTable, start, at - start)?;
    }
    Ok(out)
}

/// The disk of `size` bytes behind an L1 table, and which of its clusters have one in the file. `see` gets each entry
/// that names a cluster whose flag means something.
fn walk(
    file: &File,
    refs: &mut References,
    (l1, length): (u64, u64),
    size: u64,
    by_snapshot: bool,
    see: &mut dyn FnMut(u64, u64) -> Result<(), String>,
) -> Result<(BTreeMap<u64, Content>, Vec<u64>), String> {
    let per_table = file.cluster / 8;
    let behind = (0..size.div_ceil(file.cluster)).filter_map(|g| Some((g, file.behind(g, size)?)));
    let (mut disk, mut guests): (BTreeMap<u64, Content>, _) = (behind.collect(), vec![]);
    for i in 0..length {
        let word = file.word(l1 + i * 8);
        let l2 = word & OFFSET;
        if l2 == 0 {
            continue;
        }
        refs.structure(Use::L2, l2, file.cluster)?;
        refs.by_snapshot[(l2 / file.cluster) as usize] |= by_snapshot;
        see(word, l2 / file.cluster)?;
        for j in 0..per_table {
            let word = file.word(l2 + j * 8);
            let guest = i * per_table + j;
            let entry = entry(word, file.cluster);
            if !matches!(entry, Entry::Nothing | Entry::Zeros) {
                guests.push(guest);
            }
            if !matches!(entry, Entry::Nothing) {
                disk.remove(&guest);
            }
            let content = match entry {
                Entry::Nothing | Entry::Zeros => continue,
                Entry::Data { host, zeros } => {
                    refs.structure(Use::Data, host, file.cluster)?;
                    refs.by_snapshot[(host / file.cluster) as usize] |= by_snapshot;
                    see(word, host / file.cluster)?;
                    match zeros {
                        true => continue,
                        false => Content::Bytes(file.digest(host, file.cluster)),
                    }
                }
                Entry::Packed { host, bytes } => {
                    refs.add(Use::Data, host, bytes)?;
                    if word & COPIED != 0 {
                        return Err(format!("COPIED on compressed clusters at {host:#x}"));
                    }
                    Content::Packed(file.digest(host, bytes))
                }
            };
            disk.insert(guest, content);
        }
    }
    Ok((disk, guests))
}
