//! Where clusters are free: QEMU's first fit, and room for a table of our own.

use super::Refcounts;
use crate::error::{Error, Result};
use crate::format::geometry::{HostCluster, TABLE_ENTRY};
use crate::format::refblock;
use crate::image::device::{zeroed, Device};
use crate::image::tables::read_refblock;

impl Refcounts {
    /// QEMU's `alloc_clusters_noref`: the first of `n` free clusters in a row.
    pub(super) fn find(&mut self, dev: &mut Device, n: u64, max_offset: u64) -> Result<u64> {
        let g = self.g;
        let mut scratch = Vec::new();
        let (mut at, mut run) = (self.next.max(self.least), 0);
        while run < n {
            dev.progress.pass(TABLE_ENTRY)?;
            let index = g.reftable_index(HostCluster(at));
            if index >= self.table().entries.len() as u64 {
                at += n - run;
                break;
            }
            let block_end = g.first_cluster_of_block(index + 1).0;
            let offset = self.entry(index);
            if offset == 0 {
                let free = (n - run).min(block_end - at);
                at += free;
                run += free;
                continue;
            }
            let (narrow, counts) = self.counts(dev, index, &mut scratch)?;
            let entries = g.refblock_entries() as usize;
            let mut i = g.refblock_index(HostCluster(at));
            while i < entries && run < n {
                if run == 0 {
                    // Skip what is in use.
                    i = refblock::find(narrow, &counts, i, entries, true).unwrap_or(entries);
                }
                let limit = entries.min(i.saturating_add((n - run) as usize));
                let stop = refblock::find(narrow, &counts, i, limit, false);
                run += (stop.unwrap_or(limit) - i) as u64;
                i = stop.unwrap_or(limit);
                if stop.is_some() && run < n {
                    run = 0;
                    i += 1;
                }
            }
            at = block_end - (entries - i) as u64;
        }
        self.next = at;
        if at > 0 && at - 1 > max_offset >> g.cluster_bits {
            return Err(Error::TooBig(
                "The image file would become too large".into(),
            ));
        }
        Ok(at - n)
    }

    /// QEMU's `qcow2_get_last_cluster`: the last cluster in use below `length` bytes. Damaged images
    /// can be longer than any disk: only what the table describes is looked at.
    pub(crate) fn last_cluster(&mut self, dev: &mut Device, length: u64) -> Result<u64> {
        let g = self.g;
        let described = g.first_cluster_of_block(self.table().entries.len() as u64);
        let mut scratch = Vec::new();
        let mut end = g.clusters_for(length).min(described.0);
        while end > 0 {
            let index = g.reftable_index(HostCluster(end - 1));
            let first = g.first_cluster_of_block(index).0;
            dev.progress.pass(TABLE_ENTRY)?;
            let (narrow, counts) = self.counts(dev, index, &mut scratch)?;
            // A file may have terabytes of holes: only what is not zero is taken apart.
            if let Some(byte) = counts.iter().rposition(|b| *b != 0) {
                let n = ((end - first) as usize).min(narrow.block_entries_in(byte + 8));
                if let Some(last) = (0..n).rfind(|i| refblock::get(narrow, &counts, *i) != 0) {
                    return Ok(first + last as u64);
                }
            }
            end = first;
        }
        Err(Error::Corrupt(
            "There are no references in the refcount table.".into(),
        ))
    }

    /// A run of `n` clusters at or behind `from` that is free now, was free on disk, is described
    /// by existing blocks and is not touched by the replay. For short-lived tables.
    pub(crate) fn find_untouched(
        &mut self,
        dev: &mut Device,
        from: u64,
        n: u64,
    ) -> Result<Option<u64>> {
        let g = self.g;
        let (mut run, mut scratch) = (0, Vec::new());
        for index in g.reftable_index(HostCluster(from))..self.table().entries.len() as u64 {
            dev.progress.pass(TABLE_ENTRY)?;
            let (entries, loaded) = (g.refblock_entries(), self.block(index));
            if self.entry(index) == 0 || loaded.is_some_and(|b| b.born.is_some()) {
                run = 0;
                continue;
            }
            let is_loaded = loaded.is_some();
            if let Some(block) = loaded {
                scratch = zeroed(g.cluster_size())?;
                block.peak_counts(g, &[], &mut scratch)?;
            } else {
                self.counts(dev, index, &mut scratch)?;
            }
            let base = g.first_cluster_of_block(index).0;
            for c in from.max(base)..base.saturating_add(entries) {
                // What a resize has freed in a block that is loaded is still in use on the disk.
                let counted = refblock::get(g, &scratch, (c - base) as usize) != 0
                    || is_loaded && self.count_before(dev, HostCluster(c))? != 0;
                let free = !counted && self.fates.is_untouched(c);
                run = if free { run + 1 } else { 0 };
                if run == n {
                    let first = c + 1 - n;
                    for index in g.reftable_index(HostCluster(first))..=index {
                        self.load(dev, index)?;
                    }
                    return Ok(Some(first));
                }
            }
        }
        self.find_untouched_in_dropped(dev, n)
    }

    /// [`Refcounts::find_untouched`] in the range of a block that a shrinking resize drops: until the
    /// new state is published the table names it, and afterwards its counts go with it.
    fn find_untouched_in_dropped(&mut self, dev: &mut Device, n: u64) -> Result<Option<u64>> {
        let g = self.g;
        for i in 0..self.dropped.len() {
            let d = &self.dropped[i];
            dev.progress.pass(g.cluster_size())?;
            let before = read_refblock(dev, g, d.offset)?;
            let base = g.first_cluster_of_block(d.index).0;
            let mut run = 0;
            for at in 0..g.refblock_entries() as usize {
                let c = base + at as u64;
                let after = d.counts.as_ref().map_or(Ok(0), |c| c.get(g, at))?;
                let counted = after != 0 || refblock::get(g, &before, at) != 0;
                let free = !counted && self.fates.is_untouched(c) && c != 0;
                run = if free { run + 1 } else { 0 };
                if run == n {
                    self.dropped[i].peak = Some(before);
                    return Ok(Some(c + 1 - n));
                }
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::format::geometry::Geometry;
    use crate::format::header::Places;
    use crate::image::refcount::counts::MOST;
    use crate::io::memory::MemoryStorage;

    /// The counts of an image in clusters of 512 bytes, a block after the other; none: there is no block.
    fn refcounts(order: u32, blocks: &[Option<Vec<u64>>]) -> (Refcounts, Device) {
        let g = Geometry::new(9, order, false);
        let mut file = vec![0; 512];
        let mut entries = vec![];
        for counts in blocks {
            let Some(counts) = counts else {
                entries.push(0);
                continue;
            };
            let mut block = vec![0; 512];
            for (i, count) in counts.iter().enumerate() {
                refblock::set(g, &mut block, i, *count);
            }
            entries.push(file.len() as u64);
            file.extend(block);
        }
        let places = Places {
            l1_offset: 0,
            l1_size: 0,
            reftable_offset: 0,
            reftable_clusters: 1,
        };
        let length = file.len() as u64;
        let dev = Device::new(Box::new(MemoryStorage::new(file))).unwrap();
        (Refcounts::new(g, places, entries, length, MOST), dev)
    }

    /// Images of few blocks with runs of clusters in use and free, some without a block.
    fn all(mut with: impl FnMut(u32, &[Option<Vec<u64>>], &mut dyn FnMut(u64) -> u64)) {
        let mut seed = 1u64;
        let mut below = |n: u64| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        for round in 0..if cfg!(miri) { 7 } else { 150 } {
            let order = round % 7;
            let entries = 4096usize >> order;
            let blocks: Vec<_> = (0..1 + below(4))
                .map(|_| {
                    let mut counts = vec![0; entries];
                    let mut at = 0;
                    while at < entries {
                        let run = (1 + below(entries as u64 / 2)) as usize;
                        let end = (at + run).min(entries);
                        counts[at..end].fill(below(2));
                        at = end;
                    }
                    // One alone, first or last.
                    if below(4) == 0 {
                        counts.fill(0);
                        counts[[0, entries - 1][below(2) as usize]] = 1;
                    }
                    (below(4) != 0).then_some(counts)
                })
                .collect();
            with(order, &blocks, &mut below);
        }
    }

    fn count(blocks: &[Option<Vec<u64>>], order: u32, cluster: u64) -> u64 {
        let entries = 4096 >> order;
        let block = blocks
            .get((cluster / entries) as usize)
            .and_then(Option::as_ref);
        block.map_or(0, |counts| counts[(cluster % entries) as usize])
    }

    #[test]
    fn the_first_fit_is_the_first_that_fits_up_to_the_longest_file() {
        all(|order, blocks, below| {
            let entries = 4096 >> order;
            let (next, n) = (below(entries), 1 + below(2 * entries));
            let fits = |at: &u64| (*at..at + n).all(|c| count(blocks, order, c) == 0);
            let want = (next..).find(fits).unwrap();
            let find = |most: u64| {
                let (mut r, mut dev) = refcounts(order, blocks);
                r.next = next;
                let found = r.find(&mut dev, n, most);
                found.map(|at| (at, r.next))
            };
            let last = (want + n - 1) * 512;
            for most in [u64::MAX, last + 511, last] {
                assert_eq!(find(most).unwrap(), (want, want + n), "{order} {blocks:?}");
            }
            assert!(matches!(find(last - 1), Err(Error::TooBig(_))));
        });
    }

    #[test]
    fn the_last_cluster_is_the_last_in_use_within_a_length() {
        all(|order, blocks, below| {
            let described = blocks.len() as u64 * (4096 >> order);
            let length = below(described * 512 * 5 / 4);
            let within = 0..described.min(length.div_ceil(512));
            let want = within.rev().find(|c| count(blocks, order, *c) != 0);
            let (mut r, mut dev) = refcounts(order, blocks);
            match (r.last_cluster(&mut dev, length), want) {
                (Ok(found), Some(want)) => assert_eq!(found, want),
                (Err(Error::Corrupt(_)), None) => {}
                (found, want) => panic!("{found:?}, not {want:?}: {order} {blocks:?}"),
            }
        });
    }

    #[test]
    fn room_for_a_short_time_is_where_blocks_say_that_nothing_is() {
        all(|order, blocks, below| {
            let entries = 4096 >> order;
            let described = blocks.len() as u64 * entries;
            let (from, n) = (below(described), 1 + below(2 * entries));
            let free = |c: u64| {
                c < described
                    && blocks[(c / entries) as usize].is_some()
                    && count(blocks, order, c) == 0
            };
            let want = (from..described).find(|at| (*at..at + n).all(free));
            let (mut r, mut dev) = refcounts(order, blocks);
            // What the verb has counted, or has in memory, is as good as what it has not looked at.
            if below(2) == 0 {
                let _ = r.load(&mut dev, below(blocks.len() as u64));
            }
            assert_eq!(r.find_untouched(&mut dev, from, n).unwrap(), want);
        });
    }
}
