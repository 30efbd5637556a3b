//! Which refcount blocks are in memory, and what they take.
//!
//! A block is read when the first of its counts is asked for, and stays. When all of them take more than
//! the cap they leave one by one, in the order of the file: what was only looked at is forgotten, and the
//! counts of the others are put away in a temporary file (`counts`), as long as there is one.

use super::block::Block;
use super::counts::BlockCounts;
use super::Refcounts;
use crate::error::{Error, Result};
use crate::format::geometry::Geometry;
use crate::image::device::Device;
use crate::io::scratch::Scratch;
use crate::room;
use std::borrow::Cow;
use std::sync::Arc;

/// Our limit for what is kept of refcount blocks that a damaged table puts behind the end of the
/// file, in bytes.
const MAX_ABSENT_BLOCKS: u64 = 64 << 20;

/// Blocks that are asked for ahead of the one that is loaded.
const BLOCKS_AHEAD: u64 = 16;

/// See the module's text.
pub(super) struct Residency {
    /// Loaded blocks by refcount table index.
    pub(super) blocks: Vec<Option<Box<[Block; 1]>>>,
    /// Bytes that counts take, and may take.
    pub(super) held: u64,
    cap: u64,
    /// Where counts are put away, once some are.
    scratch: Option<Arc<Scratch>>,
    /// The block that is next to leave.
    hand: u64,
    /// Blocks before this one have been asked for.
    asked: u64,
    /// Bytes of loaded blocks that lie wholly behind the end of the file.
    absent: u64,
    /// What blocks are read into.
    buffer: Vec<u8>,
}

impl Residency {
    /// Counts may take `cap` bytes.
    pub(super) fn new(cap: u64) -> Residency {
        Residency {
            blocks: Vec::new(),
            held: 0,
            cap,
            scratch: None,
            hand: 0,
            asked: 0,
            absent: 0,
            buffer: Vec::new(),
        }
    }
}

/// Read a refcount block.
fn read(dev: &mut Device, g: Geometry, offset: u64, into: &mut Vec<u8>) -> Result<()> {
    dev.progress.pass(g.cluster_size())?;
    room::resize(into, g.cluster_len(), 0)?;
    dev.read("Could not read a refcount block", offset, into)
}

impl Refcounts {
    /// Blocks that are loaded, by refcount table index.
    pub(crate) fn loaded(&self) -> impl Iterator<Item = (u64, &Block)> {
        let blocks = self.residency.blocks.iter().enumerate();
        blocks.filter_map(|(i, b)| Some((i as u64, &b.as_deref()?[0])))
    }

    /// The block at `index`, if it is loaded.
    pub(crate) fn block(&self, index: u64) -> Option<&Block> {
        let [block] = self.residency.blocks.get(index as usize)?.as_deref()?;
        Some(block)
    }

    pub(super) fn block_mut(&mut self, index: u64) -> Option<&mut Block> {
        let slot = self.residency.blocks.get_mut(index as usize)?;
        let [block] = slot.as_deref_mut()?;
        Some(block)
    }

    /// Load the block at `index`; false where the table has none.
    pub(super) fn load(&mut self, dev: &mut Device, index: u64) -> Result<bool> {
        let g = self.g;
        if let Some(block) = self.block_mut(index) {
            if block.now.is_away() {
                block.now.fetch(g)?;
                self.make_room(index);
            }
            return Ok(true);
        }
        let offset = self.entry(index);
        if offset == 0 {
            return Ok(false);
        }
        self.check_aligned(index, offset)?;
        if offset >= dev.length() {
            // Costs the image 8 bytes, and us a cluster.
            self.residency.absent += g.cluster_size();
            if self.residency.absent > MAX_ABSENT_BLOCKS {
                return Err(Error::Corrupt(format!(
                    "Refblock offset {offset:#x} is behind the end of the file, like many others"
                )));
            }
        }
        self.ask_ahead(dev, index);
        let mut bytes = std::mem::take(&mut self.residency.buffer);
        read(dev, g, offset, &mut bytes)?;
        self.insert(index, Block::new(g, offset, &bytes, None)?)?;
        self.residency.buffer = bytes;
        Ok(true)
    }

    /// Let the storage begin to fetch the blocks behind this one, each once.
    fn ask_ahead(&mut self, dev: &mut Device, index: u64) {
        let asked = self.residency.asked.max(index + 1);
        let until = index + 1 + BLOCKS_AHEAD;
        for next in asked..until.min(self.table().entries.len() as u64) {
            let offset = self.entry(next);
            if offset != 0 {
                dev.will_read(offset, self.g.cluster_size());
            }
        }
        self.residency.asked = asked.max(until);
    }

    /// Say again what the counts of the block at `index` take.
    fn account(&mut self, index: u64) {
        if let Some(block) = self.block_mut(index) {
            let takes = block.now.size() + block.peak.as_ref().map_or(0, BlockCounts::size);
            let before = std::mem::replace(&mut block.held, takes);
            self.residency.held = self.residency.held - before + takes;
        }
    }

    /// The counts of the block at `index` have grown, or come: others have to leave where all take more
    /// than they may.
    pub(super) fn make_room(&mut self, index: u64) {
        self.account(index);
        let n = self.residency.blocks.len() as u64;
        for _ in 0..n {
            if self.residency.held <= self.residency.cap {
                return;
            }
            let next = self.residency.hand % n;
            self.residency.hand = next + 1;
            if next != index && self.block(next).is_some_and(|b| b.held != 0) {
                // Without a temporary file, or on a full disk, they stay, and all others too.
                if self.put_away(next).is_err() {
                    self.residency.cap = u64::MAX;
                }
                self.account(next);
            }
        }
    }

    pub(super) fn put_away(&mut self, index: u64) -> std::io::Result<()> {
        let scratch = match self.residency.scratch.take() {
            Some(scratch) => scratch,
            None => Arc::new(Scratch::new()?),
        };
        let bytes = self.g.cluster_size();
        let at = index.saturating_mul(2).saturating_mul(bytes);
        if let Some(block) = self.block_mut(index) {
            block.now.put_away(&scratch, at)?;
            if let Some(peak) = &mut block.peak {
                peak.put_away(&scratch, at.saturating_add(bytes))?;
            }
        }
        self.residency.scratch = Some(scratch);
        Ok(())
    }

    /// The counts of the block at `index` for one look, and a geometry with their width: read into
    /// `scratch` if the block is not loaded; none where it lies behind the end of the file, since those
    /// are zeros.
    pub(super) fn counts<'a>(
        &'a self,
        dev: &mut Device,
        index: u64,
        scratch: &'a mut Vec<u8>,
    ) -> Result<(Geometry, Cow<'a, [u8]>)> {
        if let Some(block) = self.block(index) {
            return block.now.fields(self.g);
        }
        let offset = self.entry(index);
        self.check_aligned(index, offset)?;
        scratch.clear();
        if offset != 0 && offset < dev.length() {
            read(dev, self.g, offset, scratch)?;
        }
        Ok((self.g, Cow::Borrowed(scratch)))
    }

    pub(super) fn insert(&mut self, index: u64, block: Block) -> Result<()> {
        let slot = index as usize;
        if slot >= self.residency.blocks.len() {
            let more = slot + 1 - self.residency.blocks.len();
            room::reserve(&mut self.residency.blocks, more)?;
            #[allow(clippy::disallowed_methods)] // there is room
            self.residency.blocks.resize_with(slot + 1, || None);
        }
        self.residency.blocks[slot] = Some(room::boxed(block)?);
        self.make_room(index);
        Ok(())
    }

    /// Take the block at `index` out of memory.
    pub(super) fn take_block(&mut self, index: u64) -> Option<Block> {
        let slot = self.residency.blocks.get_mut(index as usize);
        let [block] = *slot.and_then(Option::take)?;
        self.residency.held -= block.held;
        Some(block)
    }

    /// The counts as they are now are needed by a published state: keep them as part of the peak.
    pub(crate) fn mark_published(&mut self) -> Result<()> {
        let g = self.g;
        for index in 0..self.residency.blocks.len() as u64 {
            if let Some(block) = self.block_mut(index).filter(|b| b.is_written()) {
                block.mark_published(g)?;
                self.make_room(index);
            }
        }
        Ok(())
    }
}
