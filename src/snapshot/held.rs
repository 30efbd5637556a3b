//! What a replay has counted down: how much of the file that is, and what of it would become free.

use crate::by_refcount_width;
use crate::error::Result;
use crate::format::geometry::{Geometry, HostCluster};
use crate::format::refblock;
use crate::format::refblock::with_width;
use crate::image::device::{zeroed, Device, Run};
use crate::image::refcount::Refcounts;
use crate::image::tables::{Reader, REFBLOCKS};
use crate::room;

/// Clusters whose counts the replay has changed, each once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// All of them, in bytes.
    pub(crate) bytes: u64,
    /// Those whose count is zero now.
    pub(crate) freed: u64,
    /// Bytes of them that are no holes of the file; where the storage cannot tell, all.
    pub(crate) allocated: u64,
}

/// What the replay has changed, by the refcount blocks: counts are compared with those on the disk.
pub(crate) fn held(dev: &mut Device, refs: &Refcounts) -> Result<Held> {
    let g = refs.geometry();
    let changed = refs.loaded().filter(|(_, b)| b.is_written());
    let changed = room::collected(changed.map(|(index, b)| (index, b.offset)))?;
    let offsets = room::collected(changed.iter().map(|(_, offset)| *offset))?;
    let mut reader = Reader::new(dev, g, REFBLOCKS, &offsets);
    let mut new = zeroed(g.cluster_size())?;
    let mut sum = Sum::default();
    let mut done = 0;
    while done < offsets.len() {
        let (n, old) = reader.batch(dev, done)?;
        let blocks = changed.iter().skip(done);
        for ((index, _), old) in blocks.zip(old.chunks(g.cluster_len())) {
            if let Some(block) = refs.block(*index) {
                block.final_counts(g, &mut new)?;
                let first = g.first_cluster_of_block(*index).0;
                by_refcount_width!(g, W => sum.add(dev, with_width::<W>(g), first, old, &new));
            }
        }
        done += n;
    }
    sum.close(dev, g);
    Ok(sum.held)
}

#[derive(Default)]
struct Sum {
    held: Held,
    /// Neighbours that have not been looked up in the file yet: the first, and the one behind.
    run: (u64, u64),
    /// Up to here the file is data, or is not.
    known: (u64, bool),
}

impl Sum {
    /// Compare the counts of the block whose first cluster is `first`.
    #[inline(always)]
    fn add(&mut self, dev: &mut Device, g: Geometry, first: u64, old: &[u8], new: &[u8]) {
        for i in 0..g.refblock_entries() as usize {
            let (was, is) = (refblock::get(g, old, i), refblock::get(g, new, i));
            if was == is {
                continue;
            }
            let cluster = first + i as u64;
            self.held.bytes += g.cluster_size();
            if is == 0 {
                self.held.freed += g.cluster_size();
            }
            if self.run.1 != cluster {
                self.close(dev, g);
                self.run = (cluster, cluster);
            }
            self.run.1 += 1;
        }
    }

    /// Add what the file has of the neighbours so far.
    fn close(&mut self, dev: &mut Device, g: Geometry) {
        let (mut at, end) = (
            g.offset_of(HostCluster(self.run.0)),
            g.offset_of(HostCluster(self.run.1)),
        );
        while at < end {
            if at >= self.known.0 {
                let (bytes, data) = match dev.run(at) {
                    Run::Data(n) => (n, true),
                    Run::Hole(n) => (n.unwrap_or(u64::MAX), false),
                };
                self.known = (at.saturating_add(bytes.max(1)), data);
            }
            let next = self.known.0.min(end);
            if self.known.1 {
                self.held.allocated += next - at;
            }
            at = next;
        }
    }
}
