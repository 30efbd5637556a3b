//! The hot loops of a walk: runs of L2 entries against the counts that are at hand.

use super::Refcounts;
use crate::by_refcount_width;
use crate::error::Result;
use crate::format::entry::OFFSET_MASK;
use crate::format::geometry::Geometry;
use crate::format::refblock;
use crate::format::run::{self, Tallied, Tally};
use crate::image::device::Device;
use byteorder::{BigEndian, ByteOrder};

/// Counts that are likely to be in the processor's own cache, in bytes: looking ahead costs more.
pub(super) const CACHED: u64 = 1 << 20;

/// Entries whose counts are loaded together where a walk jumps about.
const AHEAD: usize = 32;

/// A walk jumps about after this many short runs.
pub(super) const JUMPS: u32 = 4;

/// When a walk looks ahead: where few clusters in a row are counted in the same block.
struct Ahead {
    /// At this entry the next ones have not been looked at.
    due_at: usize,
    short_runs: u32,
}

impl Ahead {
    #[inline(always)]
    fn due(&mut self, entry: usize) -> bool {
        let due = self.short_runs >= JUMPS && entry >= self.due_at;
        if due {
            self.due_at = entry + AHEAD;
        }
        due
    }

    #[inline(always)]
    fn ran(&mut self, entries: usize) {
        self.short_runs = if entries < AHEAD / 4 {
            self.short_runs.saturating_add(1)
        } else {
            0
        };
    }
}

impl Refcounts {
    /// Count a run of an L2 table's entries, as far as they are standard clusters in refcount blocks
    /// that are at hand. No entries: the first one is something else.
    #[inline]
    pub(crate) fn count_run(
        &mut self,
        dev: &mut Device,
        table: &[u8],
        tally: Tally,
    ) -> Result<Tallied> {
        let (first, passed) = self.first_block(table);
        if self.outside(first) || !self.load(dev, first)? {
            return Ok(Tallied {
                entries: passed,
                ..Tallied::default()
            });
        }
        Ok(by_refcount_width!(self.fields_of(first), W => match tally {
            Tally::Up => self.count_at_hand::<W>(table, Tally::Up),
            Tally::Down(n) => self.count_at_hand::<W>(table, Tally::Down(n)),
            Tally::Look => self.count_at_hand::<W>(table, Tally::Look),
        }))
    }

    /// A geometry with the width that the counts of a block have in memory.
    fn fields_of(&self, index: u64) -> Geometry {
        let order = self.block(index).and_then(|b| b.now.order());
        Geometry {
            refcount_order: order.unwrap_or(self.g.refcount_order),
            ..self.g
        }
    }

    /// [`Refcounts::count_run`] from block to block, as long as they have the same width. With the width known and each step in a copy of
    /// its own, a cluster that is not next to the last one costs little more than one that is.
    #[inline(always)]
    fn count_at_hand<const WIDTH: u32>(&mut self, table: &[u8], tally: Tally) -> Tallied {
        let g = self.g;
        let size = g.l2_entry_size();
        let mut all = Tallied::default();
        let mut ahead = self.ahead();
        while let Some(rest) = table.get(all.entries * size..).filter(|r| !r.is_empty()) {
            let entry = BigEndian::read_u64(rest);
            if entry == 0 {
                all.entries += 1;
                continue;
            }
            if ahead.due(all.entries) {
                self.touch::<WIDTH>(rest);
            }
            let Some(index) = run::block_of(g, entry) else {
                break;
            };
            if self.outside(index) {
                all.entries += 1;
                continue;
            }
            let Some(Some(block)) = self.residency.blocks.get_mut(index as usize) else {
                break;
            };
            let [block] = &mut **block;
            let Some(counts) = block.now.fields_mut::<WIDTH>() else {
                break;
            };
            let run = run::count::<WIDTH>(g, rest, counts, index, tally);
            if run.entries == 0 {
                break;
            }
            if tally != Tally::Look {
                block.move_to(tally == Tally::Up);
            }
            if run.changed != 0 {
                all.changed = all.entries + run.changed;
            }
            if let Some(freed) = run.freed {
                block.moved.to_zero = true;
                self.next = self
                    .next
                    .min(g.first_cluster_of_block(index).0 + freed as u64);
            }
            ahead.ran(run.entries);
            all.ones |= run.ones;
            all.others |= run.others;
            all.entries += run.entries;
        }
        self.residency.walk.short_runs = ahead.short_runs;
        all
    }

    /// How a walk that starts here looks ahead.
    fn ahead(&self) -> Ahead {
        let far = self.residency.open.held() > CACHED;
        Ahead {
            due_at: if far { 0 } else { usize::MAX },
            short_runs: self.residency.walk.short_runs,
        }
    }

    /// Load the counts of the next entries, so that the memory answers for all of them at once. A
    /// walk that jumps about waits for little else.
    #[inline(always)]
    fn touch<const WIDTH: u32>(&self, table: &[u8]) {
        let g = self.g;
        let fields = refblock::with_width::<WIDTH>(g);
        let mut sum = 0;
        for word in table.chunks_exact(g.l2_entry_size()).take(AHEAD) {
            let entry = BigEndian::read_u64(word);
            let index = run::block_of(g, entry).unwrap_or(u64::MAX);
            if self.outside(index) {
                continue;
            }
            let block = self.block(index);
            if let Some(counts) = block.and_then(|b| b.now.fields::<WIDTH>()) {
                let at = g.refblock_index(g.cluster_of(entry & OFFSET_MASK));
                sum ^= refblock::get(fields, counts, at);
            }
        }
        std::hint::black_box(sum);
    }

    /// Set bit 63 in a run of an L2 table's entries, as [`Refcounts::count_run`] goes.
    pub(crate) fn copied_run(
        &mut self,
        dev: &mut Device,
        table: &mut [u8],
        only_clear: bool,
    ) -> Result<(usize, bool)> {
        let (first, passed) = self.first_block(table);
        if self.outside(first) || !self.load(dev, first)? {
            return Ok((passed, false));
        }
        let fields = self.fields_of(first);
        Ok(by_refcount_width!(fields, W => self.copied_at_hand::<W>(table, only_clear)))
    }

    #[inline(always)]
    fn copied_at_hand<const WIDTH: u32>(
        &mut self,
        table: &mut [u8],
        only_clear: bool,
    ) -> (usize, bool) {
        let g = self.g;
        let size = g.l2_entry_size();
        let (mut entries, mut changed) = (0, false);
        let mut ahead = self.ahead();
        while let Some(rest) = table.get_mut(entries * size..).filter(|r| !r.is_empty()) {
            let entry = BigEndian::read_u64(rest);
            if entry == 0 {
                entries += 1;
                continue;
            }
            if ahead.due(entries) {
                self.touch::<WIDTH>(rest);
            }
            let Some(index) = run::block_of(g, entry) else {
                break;
            };
            if self.outside(index) {
                entries += 1;
                continue;
            }
            let block = self.block(index);
            let Some(counts) = block.and_then(|b| b.now.fields::<WIDTH>()) else {
                break;
            };
            let (n, differs) = run::set_copied::<WIDTH>(g, rest, counts, index, only_clear);
            if n == 0 {
                break;
            }
            ahead.ran(n);
            entries += n;
            changed |= differs;
        }
        self.residency.walk.short_runs = ahead.short_runs;
        (entries, changed)
    }
}
