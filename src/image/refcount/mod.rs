//! Refcounts in memory: QEMU's allocations and frees, replayed before anything is written.
//!
//! The look-first half of a verb runs QEMU's code path against [`Refcounts`]: first-fit search,
//! refcount blocks and tables that grow in the middle, frees. Nothing reaches the disk. What the
//! replay leaves behind is, for each refcount block, the *final* counts and, where more than one
//! write publishes something, the *peak*: the highest count that any published state in between
//! needs. The writing half brings the disk to the peak before the first publish and down to the
//! final counts after the last, so that at no moment a count is below the references to a cluster.
//!
//! | file | what |
//! |---|---|
//! | `search` | where clusters are free: QEMU's first fit |
//! | `structure` | the refcount table and its blocks: growth and shrinking |
//! | `block` | one block: its counts now and at the peak, where it comes from, how it has moved |
//! | `tally` | the hot loops of a walk |
//! | `fates` | what became of a cluster, and when the disk has forgotten what was in it: epochs |
//! | `counts` | counts of a block, in fields as narrow as they can be |
//! | `residency` | which blocks are in memory, and what is put away |

mod block;
pub(crate) mod counts;
mod fates;
mod residency;
mod search;
mod structure;
mod tally;

use super::device::Device;
use crate::error::{Error, Result};
use crate::format::geometry::{Geometry, HostCluster, MAX_CLUSTER_OFFSET};
use crate::format::header::Places;
use crate::format::refblock;
use crate::format::run::Tally;
use residency::Residency;
use structure::{Dropped, Reftable};

pub(crate) use block::Block;
pub(crate) use fates::{Fates, Forgotten, Freed};

/// See the module's text.
pub(crate) struct Refcounts {
    g: Geometry,
    /// Places of the refcount table, the current one last; never empty.
    tables: Vec<Reftable>,
    /// Refcount blocks dropped by a shrinking resize.
    dropped: Vec<Dropped>,
    residency: Residency,
    /// Runs since the walk last asked whether to look ahead.
    runs: u32,
    /// QEMU's `free_cluster_index`: where the search for free clusters goes on.
    pub(crate) next: u64,
    /// It takes no cluster below this one.
    pub(crate) least: u64,
    /// The length that QEMU's writes and truncates give the file, up to this point.
    pub(crate) reach: u64,
    /// What became of the clusters that explicit allocations and frees have touched.
    pub(crate) fates: Fates,
}

/// Does a caller have to look for clusters again?
#[derive(PartialEq)]
enum Reserved {
    Done,
    /// A refcount block was made where the caller may have wanted to put its data (QEMU's -EAGAIN).
    Again,
}

impl Refcounts {
    /// Those of an image in a file of `length` bytes, whose table has these entries. Counts may take
    /// `memory` bytes.
    pub(crate) fn new(
        g: Geometry,
        places: Places,
        entries: Vec<u64>,
        length: u64,
        memory: u64,
    ) -> Refcounts {
        Refcounts {
            g,
            tables: vec![Reftable {
                offset: places.reftable_offset,
                clusters: places.reftable_clusters.into(),
                entries,
                born: None,
            }],
            dropped: Vec::new(),
            residency: Residency::new(memory),
            runs: 0,
            next: 0,
            least: 0,
            reach: length,
            fates: Fates::default(),
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.g
    }

    /// QEMU writes up to this place of the file.
    pub(crate) fn reach_to(&mut self, end: u64) {
        self.reach = self.reach.max(end);
    }

    /// The refcount of a cluster when the walk of create was done, whatever was freed since: the
    /// counts that the first publish of several needs.
    pub(crate) fn get_published(&mut self, dev: &mut Device, cluster: HostCluster) -> Result<u64> {
        let last = self.get(dev, cluster)?;
        Ok(self.peak(cluster)?.max(last))
    }

    /// The highest count that a cluster has between two publishes, where that is known; else 0.
    fn peak(&self, cluster: HostCluster) -> Result<u64> {
        let block = self.block(self.g.reftable_index(cluster));
        let peak = block.and_then(|b| b.peak.as_ref());
        peak.map_or(Ok(0), |p| p.get(self.g, self.g.refblock_index(cluster)))
    }

    /// The refcount of a cluster; 0 where no block describes it.
    pub(crate) fn get(&mut self, dev: &mut Device, cluster: HostCluster) -> Result<u64> {
        self.load(dev, self.g.reftable_index(cluster))?;
        self.count_after(cluster)
    }

    /// Do `tally` to a count and return it. To be changed, its block must exist.
    #[inline]
    pub(crate) fn tally(
        &mut self,
        dev: &mut Device,
        cluster: HostCluster,
        tally: Tally,
    ) -> Result<u64> {
        let g = self.g;
        let index = g.reftable_index(cluster);
        if !self.load(dev, index)? {
            return match tally {
                Tally::Look => Ok(0),
                _ => Err(self.not_described(cluster)),
            };
        }
        let at = g.refblock_index(cluster);
        let Some(block) = self.block_mut(index) else {
            return Ok(0); // loaded above
        };
        let old = block.now.get(g, at)?;
        let new = match tally {
            Tally::Look => return Ok(old),
            Tally::Up if old == g.refcount_max() => return Err(overflow(g, cluster)),
            Tally::Up => old + 1,
            Tally::Down(n) => old.checked_sub(n).ok_or_else(|| underflow(g, cluster))?,
        };
        block.now.set(g, at, new)?;
        block.move_to(tally == Tally::Up);
        block.moved.to_zero |= new == 0;
        self.make_room(index);
        if new == 0 && cluster.0 < self.next {
            self.next = cluster.0;
        }
        Ok(new)
    }

    /// QEMU's `qcow2_alloc_clusters`: first fit from where the search stands, all counted once.
    /// Zero bytes reserve nothing and give the place of the search.
    pub(crate) fn alloc(&mut self, dev: &mut Device, bytes: u64) -> Result<u64> {
        let n = self.g.clusters_for(bytes);
        loop {
            let start = self.find(dev, n, MAX_CLUSTER_OFFSET)?;
            if self.reserve(dev, start, n)? == Reserved::Done {
                return Ok(self.g.offset_of(HostCluster(start)));
            }
        }
    }

    /// QEMU's `update_refcount(+1)` for new clusters.
    fn reserve(&mut self, dev: &mut Device, start: u64, n: u64) -> Result<Reserved> {
        let g = self.g;
        for c in start..start + n {
            if self.ensure_block(dev, HostCluster(c))? == Reserved::Again {
                // Undo, and try the same clusters first.
                for undo in start..c {
                    self.store(HostCluster(undo), 0)?;
                    self.fates.give_back(undo);
                }
                self.next = self.next.min(start);
                return Ok(Reserved::Again);
            }
            debug_assert_eq!(self.get(dev, HostCluster(c))?, 0);
            self.store(HostCluster(c), 1)?;
            self.fates.take(c)?;
        }
        debug_assert!(g.refcount_max() >= 1);
        Ok(Reserved::Done)
    }

    /// Count a cluster that this verb has allocated `n` times.
    pub(crate) fn count_as(&mut self, cluster: HostCluster, n: u64) -> Result<()> {
        if n > self.g.refcount_max() {
            return Err(overflow(self.g, cluster));
        }
        self.store(cluster, n)
    }

    /// Store a count in a loaded block.
    fn store(&mut self, cluster: HostCluster, count: u64) -> Result<()> {
        let g = self.g;
        let (index, at) = (g.reftable_index(cluster), g.refblock_index(cluster));
        if let Some(block) = self.block_mut(index) {
            let up = count >= block.now.get(g, at)?;
            block.now.set(g, at, count)?;
            block.move_to(up);
            block.moved.to_zero |= count == 0;
            let end = block.offset.saturating_add(g.cluster_size());
            self.reach_to(end);
            self.make_room(index);
        }
        Ok(())
    }

    /// QEMU's `qcow2_free_clusters`: an underflow leaves the counts as they are and is no error.
    /// `forgotten` is the epoch whose publish removes the last reference on disk.
    pub(crate) fn free(
        &mut self,
        dev: &mut Device,
        offset: u64,
        bytes: u64,
        bytes_end_up: Freed,
        forgotten: Forgotten,
    ) -> Result<()> {
        self.free_each(dev, offset, bytes, |refs, c, left| {
            refs.store(HostCluster(c), left)?;
            match left {
                0 => refs.fates.free(c, bytes_end_up, forgotten),
                _ => Ok(()),
            }
        })
    }

    /// Take one reference from each cluster of a data range, holes punched, nothing remembered:
    /// for the many clusters of a resize, none of which this verb writes to again.
    pub(crate) fn free_data(&mut self, dev: &mut Device, offset: u64, bytes: u64) -> Result<()> {
        self.free_each(dev, offset, bytes, |_, _, _| Ok(()))
    }

    /// Take a reference from each cluster of a range, if all have one. `freed` is told what is left.
    fn free_each(
        &mut self,
        dev: &mut Device,
        offset: u64,
        bytes: u64,
        mut freed: impl FnMut(&mut Refcounts, u64, u64) -> Result<()>,
    ) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let first = self.g.cluster_of(offset).0;
        let last = self.g.cluster_of(offset.saturating_add(bytes - 1)).0;
        for c in first..=last {
            if self.get(dev, HostCluster(c))? == 0 {
                return Ok(());
            }
        }
        for c in first..=last {
            let left = self.tally(dev, HostCluster(c), Tally::Down(1))?;
            freed(self, c, left)?;
        }
        Ok(())
    }

    /// The count at the end of the replay of a cluster that the replay has touched.
    pub(crate) fn count_after(&self, cluster: HostCluster) -> Result<u64> {
        let at = self.g.refblock_index(cluster);
        self.block(self.g.reftable_index(cluster))
            .map_or(Ok(0), |b| b.now.get(self.g, at))
    }

    /// Has the verb changed counts in the block at `index`?
    pub(crate) fn may_lose(&self, index: u64) -> bool {
        match self.block(index) {
            Some(b) => b.is_written(),
            // Not looked at, so not changed; or dropped, because everything in it is free.
            None => self.dropped_at(index).is_some(),
        }
    }

    /// Is this cluster free after the verb, and counted before it, punched by it, or `new`?
    pub(crate) fn loses_last(
        &mut self,
        dev: &mut Device,
        cluster: HostCluster,
        new: bool,
    ) -> Result<bool> {
        let left = self.count_after(cluster)?;
        let punched = self.peak(cluster)? != 0 || self.fates.is_punched(cluster.0);
        Ok(left == 0 && (new || punched || self.count_before(dev, cluster)? != 0))
    }

    /// Count a cluster once in the peak only: it is used between two publishes and free again
    /// afterwards. The replay must be over.
    pub(crate) fn count_temporarily(&mut self, cluster: HostCluster) -> Result<()> {
        let g = self.g;
        let at = g.refblock_index(cluster);
        let index = g.reftable_index(cluster);
        let dropped = self.dropped_at(index);
        if let Some(d) = dropped.and_then(|i| self.dropped.get_mut(i)) {
            if let Some(peak) = &mut d.peak {
                refblock::set(g, peak, at, 1);
            }
            return Ok(());
        }
        let Some(block) = self.block_mut(index) else {
            return Err(self.not_described(cluster));
        };
        block.count_in_peak(g, at)?;
        self.make_room(index);
        Ok(())
    }
}

fn overflow(g: Geometry, cluster: HostCluster) -> Error {
    Error::Invalid(format!(
        "The refcount of the cluster at {:#x} exceeds {} bits",
        g.offset_of(cluster),
        g.refcount_bits()
    ))
}

fn underflow(g: Geometry, cluster: HostCluster) -> Error {
    Error::Invalid(format!(
        "The refcount of the cluster at {:#x}, which is in use, is zero",
        g.offset_of(cluster)
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::format::entry::OFFSET_MASK;
    use crate::format::run::Tallied;
    use crate::io::memory::MemoryStorage;
    use byteorder::{BigEndian, ByteOrder};
    use counts::MOST;

    /// Count a table of clusters, as `walk` does.
    fn count(r: &mut Refcounts, dev: &mut Device, table: &[u8], tally: Tally) -> Tallied {
        let mut all = Tallied::default();
        while let Some(rest) = table.get(all.entries * 8..).filter(|t| !t.is_empty()) {
            let run = r.count_run(dev, rest, tally).unwrap();
            all.ones |= run.ones;
            all.others |= run.others;
            all.entries += run.entries;
            if run.entries == 0 {
                let c = r.g.cluster_of(BigEndian::read_u64(rest) & OFFSET_MASK);
                all.ones |= r.tally(dev, c, tally).unwrap() == 1;
                all.entries += 1;
            }
        }
        all
    }

    #[test]
    #[cfg_attr(miri, ignore = "many minutes there")]
    fn a_walk_that_jumps_about_comes_to_the_same_in_narrow_fields_and_in_a_temporary_file() {
        // More counts than fit in a cache, and more than may be in memory.
        for (order, blocks, cap) in [(2, 5000, MOST), (4, 128, 4096), (6, 64, 512)] {
            let g = Geometry::new(9, order, false);
            let file = vec![0; 512 * (1 + blocks as usize)];
            let mut dev = Device::new(Box::new(MemoryStorage::new(file))).unwrap();
            let places = Places {
                l1_offset: 0,
                l1_size: 0,
                reftable_offset: 0,
                reftable_clusters: 1,
            };
            let entries = (1..=blocks).map(|b| b * 512).collect();
            let mut r = Refcounts::new(g, places, entries, 0, cap);
            let mut want = vec![0u64; (blocks * g.refblock_entries()) as usize];
            let mut seed = 88_172_645_463_325_252u64;
            for round in 0..1500 {
                let mut table = [0; 512];
                for word in table.chunks_exact_mut(8) {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // One cluster again and again, out of what narrow fields hold.
                    let hot = round % 8 == 0 && want[77] + 64 < g.refcount_max().min(400);
                    let c = if hot {
                        77
                    } else {
                        78 + (seed >> 33) % (want.len() as u64 - 78)
                    };
                    BigEndian::write_u64(word, c << 9);
                }
                let clusters: Vec<_> = table
                    .chunks_exact(8)
                    .map(|w| BigEndian::read_u64(w) as usize >> 9)
                    .collect();
                for tally in [Tally::Up, Tally::Down(1)].into_iter().take(1 + round % 2) {
                    count(&mut r, &mut dev, &table, tally);
                    for c in &clusters {
                        want[*c] = if tally == Tally::Up {
                            want[*c] + 1
                        } else {
                            want[*c] - 1
                        };
                    }
                    let look = count(&mut r, &mut dev, &table, Tally::Look);
                    assert_eq!(look.ones, clusters.iter().any(|c| want[*c] == 1));
                    assert_eq!(look.others, clusters.iter().any(|c| want[*c] != 1));
                    let (mut flags, mut done) = (table, 0);
                    while done < 64 {
                        done += r
                            .copied_run(&mut dev, &mut flags[done * 8..], false)
                            .unwrap()
                            .0;
                    }
                    for (word, c) in flags.chunks_exact(8).zip(&clusters) {
                        assert_eq!(
                            word[0] >> 7 == 1,
                            want[*c] == 1,
                            "order {order} cluster {c}"
                        );
                    }
                }
            }
            assert!(r.residency.held <= cap, "order {order}");
            let away = r.loaded().filter(|(_, b)| b.now.is_away()).count();
            assert_eq!(away > blocks as usize / 2, cap != MOST, "order {order}");
            for (c, want) in want.iter().enumerate() {
                let count = r.count_after(HostCluster(c as u64)).unwrap();
                assert_eq!(count, *want, "order {order} cluster {c}");
            }
        }
    }
}
