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
use crate::image::tables::{self, Reader};
use crate::room;
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
        self.walk_tables(dev, &Named::of(l1), tally, &[])
    }

    /// Walk these tables, in their order. Those that `counted`, which has just been walked, names at the
    /// same place are not read again: which of their flags change is found out when they are written.
    pub(crate) fn walk_tables(
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
        let mut tables = Reader::new(dev, self.g, tables::L2_TABLES, &named.words);
        let words = named.words.iter().zip(&mut out.l1).enumerate();
        for (index, (word, new)) in words.filter(|(_, (word, _))| **word != 0) {
            let offset = word & OFFSET_MASK;
            let same = |c: &&u64| *c & OFFSET_MASK == offset;
            let mut known = None;
            if counted.get(index).filter(same).is_some() {
                known = self.known(dev, offset)?;
            }
            let counted = match known {
                Some(known) => known,
                None => {
                    self.count_table(dev, &mut tables, (index, offset), named.share(index), tally)?
                }
            };
            *new = offset | if counted.own == 1 { COPIED } else { 0 };
            out.l1_changed |= *new != *word;
            out.ones |= counted.ones || counted.own == 1;
            out.freed += u64::from(counted.own == 0);
            self.note(&mut out.tables, offset, counted, tally)?;
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
        (index, offset): (usize, u64),
        share: Share,
        tally: Tally,
    ) -> Result<Counted> {
        let g = self.g;
        let tally = match tally {
            Tally::Down(_) => Tally::Down(share.times),
            other => other,
        };
        dev.progress.step(g.cluster_size())?;
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

    /// Note what counting the table at `offset` means for it.
    fn note(
        &mut self,
        marked: &mut Vec<Marked>,
        offset: u64,
        counted: Counted,
        tally: Tally,
    ) -> Result<()> {
        let g = self.g;
        if counted.changed == 0 {
            return Ok(());
        }
        // QEMU drops the first slice of a table that is freed, and writes the others.
        let (end, slice) = (counted.changed.into(), g.l2_slice_bytes(self.meaning.size));
        let freed = matches!(tally, Tally::Down(_)) && counted.own == 0;
        if !freed || end > slice {
            let end = u64::div_ceil(end, slice) * slice;
            self.refs.reach_to(offset.saturating_add(end));
        }
        if freed {
            return Ok(());
        }
        let of_table = Some(Protected::ActiveL2);
        self.overlap.check(offset, g.cluster_size(), of_table)?;
        let flags = match (counted.ones, counted.others) {
            _ if tally != Tally::Look || counted.in_memory => Flags::Final,
            (true, true) => Flags::Final,
            (true, false) => Flags::AllAreOne,
            (false, _) => Flags::NoneIsOne,
        };
        room::push(marked, Marked { offset, flags })
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
            let one = count_entry(refs, dev, old, (offset, at / size), tally, &mut all)?;
            at += size;
            if (old & COPIED != 0) != one {
                all.changed = at as u32;
            }
        }
    }
    Ok(all)
}

/// Count what one entry refers to, of whatever kind it is. Returns its bit 63, as the counts are now.
/// `place` names the entry in errors.
fn count_entry(
    refs: &mut Refcounts,
    dev: &mut Device,
    entry: u64,
    place: (u64, usize),
    tally: Tally,
    all: &mut Counted,
) -> Result<bool> {
    let g = refs.geometry();
    match entry::cluster(g, entry & !COPIED) {
        Cluster::Compressed { offset, length } if tally != Tally::Look => {
            let last = g.cluster_of(offset.saturating_add(length - 1)).0;
            for c in g.cluster_of(offset).0..=last {
                all.ones |= refs.tally(dev, HostCluster(c), tally)? == 1;
            }
        }
        Cluster::Standard(at) | Cluster::ZeroAllocated(at) => {
            if g.in_cluster(at) != 0 {
                let (table, index) = place;
                return Err(Error::Corrupt(format!(
                    "Cluster allocation offset {at:#x} unaligned (L2 offset: {table:#x}, L2 index: {index:#x})"
                )));
            }
            let one = refs.tally(dev, g.cluster_of(at), tally)? == 1;
            all.ones |= one;
            all.others |= !one;
            return Ok(one);
        }
        _ => {}
    }
    // Whatever its count, a compressed cluster is never written in place.
    Ok(false)
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
    if let Flags::AllAreOne | Flags::NoneIsOne = flags {
        let mut differs = 0;
        for word in table.chunks_exact_mut(size) {
            let one = flags == Flags::AllAreOne && entry::is_counted(BigEndian::read_u64(word));
            let may_be = if set { 0x80 } else { word[0] & 0x80 };
            let new = word[0] & 0x7f | may_be & u8::from(one) << 7;
            differs |= new ^ word[0];
            word[0] = new;
        }
        return Ok(differs != 0);
    }
    // Peaks are kept only where a verb publishes more than once.
    let peaks = flags == Flags::Published && refs.epoch() != 0;
    let (mut at, mut changed) = (0, false);
    while let Some(rest) = table.get_mut(at..).filter(|r| !r.is_empty()) {
        if !peaks {
            let (entries, differs) = refs.copied_run(dev, rest, !set)?;
            changed |= differs;
            at += entries * size;
            if entries != 0 {
                continue;
            }
        }
        let old = BigEndian::read_u64(rest);
        let copied = match entry::cluster(refs.geometry(), old & !COPIED) {
            Cluster::Standard(host) | Cluster::ZeroAllocated(host) => {
                let cluster = refs.geometry().cluster_of(host);
                1 == match peaks {
                    true => refs.get_published(dev, cluster)?,
                    false => refs.get(dev, cluster)?,
                }
            }
            _ => false,
        };
        at += size;
        if (old & COPIED != 0) != copied && (set || !copied) {
            BigEndian::write_u64(rest, old ^ COPIED);
            changed = true;
        }
    }
    Ok(changed)
}
