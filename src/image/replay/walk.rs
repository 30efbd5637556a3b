//! **The** traversal of everything that an L1 table reaches
//! (QEMU's `qcow2_update_snapshot_refcount`).
//!
//! [`Replay::walk`] looks: it counts in memory, checks what it meets and notes which L2 tables
//! would change. Those are written later, when the counts are final (`plan::passes`).

use super::named::{check_l2_offset, check_repeats, Named, Part, Share};
use super::overlap::Protected;
use super::Replay;
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, COPIED, OFFSET_MASK};
use crate::format::geometry::HostCluster;
use crate::format::run::Tally;
use crate::image::device::Device;
use crate::image::refcount::Refcounts;
use crate::image::room;
use crate::image::tables::{self, Reader};
use byteorder::{BigEndian, ByteOrder};

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

/// What counting one table came to.
#[derive(Clone, Copy, Default)]
struct Counted {
    /// The end of the last entry whose bit 63 changes, in bytes from the table's start; 0: none.
    changed: u32,
    /// Some cluster's count is one now, and some cluster's is not.
    ones: bool,
    others: bool,
    /// The table's own count.
    own: u64,
    /// The contents differ from what is on the disk.
    in_memory: bool,
}

impl Replay {
    /// Walk `l1`, in QEMU's order: the clusters of an L2 table, then the table itself.
    pub(crate) fn walk(&mut self, dev: &mut Device, l1: &[u64], tally: Tally) -> Result<Walked> {
        self.walk_tables(dev, &Named::of(l1), tally)
    }

    /// Walk these tables, in their order.
    pub(crate) fn walk_tables(
        &mut self,
        dev: &mut Device,
        named: &Named<'_>,
        tally: Tally,
    ) -> Result<Walked> {
        self.walk_but(dev, named, tally, &[])
    }

    /// Look at what `l1` reaches when all counts are final, as [`Replay::walk`] does. Tables that
    /// `counted`, which has just been walked, names at the same place are not read again: which of
    /// their flags change is found out when they are written.
    pub(crate) fn look(&mut self, dev: &mut Device, l1: &[u64], counted: &[u64]) -> Result<Walked> {
        self.walk_but(dev, &Named::of(l1), Tally::Look, counted)
    }

    fn walk_but(
        &mut self,
        dev: &mut Device,
        named: &Named<'_>,
        tally: Tally,
        counted: &[u64],
    ) -> Result<Walked> {
        let mut out = Walked {
            l1: room::copy_of(&named.words)?,
            ..Walked::default()
        };
        check_repeats(self.g, &named.words)?;
        let mut tables = Reader::new(dev, self.g, tables::Source::L2Tables, &named.words);
        for (index, word) in named.words.iter().enumerate() {
            let same = |c: &&u64| (**c ^ word) & OFFSET_MASK == 0;
            let mut known = None;
            if counted.get(index).filter(same).is_some() {
                known = self.known(dev, word & OFFSET_MASK)?;
            }
            let counted = match known {
                Some(known) => known,
                None => self.count_table(dev, &mut tables, index, named.share(index), tally)?,
            };
            self.note(&mut out, index, counted, tally)?;
        }
        tables.give_back(dev);
        Ok(out)
    }

    /// What is known of an L2 table that was just counted: it is to be written, if it can be, whatever
    /// is in it, without an error or a longer file.
    fn known(&mut self, dev: &mut Device, offset: u64) -> Result<Option<Counted>> {
        let (g, own) = (self.g, self.g.cluster_of(offset));
        let of_table = Some(Protected::ActiveL2);
        if offset == 0
            || offset.saturating_add(g.cluster_size()) > self.refs.reach
            || self
                .overlap
                .check(offset, g.cluster_size(), of_table)
                .is_err()
            || self.refs.fates.is_taken(own.0)
        {
            return Ok(None);
        }
        let count = self.refs.get(dev, own)?;
        if count == 0 {
            return Ok(None);
        }
        dev.progress.step(g.cluster_size())?;
        Ok(Some(Counted {
            changed: g.cluster_size() as u32,
            ones: true,
            others: true,
            own: count,
            in_memory: false,
        }))
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
        let mut counted = count_entries(&mut self.refs, dev, table, offset, tally)?;
        counted.in_memory = changed.is_some();
        counted.own = match share.part {
            // Counted with the part before it.
            Part::Behind(_) => 2,
            _ => self.refs.tally(dev, g.cluster_of(offset), tally)?,
        };
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
        out.ones |= counted.ones || counted.own == 1;
        out.freed += u64::from(counted.own == 0);
        if counted.changed != 0 {
            // QEMU drops the first slice of a table that is freed, and writes the others.
            let (end, slice) = (counted.changed.into(), g.l2_slice_bytes(self.meaning.size));
            let freed = matches!(tally, Tally::Down(_)) && counted.own == 0;
            if !freed || end > slice {
                let end = u64::div_ceil(end, slice) * slice;
                self.refs.reach_to(offset.saturating_add(end));
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
        let new = offset | if counted.own == 1 { COPIED } else { 0 };
        if new != *slot {
            *slot = new;
            out.l1_changed = true;
        }
        Ok(())
    }
}

/// Count the clusters of one L2 table.
fn count_entries(
    refs: &mut Refcounts,
    dev: &mut Device,
    table: &[u8],
    offset: u64,
    tally: Tally,
) -> Result<Counted> {
    let size = refs.geometry().l2_entry_size();
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
            let count = count_entry(refs, dev, old, place, tally, &mut all.ones)?;
            at += size;
            all.ones |= count == 1;
            // Flags of compressed clusters and of entries that name none do not hang on a count.
            let kind = entry::cluster(refs.geometry(), old & !COPIED);
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
/// bit 63. `place` names the entry in errors.
fn count_entry(
    refs: &mut Refcounts,
    dev: &mut Device,
    entry: u64,
    place: (u64, usize),
    tally: Tally,
    ones: &mut bool,
) -> Result<u64> {
    let g = refs.geometry();
    let mut bump = |c: HostCluster| -> Result<u64> {
        let count = refs.tally(dev, c, tally)?;
        *ones |= count == 1;
        Ok(count)
    };
    match entry::cluster(g, entry & !COPIED) {
        Cluster::Compressed { offset, length } if tally != Tally::Look => {
            let last = g.cluster_of(offset.saturating_add(length - 1)).0;
            for c in g.cluster_of(offset).0..=last {
                bump(HostCluster(c))?;
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
            bump(g.cluster_of(at))
        }
        Cluster::ZeroPlain | Cluster::Unallocated => Ok(0),
    }
}

/// Bit 63 of one L2 entry as `flags` demands.
fn wanted(refs: &mut Refcounts, dev: &mut Device, old: u64, flags: Flags) -> Result<bool> {
    let g = refs.geometry();
    let (Cluster::Standard(at) | Cluster::ZeroAllocated(at)) = entry::cluster(g, old & !COPIED)
    else {
        return Ok(false);
    };
    let count = match flags {
        Flags::Final => refs.get(dev, g.cluster_of(at))?,
        Flags::Published => refs.get_published(dev, g.cluster_of(at))?,
        Flags::NoneIsOne => 0,
        Flags::AllAreOne => 1,
    };
    Ok(count == 1)
}

/// Clear bit 63 in the entries of a table, or a part of one, and with `set` also set it, as `flags`
/// demands. Has anything changed?
pub(crate) fn set_copied(
    refs: &mut Refcounts,
    dev: &mut Device,
    table: &mut [u8],
    flags: Flags,
    set: bool,
) -> Result<bool> {
    let size = refs.geometry().l2_entry_size();
    // No counts need be looked at where all come to the same.
    if flags == Flags::NoneIsOne || flags == Flags::AllAreOne && set {
        let mut differs = 0;
        for word in table.chunks_exact_mut(size) {
            let one = flags == Flags::AllAreOne && entry::is_counted(BigEndian::read_u64(word));
            let new = word[0] & 0x7f | u8::from(one) << 7;
            differs |= new ^ word[0];
            word[0] = new;
        }
        return Ok(differs != 0);
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
        let copied = wanted(refs, dev, old, flags)?;
        at += size;
        if (old & COPIED != 0) != copied && (set || !copied) {
            BigEndian::write_u64(rest, old ^ COPIED);
            changed = true;
        }
    }
    Ok(changed)
}
