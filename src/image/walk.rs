//! **The** traversal of everything that an L1 table reaches
//! (QEMU's `qcow2_update_snapshot_refcount`).
//!
//! [`Replay::walk`] looks: it counts in memory, checks what it meets and notes which L2 tables
//! would change. [`rewrite_tables`] writes those tables later, when the counts are final.

use super::device::Device;
use super::overlap::Kind;
use super::refcount::Refcounts;
use super::replay::{changed_table, Replay};
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, COPIED, OFFSET_MASK};
use crate::format::geometry::{Geometry, HostCluster};
use crate::format::run::Step;
use crate::io::MAX_REQUEST;
use byteorder::{BigEndian, ByteOrder};

/// Changed tables are written in pieces of this many bytes, so that a flag does not cost a cluster.
const PIECE: usize = 4096;

/// Our limit for the entries of L2 tables that an L1 table names again: about a second.
const MAX_REPEATED_ENTRIES: u64 = 1 << 28;

/// What a walk found.
#[derive(Default)]
pub(crate) struct Walked {
    /// The L1 table with bit 63 as the counts demand, reserved bits cleared.
    pub(crate) l1: Vec<u64>,
    /// `l1` differs from what was walked.
    pub(crate) l1_changed: bool,
    /// L2 tables that remain and in which some bit 63 differs from what the counts demand.
    pub(crate) tables: Vec<Marked>,
    /// Some count is one now.
    pub(crate) ones: bool,
}

/// An L2 table that is to be rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Marked {
    pub(crate) offset: u64,
    /// What the last walk of the verb has seen, if it came by: the clusters' counts in the end.
    pub(crate) ones: Ones,
}

/// Which of the clusters that a table names have a count of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ones {
    All,
    None,
    /// Some, or not known: the counts must be looked at again.
    Some,
}

/// What counting one table came to.
#[derive(Default)]
struct Counted {
    /// The end of the last entry whose bit 63 changes, in bytes from the table's start.
    changed: Option<u64>,
    /// Some cluster's count is one now, and some cluster's is not.
    ones: bool,
    others: bool,
}

impl Replay {
    /// Walk `l1`, in QEMU's order: the clusters of an L2 table, then the table itself.
    pub(crate) fn walk(&mut self, dev: &mut Device, l1: &[u64], step: Step) -> Result<Walked> {
        let g = self.g;
        let mut out = Walked::default();
        out.l1
            .try_reserve_exact(l1.len())
            .map_err(|_| Error::NoMemory(l1.len() as u64 * 8))?;
        out.l1.extend_from_slice(l1);

        check_repeats(g, l1)?;
        let mut tables = TableReader::new(g, l1)?;
        for (index, slot) in out.l1.iter_mut().enumerate() {
            let old = *slot;
            if old == 0 {
                continue;
            }
            let offset = old & OFFSET_MASK;
            check_l2_offset(g, offset, index)?;
            // What is rewritten is the table on disk.
            let mut on_disk = true;
            let table = match changed_table(&self.tables, &self.temporary, offset) {
                Some(changed) => {
                    on_disk = false;
                    changed
                }
                // All zeros, however many the L1 names.
                None if dev.ends_before(offset)? => &[],
                None => tables.get(dev, index, offset)?,
            };
            let counted = count_table(&mut self.refs, dev, g, table, offset, step)?;
            out.ones |= counted.ones;

            let own = g.cluster_of(offset);
            let count = match step {
                Step::Look => self.refs.get(dev, own)?,
                _ => self.refs.bump(dev, own, step == Step::Up)?,
            };
            out.ones |= count == 1;
            if let Some(end) = counted.changed {
                // QEMU drops the first slice of a table that is freed, and writes the others.
                let slice = g.l2_slice_bytes(self.header.size);
                let freed = step == Step::Down && count == 0;
                if !freed || end > slice {
                    self.reach = self
                        .reach
                        .max(offset.saturating_add(end.div_ceil(slice) * slice));
                }
                if !freed {
                    self.overlap
                        .check(offset, g.cluster_size(), Some(Kind::ActiveL2))?;
                    let ones = match (counted.ones, counted.others) {
                        _ if step != Step::Look || !on_disk => Ones::Some,
                        (true, true) => Ones::Some,
                        (true, false) => Ones::All,
                        (false, _) => Ones::None,
                    };
                    out.tables.push(Marked { offset, ones });
                }
            }
            let new = offset | if count == 1 { COPIED } else { 0 };
            if new != old {
                *slot = new;
                out.l1_changed = true;
            }
        }
        Ok(out)
    }
}

/// An L1 table may name an L2 table twice: QEMU counts it twice. It may not do so a million times,
/// which would take hours.
pub(super) fn check_repeats(g: Geometry, l1: &[u64]) -> Result<()> {
    if (l1.len() as u64).saturating_mul(g.l2_entries()) <= MAX_REPEATED_ENTRIES {
        return Ok(());
    }
    let mut tables: Vec<u64> = Vec::new();
    tables
        .try_reserve_exact(l1.len())
        .map_err(|_| Error::NoMemory(l1.len() as u64 * 8))?;
    tables.extend(l1.iter().map(|e| e & OFFSET_MASK).filter(|o| *o != 0));
    tables.sort_unstable();
    let repeats = tables.windows(2).filter(|w| w[0] == w[1]).count() as u64;
    if repeats.saturating_mul(g.l2_entries()) > MAX_REPEATED_ENTRIES {
        return Err(Error::Corrupt(format!(
            "The L1 table names L2 tables {repeats} times more than there are"
        )));
    }
    Ok(())
}

/// An L2 table must be at a cluster boundary and not in the header's cluster.
fn check_l2_offset(g: Geometry, offset: u64, l1_index: usize) -> Result<()> {
    if g.in_cluster(offset) != 0 {
        return Err(Error::Corrupt(format!(
            "L2 table offset {offset:#x} unaligned (L1 index: {l1_index:#x})"
        )));
    }
    if offset == 0 {
        return Err(Error::Corrupt(format!(
            "L1 entry {l1_index:#x} has flags but no offset"
        )));
    }
    Ok(())
}

/// Count the clusters of one L2 table.
fn count_table(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    table: &[u8],
    offset: u64,
    step: Step,
) -> Result<Counted> {
    let size = g.l2_entry_size();
    let (mut at, mut all) = (0, Counted::default());
    while let Some(rest) = table.get(at..).filter(|r| !r.is_empty()) {
        let run = refs.count_run(dev, rest, step)?;
        all.ones |= run.ones;
        all.others |= run.others;
        if run.changed != 0 {
            all.changed = Some((at + run.changed * size) as u64);
        }
        at += run.entries * size;
        if run.entries == 0 {
            let old = BigEndian::read_u64(rest);
            let place = (offset, at / size);
            let count = count_entry(refs, dev, g, old, place, step, &mut all.ones)?;
            at += size;
            all.ones |= count == 1;
            // Flags of compressed clusters and of entries that name none do not hang on a count.
            let kind = entry::cluster(g, old & !COPIED);
            all.others |=
                count != 1 && matches!(kind, Cluster::Standard(_) | Cluster::ZeroAllocated(_));
            if (old & COPIED != 0) != (count == 1) {
                all.changed = Some(at as u64);
            }
        }
    }
    Ok(all)
}

/// Count what one entry refers to, of whatever kind it is. Returns the count that decides about its
/// bit 63. `place` names the entry in errors.
fn count_entry(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    entry: u64,
    place: (u64, usize),
    step: Step,
    ones: &mut bool,
) -> Result<u64> {
    let mut bump = |refs: &mut Refcounts, c: HostCluster| -> Result<u64> {
        let count = match step {
            Step::Look => return refs.get(dev, c),
            Step::Up => refs.bump(dev, c, true)?,
            Step::Down => refs.bump(dev, c, false)?,
        };
        *ones |= count == 1;
        Ok(count)
    };
    match entry::cluster(g, entry & !COPIED) {
        Cluster::Compressed { offset, length } if step != Step::Look => {
            let last = g.cluster_of(offset.saturating_add(length - 1)).0;
            for c in g.cluster_of(offset).0..=last {
                bump(refs, HostCluster(c))?;
            }
            Ok(2)
        }
        // Whatever its count, a compressed cluster is never written in place.
        Cluster::Compressed { .. } => Ok(2),
        Cluster::Standard(at) | Cluster::ZeroAllocated(at) => {
            if g.in_cluster(at) != 0 {
                let (table, index) = place;
                return Err(Error::Corrupt(format!(
                    "Cluster allocation offset {at:#x} unaligned (L2 offset: {table:#x}, L2 index: {index:#x})"
                )));
            }
            bump(refs, g.cluster_of(at))
        }
        Cluster::ZeroPlain | Cluster::Unallocated => Ok(0),
    }
}

/// May bit 63 be set when the tables are written?
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flags {
    /// Before the publish: only cleared.
    OnlyClear,
    /// After it: as the counts demand.
    AsCounted,
}

/// Which counts decide about bit 63.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counts {
    /// Those at the end of the verb.
    Final,
    /// Those at the first publish: create looks at its tables before it lets go of VM state.
    Published,
    /// None is one, as the walks have seen: nothing is COPIED.
    NoneIsOne,
    /// All of the table's are one, as the last walk has seen.
    AllAreOne,
}

/// Bit 63 of one L2 entry as the counts demand.
fn wanted(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    old: u64,
    counts: Counts,
) -> Result<bool> {
    let (Cluster::Standard(at) | Cluster::ZeroAllocated(at)) = entry::cluster(g, old & !COPIED)
    else {
        return Ok(false);
    };
    let count = match counts {
        Counts::Final => refs.get(dev, g.cluster_of(at))?,
        Counts::Published => refs.get_published(dev, g.cluster_of(at))?,
        Counts::NoneIsOne => 0,
        Counts::AllAreOne => 1,
    };
    Ok(count == 1)
}

/// Set or clear bit 63 in the entries of one table.
pub(crate) fn set_copied(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    table: &mut [u8],
    flags: Flags,
    counts: Counts,
) -> Result<bool> {
    let size = g.l2_entry_size();
    if counts == Counts::NoneIsOne {
        let mut changed = false;
        for word in table.chunks_exact_mut(size) {
            changed |= word[0] & 0x80 != 0;
            word[0] &= 0x7f;
        }
        return Ok(changed);
    }
    // Peaks are kept only where a verb publishes more than once.
    let runs = match counts {
        Counts::Final => true,
        Counts::Published => !refs.has_peaks(),
        Counts::NoneIsOne | Counts::AllAreOne => false,
    };
    let (mut at, mut changed) = (0, false);
    while let Some(rest) = table.get_mut(at..).filter(|r| !r.is_empty()) {
        if runs {
            let (entries, differs) = refs.copied_run(dev, rest, flags == Flags::OnlyClear)?;
            changed |= differs;
            at += entries * size;
            if entries != 0 {
                continue;
            }
        }
        let old = BigEndian::read_u64(rest);
        let copied = wanted(refs, dev, g, old, counts)?;
        if (old & COPIED != 0) != copied && (flags == Flags::AsCounted || !copied) {
            BigEndian::write_u64(rest, old ^ COPIED);
            changed = true;
        }
        at += size;
    }
    Ok(changed)
}

/// Write bit 63 of the entries of `tables` as the counts demand, which are looked at only where no
/// walk has said enough; changed 4 KiB pieces only,
/// adjacent ones in one request.
pub(crate) fn rewrite_tables(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    tables: &[Marked],
    flags: Flags,
    counts: Counts,
) -> Result<()> {
    let offsets: Vec<u64> = tables.iter().map(|t| t.offset).collect();
    let mut reader = TableReader::new(g, &offsets)?;
    let mut out = Pieces::new("L2 table");
    let mut new = Vec::new();
    for (index, Marked { offset, ones }) in tables.iter().copied().enumerate() {
        let table = reader.get(dev, index, offset)?;
        let counts = match ones {
            Ones::All => Counts::AllAreOne,
            Ones::None => Counts::NoneIsOne,
            Ones::Some => counts,
        };
        new.clear();
        new.extend_from_slice(table);
        if set_copied(refs, dev, g, &mut new, flags, counts)? {
            out.write_changes(dev, offset, table, &new)?;
        }
    }
    out.finish(dev)
}

/// Collects changed pieces and writes adjacent ones together.
pub(crate) struct Pieces {
    label: &'static str,
    offset: u64,
    data: Vec<u8>,
}

impl Pieces {
    pub(crate) fn new(label: &'static str) -> Pieces {
        Pieces {
            label,
            offset: 0,
            data: Vec::new(),
        }
    }

    /// Write the 4 KiB pieces in which `new` differs from `old`.
    pub(crate) fn write_changes(
        &mut self,
        dev: &mut Device,
        offset: u64,
        old: &[u8],
        new: &[u8],
    ) -> Result<()> {
        let mut at = offset;
        for (a, b) in old.chunks(PIECE).zip(new.chunks(PIECE)) {
            if a != b {
                self.push(dev, at, b)?;
            }
            at = at.saturating_add(b.len() as u64);
        }
        Ok(())
    }

    fn push(&mut self, dev: &mut Device, offset: u64, piece: &[u8]) -> Result<()> {
        let adjacent = self.offset.saturating_add(self.data.len() as u64) == offset;
        if !adjacent || self.data.len() + piece.len() > MAX_REQUEST {
            self.finish(dev)?;
            self.offset = offset;
        }
        self.data.extend_from_slice(piece);
        Ok(())
    }

    /// Write what is left.
    pub(crate) fn finish(&mut self, dev: &mut Device) -> Result<()> {
        if !self.data.is_empty() {
            dev.write(self.label, self.offset, &self.data)?;
            self.data.clear();
        }
        Ok(())
    }
}

/// Reads the L2 tables of an L1 in order, neighbours in the file in one request.
struct TableReader<'a> {
    g: Geometry,
    l1: &'a [u64],
    /// Tables `first..first + n` of `l1` are in `buf`, one behind the other.
    first: usize,
    n: usize,
    buf: Vec<u8>,
}

impl<'a> TableReader<'a> {
    fn new(g: Geometry, l1: &'a [u64]) -> Result<TableReader<'a>> {
        Ok(TableReader {
            g,
            l1,
            first: 0,
            n: 0,
            buf: Vec::new(),
        })
    }

    /// The table at `offset`, which `l1[index]` names.
    fn get(&mut self, dev: &mut Device, index: usize, offset: u64) -> Result<&[u8]> {
        let cs = self.g.cluster_len();
        if !(self.first..self.first + self.n).contains(&index) {
            let most = (MAX_REQUEST / cs).max(1);
            let mut next = offset;
            let ahead = self.l1.iter().skip(index).take(most);
            let n = ahead
                .take_while(|e| {
                    let here = **e & OFFSET_MASK == next;
                    next = next.saturating_add(cs as u64);
                    here
                })
                .count()
                .max(1);
            let bytes = n * cs;
            if self.buf.len() < bytes {
                self.buf = super::device::zeroed(bytes as u64)?;
            }
            self.n = 0;
            dev.read("Could not read an L2 table", offset, &mut self.buf[..bytes])?;
            (self.first, self.n) = (index, n);
        }
        let at = (index - self.first) * cs;
        Ok(&self.buf[at..at + cs])
    }
}
