//! **The** traversal of everything that an L1 table reaches
//! (QEMU's `qcow2_update_snapshot_refcount`).
//!
//! [`Replay::walk`] looks: it counts in memory, checks what it meets and notes which L2 tables
//! would change. [`rewrite_tables`] writes those tables later, when the counts are final.

use super::device::Device;
use super::overlap::Kind;
use super::refcount::Refcounts;
use super::replay::{changed_table, Replay};
use super::room;
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, COPIED, OFFSET_MASK};
use crate::format::geometry::{Geometry, HostCluster};
use crate::format::run::Step;
use crate::io::MAX_REQUEST;
use byteorder::{BigEndian, ByteOrder};

/// Changed tables are written in pieces of this many bytes, so that a flag does not cost a cluster.
pub(crate) const PIECE: usize = 4096;

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

/// What counting one table, or the part of it that is counted now, came to.
#[derive(Clone, Copy, Default)]
struct Counted {
    /// The end of the last entry whose bit 63 changes, in bytes from the table's start; 0: none.
    changed: u32,
    /// Some cluster's count is one now, and some cluster's is not.
    ones: bool,
    others: bool,
    /// The table's own count, once that is known.
    own: Option<Own>,
    /// The contents differ from what is on the disk.
    in_memory: bool,
}

/// What an L2 table's own count is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Own {
    None,
    One,
    More,
}

impl Counted {
    /// Take in what another part of the same table came to.
    fn add(&mut self, part: Counted) {
        self.changed = self.changed.max(part.changed);
        self.ones |= part.ones;
        self.others |= part.others;
        self.own = self.own.or(part.own);
        self.in_memory |= part.in_memory;
    }
}

impl Replay {
    /// Walk `l1`, in QEMU's order: the clusters of an L2 table, then the table itself.
    pub(crate) fn walk(&mut self, dev: &mut Device, l1: &[u64], step: Step) -> Result<Walked> {
        let g = self.g;
        let mut out = Walked {
            l1: room::copy_of(l1)?,
            ..Walked::default()
        };

        check_repeats(g, l1)?;
        self.refs.begin_walk();
        let mut tables = TableReader::new(g, l1)?;
        for index in 0..l1.len() {
            if self.refs.thrashes(g.l2_entries()) {
                self.walk_in_windows(dev, l1, index, step, &mut out)?;
                break;
            }
            let counted = self.count_table(dev, &mut tables, index, step)?;
            self.note(&mut out, index, counted, step)?;
        }
        Ok(out)
    }

    /// The rest of a walk, from `first` on, where the refcount blocks do not fit in memory: once for
    /// each part of them that does.
    fn walk_in_windows(
        &mut self,
        dev: &mut Device,
        l1: &[u64],
        first: usize,
        step: Step,
        out: &mut Walked,
    ) -> Result<()> {
        let n = l1.len() - first;
        let mut all = room::filled(n, Counted::default())?;
        for window in self.refs.windows()? {
            self.refs.enter_window(window)?;
            let mut tables = TableReader::new(self.g, l1)?;
            for (index, counted) in (first..).zip(&mut all) {
                counted.add(self.count_table(dev, &mut tables, index, step)?);
            }
        }
        self.refs.leave_windows();
        for (index, counted) in (first..).zip(all) {
            self.note(out, index, counted, step)?;
        }
        Ok(())
    }

    /// Count what the L2 table at `index` of the L1 refers to, and the table itself.
    fn count_table(
        &mut self,
        dev: &mut Device,
        tables: &mut TableReader,
        index: usize,
        step: Step,
    ) -> Result<Counted> {
        let g = self.g;
        let entry = tables.l1.get(index).copied().unwrap_or(0);
        if entry == 0 {
            return Ok(Counted::default());
        }
        dev.progress.step(g.cluster_size())?;
        let offset = entry & OFFSET_MASK;
        check_l2_offset(g, offset, index)?;
        // What is rewritten is the table on disk.
        let changed = changed_table(g, &self.tables, &self.zero_tables, offset);
        let table = match changed {
            Some(changed) => changed,
            // All zeros, however many the L1 names.
            None if dev.ends_before(offset)? => &[],
            None => tables.get(dev, index, offset)?,
        };
        let mut counted = count_entries(&mut self.refs, dev, g, table, offset, step)?;
        counted.in_memory = changed.is_some();

        let own = g.cluster_of(offset);
        if !self.refs.outside(g.reftable_index(own)) {
            let count = match step {
                Step::Look => self.refs.get(dev, own)?,
                _ => self.refs.bump(dev, own, step == Step::Up)?,
            };
            counted.own = Some(match count {
                0 => Own::None,
                1 => Own::One,
                _ => Own::More,
            });
        }
        Ok(counted)
    }

    /// Note what counting the table at `index` means for it and for its entry in the L1.
    fn note(&mut self, out: &mut Walked, index: usize, counted: Counted, step: Step) -> Result<()> {
        let g = self.g;
        let Some(slot) = out.l1.get_mut(index).filter(|entry| **entry != 0) else {
            return Ok(());
        };
        let offset = *slot & OFFSET_MASK;
        // Each table has been counted, in one window or another.
        let own = counted.own.unwrap_or(Own::None);
        out.ones |= counted.ones || own == Own::One;
        if counted.changed != 0 {
            // QEMU drops the first slice of a table that is freed, and writes the others.
            let (end, slice) = (counted.changed.into(), g.l2_slice_bytes(self.header.size));
            let freed = step == Step::Down && own == Own::None;
            if !freed || end > slice {
                self.reach = self
                    .reach
                    .max(offset.saturating_add(u64::div_ceil(end, slice) * slice));
            }
            if !freed {
                self.overlap
                    .check(offset, g.cluster_size(), Some(Kind::ActiveL2))?;
                let ones = match (counted.ones, counted.others) {
                    _ if step != Step::Look || counted.in_memory => Ones::Some,
                    (true, true) => Ones::Some,
                    (true, false) => Ones::All,
                    (false, _) => Ones::None,
                };
                room::push(&mut out.tables, Marked { offset, ones })?;
            }
        }
        let new = offset | if own == Own::One { COPIED } else { 0 };
        if new != *slot {
            *slot = new;
            out.l1_changed = true;
        }
        Ok(())
    }
}

/// An L1 table may name an L2 table twice: QEMU counts it twice. It may not do so a million times,
/// which would take hours.
pub(crate) fn check_repeats(g: Geometry, l1: &[u64]) -> Result<()> {
    if (l1.len() as u64).saturating_mul(g.l2_entries()) <= MAX_REPEATED_ENTRIES {
        return Ok(());
    }
    let named = l1.iter().map(|e| e & OFFSET_MASK).filter(|o| *o != 0);
    let mut tables = room::collected(named)?;
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
fn count_entries(
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
            all.changed = (at + run.changed * size) as u32;
        }
        at += run.entries * size;
        if run.entries == 0 {
            let old = BigEndian::read_u64(rest);
            let place = (offset, at / size);
            let count = count_entry(refs, dev, g, old, place, step, &mut all.ones)?;
            at += size;
            let Some(count) = count else {
                continue;
            };
            all.ones |= count == 1;
            // Flags of compressed clusters and of entries that name none do not hang on a count.
            let kind = entry::cluster(g, old & !COPIED);
            all.others |=
                count != 1 && matches!(kind, Cluster::Standard(_) | Cluster::ZeroAllocated(_));
            if (old & COPIED != 0) != (count == 1) {
                all.changed = at as u32;
            }
        }
    }
    Ok(all)
}

/// Count what one entry refers to, of whatever kind it is. Returns the count that decides about its
/// bit 63; none where that cluster is passed over for now. `place` names the entry in errors.
fn count_entry(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    entry: u64,
    place: (u64, usize),
    step: Step,
    ones: &mut bool,
) -> Result<Option<u64>> {
    let mut bump = |refs: &mut Refcounts, c: HostCluster| -> Result<Option<u64>> {
        if refs.outside(g.reftable_index(c)) {
            return Ok(None);
        }
        let count = match step {
            Step::Look => return refs.get(dev, c).map(Some),
            Step::Up => refs.bump(dev, c, true)?,
            Step::Down => refs.bump(dev, c, false)?,
        };
        *ones |= count == 1;
        Ok(Some(count))
    };
    match entry::cluster(g, entry & !COPIED) {
        Cluster::Compressed { offset, length } if step != Step::Look => {
            let last = g.cluster_of(offset.saturating_add(length - 1)).0;
            for c in g.cluster_of(offset).0..=last {
                bump(refs, HostCluster(c))?;
            }
            Ok(Some(2))
        }
        // Whatever its count, a compressed cluster is never written in place.
        Cluster::Compressed { .. } => Ok(Some(2)),
        Cluster::Standard(at) | Cluster::ZeroAllocated(at) => {
            if g.in_cluster(at) != 0 {
                let (table, index) = place;
                return Err(Error::Corrupt(format!(
                    "Cluster allocation offset {at:#x} unaligned (L2 offset: {table:#x}, L2 index: {index:#x})"
                )));
            }
            bump(refs, g.cluster_of(at))
        }
        Cluster::ZeroPlain | Cluster::Unallocated => Ok(Some(0)),
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

/// Bit 63 of one L2 entry as the counts demand; none where the cluster is passed over for now.
fn wanted(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    old: u64,
    counts: Counts,
) -> Result<Option<bool>> {
    let (Cluster::Standard(at) | Cluster::ZeroAllocated(at)) = entry::cluster(g, old & !COPIED)
    else {
        return Ok(Some(false));
    };
    if refs.outside(g.reftable_index(g.cluster_of(at))) {
        return Ok(None);
    }
    let count = match counts {
        Counts::Final => refs.get(dev, g.cluster_of(at))?,
        Counts::Published => refs.get_published(dev, g.cluster_of(at))?,
        Counts::NoneIsOne => 0,
        Counts::AllAreOne => 1,
    };
    Ok(Some(count == 1))
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
    if counts == Counts::AllAreOne && flags == Flags::AsCounted {
        let mut changed = false;
        for word in table.chunks_exact_mut(size) {
            let old = BigEndian::read_u64(word);
            let new = if entry::is_counted(old) {
                old | COPIED
            } else {
                old & !COPIED
            };
            changed |= new != old;
            BigEndian::write_u64(word, new);
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
        at += size;
        let Some(copied) = copied else {
            continue;
        };
        if (old & COPIED != 0) != copied && (flags == Flags::AsCounted || !copied) {
            BigEndian::write_u64(rest, old ^ COPIED);
            changed = true;
        }
    }
    Ok(changed)
}

/// Write bit 63 of the entries of `tables` as the counts demand, which are looked at only where no
/// walk has said enough. Where a walk went in windows, so does this.
pub(crate) fn rewrite_tables(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    tables: &[Marked],
    flags: Flags,
    counts: Counts,
) -> Result<()> {
    if counts == Counts::NoneIsOne || !refs.jumped() {
        return rewrite_part(refs, dev, g, tables, flags, counts);
    }
    let these = |some| {
        let tables = tables.iter().copied();
        room::collected(tables.filter(move |t| (t.ones == Ones::Some) == some))
    };
    rewrite_part(refs, dev, g, &these(false)?, flags, counts)?;
    let some = these(true)?;
    if some.is_empty() {
        return Ok(());
    }
    for window in refs.windows()? {
        refs.enter_window(window)?;
        rewrite_part(refs, dev, g, &some, flags, counts)?;
    }
    refs.leave_windows();
    Ok(())
}

/// [`rewrite_tables`] as far as entries are not passed over; changed 4 KiB pieces only, adjacent ones
/// in one request.
fn rewrite_part(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    tables: &[Marked],
    flags: Flags,
    counts: Counts,
) -> Result<()> {
    let offsets = room::collected(tables.iter().map(|t| t.offset))?;
    let mut reader = TableReader::new(g, &offsets)?;
    let mut out = Pieces::new("L2 table");
    let mut new = Vec::new();
    for (index, Marked { offset, ones }) in tables.iter().copied().enumerate() {
        dev.progress.step(g.cluster_size())?;
        let table = reader.get(dev, index, offset)?;
        let counts = match ones {
            Ones::All => Counts::AllAreOne,
            Ones::None => Counts::NoneIsOne,
            Ones::Some => counts,
        };
        new.clear();
        room::append(&mut new, table)?;
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

    pub(crate) fn push(&mut self, dev: &mut Device, offset: u64, piece: &[u8]) -> Result<()> {
        let adjacent = self.offset.saturating_add(self.data.len() as u64) == offset;
        if !adjacent || self.data.len() + piece.len() > MAX_REQUEST {
            self.finish(dev)?;
            self.offset = offset;
        }
        room::append(&mut self.data, piece)
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
    /// Tables before this one of `l1` have been asked for.
    asked: usize,
}

/// What is asked for ahead of the table that is read, in bytes: disks serve many requests at once.
const AHEAD: usize = 4 << 20;

impl<'a> TableReader<'a> {
    fn new(g: Geometry, l1: &'a [u64]) -> Result<TableReader<'a>> {
        Ok(TableReader {
            g,
            l1,
            first: 0,
            n: 0,
            buf: Vec::new(),
            asked: 0,
        })
    }

    /// Let the storage begin to fetch the tables behind the next `n` from `index` on, each once. Between
    /// two tables lie the data of half a gigabyte, so the system does not see a reader in sequence.
    fn ask_ahead(&mut self, dev: &mut Device, index: usize, n: usize) {
        let cs = self.g.cluster_size();
        self.asked = self.asked.max(index + n);
        let until = (index + n).saturating_add(AHEAD / self.g.cluster_len());
        let (mut from, mut bytes) = (0, 0);
        let next = self.l1.iter().take(until).skip(self.asked);
        for offset in next.map(|e| e & OFFSET_MASK).filter(|o| *o != 0) {
            if bytes != 0 && (from + bytes != offset || bytes >= 1 << 20) {
                dev.will_read(from, bytes);
                bytes = 0;
            }
            if bytes == 0 {
                from = offset;
            }
            bytes += cs;
        }
        if bytes != 0 {
            dev.will_read(from, bytes);
        }
        self.asked = self.asked.max(until);
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
            self.ask_ahead(dev, index, n);
            dev.read("Could not read an L2 table", offset, &mut self.buf[..bytes])?;
            (self.first, self.n) = (index, n);
        }
        let at = (index - self.first) * cs;
        Ok(&self.buf[at..at + cs])
    }
}
