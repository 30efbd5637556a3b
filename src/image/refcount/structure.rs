//! The refcount table and its blocks: where they are, how they grow and how they shrink.

use super::block::Block;
use super::counts::BlockCounts;
use super::fates::{Forgotten, Freed};
use super::{Refcounts, Reserved};
use crate::error::{Error, Result};
use crate::format::entry::REFTABLE_OFFSET_MASK;
use crate::format::geometry::{Geometry, HostCluster, TABLE_ENTRY};
use crate::format::refblock;
use crate::image::device::{self, Device};
use crate::room;

/// QEMU compares the number of refcount table entries with this (`QCOW_MAX_REFTABLE_SIZE`).
const MAX_REFTABLE_ENTRIES: u64 = 8 << 20;

/// One place where the refcount table has been during the verb.
#[derive(Debug)]
pub(crate) struct Reftable {
    pub(crate) offset: u64,
    pub(crate) clusters: u64,
    /// All entries, zero tail included.
    pub(crate) entries: Vec<u64>,
    /// `None`: the table that was there before the verb; else the epoch that made it.
    pub(crate) born: Option<usize>,
}

impl Reftable {
    /// Offset of the block at `index`; 0 for none.
    pub(crate) fn entry(&self, index: u64) -> u64 {
        self.entries.get(index as usize).copied().unwrap_or(0) & REFTABLE_OFFSET_MASK
    }
}

/// A refcount block that a shrinking resize takes out of the table.
pub(crate) struct Dropped {
    /// Its place in the refcount table.
    pub(crate) index: u64,
    /// Its place in the file.
    pub(crate) offset: u64,
    /// The counts it had at the end, if the verb changed them.
    pub(crate) counts: Option<BlockCounts>,
    /// Its counts on disk and those of a temporary table, if one is put into its range.
    pub(crate) peak: Option<Vec<u8>>,
}

impl Refcounts {
    /// Places of the refcount table, the current one last.
    pub(crate) fn tables(&self) -> &[Reftable] {
        &self.tables
    }

    /// The refcount table as it is now.
    pub(crate) fn table(&self) -> &Reftable {
        // Never empty: made with one, only pushed to.
        &self.tables[self.tables.len() - 1]
    }

    pub(super) fn table_mut(&mut self) -> &mut Reftable {
        let last = self.tables.len() - 1;
        &mut self.tables[last]
    }

    /// The entries of the refcount table as they are now: the verb is over.
    pub(crate) fn take_table(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.table_mut().entries)
    }

    /// Offset of the block at `index` of the table; 0 for none.
    pub(crate) fn entry(&self, index: u64) -> u64 {
        self.table().entry(index)
    }

    /// Blocks that a shrinking resize takes out of the table.
    pub(crate) fn dropped(&self) -> &[Dropped] {
        &self.dropped
    }

    /// Which of the dropped blocks was at `index`? They are in order.
    pub(super) fn dropped_at(&self, index: u64) -> Option<usize> {
        let dropped = &self.dropped;
        dropped.binary_search_by_key(&index, |d| d.index).ok()
    }

    pub(super) fn check_aligned(&self, index: u64, offset: u64) -> Result<()> {
        if self.g.in_cluster(offset) != 0 {
            return Err(Error::Corrupt(format!(
                "Refblock offset {offset:#x} unaligned (reftable index: {index:#x})"
            )));
        }
        Ok(())
    }

    /// Why a cluster in use cannot be counted: no refcount block describes it. QEMU would make one,
    /// and refuse if the table cannot grow that far.
    pub(super) fn not_described(&self, cluster: HostCluster) -> Error {
        let g = self.g;
        let at = g.offset_of(cluster);
        let used = (cluster.0 + 1).div_ceil(g.refblock_entries());
        let blocks = blocks_with_metadata(g, g.first_cluster_of_block(used).0);
        let within = g.reftable_index(cluster) < self.table().entries.len() as u64;
        if !within && blocks + blocks.div_ceil(2) > MAX_REFTABLE_ENTRIES {
            return Error::TooBig(format!(
                "The cluster at {at:#x}, which is in use, is out of range"
            ));
        }
        Error::Corrupt(format!(
            "No refcount block describes the cluster at {at:#x}, which is in use"
        ))
    }

    /// QEMU's `alloc_refcount_block`.
    pub(super) fn ensure_block(
        &mut self,
        dev: &mut Device,
        cluster: HostCluster,
    ) -> Result<Reserved> {
        let g = self.g;
        let index = g.reftable_index(cluster);
        if self.load(dev, index)? {
            return Ok(Reserved::Done);
        }
        let new = HostCluster(self.find(dev, 1, i64::MAX as u64)?);
        if new.0 == 0 {
            return Err(Error::Corrupt(
                "Preventing invalid allocation of refcount block at offset 0".into(),
            ));
        }
        let own = g.reftable_index(new) == index;
        if !own && self.reserve(dev, new.0, 1)? == Reserved::Again {
            return Ok(Reserved::Again);
        }
        self.new_block(dev, index, g.offset_of(new))?;
        if own {
            self.store(new, 1)?;
        }
        self.fates.take(new.0)?;
        if index < self.table().entries.len() as u64 {
            self.table_mut().entries[index as usize] = g.offset_of(new);
        } else {
            let used = (cluster.0 + 1)
                .max(new.0 + 1)
                .div_ceil(g.refblock_entries());
            self.grow_table(dev, g.first_cluster_of_block(used), index, g.offset_of(new))?;
        }
        Ok(Reserved::Again)
    }

    /// An empty block at `offset`, to be entered at `index`.
    fn new_block(&mut self, dev: &mut Device, index: u64, offset: u64) -> Result<()> {
        let counts = device::zeroed(self.g.cluster_size())?;
        self.forget_before_writing(dev, offset, self.g.cluster_size())?;
        let epoch = self.epoch();
        self.reach_to(offset.saturating_add(self.g.cluster_size()));
        let block = Block::new(self.g, offset, &counts, Some(epoch))?;
        self.insert(index, block)
    }

    /// QEMU's `qcow2_refcount_area`: a larger table, and the blocks that describe it, behind
    /// everything that is described so far.
    fn grow_table(
        &mut self,
        dev: &mut Device,
        start: HostCluster,
        new_index: u64,
        new_block: u64,
    ) -> Result<()> {
        let g = self.g;
        let total_blocks = blocks_with_metadata(g, start.0);
        let per_cluster = g.reftable_entries_per_cluster();
        let entries = (total_blocks + total_blocks.div_ceil(2)).next_multiple_of(per_cluster);
        if total_blocks > MAX_REFTABLE_ENTRIES || entries > MAX_REFTABLE_ENTRIES {
            return Err(Error::TooBig(
                "The refcount table would become too large".into(),
            ));
        }
        let clusters = entries / per_cluster;

        let old = (self.table().offset, self.table().clusters);
        let all = self.table().entries.iter().copied();
        let all = all.chain(std::iter::repeat(0));
        let mut table = room::collected(all.take(entries as usize))?;
        table[new_index as usize] = new_block;

        // Which blocks are new, and where they and the table lie.
        let first = g.reftable_index(start);
        let missing = (first..total_blocks)
            .filter(|i| table[*i as usize] == 0)
            .count() as u64;
        let table_cluster = start.0 + missing;
        let end = table_cluster + clusters;
        let mut next_block = start.0;
        for index in first..total_blocks {
            if table[index as usize] == 0 {
                let offset = g.offset_of(HostCluster(next_block));
                self.new_block(dev, index, offset)?;
                table[index as usize] = offset;
                next_block += 1;
            }
        }
        let offset = g.offset_of(HostCluster(table_cluster));
        self.forget_before_writing(dev, offset, clusters * g.cluster_size())?;
        let table = Reftable {
            offset,
            clusters,
            entries: table,
            born: Some(self.epoch()),
        };
        room::push(&mut self.tables, table)?;
        for index in first..total_blocks {
            self.load(dev, index)?;
        }
        for c in start.0..end {
            if self.get(dev, HostCluster(c))? != 0 {
                return Err(Error::Corrupt(
                    "Space behind the image's last refcount block is in use".into(),
                ));
            }
            self.store(HostCluster(c), 1)?;
            self.fates.take(c)?;
        }
        self.reach_to(g.offset_of(HostCluster(end)));
        // The old table is forgotten when the header names the new one.
        self.free(
            dev,
            old.0,
            old.1 * g.cluster_size(),
            Freed::Kept,
            Forgotten::With(self.epoch()),
        )
    }

    /// QEMU's `qcow2_shrink_reftable`: drop blocks that describe nothing but themselves.
    pub(crate) fn shrink_table(&mut self, dev: &mut Device) -> Result<()> {
        let g = self.g;
        let mut scratch = Vec::new();
        let mut unused = Vec::new();
        for index in 0..self.table().entries.len() as u64 {
            dev.progress.pass(TABLE_ENTRY)?;
            let offset = self.entry(index);
            if offset == 0 {
                continue;
            }
            let (narrow, counts) = self.counts(dev, index, &mut scratch)?;
            let (mut counts, itself) = (room::owned(counts)?, g.cluster_of(offset));
            if g.reftable_index(itself) == index {
                refblock::set(narrow, &mut counts, g.refblock_index(itself), 0);
            }
            if counts.iter().all(|b| *b == 0) {
                room::push(&mut unused, (index, offset))?;
            }
        }
        let end = self
            .table()
            .offset
            .saturating_add(self.table().entries.len() as u64 * TABLE_ENTRY);
        self.reach_to(end);
        for (index, offset) in unused {
            dev.progress.pass(TABLE_ENTRY)?;
            // `qcow2_discard_refcount_block`
            let cluster = g.cluster_of(offset);
            if self.get(dev, cluster)? != 1 {
                return Err(Error::Corrupt(format!(
                    "Invalid refcount: refblock offset {offset:#x}"
                )));
            }
            self.store(cluster, 0)?;
            self.next = self.next.min(cluster.0);
            self.fates
                .free(cluster.0, Freed::Punched, Forgotten::Never)?;
            self.table_mut().entries[index as usize] = 0;
            let block = self.take_block(index);
            if block.as_ref().is_none_or(|b| b.born.is_none()) {
                // Nothing is left in it but, at times, the block itself.
                let mut counts = block.map(|b| b.now);
                if let Some(counts) = &mut counts {
                    // Its place in the temporary file is that of the next block here.
                    counts.fetch(g)?;
                }
                let dropped = Dropped {
                    index,
                    offset,
                    counts,
                    peak: None,
                };
                room::push(&mut self.dropped, dropped)?;
            }
        }
        Ok(())
    }
}

/// Blocks that describe `clusters` and the table and blocks behind them, with QEMU's reserve of
/// half the table (`qcow2_refcount_metadata_size`, generous).
fn blocks_with_metadata(g: Geometry, mut clusters: u64) -> u64 {
    let (mut table, mut blocks, mut total) = (0u64, 0u64, 0u64);
    let mut generous = true;
    loop {
        let last = total;
        blocks = (clusters + table + blocks).div_ceil(g.refblock_entries());
        table = blocks.div_ceil(g.reftable_entries_per_cluster());
        total = clusters + blocks + table;
        if total == last {
            if !generous {
                return blocks;
            }
            clusters += table.div_ceil(2);
            generous = false;
            total = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::format::header::Places;
    use crate::image::refcount::counts::MOST;
    use crate::io::memory::MemoryStorage;

    /// An image in clusters of 512 bytes with counts of 64 bits, of whose refcount table nothing is there.
    fn bare() -> Refcounts {
        let places = Places {
            l1_offset: 0,
            l1_size: 0,
            reftable_offset: 0,
            reftable_clusters: 1,
        };
        Refcounts::new(Geometry::new(9, 6, false), places, vec![0; 64], 0, MOST)
    }

    #[test]
    fn blocks_describe_what_is_there_themselves_their_table_and_half_of_it_more() {
        for (bits, order) in [(9, 6), (9, 4), (12, 0), (16, 4)] {
            let g = Geometry::new(bits, order, false);
            let (per_block, per_cluster) = (g.refblock_entries(), g.reftable_entries_per_cluster());
            let table = |blocks: u64| blocks.div_ceil(per_cluster);
            // Looked for from where there are too few.
            let least = |clusters: u64| {
                let enough = |b: &u64| b * per_block >= clusters + b + table(*b);
                (clusters / per_block..).find(enough).unwrap()
            };
            for clusters in [1, 63, 64, 65, 4000, 262_144, 1_000_003, 88_888_888] {
                let want = least(clusters + table(least(clusters)).div_ceil(2));
                assert_eq!(
                    blocks_with_metadata(g, clusters),
                    want,
                    "{bits} {order} {clusters}"
                );
            }
        }
    }

    /// The last number for which this holds.
    fn last(g: Geometry, holds: impl Fn(u64) -> bool) -> u64 {
        let (mut low, mut high) = (0, MAX_REFTABLE_ENTRIES * g.refblock_entries());
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            (low, high) = match holds(middle) {
                true => (middle, high),
                false => (low, middle),
            };
        }
        low
    }

    /// With QEMU's reserve.
    fn is_not_too_long(blocks: u64) -> bool {
        (blocks + blocks.div_ceil(2)).next_multiple_of(64) <= MAX_REFTABLE_ENTRIES
    }

    #[test]
    fn what_no_block_could_describe_is_out_of_range() {
        let r = bare();
        let last = last(r.g, |cluster| {
            let used = (cluster + 1).next_multiple_of(r.g.refblock_entries());
            is_not_too_long(blocks_with_metadata(r.g, used))
        });
        for (cluster, out_of_range) in [
            (64, false),
            (64 * 64, false),
            (last / 2, false),
            (last, false),
            (last + 1, true),
            (last + last / 4, true),
            (last * 4, true),
            (1 << 46, true),
        ] {
            match (r.not_described(HostCluster(cluster)), out_of_range) {
                (Error::TooBig(_), true) | (Error::Corrupt(_), false) => {}
                (e, _) => panic!("{cluster:#x}: {e}"),
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "many minutes there")]
    fn a_table_grows_to_its_last_cluster_and_no_further() {
        let g = bare().g;
        let most = last(g, |start| is_not_too_long(blocks_with_metadata(g, start)));
        for (start, fits) in [(most, true), (most + 64, false), (most * 5 / 4, false)] {
            let mut r = bare();
            let mut dev = Device::new(Box::new(MemoryStorage::default())).unwrap();
            // All that is described before it has its blocks.
            r.tables[0].entries = vec![512; (start / 64) as usize];
            let start = HostCluster(start);
            let index = r.g.reftable_index(start);
            let done = r.grow_table(&mut dev, start, index, 512);
            assert_eq!(done.is_ok(), fits, "{start:?}: {done:?}");
        }
    }
}
