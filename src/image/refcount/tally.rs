//! The hot loops of a walk: runs of L2 entries against the counts that are in memory.

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
const CACHED: u64 = 1 << 20;

/// Entries whose counts are loaded together where a walk jumps about.
const AHEAD: usize = 32;

/// A walk jumps about after this many short runs.
const JUMPS: u32 = 4;

/// How far a table has been gone through, and when the walk looks ahead: where few clusters in a row are
/// counted in the same block.
struct Cursor {
    entries: usize,
    /// At this entry the next ones have not been looked at.
    due_at: usize,
    short_runs: u32,
}

impl Cursor {
    #[inline(always)]
    fn looks_ahead(&mut self) -> bool {
        let due = self.short_runs >= JUMPS && self.entries >= self.due_at;
        if due {
            self.due_at = self.entries + AHEAD;
        }
        due
    }

    #[inline(always)]
    fn passed(&mut self, entries: usize) {
        self.entries += entries;
        self.short_runs = if entries < AHEAD / 4 {
            self.short_runs.saturating_add(1)
        } else {
            0
        };
    }
}

impl Refcounts {
    /// Count a run of an L2 table's entries, as far as they are standard clusters whose counts are in
    /// memory in fields of one width. No entries: the first one is something else.
    #[inline]
    pub(crate) fn count_run(
        &mut self,
        dev: &mut Device,
        table: &[u8],
        tally: Tally,
    ) -> Result<Tallied> {
        let (at, width) = self.first_of(dev, table)?;
        let Some(fields) = width else {
            return Ok(Tallied {
                entries: at.entries,
                ..Tallied::default()
            });
        };
        // With the width known and each step in a copy of its own, a cluster that is not next to the last
        // one costs little more than one that is.
        Ok(by_refcount_width!(fields, W => match tally {
            Tally::Up => self.count_at_hand::<W>(table, at, Tally::Up),
            Tally::Down(n) => self.count_at_hand::<W>(table, at, Tally::Down(n)),
            Tally::Look => self.count_at_hand::<W>(table, at, Tally::Look),
        }))
    }

    #[inline(always)]
    fn count_at_hand<const WIDTH: u32>(
        &mut self,
        table: &[u8],
        mut at: Cursor,
        tally: Tally,
    ) -> Tallied {
        let g = self.g;
        let mut all = Tallied::default();
        while let Some((index, rest)) = self.next_block::<WIDTH>(table, &mut at) {
            let Some(block) = self.block_mut(index) else {
                break;
            };
            let Some(counts) = block.now.of_width_mut::<WIDTH>() else {
                break;
            };
            let run = run::count::<WIDTH>(
                g,
                table.get(rest..).unwrap_or_default(),
                counts,
                index,
                tally,
            );
            if run.entries == 0 {
                break;
            }
            if tally != Tally::Look {
                block.move_to(tally == Tally::Up);
            }
            if run.changed != 0 {
                all.changed = at.entries + run.changed;
            }
            if let Some(freed) = run.freed {
                block.moved.to_zero = true;
                let first = g.first_cluster_of_block(index).0;
                self.next = self.next.min(first + freed as u64);
            }
            all.ones |= run.ones;
            all.others |= run.others;
            at.passed(run.entries);
        }
        (self.short_runs, all.entries) = (at.short_runs, at.entries);
        all
    }

    /// Set bit 63 in a run of an L2 table's entries, as [`Refcounts::count_run`] goes. Returns how many they
    /// are, and whether one has changed.
    pub(crate) fn copied_run(
        &mut self,
        dev: &mut Device,
        table: &mut [u8],
        only_clear: bool,
    ) -> Result<(usize, bool)> {
        let (at, width) = self.first_of(dev, table)?;
        let Some(fields) = width else {
            return Ok((at.entries, false));
        };
        Ok(by_refcount_width!(fields, W => self.copied_at_hand::<W>(table, at, only_clear)))
    }

    #[inline(always)]
    fn copied_at_hand<const WIDTH: u32>(
        &mut self,
        table: &mut [u8],
        mut at: Cursor,
        only_clear: bool,
    ) -> (usize, bool) {
        let (g, mut changed) = (self.g, false);
        while let Some((index, rest)) = self.next_block::<WIDTH>(table, &mut at) {
            let counts = self.block(index).and_then(|b| b.now.of_width::<WIDTH>());
            let (Some(counts), Some(rest)) = (counts, table.get_mut(rest..)) else {
                break;
            };
            let (n, differs) = run::set_copied::<WIDTH>(g, rest, counts, index, only_clear);
            if n == 0 {
                break;
            }
            changed |= differs;
            at.passed(n);
        }
        self.short_runs = at.short_runs;
        (at.entries, changed)
    }

    /// Where the entries of a table begin that are not zero, and a geometry with the width of the first
    /// one's counts, which are loaded. None, if it is no standard cluster, or no block describes it.
    fn first_of(&mut self, dev: &mut Device, table: &[u8]) -> Result<(Cursor, Option<Geometry>)> {
        let g = self.g;
        let entries = run::zeros(table, g.l2_entry_size());
        let far = self.residency.held > CACHED;
        let at = Cursor {
            entries,
            due_at: if far { 0 } else { usize::MAX },
            short_runs: self.short_runs,
        };
        let entry = table
            .get(entries * g.l2_entry_size()..)
            .filter(|r| !r.is_empty());
        let index = entry.and_then(|entry| run::block_of(g, BigEndian::read_u64(entry)));
        let mut width = None;
        if let Some(index) = index {
            if self.load(dev, index)? {
                width = self.block(index).map(|b| b.now.narrow(g));
            }
        }
        Ok((at, width))
    }

    /// Go on to the next entry that is not zero: the refcount block that counts it, if it is a standard
    /// cluster, and where in the table it stands.
    #[inline(always)]
    fn next_block<const WIDTH: u32>(&self, table: &[u8], at: &mut Cursor) -> Option<(u64, usize)> {
        let size = self.g.l2_entry_size();
        loop {
            let rest = table.get(at.entries * size..).filter(|r| !r.is_empty())?;
            let entry = BigEndian::read_u64(rest);
            if entry != 0 {
                if at.looks_ahead() {
                    self.touch::<WIDTH>(rest);
                }
                return Some((run::block_of(self.g, entry)?, at.entries * size));
            }
            at.entries += run::zeros(rest, size);
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
            let block = run::block_of(g, entry).and_then(|index| self.block(index));
            if let Some(counts) = block.and_then(|b| b.now.of_width::<WIDTH>()) {
                let at = g.refblock_index(g.cluster_of(entry & OFFSET_MASK));
                sum ^= refblock::get(fields, counts, at);
            }
        }
        std::hint::black_box(sum);
    }
}
