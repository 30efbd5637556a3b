//! A refcount block in memory.

use super::counts::BlockCounts;
use crate::error::Result;
use crate::format::geometry::Geometry;
use crate::format::refblock;
use crate::image::device::zeroed;

/// One refcount block that the verb has looked at.
pub(crate) struct Block {
    /// Where it lives in the file.
    pub(crate) offset: u64,
    /// Counts at the end of the replay, as far as it has come.
    pub(super) now: BlockCounts,
    /// Counts that published states in between need, where there is more than one publish.
    pub(super) peak: Option<BlockCounts>,
    /// The epoch that makes it; none if the image has it.
    pub(crate) born: Option<usize>,
    pub(super) moved: Moved,
    /// Bytes that its counts take in memory.
    pub(super) held: u64,
}

/// Where its counts have gone.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moved {
    /// Some count went up.
    pub(super) up: bool,
    /// Some count went down.
    pub(super) down: bool,
    /// Some count went down to zero: there may be holes to punch.
    pub(super) to_zero: bool,
    /// QEMU would not write this block: only a temporary table of ours is counted in it.
    pub(super) ours: bool,
}

impl Block {
    pub(super) fn new(
        g: Geometry,
        offset: u64,
        counts: &[u8],
        born: Option<usize>,
    ) -> Result<Block> {
        Ok(Block {
            offset,
            now: BlockCounts::new(g, counts)?,
            peak: None,
            born,
            moved: Moved::default(),
            held: 0,
        })
    }

    /// A count goes up, or down.
    #[inline]
    pub(super) fn move_to(&mut self, up: bool) {
        self.moved.up |= up;
        self.moved.down |= !up;
    }

    /// Does the verb write it?
    pub(crate) fn is_written(&self) -> bool {
        self.moved.up || self.moved.down || self.born.is_some()
    }

    /// Does QEMU write it?
    pub(crate) fn is_qemus(&self) -> bool {
        self.is_written() && !self.moved.ours
    }

    /// Do its counts on disk go up before the first publish?
    pub(crate) fn is_raised(&self) -> bool {
        self.born.is_none() && (self.moved.up || self.peak.is_some())
    }

    /// Do they go down after the last?
    pub(crate) fn is_lowered(&self) -> bool {
        self.is_written() && !self.only_raised()
    }

    /// Are there clusters that become free?
    pub(crate) fn frees(&self) -> bool {
        self.moved.to_zero
    }

    /// The counts are the highest that any published state needs: writing them once is enough.
    fn only_raised(&self) -> bool {
        !self.moved.down && self.peak.is_none()
    }

    /// Put the final counts into `to`, which has the block's size.
    pub(crate) fn final_counts(&self, g: Geometry, to: &mut [u8]) -> Result<()> {
        self.now.put(g, to)
    }

    /// Put the highest counts that any published state needs into `to`; `old` are those on disk.
    pub(crate) fn peak_counts(&self, g: Geometry, old: &[u8], to: &mut [u8]) -> Result<()> {
        self.now.put(g, to)?;
        if !self.only_raised() {
            refblock::raise_to(g, to, old);
        }
        if let Some(peak) = &self.peak {
            refblock::raise_to(g, to, &peak.bytes(g)?);
        }
        Ok(())
    }

    /// The counts as they are now are needed by a published state: keep them as part of the peak.
    pub(super) fn mark_published(&mut self, g: Geometry) -> Result<()> {
        let mut counts = zeroed(g.cluster_size())?;
        self.peak_counts(g, &[], &mut counts)?;
        self.peak = Some(BlockCounts::new(g, &counts)?);
        Ok(())
    }

    /// Count a cluster once in the peak only.
    pub(super) fn count_in_peak(&mut self, g: Geometry, at: usize) -> Result<()> {
        let ours = !self.is_written();
        if self.peak.is_none() {
            self.peak = Some(BlockCounts::new(g, &self.now.bytes(g)?)?);
        }
        if let Some(peak) = &mut self.peak {
            peak.set(g, at, 1)?;
        }
        (self.moved.up, self.moved.down) = (true, true);
        self.moved.ours |= ours;
        Ok(())
    }
}
