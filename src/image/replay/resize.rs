//! Resizing the disk in the middle of a goto (QEMU's `qcow2_co_truncate`), in memory.

use super::named::check_repeats;
use super::{Contents, Replay};
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, COPIED, OFFSET_MASK};
use crate::format::geometry::TABLE_ENTRY;
use crate::image::device::Device;
use crate::image::refcount::{Forgotten, Freed};
use crate::room;
use byteorder::{BigEndian, ByteOrder};

/// What discarding a part of the disk has come to.
struct Discarded {
    /// The first L1 entry that was looked at.
    first: usize,
    /// For each L1 entry from there on: has the L2 table that the L1 owns lost an entry?
    emptied: Vec<bool>,
    /// The end in the file of what is changed in QEMU's cache and not written when the tables are
    /// freed.
    unwritten: u64,
}

/// Bytes of L2 tables that a larger disk copies because the L1 does not own them, at most. Only
/// those behind the old end count, which hold old VM state: QEMU would have to write these copies.
const MOST_COPIES: u64 = 128 << 20;

impl Replay {
    /// Make the disk smaller: QEMU first discards everything behind the new end (copying L2 tables
    /// that it does not own for it), then cuts the L1 table, the refcount table and the file. All of
    /// it counts here, since it decides where later structures go; none of it is written, since the
    /// goto that follows replaces the whole disk.
    pub(crate) fn shrink(&mut self, dev: &mut Device, old_size: u64, new_size: u64) -> Result<()> {
        let g = self.g;
        let start = g.round_up(new_size);
        let discarded = self.discard_fully(dev, start, old_size)?;

        // `qcow2_shrink_l1_table`
        let keep = g.l1_entries_for(new_size) as usize;
        if keep < self.l1.len() {
            let end = self
                .l1_place()
                .offset
                .saturating_add(self.l1.len() as u64 * TABLE_ENTRY);
            self.refs.reach_to(end);
        }
        let mut remaining = Vec::new();
        for index in (keep..self.l1.len()).rev() {
            dev.progress.pass(TABLE_ENTRY)?;
            let offset = self.l1[index] & OFFSET_MASK;
            if offset != 0 {
                self.refs.free(
                    dev,
                    offset,
                    g.cluster_size(),
                    Freed::Punched,
                    Forgotten::Never,
                )?;
                self.remade.contents.remove(offset);
                self.l1[index] = 0;
                let emptied = index.checked_sub(discarded.first);
                let emptied = emptied.and_then(|i| discarded.emptied.get(i));
                if emptied == Some(&true) && self.refs.get(dev, g.cluster_of(offset))? != 0 {
                    room::push(&mut remaining, offset)?;
                }
            }
        }
        // Looked at again: the L1 may have named a table twice.
        for offset in remaining {
            if self.refs.get(dev, g.cluster_of(offset))? != 0 {
                return Err(shared_but_copied(offset));
            }
        }

        self.refs.shrink_table(dev)?;
        self.overlap.follow(&self.l1, &self.refs.table().entries)?;
        let length = self.refs.reach;
        let last = self.refs.last_cluster(dev, length)?;
        let wanted = (last + 1) << g.cluster_bits;
        if wanted < length && !dev.fixed_length() {
            self.truncate(wanted);
        }
        // What QEMU's cache still holds of tables that are free by now makes the file longer again.
        self.refs.reach_to(discarded.unwritten);
        Ok(())
    }

    /// QEMU's `qcow2_cluster_discard(ALWAYS, full)` over `start..end` of the disk. Of a freed table
    /// QEMU's cache forgets the first slice only; a table that is made writes them all.
    fn discard_fully(&mut self, dev: &mut Device, start: u64, end: u64) -> Result<Discarded> {
        let g = self.g;
        let (slice, mut unwritten) = (g.l2_slice_bytes(end), 0);
        let first = g.l1_index(start) as usize;
        let mut emptied = Vec::new();
        check_repeats(g, self.l1.get(first..).unwrap_or_default())?;
        let mut at = start;
        while at < end {
            dev.progress.step(g.cluster_size())?;
            let l1_index = g.l1_index(at);
            let next = g.guest_of_l1(l1_index + 1).unwrap_or(u64::MAX).min(end);
            let from = g.l2_index(at) as usize;
            let n = g.clusters_for(next - at) as usize;
            let owned = self
                .l1
                .get(l1_index as usize)
                .is_some_and(|e| e & COPIED != 0);
            let (offset, table) = self.own_table(dev, l1_index, Forgotten::Never)?;
            if !owned {
                self.remade.take(g, offset)?;
                unwritten = 0;
            }
            let (size, mut changed) = (g.l2_entry_size(), false);
            let mut table = table;
            let words = table.bytes_mut().chunks_exact_mut(size);
            for (i, word) in words.enumerate().skip(from).take(n) {
                if word.iter().all(|b| *b == 0) {
                    continue;
                }
                changed = true;
                let slice_end = ((i * size) as u64 / slice + 1) * slice;
                if slice_end > slice {
                    unwritten = unwritten.max(offset.saturating_add(slice_end));
                }
                match entry::cluster(g, BigEndian::read_u64(word)) {
                    Cluster::Standard(at) | Cluster::ZeroAllocated(at) if g.in_cluster(at) == 0 => {
                        self.refs.free_data(dev, at, g.cluster_size())?;
                    }
                    Cluster::Compressed { offset, length } => {
                        self.refs.free_data(dev, offset, length)?
                    }
                    _ => {}
                }
                word.fill(0);
            }
            room::push(&mut emptied, owned && changed)?;
            // Only the table at the new end still matters: the others go with the L1's tail.
            if from != 0 && (changed || !owned) {
                self.remade.contents.insert(offset, table)?;
            }
            at = next;
        }
        Ok(Discarded {
            first,
            emptied,
            unwritten,
        })
    }

    /// Make the disk larger where a longer backing file would show in the new part: QEMU enters zero
    /// clusters there, and writes zeros up to the first whole (sub)cluster. As with shrinking, what
    /// that allocates decides where later structures go, and the goto frees it again.
    pub(crate) fn cover_backing(
        &mut self,
        dev: &mut Device,
        old_size: u64,
        new_size: u64,
    ) -> Result<()> {
        let unit = self.zero_unit();
        let zero_start = old_size.div_ceil(unit).saturating_mul(unit);
        if new_size > zero_start {
            self.zeroize(dev, zero_start, new_size)?;
        }
        if zero_start > old_size {
            self.write_head(dev, old_size, zero_start.min(new_size))?;
        }
        Ok(())
    }

    /// What can be zeroed by itself: a subcluster, or a cluster.
    fn zero_unit(&self) -> u64 {
        self.g.cluster_size() / if self.g.extended_l2 { 32 } else { 1 }
    }

    /// QEMU's `qcow2_subcluster_zeroize` where nothing may be unmapped: tables are made, clusters stay.
    fn zeroize(&mut self, dev: &mut Device, start: u64, end: u64) -> Result<()> {
        let g = self.g;
        let mut at = start;
        while at < end {
            dev.progress.step(g.cluster_size())?;
            let l1_index = g.l1_index(at);
            let next = g.guest_of_l1(l1_index + 1).unwrap_or(u64::MAX).min(end);
            let entry = self.l1.get(l1_index as usize).copied().unwrap_or(0);
            let table = self.own_temporary_table(dev, l1_index)?;
            if g.in_cluster(at) != 0 {
                // A part of a cluster can be zeroed only where it has subclusters.
                let from = g.l2_index(at) as usize * g.l2_entry_size();
                let word = table.word(from);
                if word & entry::COMPRESSED != 0 {
                    // Such a cluster has no subclusters. In QEMU's words.
                    return Err(Error::Os {
                        context: "Failed to zero out new clusters".into(),
                        source: std::io::Error::from_raw_os_error(libc::ENOTSUP),
                    });
                }
            }
            // Only a table that is not freed with the old disk would show the zeros.
            let (table_at, entries) = (entry & OFFSET_MASK, g.l2_index(at)..=g.l2_index(next - 1));
            if entry & COPIED != 0
                && self.refs.get(dev, g.cluster_of(table_at))? > 1
                && !self.all_zero(&table, entries)
            {
                self.keep_table(table_at, table)?;
            }
            at = next;
        }
        Ok(())
    }

    /// Are these entries of a table zero clusters already?
    fn all_zero(&self, table: &Contents, mut entries: std::ops::RangeInclusive<u64>) -> bool {
        let size = self.g.l2_entry_size();
        entries.all(|i| match i as usize * size {
            at if self.g.extended_l2 => table.word(at + 8) == entry::SUBCLUSTERS_ALL_ZERO,
            at => table.word(at) & entry::ZERO != 0,
        })
    }

    /// Remember the contents of a table that the resize changes.
    fn keep_table(&mut self, offset: u64, table: Contents) -> Result<()> {
        let copies = self.remade.contents.len() as u64 * self.g.cluster_size();
        if copies > MOST_COPIES {
            return Err(Error::NoMemory(copies));
        }
        self.remade.contents.insert(offset, table)
    }

    /// Own the table at `l1_index`; if it had to be made, remember what is in it until it is freed.
    fn own_temporary_table(&mut self, dev: &mut Device, l1_index: u64) -> Result<Contents> {
        let entry = self.l1.get(l1_index as usize).copied().unwrap_or(0);
        let (offset, table) = self.own_table(dev, l1_index, Forgotten::Never)?;
        if entry & COPIED == 0 {
            match &table {
                Contents::Zeros => self.remade.take_zeros(self.g, offset)?,
                Contents::Bytes(bytes) => {
                    let copy = room::copy_of(bytes)?;
                    self.remade.take(self.g, offset)?;
                    self.keep_table(offset, Contents::Bytes(copy))?;
                }
            }
        }
        Ok(table)
    }

    /// A guest write of zeros to `start..end`, which lies in one cluster.
    fn write_head(&mut self, dev: &mut Device, start: u64, end: u64) -> Result<()> {
        let g = self.g;
        let in_cluster = g.in_cluster(start);
        let written_end = in_cluster + (end - start);
        let l1_index = g.l1_index(start);
        let table = self.own_temporary_table(dev, l1_index)?;
        let offset = self.l1.get(l1_index as usize).copied().unwrap_or(0) & OFFSET_MASK;
        let at = g.l2_index(start) as usize * g.l2_entry_size();
        let old = table.word(at);
        // A new cluster is filled up to the end of the subcluster, or of the cluster.
        let reach = written_end
            .div_ceil(self.zero_unit())
            .saturating_mul(self.zero_unit());
        match entry::cluster(g, old) {
            Cluster::Standard(host) | Cluster::ZeroAllocated(host) if old & COPIED != 0 => {
                let end = if matches!(entry::cluster(g, old), Cluster::Standard(_)) {
                    written_end
                } else {
                    reach
                };
                if self.refs.get(dev, g.cluster_of(host))? > 1 {
                    let (from, bytes) = (host.saturating_add(in_cluster), end - in_cluster);
                    let there = dev.read_vec("Could not read data", from, bytes)?;
                    if there.iter().any(|b| *b != 0) {
                        return Err(Error::Corrupt(format!(
                            "Data cluster {host:#x} is shared but flagged as COPIED"
                        )));
                    }
                }
                self.refs.reach_to(host.saturating_add(end));
                return Ok(());
            }
            _ => {}
        }
        let new = self.refs.alloc(dev, g.cluster_size())?;
        self.refs.reach_to(new.saturating_add(reach));
        self.remade.take(g, new)?;
        let mut table = table.whole(g)?;
        if let Some(word) = table.get_mut(at..at + 8) {
            let old_word = old.to_be_bytes();
            BigEndian::write_u64(word, new | COPIED);
            self.forget_cluster(dev, &old_word, Forgotten::Never)?;
        }
        self.remade.contents.insert(offset, Contents::Bytes(table))
    }
}

/// QEMU changes such a table in place, and the snapshot that shares it loses what was in it.
pub(crate) fn shared_but_copied(offset: u64) -> Error {
    Error::Corrupt(format!(
        "L2 table {offset:#x} is shared but flagged as COPIED"
    ))
}
