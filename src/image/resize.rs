//! Resizing the disk in the middle of a goto (QEMU's `qcow2_co_truncate`), in memory.

use super::device::Device;
use super::refcount::{Freed, NEVER};
use super::replay::Replay;
use crate::error::Result;
use crate::format::entry::{self, Cluster, COPIED, OFFSET_MASK};
use crate::format::geometry::TABLE_ENTRY;
use byteorder::{BigEndian, ByteOrder};

impl Replay {
    /// Make the disk smaller: QEMU first discards everything behind the new end (copying L2 tables
    /// that it does not own for it), then cuts the L1 table, the refcount table and the file. All of
    /// it counts here, since it decides where later structures go; none of it is written, since the
    /// goto that follows replaces the whole disk.
    pub(crate) fn shrink(&mut self, dev: &mut Device, old_size: u64, new_size: u64) -> Result<()> {
        let g = self.g;
        let start = g.round_up(new_size);
        self.discard_fully(dev, start, old_size)?;

        // `qcow2_shrink_l1_table`
        let keep = g.l1_entries_for(new_size) as usize;
        if keep < self.l1.len() {
            let end = self
                .header
                .l1_offset
                .saturating_add(self.l1.len() as u64 * TABLE_ENTRY);
            self.reach = self.reach.max(end);
        }
        for index in (keep..self.l1.len()).rev() {
            let offset = self.l1[index] & OFFSET_MASK;
            if offset != 0 {
                self.refs
                    .free(dev, offset, g.cluster_size(), Freed::Punched, NEVER)?;
                self.tables.remove(&offset);
                self.l1[index] = 0;
            }
        }

        self.refs.shrink_table(dev)?;
        let length = self.length();
        let last = self.refs.last_cluster(dev, length)?;
        let wanted = (last + 1) << g.cluster_bits;
        if wanted < length {
            self.truncate(wanted);
        }
        Ok(())
    }

    /// QEMU's `qcow2_cluster_discard(ALWAYS, full)` over `start..end` of the disk.
    fn discard_fully(&mut self, dev: &mut Device, start: u64, end: u64) -> Result<()> {
        let g = self.g;
        let mut at = start;
        while at < end {
            let l1_index = g.l1_index(at);
            let next = g.guest_of_l1(l1_index + 1).unwrap_or(u64::MAX).min(end);
            let from = g.l2_index(at) as usize;
            let n = g.clusters_for(next - at) as usize;
            let owned = self
                .l1
                .get(l1_index as usize)
                .is_some_and(|e| e & COPIED != 0);
            let (offset, mut table) = self.own_table(dev, l1_index)?;
            if !owned {
                self.temporary_tables.push(offset);
            }
            let size = g.l2_entry_size();
            for word in table.chunks_exact_mut(size).skip(from).take(n) {
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
            // Only the table at the new end still matters: the others go with the L1's tail.
            if from != 0 {
                self.tables.insert(offset, table);
            }
            at = next;
        }
        Ok(())
    }
}
