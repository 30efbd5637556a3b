//! What a verb may do to an image, found out from the bytes alone, apart from the library's code.

use super::disk::State;
use qcow2_snapshot::{Image, Outcome};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Tables are followed so far.
const MANY: u64 = 1 << 17;

/// Big-endian number of `n` bytes at `at`; 0 past the end.
pub fn be(b: &[u8], at: u64, n: usize) -> u64 {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    let part = at.checked_add(n).and_then(|end| b.get(at..end));
    part.map_or(0, |p| p.iter().fold(0, |v, b| v << 8 | u64::from(*b)))
}

/// Header fields as they stand in a file.
pub struct Raw<'a>(&'a [u8]);

impl<'a> Raw<'a> {
    pub fn new(file: &'a [u8]) -> Raw<'a> {
        Raw(file)
    }
    pub fn cluster_bits(&self) -> u64 {
        be(self.0, 20, 4)
    }
    pub fn size(&self) -> u64 {
        be(self.0, 24, 8)
    }
    pub fn l1_size(&self) -> u64 {
        be(self.0, 36, 4)
    }
    pub fn l1_offset(&self) -> u64 {
        be(self.0, 40, 8)
    }
    pub fn reftable_offset(&self) -> u64 {
        be(self.0, 48, 8)
    }
    pub fn reftable_clusters(&self) -> u64 {
        be(self.0, 56, 4)
    }
    pub fn reftable_bytes(&self) -> u64 {
        self.reftable_clusters() << self.cluster_bits().min(21)
    }
    pub fn nb_snapshots(&self) -> u64 {
        be(self.0, 60, 4)
    }
    pub fn snapshots_offset(&self) -> u64 {
        be(self.0, 64, 8)
    }
    /// log2 of the refcount width.
    pub fn refcount_order(&self) -> u64 {
        if be(self.0, 4, 4) >= 3 {
            be(self.0, 96, 4).min(6)
        } else {
            4
        }
    }
    pub fn extended_l2(&self) -> bool {
        be(self.0, 4, 4) >= 3 && be(self.0, 72, 8) & 0x10 != 0
    }
}

/// One entry of a snapshot table, as far as places go.
pub struct Entry {
    /// Where the entry begins.
    pub at: u64,
    pub l1_offset: u64,
    pub l1_size: u64,
    pub end: u64,
}

/// The entries of the snapshot table that lie within `file` from `base` on.
pub fn entries(read: &dyn Fn(u64, usize) -> u64, start: u64, count: u64) -> Vec<Entry> {
    let mut out = Vec::new();
    let mut at = start;
    for _ in 0..count.min(MANY) {
        at = at.saturating_add(7) & !7;
        let end = at
            .saturating_add(40 + read(at.saturating_add(36), 4).min(1024))
            .saturating_add(read(at.saturating_add(12), 2) + read(at.saturating_add(14), 2));
        out.push(Entry {
            at,
            l1_offset: read(at, 8),
            l1_size: read(at.saturating_add(8), 4),
            end,
        });
        at = end;
    }
    out
}

/// Refcounts on a disk.
pub struct Counts {
    bits: u64,
    order: u64,
    reftable: Vec<u64>,
}

/// Refcounts and places of structures on a disk.
pub struct Before {
    counts: Counts,
    /// Clusters (first, last) of the L1 tables, L2 tables, refcount blocks and table, snapshot table.
    structures: Vec<(u64, u64)>,
}

fn words(s: &State, offset: u64, n: u64) -> Vec<u64> {
    let bytes = s.bytes(offset, n.min(MANY) * 8);
    bytes
        .chunks_exact(8)
        .map(|w| w.iter().fold(0, |v, b| v << 8 | u64::from(*b)))
        .collect()
}

impl Before {
    pub fn new(s: &State) -> Before {
        let first = s.bytes(0, 112);
        let raw = Raw::new(&first);
        let mut b = Before {
            counts: Counts::new(s),
            structures: Vec::new(),
        };
        let cluster = 1 << b.counts.bits;
        b.add(raw.reftable_offset(), raw.reftable_bytes());
        for i in 0..b.counts.reftable.len() {
            let block = b.counts.reftable[i] & !511;
            if block != 0 {
                b.add(block, cluster);
            }
        }
        let read = |at: u64, n: usize| s.number(at, n);
        let table = entries(&read, raw.snapshots_offset(), raw.nb_snapshots());
        if let Some(last) = table.last() {
            b.add(
                raw.snapshots_offset(),
                last.end.saturating_sub(raw.snapshots_offset()),
            );
        }
        let mut l1s: Vec<(u64, u64)> = table.iter().map(|e| (e.l1_offset, e.l1_size)).collect();
        l1s.push((raw.l1_offset(), raw.l1_size()));
        l1s.sort_unstable();
        l1s.dedup();
        for (offset, entries) in l1s {
            b.add(offset, entries * 8);
            for entry in words(s, offset, entries) {
                if entry & OFFSET != 0 {
                    b.add(entry & OFFSET, cluster);
                }
            }
        }
        // Sorted, and none in another: those that a cluster could be in are next to each other.
        b.structures.sort_unstable();
        b.structures.dedup_by(|next, kept| {
            let joins = next.0 <= kept.1;
            if joins {
                kept.1 = kept.1.max(next.1);
            }
            joins
        });
        b
    }

    fn add(&mut self, offset: u64, bytes: u64) {
        let last = offset.saturating_add(bytes.max(1) - 1) >> self.counts.bits;
        self.structures.push((offset >> self.counts.bits, last));
    }

    fn structure(&self, cluster: u64) -> bool {
        let behind = self
            .structures
            .partition_point(|(first, _)| *first <= cluster);
        behind > 0 && cluster <= self.structures[behind - 1].1
    }
}

impl Counts {
    pub fn new(s: &State) -> Counts {
        let first = s.bytes(0, 112);
        let raw = Raw::new(&first);
        Counts {
            bits: raw.cluster_bits().clamp(9, 21),
            order: raw.refcount_order(),
            reftable: words(s, raw.reftable_offset(), raw.reftable_bytes() / 8),
        }
    }

    /// The refcount of a cluster on disk `s`, by the table of this state.
    pub fn refcount(&self, s: &State, cluster: u64) -> u64 {
        let per_block_bits = self.bits + 3 - self.order;
        let entry = self
            .reftable
            .get((cluster >> per_block_bits) as usize)
            .copied()
            .unwrap_or(0);
        if entry & !511 == 0 {
            return 0;
        }
        let index = cluster & ((1 << per_block_bits) - 1);
        if self.order < 3 {
            let per_byte_bits = 3 - self.order;
            let byte = s.number((entry & !511).saturating_add(index >> per_byte_bits), 1);
            let shift = (index & ((1 << per_byte_bits) - 1)) << self.order;
            return byte >> shift & ((1 << (1 << self.order)) - 1);
        }
        let n = 1usize << (self.order - 3);
        s.number((entry & !511).saturating_add(index * n as u64), n)
    }
}

/// Did the verb keep to what it may do?
pub fn judge(
    was: &State,
    is: &State,
    image: &Image,
    result: &Result<(), qcow2_snapshot::Error>,
    what: &str,
) {
    let writes = &is.writes[was.writes.len()..];
    let holes = &is.holes[was.holes.len()..];
    if let Err(e) = result {
        if is.failed {
            return; // a full disk: the fault tests' matter
        }
        assert_eq!(
            is.requests, was.requests,
            "{what} has asked for changes and then fails: {e}\n{writes:x?}"
        );
        assert!(is.same_bytes(was), "{what} fails and leaves changes: {e}");
        assert!(
            matches!(image.last_outcome(), Outcome::Unchanged | Outcome::None),
            "{what}: {:?} after {e}",
            image.last_outcome()
        );
        return;
    }
    if !matches!(what, "read_snapshots" | "list" | "usage") {
        assert_eq!(image.last_outcome(), Outcome::Done, "{what}");
    }
    if what == "usage" {
        assert_eq!(is.requests, was.requests, "usage asks for changes");
    }
    if writes.is_empty() && holes.is_empty() {
        return;
    }
    let before = Before::new(was);
    for (label, offset, bytes) in writes {
        let end = offset + bytes;
        let allowed = match *label {
            "header" => *offset >= 24 && end <= 72,
            "header: autoclear features" => *offset == 88 && end == 96,
            _ => (offset >> before.counts.bits..=(end - 1) >> before.counts.bits)
                .all(|c| c != 0 && (before.structure(c) || before.counts.refcount(was, c) == 0)),
        };
        assert!(
            allowed,
            "{what} writes a {label} to {offset:#x}..{end:#x}, which holds something else"
        );
    }
    if holes.is_empty() {
        return;
    }
    let after = Counts::new(is);
    for (offset, bytes) in holes {
        for c in offset >> after.bits..(offset + bytes).div_ceil(1 << after.bits) {
            let count = after.refcount(is, c);
            assert_eq!(
                count, 0,
                "{what} punches a hole at {offset:#x}+{bytes:#x} where something is"
            );
        }
    }
}
