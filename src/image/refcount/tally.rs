//! The hot loops of a walk: runs of L2 entries against the counts that are in memory.

use super::Refcounts;
use crate::by_refcount_width;
use crate::error::Result;
use crate::format::geometry::Geometry;
use crate::format::refblock;
use crate::format::run::{self, Entries, Tallied, Tally};
use crate::image::device::Device;
use byteorder::{BigEndian, ByteOrder};

/// Counts that are likely to be in the processor's own cache, in bytes: looking ahead costs more.
const CACHED: u64 = 1 << 20;

/// Entries whose counts are loaded together where a walk jumps about.
const AHEAD: usize = 32;

/// A walk jumps about where so many runs are behind one another in as many entries.
const JUMPS: u32 = 4;

/// How far a table has been gone through, and when the walk looks ahead: where few clusters in a row are
/// counted in the same block.
struct Cursor {
    entries: usize,
    /// The refcount block that counts the next entry; none, if that is no standard cluster.
    next: Option<u64>,
    /// At this entry the next ones have not been looked at.
    due_at: usize,
    /// Runs since the last look.
    runs: u32,
}

impl Cursor {
    #[inline(always)]
    fn looks_ahead(&mut self) -> bool {
        self.runs = self.runs.saturating_add(1);
        let due = self.entries >= self.due_at;
        let looks = due && self.runs >= JUMPS;
        if due {
            (self.due_at, self.runs) = (self.entries + AHEAD, 0);
        }
        looks
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
        let e = Entries::of(self.g);
        let mut all = Tallied::default();
        while let Some(index) = at.next {
            let rest = table.get(at.entries * e.size..).unwrap_or_default();
            if at.looks_ahead() {
                self.touch::<WIDTH>(e, rest);
            }
            let Some(block) = self.block_mut(index) else {
                break;
            };
            let Some(counts) = block.now.of_width_mut::<WIDTH>() else {
                break;
            };
            let run = run::count::<WIDTH>(e, rest, counts, index, tally);
            if tally != Tally::Look {
                block.move_to(tally == Tally::Up);
            }
            if run.changed != 0 {
                all.changed = at.entries + run.changed;
            }
            if let Some(freed) = run.freed {
                block.moved.to_zero = true;
                let first = self.g.first_cluster_of_block(index).0;
                self.next = self.next.min(first + freed as u64);
            }
            all.ones |= run.ones;
            all.others |= run.others;
            at.entries += run.entries;
            at.next = run.next;
        }
        (self.runs, all.entries) = (at.runs, at.entries);
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
        let (e, mut changed) = (Entries::of(self.g), false);
        while let Some(index) = at.next {
            let rest = table.get_mut(at.entries * e.size..).unwrap_or_default();
            if at.looks_ahead() {
                self.touch::<WIDTH>(e, rest);
            }
            let block = self.block(index);
            let Some(counts) = block.and_then(|b| b.now.of_width::<WIDTH>()) else {
                break;
            };
            let run = run::set_copied::<WIDTH>(e, rest, counts, index, only_clear);
            changed |= run.changed != 0;
            at.entries += run.entries;
            at.next = run.next;
        }
        self.runs = at.runs;
        (at.entries, changed)
    }

    /// Where the entries of a table begin that are not zero, and a geometry with the width of the first
    /// one's counts, which are loaded. None, if it is no standard cluster, or no block describes it.
    fn first_of(&mut self, dev: &mut Device, table: &[u8]) -> Result<(Cursor, Option<Geometry>)> {
        let e = Entries::of(self.g);
        let entries = run::zeros(table, e.size);
        let far = self.residency.held > CACHED;
        let entry = table.get(entries * e.size..).filter(|r| !r.is_empty());
        let at = Cursor {
            entries,
            next: entry.and_then(|entry| e.block_of(BigEndian::read_u64(entry))),
            due_at: if far { 0 } else { usize::MAX },
            runs: self.runs,
        };
        let mut width = None;
        if let Some(index) = at.next {
            if self.load(dev, index)? {
                width = self.block(index).map(|b| b.now.narrow(self.g));
            }
        }
        Ok((at, width))
    }

    /// Load the counts of the next entries, so that the memory answers for all of them at once. A
    /// walk that jumps about waits for little else.
    #[inline(always)]
    fn touch<const WIDTH: u32>(&self, e: Entries, table: &[u8]) {
        let fields = refblock::with_width::<WIDTH>(self.g);
        let mut sum = 0;
        for word in table.chunks_exact(e.size).take(AHEAD) {
            let entry = BigEndian::read_u64(word);
            let block = e.block_of(entry).and_then(|index| self.block(index));
            if let Some(counts) = block.and_then(|b| b.now.of_width::<WIDTH>()) {
                sum ^= refblock::get(fields, counts, e.index_of(entry));
            }
        }
        std::hint::black_box(sum);
    }
}
