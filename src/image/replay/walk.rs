//! **The** traversal of everything that an L1 table reaches
//! (QEMU's `qcow2_update_snapshot_refcount`).
//!
//! [`Replay::walk`] looks: it counts in memory, checks what it meets and notes which L2 tables
//! would change. Those are written later, when the counts are final (`plan::passes`).

use super::overlap::Protected;
use super::Replay;
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, COPIED, OFFSET_MASK};
use crate::format::geometry::{Geometry, HostCluster};
use crate::format::run::Tally;
use crate::image::device::Device;
use crate::image::refcount::Refcounts;
use crate::image::room;
use crate::image::tables::{self, Reader};
use byteorder::{BigEndian, ByteOrder};

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
    /// L2 tables that nothing names any more.
    pub(crate) freed: u64,
}

/// L2 tables to go through.
#[derive(Clone, Copy)]
pub(crate) struct Tables<'a> {
    /// Where they are, as an L1 table says it.
    pub(crate) words: &'a [u64],
    /// What to count of each; without it all of it, once.
    pub(crate) shares: &'a [Share],
}

/// What is counted of an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) part: Part,
    /// How often, where it is taken away.
    pub(crate) times: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// The table and what it names.
    All,
    /// The table and what its first entries name, so many.
    Before(u32),
    /// What those behind them name.
    Behind(u32),
}

impl<'a> Tables<'a> {
    /// Those that an L1 table names.
    pub(crate) fn of(l1: &'a [u64]) -> Tables<'a> {
        Tables {
            words: l1,
            shares: &[],
        }
    }

    fn share(&self, index: usize) -> Share {
        self.shares.get(index).copied().unwrap_or(Share {
            part: Part::All,
            times: 1,
        })
    }
}

impl Part {
    /// These entries of the table.
    fn of(self, table: &[u8], entry_size: usize) -> &[u8] {
        let at = |entries: u32| (entries as usize * entry_size).min(table.len());
        match self {
            Part::All => table,
            Part::Before(n) => table.get(..at(n)).unwrap_or_default(),
            Part::Behind(n) => table.get(at(n)..).unwrap_or_default(),
        }
    }
}

/// An L2 table that is to be rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Marked {
    pub(crate) offset: u64,
    pub(crate) flags: Flags,
}

/// What decides about bit 63 of the entries of a table when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Flags {
    /// Nothing: the last walk has seen that all the clusters it names have a count of one.
    AllAreOne,
    /// Nothing: the walks have seen that none has.
    NoneIsOne,
    /// The counts at the end of the verb.
    Final,
    /// The counts at the first publish: create looks at its tables before it lets go of VM state.
    Published,
}

impl Flags {
    /// Must counts be looked at again?
    pub(crate) fn need_counts(self) -> bool {
        matches!(self, Flags::Final | Flags::Published)
    }
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
    pub(crate) fn walk(&mut self, dev: &mut Device, l1: &[u64], tally: Tally) -> Result<Walked> {
        self.walk_tables(dev, Tables::of(l1), tally)
    }

    /// Walk these tables, in their order.
    pub(crate) fn walk_tables(
        &mut self,
        dev: &mut Device,
        named: Tables<'_>,
        tally: Tally,
    ) -> Result<Walked> {
        let g = self.g;
        let mut out = Walked {
            l1: room::copy_of(named.words)?,
            ..Walked::default()
        };

        check_repeats(g, named.words)?;
        self.refs.begin_walk();
        let mut tables = Reader::new(g, tables::Source::L2Tables, named.words);
        for index in 0..named.words.len() {
            if self.refs.thrashes(g.l2_entries()) {
                self.walk_in_windows(dev, named, index, tally, &mut out)?;
                break;
            }
            let counted = self.count_table(dev, &mut tables, index, named.share(index), tally)?;
            self.note(&mut out, index, counted, tally)?;
        }
        Ok(out)
    }

    /// Look at what `l1` reaches when all counts are final, as [`Replay::walk`] does. Tables that
    /// `counted`, which has just been walked, names at the same place are not read again: which of
    /// their flags change is found out when they are written.
    pub(crate) fn look(&mut self, dev: &mut Device, l1: &[u64], counted: &[u64]) -> Result<Walked> {
        let same = |(a, b): (&u64, &u64)| (a ^ b) & OFFSET_MASK == 0;
        let shared = l1.iter().zip(counted).filter(|pair| same(*pair));
        if self.refs.jumped() || shared.count() == 0 {
            return self.walk(dev, l1, Tally::Look);
        }
        let g = self.g;
        let mut out = Walked {
            l1: room::copy_of(l1)?,
            ..Walked::default()
        };
        check_repeats(g, l1)?;
        self.refs.begin_walk();
        let mut tables = Reader::new(g, tables::Source::L2Tables, l1);
        for (index, entry) in l1.iter().enumerate() {
            let known = counted.get(index).is_some_and(|c| same((entry, c)));
            if known && self.is_sound(dev, entry & OFFSET_MASK)? {
                dev.progress.step(g.cluster_size())?;
                self.note_known(dev, &mut out, index)?;
            } else {
                let share = Tables::of(l1).share(index);
                let counted = self.count_table(dev, &mut tables, index, share, Tally::Look)?;
                self.note(&mut out, index, counted, Tally::Look)?;
            }
        }
        Ok(out)
    }

    /// Can the L2 table at `offset` be written, whatever is in it, without an error or a longer file?
    fn is_sound(&mut self, dev: &mut Device, offset: u64) -> Result<bool> {
        let own = self.g.cluster_of(offset);
        let protected =
            self.overlap
                .check(offset, self.g.cluster_size(), Some(Protected::ActiveL2));
        Ok(offset != 0
            && offset.saturating_add(self.g.cluster_size()) <= self.reach
            && protected.is_ok()
            && !self.refs.fates.is_taken(own.0)
            && self.refs.get(dev, own)? != 0)
    }

    /// [`Replay::note`] for a table whose entries are looked at when it is written.
    fn note_known(&mut self, dev: &mut Device, out: &mut Walked, index: usize) -> Result<()> {
        let Some(slot) = out.l1.get_mut(index) else {
            return Ok(());
        };
        let offset = *slot & OFFSET_MASK;
        let flags = Flags::Final;
        room::push(&mut out.tables, Marked { offset, flags })?;
        let one = self.refs.get(dev, self.g.cluster_of(offset))? == 1;
        let new = offset | if one { COPIED } else { 0 };
        out.l1_changed |= new != *slot;
        *slot = new;
        Ok(())
    }

    /// The rest of a walk, from `first` on, where the refcount blocks do not fit in memory: once for
    /// each part of them that does.
    fn walk_in_windows(
        &mut self,
        dev: &mut Device,
        named: Tables<'_>,
        first: usize,
        tally: Tally,
        out: &mut Walked,
    ) -> Result<()> {
        let n = named.words.len() - first;
        let mut all = room::filled(n, Counted::default())?;
        for window in self.refs.windows()? {
            self.refs.enter_window(window)?;
            let mut tables = Reader::new(self.g, tables::Source::L2Tables, named.words);
            for (index, counted) in (first..).zip(&mut all) {
                let share = named.share(index);
                counted.add(self.count_table(dev, &mut tables, index, share, tally)?);
            }
        }
        self.refs.leave_windows();
        for (index, counted) in (first..).zip(all) {
            self.note(out, index, counted, tally)?;
        }
        Ok(())
    }

    /// Count what the L2 table at `index` of the L1 refers to, and the table itself.
    fn count_table(
        &mut self,
        dev: &mut Device,
        tables: &mut Reader,
        index: usize,
        share: Share,
        tally: Tally,
    ) -> Result<Counted> {
        let g = self.g;
        let tally = match tally {
            Tally::Down(_) => Tally::Down(share.times),
            other => other,
        };
        let entry = tables.list().get(index).copied().unwrap_or(0);
        if entry == 0 {
            return Ok(Counted::default());
        }
        dev.progress.step(g.cluster_size())?;
        let offset = entry & OFFSET_MASK;
        check_l2_offset(g, offset, index)?;
        // What is rewritten is the table on disk.
        let changed = self.remade.get(g, offset);
        let table = match changed {
            Some(changed) => changed,
            // All zeros, however many the L1 names.
            None if dev.ends_before(offset)? => &[],
            None => tables.get(dev, index)?,
        };
        let table = share.part.of(table, g.l2_entry_size());
        let mut counted = count_entries(&mut self.refs, dev, g, table, offset, tally)?;
        counted.in_memory = changed.is_some();
        if matches!(share.part, Part::Behind(_)) {
            counted.own = Some(Own::More);
            return Ok(counted);
        }

        let own = g.cluster_of(offset);
        if !self.refs.outside(g.reftable_index(own)) {
            counted.own = Some(match self.refs.tally(dev, own, tally)? {
                0 => Own::None,
                1 => Own::One,
                _ => Own::More,
            });
        }
        Ok(counted)
    }

    /// Note what counting the table at `index` means for it and for its entry in the L1.
    fn note(
        &mut self,
        out: &mut Walked,
        index: usize,
        counted: Counted,
        tally: Tally,
    ) -> Result<()> {
        let g = self.g;
        let Some(slot) = out.l1.get_mut(index).filter(|entry| **entry != 0) else {
            return Ok(());
        };
        let offset = *slot & OFFSET_MASK;
        // Each table has been counted, in one window or another.
        let own = counted.own.unwrap_or(Own::None);
        out.ones |= counted.ones || own == Own::One;
        out.freed += u64::from(own == Own::None);
        if counted.changed != 0 {
            // QEMU drops the first slice of a table that is freed, and writes the others.
            let (end, slice) = (counted.changed.into(), g.l2_slice_bytes(self.meaning.size));
            let freed = matches!(tally, Tally::Down(_)) && own == Own::None;
            if !freed || end > slice {
                self.reach = self
                    .reach
                    .max(offset.saturating_add(u64::div_ceil(end, slice) * slice));
            }
            if !freed {
                self.overlap
                    .check(offset, g.cluster_size(), Some(Protected::ActiveL2))?;
                let flags = match (counted.ones, counted.others) {
                    _ if tally != Tally::Look || counted.in_memory => Flags::Final,
                    (true, true) => Flags::Final,
                    (true, false) => Flags::AllAreOne,
                    (false, _) => Flags::NoneIsOne,
                };
                room::push(&mut out.tables, Marked { offset, flags })?;
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
pub(crate) fn check_l2_offset(g: Geometry, offset: u64, l1_index: usize) -> Result<()> {
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
    tally: Tally,
) -> Result<Counted> {
    let size = g.l2_entry_size();
    let (mut at, mut all) = (0, Counted::default());
    while let Some(rest) = table.get(at..).filter(|r| !r.is_empty()) {
        let run = refs.count_run(dev, rest, tally)?;
        all.ones |= run.ones;
        all.others |= run.others;
        if run.changed != 0 {
            all.changed = (at + run.changed * size) as u32;
        }
        at += run.entries * size;
        if run.entries == 0 {
            let old = BigEndian::read_u64(rest);
            let place = (offset, at / size);
            let count = count_entry(refs, dev, g, old, place, tally, &mut all.ones)?;
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
    tally: Tally,
    ones: &mut bool,
) -> Result<Option<u64>> {
    let mut bump = |refs: &mut Refcounts, c: HostCluster| -> Result<Option<u64>> {
        if refs.outside(g.reftable_index(c)) {
            return Ok(None);
        }
        let count = refs.tally(dev, c, tally)?;
        *ones |= count == 1;
        Ok(Some(count))
    };
    match entry::cluster(g, entry & !COPIED) {
        Cluster::Compressed { offset, length } if tally != Tally::Look => {
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

/// Bit 63 of one L2 entry as `flags` demands; none where the cluster is passed over for now.
fn wanted(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    old: u64,
    flags: Flags,
) -> Result<Option<bool>> {
    let (Cluster::Standard(at) | Cluster::ZeroAllocated(at)) = entry::cluster(g, old & !COPIED)
    else {
        return Ok(Some(false));
    };
    if refs.outside(g.reftable_index(g.cluster_of(at))) {
        return Ok(None);
    }
    let count = match flags {
        Flags::Final => refs.get(dev, g.cluster_of(at))?,
        Flags::Published => refs.get_published(dev, g.cluster_of(at))?,
        Flags::NoneIsOne => 0,
        Flags::AllAreOne => 1,
    };
    Ok(Some(count == 1))
}

/// Clear bit 63 in the entries of a table, or a part of one, and with `set` also set it, as `flags`
/// demands. Has anything changed?
pub(crate) fn set_copied(
    refs: &mut Refcounts,
    dev: &mut Device,
    g: Geometry,
    table: &mut [u8],
    flags: Flags,
    set: bool,
) -> Result<bool> {
    let size = g.l2_entry_size();
    if flags == Flags::NoneIsOne {
        let mut changed = false;
        for word in table.chunks_exact_mut(size) {
            changed |= word[0] & 0x80 != 0;
            word[0] &= 0x7f;
        }
        return Ok(changed);
    }
    if flags == Flags::AllAreOne && set {
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
    let runs = match flags {
        Flags::Final => true,
        Flags::Published => !refs.has_peaks(),
        Flags::NoneIsOne | Flags::AllAreOne => false,
    };
    let (mut at, mut changed) = (0, false);
    while let Some(rest) = table.get_mut(at..).filter(|r| !r.is_empty()) {
        if runs {
            let (entries, differs) = refs.copied_run(dev, rest, !set)?;
            changed |= differs;
            at += entries * size;
            if entries != 0 {
                continue;
            }
        }
        let old = BigEndian::read_u64(rest);
        let copied = wanted(refs, dev, g, old, flags)?;
        at += size;
        let Some(copied) = copied else {
            continue;
        };
        if (old & COPIED != 0) != copied && (set || !copied) {
            BigEndian::write_u64(rest, old ^ COPIED);
            changed = true;
        }
    }
    Ok(changed)
}
