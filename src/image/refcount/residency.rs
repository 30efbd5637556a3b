//! Which refcount blocks are in memory, in which form, and what they take.
//!
//! A block is read when the first of its counts is asked for and *open* from then on. The open ones
//! that were not used for long are left: forgotten if nothing in them has changed, else packed or
//! narrow (`packed`) and *kept*. When all of it takes more than the cap, kept ones are put *away* in
//! a temporary file, as long as there is one.
//!
//! A walk in order comes to each block once. One that jumps about would fetch blocks from the file
//! again and again: it is then cut into *windows*. In each it goes over all the tables that are left
//! and counts only in so many blocks as fit in memory, so that what is beyond the cap costs passes.

use super::block::Block;
use super::packed::BlockCounts;
use super::residents::Residents;
use super::tally::{CACHED, JUMPS};
use super::Refcounts;
use crate::error::{Error, Result};
use crate::format::entry::OFFSET_MASK;
use crate::format::run;
use crate::image::device::Device;
use crate::image::room;
use crate::image::tables::read_refblock;
use crate::io::scratch::Scratch;
use byteorder::{BigEndian, ByteOrder};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

/// Our limit for what is kept of refcount blocks that a damaged table puts behind the end of the
/// file, in bytes.
const MAX_ABSENT_BLOCKS: u64 = 64 << 20;

/// Blocks that are asked for ahead of the one that is loaded.
const BLOCKS_AHEAD: u64 = 16;

/// When a walk has come back to this many blocks that could not stay, and to one in so many entries,
/// it is seen whether windows would be cheaper.
const BACK: u64 = 8;
const ENTRIES_EACH: u64 = 1024;

/// What fetching a block costs besides its bytes, and what an entry costs in a window, in bytes of such
/// a fetch.
const FETCH: u64 = 4096;
const ENTRY: u64 = 16;

/// See the module's text.
pub(super) struct Residency {
    /// Loaded blocks by refcount table index.
    pub(super) blocks: Vec<Option<Box<[Block; 1]>>>,
    /// Which of them are open.
    pub(super) open: Residents,
    overflow: Overflow,
    reading: Reading,
    pub(super) walk: Walk,
    window: Window,
    /// Blocks have been narrowed.
    narrow: bool,
}

/// Where counts go that do not fit in memory.
#[derive(Default)]
struct Overflow {
    /// Where counts are put away; none before that, and where that is not possible.
    scratch: Option<Arc<Scratch>>,
    refused: bool,
    /// The next block to be put away, if it is kept.
    hand: u64,
}

/// How blocks are read.
#[derive(Default)]
struct Reading {
    /// Blocks before this one have been asked for.
    asked: u64,
    /// Bytes of loaded blocks that lie wholly behind the end of the file.
    absent: u64,
}

/// How a walk goes.
#[derive(Default)]
pub(super) struct Walk {
    /// Runs of few clusters since the last long one: it jumps about.
    pub(super) short_runs: u32,
    /// Blocks that it has come back to although they could not stay, and entries counted.
    back: u64,
    entries: u64,
    /// The number of blocks at which windows are next thought of.
    think_at: u64,
}

/// In which blocks a walk counts now.
struct Window {
    /// From this one on, so many.
    first: u64,
    blocks: u64,
    /// A walk of this verb was cut into windows.
    used: bool,
}

impl Residency {
    /// Counts may take `cap` bytes.
    pub(super) fn new(cap: u64) -> Residency {
        Residency {
            blocks: Vec::new(),
            open: Residents::new(cap),
            overflow: Overflow::default(),
            reading: Reading::default(),
            walk: Walk::default(),
            window: Window {
                first: 0,
                blocks: u64::MAX,
                used: false,
            },
            narrow: false,
        }
    }
}

/// Is it cheaper to go over the entries once for each part of `blocks` that fits, which is `fit` of
/// them, than to fetch blocks again as often as so far: `back` times in `entries` entries?
fn windows_pay(cluster_size: u64, back: u64, entries: u64, blocks: u64, fit: u64) -> bool {
    let fetches = back.saturating_mul(cluster_size + FETCH);
    fetches > entries.saturating_mul(blocks.div_ceil(fit) * ENTRY)
}

impl Block {
    /// Is this block kept in memory?
    fn worth_putting_away(&self) -> bool {
        !self.open && self.held != 0
    }
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
        let [block] = self
            .residency
            .blocks
            .get_mut(index as usize)?
            .as_deref_mut()?;
        Some(block)
    }

    /// Load the block at `index`; false where the table has none.
    pub(super) fn load(&mut self, dev: &mut Device, index: u64) -> Result<bool> {
        if let Some(block) = self.block(index) {
            if block.now.order().is_none() {
                self.admit(index)?;
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
            self.residency.reading.absent += self.g.cluster_size();
            if self.residency.reading.absent > MAX_ABSENT_BLOCKS {
                return Err(Error::Corrupt(format!(
                    "Refblock offset {offset:#x} is behind the end of the file, like many others"
                )));
            }
        }
        self.ask_ahead(dev, index);
        dev.progress.pass(self.g.cluster_size())?;
        let counts = read_refblock(dev, self.g, offset)?;
        self.insert(index, Block::new(self.g, offset, counts, None))?;
        self.admit(index)?;
        Ok(true)
    }

    /// Let the storage begin to fetch the blocks behind this one, each once.
    fn ask_ahead(&mut self, dev: &mut Device, index: u64) {
        let asked = self.residency.reading.asked.max(index + 1);
        let until = index + 1 + BLOCKS_AHEAD;
        for next in asked..until.min(self.table().entries.len() as u64) {
            let offset = self.entry(next);
            if offset != 0 && !self.outside(next) {
                dev.will_read(offset, self.g.cluster_size());
            }
        }
        self.residency.reading.asked = asked.max(until);
    }

    /// Open the counts of a block, and leave blocks that were not used for long.
    fn admit(&mut self, index: u64) -> Result<()> {
        let g = self.g;
        let narrow = self.residency.walk.short_runs >= JUMPS && self.residency.open.held() > CACHED;
        if narrow && !self.residency.narrow {
            // All of them: between blocks of one width the walk does not stop.
            self.residency.narrow = true;
            for [block] in self.residency.blocks.iter_mut().flatten().map(|b| &mut **b) {
                block.now.narrow(g);
            }
        }
        let Some(block) = self.block_mut(index) else {
            return Ok(());
        };
        block.now.open(g)?;
        if narrow {
            block.now.narrow(g);
        }
        block.open = true;
        let bytes = block.now.size();
        self.account(index);
        let back = self.residency.open.enter(index, bytes)?;
        self.residency.walk.back += u64::from(back);
        while let Some(oldest) = self.residency.open.leave() {
            if oldest != index {
                self.settle(oldest);
            }
        }
        self.make_room(index)
    }

    /// A block is no longer open: forget it, or keep it in little memory.
    fn settle(&mut self, index: u64) {
        let g = self.g;
        let Some(slot) = self.residency.blocks.get_mut(index as usize) else {
            return;
        };
        match slot {
            // What was only looked at is read again if need be.
            Some(block) if !block[0].is_written() => {
                self.residency.open.kept -= block[0].held;
                *slot = None;
            }
            Some(block) => {
                let [block] = &mut **block;
                block.now.pack(g);
                block.open = false;
                self.account(index);
            }
            None => {}
        }
    }

    /// Say again what a block takes besides its counts while they are open.
    pub(super) fn account(&mut self, index: u64) {
        let Some(Some(block)) = self.residency.blocks.get_mut(index as usize) else {
            return;
        };
        let [block] = &mut **block;
        let counts = if block.open { 0 } else { block.now.size() };
        let takes = counts + block.peak.as_ref().map_or(0, BlockCounts::size);
        let before = std::mem::replace(&mut block.held, takes);
        let residents = &mut self.residency.open;
        residents.kept = (residents.kept - before) + takes;
    }

    /// Put blocks away until what all take is within the cap, but not the one at `index`.
    fn make_room(&mut self, index: u64) -> Result<()> {
        while self.residency.open.over() && !self.residency.overflow.refused {
            match self.next_kept(index) {
                Some(kept) => self.put_away(kept)?,
                None => match self.residency.open.oldest_but(index) {
                    Some(oldest) => {
                        self.settle(oldest);
                        self.put_away(oldest)?;
                    }
                    None => return Ok(()),
                },
            }
        }
        Ok(())
    }

    /// The next block that is kept and worth putting away.
    fn next_kept(&mut self, but: u64) -> Option<u64> {
        let n = self.residency.blocks.len() as u64;
        for _ in 0..n {
            let index = self.residency.overflow.hand % n;
            self.residency.overflow.hand = index + 1;
            if index != but && self.block(index).is_some_and(Block::worth_putting_away) {
                return Some(index);
            }
        }
        None
    }

    /// Put the counts of a kept block away. Where that is not possible it stays, and all others too.
    fn put_away(&mut self, index: u64) -> Result<()> {
        let g = self.g;
        if self.residency.overflow.scratch.is_none() && !self.residency.overflow.refused {
            self.residency.overflow.scratch = Scratch::new().ok().map(Arc::new);
        }
        #[allow(clippy::disallowed_methods)] // an Arc
        let Some(scratch) = self.residency.overflow.scratch.clone() else {
            self.residency.overflow.refused = true;
            return Ok(());
        };
        let Some(block) = self.block_mut(index) else {
            return Ok(());
        };
        let at = index.saturating_mul(2).saturating_mul(g.cluster_size());
        let mut put = || {
            block.now.put_away(g, &scratch, at)?;
            match &mut block.peak {
                Some(peak) => peak.put_away(g, &scratch, at.saturating_add(g.cluster_size())),
                None => Ok(()),
            }
        };
        // A full disk: what is away can still be read.
        let done = put().is_ok();
        self.account(index);
        self.residency.overflow.refused |= !done;
        Ok(())
    }

    /// The counts of the block at `index` for one look, read into `scratch` if the block is not
    /// loaded; none where it lies behind the end of the file, since those are zeros.
    pub(super) fn counts<'a>(
        &'a self,
        dev: &mut Device,
        index: u64,
        scratch: &'a mut Vec<u8>,
    ) -> Result<Option<&'a [u8]>> {
        if let Some(block) = self.block(index) {
            return Ok(Some(match block.counts(self.g)? {
                Cow::Borrowed(counts) => counts,
                Cow::Owned(counts) => {
                    *scratch = counts;
                    scratch
                }
            }));
        }
        let offset = self.entry(index);
        if offset == 0 {
            return Ok(None);
        }
        self.check_aligned(index, offset)?;
        if offset >= dev.length() {
            scratch.clear();
            return Ok(Some(scratch));
        }
        dev.progress.pass(self.g.cluster_size())?;
        room::resize(scratch, self.g.cluster_len(), 0)?;
        dev.read("Could not read a refcount block", offset, scratch)?;
        Ok(Some(scratch))
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
        self.account(index);
        Ok(())
    }

    /// Take the block at `index` out of memory.
    pub(super) fn take_block(&mut self, index: u64) -> Option<Block> {
        let slot = self.residency.blocks.get_mut(index as usize);
        let [block] = *slot.and_then(Option::take)?;
        self.residency.open.kept -= block.held;
        Some(block)
    }

    /// The counts as they are now are needed by a published state: keep them as part of the peak.
    pub(crate) fn mark_published(&mut self) -> Result<()> {
        let g = self.g;
        for index in 0..self.residency.blocks.len() as u64 {
            let Some(block) = self.block_mut(index).filter(|b| b.is_written()) else {
                continue;
            };
            block.mark_published(g)?;
            self.account(index);
            self.make_room(u64::MAX)?;
        }
        Ok(())
    }

    /// Does the walk pass the block at `index` over for now?
    #[inline(always)]
    pub(crate) fn outside(&self, index: u64) -> bool {
        let window = &self.residency.window;
        index.wrapping_sub(window.first) >= window.blocks
    }

    /// The refcount block that counts the first entry of a table which is not zero and not passed
    /// over (if it is a standard cluster, else none that matters), and how many come before it.
    #[inline]
    pub(super) fn first_block(&self, table: &[u8]) -> (u64, usize) {
        let g = self.g;
        let mut words = table
            .chunks_exact(g.l2_entry_size())
            .map(BigEndian::read_u64);
        let counted =
            |w: u64| w != 0 && !run::block_of(g, w).is_some_and(|index| self.outside(index));
        #[allow(clippy::disallowed_methods)] // an iterator
        match words.clone().position(counted) {
            Some(n) => {
                let word = words.nth(n).unwrap_or(0);
                (g.reftable_index(g.cluster_of(word & OFFSET_MASK)), n)
            }
            None => (self.residency.window.first, words.len()),
        }
    }

    /// A walk begins.
    pub(crate) fn begin_walk(&mut self) {
        let walk = &mut self.residency.walk;
        (walk.back, walk.entries, walk.think_at) = (0, 0, BACK);
    }

    /// So many entries have been counted. Does the walk spend more time opening and leaving blocks than
    /// it would in windows?
    pub(crate) fn thrashes(&mut self, entries: u64) -> bool {
        let walk = &mut self.residency.walk;
        walk.entries += entries;
        if walk.back < walk.think_at || walk.back * ENTRIES_EACH < walk.entries {
            return false;
        }
        walk.think_at = walk.back.saturating_mul(2);
        let (back, entries) = (walk.back, walk.entries);
        let (fit, blocks) = self.window_size();
        windows_pay(self.g.cluster_size(), back, entries, blocks, fit)
    }

    /// Was a walk of this verb cut into windows?
    pub(crate) fn jumped(&self) -> bool {
        self.residency.window.used
    }

    /// How many blocks fit in memory together, and how many there are.
    fn window_size(&self) -> (u64, u64) {
        let g = self.g;
        let (mut n, mut bytes, mut peaks) = (0u64, 0u64, 1);
        for (_, block) in self.loaded() {
            n += 1;
            bytes += g.cluster_size() >> (g.refcount_order - block.now.fields_needed(g));
            if block.peak.is_some() {
                peaks = 2;
            }
        }
        // Not all of the room: counts grow, and fields with them.
        let room = self.residency.open.room() / 8 * 7 / peaks;
        let blocks = (room.saturating_mul(n.max(1)) / bytes.max(1)).max(1);
        let used = self.table().entries.iter().filter(|e| **e != 0).count();
        (blocks, used as u64)
    }

    /// Ranges of blocks that fit in memory together; the last one goes on to where no blocks are.
    pub(crate) fn windows(&mut self) -> Result<Vec<Range<u64>>> {
        self.residency.window.used = true;
        let (blocks, _) = self.window_size();
        let entries = self.table().entries.iter().zip(0u64..);
        let used = entries.filter(|(e, _)| **e != 0).map(|(_, i)| i);
        let mut starts = room::collected(used.step_by(blocks as usize))?;
        match starts.first_mut() {
            Some(first) => *first = 0,
            None => room::push(&mut starts, 0)?,
        }
        let ends = starts.iter().skip(1).copied().chain([u64::MAX]);
        room::collected(starts.iter().copied().zip(ends).map(|(a, b)| a..b))
    }

    /// From here on count only in these blocks: the others are left.
    pub(crate) fn enter_window(&mut self, window: Range<u64>) -> Result<()> {
        while let Some(oldest) = self.residency.open.oldest() {
            self.settle(oldest);
        }
        for index in (0..self.residency.blocks.len() as u64).filter(|i| !window.contains(i)) {
            if self.residency.overflow.refused {
                break;
            }
            if self.block(index).is_some_and(Block::worth_putting_away) {
                self.put_away(index)?;
            }
        }
        self.residency.reading.asked = window.start;
        self.residency.window.first = window.start;
        self.residency.window.blocks = window.end - window.start;
        Ok(())
    }

    /// Count in all blocks again.
    pub(crate) fn leave_windows(&mut self) {
        (self.residency.window.first, self.residency.window.blocks) = (0, u64::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_for_walks_that_come_back_to_blocks_for_nearly_every_entry() {
        let block = 64 << 10;
        // 80 TiB in random order, 640 of 40,960 blocks fit: nearly each entry fetches one.
        assert!(windows_pay(block, 1 << 20, 1 << 20, 40_960, 640));
        // In order: a block is come back to once for each L2 table.
        assert!(!windows_pay(block, 128, 1 << 20, 40_960, 640));
        // Where nearly all fits two passes are cheaper than a fetch for one in a thousand entries.
        assert!(windows_pay(block, 1100, 1 << 20, 1000, 900));
        assert!(!windows_pay(block, 400, 1 << 20, 1000, 900));
    }
}
