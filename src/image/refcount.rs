//! Refcounts in memory: QEMU's allocations and frees, replayed before anything is written.
//!
//! The look-first half of a verb runs QEMU's code path against [`Refcounts`]: first-fit search,
//! refcount blocks and tables that grow in the middle, frees. Nothing reaches the disk. What the
//! replay leaves behind is, for each refcount block, the *final* counts and, where more than one
//! write publishes something, the *peak*: the highest count that any published state in between
//! needs. The writing half brings the disk to the peak before the first publish and down to the
//! final counts after the last, so that at no moment a count is below the references to a cluster.

mod memory;

use super::counts::Counts;
use super::device::{self, Device};
use super::room::{self, Clusters, Known};
use crate::by_refcount_width;
use crate::error::{Error, Result};
use crate::format::entry::{OFFSET_MASK, REFTABLE_OFFSET_MASK};
use crate::format::geometry::{Geometry, HostCluster, MAX_CLUSTER_OFFSET, TABLE_ENTRY};
use crate::format::refblock;
use crate::format::run::{self, Run, Step};
use byteorder::{BigEndian, ByteOrder};
use std::borrow::Cow;

/// QEMU compares the number of refcount table entries with this (`QCOW_MAX_REFTABLE_SIZE`).
const MAX_REFTABLE_ENTRIES: u64 = 8 << 20;

/// Counts that are likely to be in the processor's own cache, in bytes: looking ahead costs more.
const CACHED: u64 = 1 << 20;

/// Entries whose counts are loaded together where a walk jumps about.
const AHEAD: usize = 32;

/// A walk jumps about after this many short runs.
const JUMPS: u32 = 4;

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

/// A refcount block in memory.
pub(crate) struct Block {
    /// Where it lives in the file.
    pub(crate) offset: u64,
    /// Counts at the end of the replay.
    counts: Counts,
    /// Counts that published states in between need, where there is more than one publish.
    peak: Option<Counts>,
    /// The counts or the peak differ from what was read.
    pub(crate) dirty: bool,
    /// Some count went up, or the block is new.
    pub(crate) raised: bool,
    /// Some count went down.
    pub(crate) lowered: bool,
    /// Some count went down to zero: there may be holes to punch.
    pub(crate) freed: bool,
    /// QEMU would not write this block: only a temporary table of ours is counted in it.
    pub(crate) ours: bool,
    /// Made by this verb, in this epoch: nothing on disk yet.
    pub(crate) born: Option<usize>,
    /// The counts are among the open ones.
    open: bool,
    /// Bytes that the block takes, without open counts.
    kept: u64,
}

impl Block {
    fn new(g: Geometry, offset: u64, counts: Vec<u8>, born: Option<usize>) -> Block {
        let made = born.is_some();
        Block {
            offset,
            counts: Counts::new(g, counts),
            peak: None,
            dirty: made,
            raised: made,
            lowered: false,
            freed: false,
            ours: false,
            born,
            open: false,
            kept: 0,
        }
    }

    /// The counts at the end of the replay.
    pub(crate) fn counts(&self, g: Geometry) -> Result<Cow<'_, [u8]>> {
        self.counts.bytes(g)
    }

    /// Counts that published states in between need, where there is more than one publish.
    pub(crate) fn peak(&self, g: Geometry) -> Result<Option<Cow<'_, [u8]>>> {
        self.peak.as_ref().map(|p| p.bytes(g)).transpose()
    }

    /// Some count is needed in between that is not needed at the end.
    pub(crate) fn has_peak(&self) -> bool {
        self.peak.is_some()
    }

    /// The counts are the highest that any published state needs: writing them once is enough.
    pub(crate) fn only_raised(&self) -> bool {
        !self.lowered && self.peak.is_none()
    }

    #[inline]
    fn touch(&mut self, up: bool) {
        self.dirty = true;
        self.raised |= up;
        self.lowered |= !up;
    }
}

/// One place where the refcount table has been during the verb.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) offset: u64,
    pub(crate) clusters: u64,
    /// All entries, zero tail included.
    pub(crate) entries: Vec<u64>,
    /// `None`: the table that was there before the verb; else the epoch that made it.
    pub(crate) born: Option<usize>,
}

/// Does a caller have to look for clusters again?
#[derive(PartialEq)]
enum Reserved {
    Done,
    /// A refcount block was made where the caller may have wanted to put its data (QEMU's -EAGAIN).
    Again,
}

/// How a freed cluster's bytes end up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freed {
    /// A hole is punched (QEMU's discard types ALWAYS and SNAPSHOT).
    Punched,
    /// The bytes stay (QEMU's discard types OTHER and NEVER).
    Kept,
}

/// See the module's text.
pub(crate) struct Refcounts {
    g: Geometry,
    /// Places of the refcount table, the current one last.
    pub(crate) tables: Vec<Table>,
    /// Loaded blocks by refcount table index.
    blocks: Vec<Option<Box<[Block; 1]>>>,
    /// What they take, and where they are.
    memory: memory::Memory,
    /// Runs of few clusters since the last long one: the walk jumps about.
    short_runs: u32,
    /// QEMU's `free_cluster_index`: where the search for free clusters goes on.
    pub(crate) next: u64,
    /// The epoch that new structures belong to; see `update`.
    pub(crate) epoch: usize,
    /// Clusters that held something before the verb and were freed by an explicit free, with the
    /// epoch whose publish makes the disk forget them.
    pub(crate) forgotten: Known<usize>,
    /// Clusters freed without a hole.
    pub(crate) kept: Clusters,
    /// Clusters that were punched in QEMU's sequence although free before the verb.
    pub(crate) punched: Clusters,
    /// Clusters that explicit allocations of this verb have taken.
    pub(crate) taken: Clusters,
    /// Length that QEMU's writes of refcount structures give the file at least.
    pub(crate) reach: u64,
    /// Refcount blocks dropped by a shrinking resize.
    pub(crate) dropped: Vec<Dropped>,
    /// The last block read for its counts before the verb.
    before: Option<(u64, Vec<u8>)>,
    /// New contents would go to clusters that the image uses until the verb's last publish.
    overwrites: bool,
}

/// A refcount block that a shrinking resize takes out of the table.
pub(crate) struct Dropped {
    /// Its place in the refcount table.
    pub(crate) index: u64,
    /// Its place in the file.
    pub(crate) offset: u64,
    /// The counts it had at the end, if the verb changed them.
    pub(crate) counts: Option<Counts>,
    /// Its counts on disk and those of a temporary table, if one is put into its range.
    pub(crate) peak: Option<Vec<u8>>,
}

impl Refcounts {
    /// The table at `offset`. Counts may take `memory` bytes.
    pub(crate) fn new(
        g: Geometry,
        offset: u64,
        clusters: u64,
        entries: Vec<u64>,
        memory: u64,
    ) -> Refcounts {
        Refcounts {
            g,
            tables: vec![Table {
                offset,
                clusters,
                entries,
                born: None,
            }],
            blocks: Vec::new(),
            memory: memory::Memory::new(memory),
            short_runs: 0,
            next: 0,
            epoch: 0,
            forgotten: Known::default(),
            kept: Clusters::default(),
            punched: Clusters::default(),
            taken: Clusters::default(),
            reach: 0,
            dropped: Vec::new(),
            before: None,
            overwrites: false,
        }
    }

    /// The refcount table as it is now.
    pub(crate) fn table(&self) -> &Table {
        // `tables` is never empty: made with one, only pushed to.
        &self.tables[self.tables.len() - 1]
    }

    /// The entries of the table as it is now, which the replay has no more use for.
    pub(crate) fn take_entries(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.table_mut().entries)
    }

    fn table_mut(&mut self) -> &mut Table {
        let last = self.tables.len() - 1;
        &mut self.tables[last]
    }

    /// Offset of the block at `index` of the table; 0 for none.
    pub(crate) fn entry(&self, index: u64) -> u64 {
        self.table()
            .entries
            .get(index as usize)
            .copied()
            .unwrap_or(0)
            & REFTABLE_OFFSET_MASK
    }

    /// Blocks that are loaded, by refcount table index.
    pub(crate) fn loaded(&self) -> impl Iterator<Item = (u64, &Block)> {
        self.blocks
            .iter()
            .enumerate()
            .filter_map(|(i, b)| Some((i as u64, &b.as_deref()?[0])))
    }

    /// Does any loaded block have a peak?
    pub(crate) fn has_peaks(&self) -> bool {
        self.epoch != 0
    }

    fn check_aligned(&self, index: u64, offset: u64) -> Result<()> {
        if self.g.in_cluster(offset) != 0 {
            return Err(Error::Corrupt(format!(
                "Refblock offset {offset:#x} unaligned (reftable index: {index:#x})"
            )));
        }
        Ok(())
    }

    fn block_mut(&mut self, index: u64) -> Option<&mut Block> {
        let [block] = self.blocks.get_mut(index as usize)?.as_deref_mut()?;
        Some(block)
    }

    /// The block at `index`, if it is loaded.
    pub(crate) fn block(&self, index: u64) -> Option<&Block> {
        let [block] = self.blocks.get(index as usize)?.as_deref()?;
        Some(block)
    }

    /// The refcount of a cluster when the walk of create was done, whatever was freed since: the
    /// counts that the first publish of several needs.
    pub(crate) fn get_published(&mut self, dev: &mut Device, cluster: HostCluster) -> Result<u64> {
        let last = self.get(dev, cluster)?;
        let at = self.g.refblock_index(cluster);
        let peak = self
            .block(self.g.reftable_index(cluster))
            .and_then(|b| b.peak.as_ref());
        Ok(match peak {
            Some(peak) => peak.get(self.g, at)?.max(last),
            None => last,
        })
    }

    /// The refcount of a cluster; 0 where no block describes it.
    pub(crate) fn get(&mut self, dev: &mut Device, cluster: HostCluster) -> Result<u64> {
        let index = self.g.reftable_index(cluster);
        if !self.load(dev, index)? {
            return Ok(0);
        }
        let at = self.g.refblock_index(cluster);
        self.block(index)
            .map_or(Ok(0), |b| b.counts.get(self.g, at))
    }

    /// Add 1 to or take 1 from a count during a walk and return it. The block must exist.
    #[inline]
    pub(crate) fn bump(&mut self, dev: &mut Device, cluster: HostCluster, up: bool) -> Result<u64> {
        let g = self.g;
        let index = g.reftable_index(cluster);
        if !self.load(dev, index)? {
            return Err(self.not_described(cluster));
        }
        let at = g.refblock_index(cluster);
        let Some(block) = self.block_mut(index) else {
            return Ok(0); // loaded above
        };
        let old = block.counts.get(g, at)?;
        let new = if up {
            if old == g.refcount_max() {
                return Err(overflow(g, cluster));
            }
            old + 1
        } else {
            old.checked_sub(1).ok_or_else(|| underflow(g, cluster))?
        };
        block.counts.set(g, at, new)?;
        block.touch(up);
        block.freed |= new == 0;
        if new == 0 && cluster.0 < self.next {
            self.next = cluster.0;
        }
        Ok(new)
    }

    /// Why a cluster in use cannot be counted: no refcount block describes it. QEMU would make one,
    /// and refuse if the table cannot grow that far.
    fn not_described(&self, cluster: HostCluster) -> Error {
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

    /// Count a run of an L2 table's entries, as far as they are standard clusters in refcount blocks
    /// that are at hand. No entries: the first one is something else.
    #[inline]
    pub(crate) fn count_run(&mut self, dev: &mut Device, table: &[u8], step: Step) -> Result<Run> {
        let (first, passed) = self.first_block(table);
        if self.outside(first) || !self.load(dev, first)? {
            return Ok(Run {
                entries: passed,
                ..Run::default()
            });
        }
        Ok(by_refcount_width!(self.fields_of(first), W => match step {
            Step::Up => self.count_at_hand::<W>(table, Step::Up),
            Step::Down => self.count_at_hand::<W>(table, Step::Down),
            Step::Look => self.count_at_hand::<W>(table, Step::Look),
        }))
    }

    /// A geometry with the width that the counts of a block have in memory.
    fn fields_of(&self, index: u64) -> Geometry {
        let order = self.block(index).and_then(|b| b.counts.order());
        Geometry {
            refcount_order: order.unwrap_or(self.g.refcount_order),
            ..self.g
        }
    }

    /// [`Refcounts::count_run`] from block to block, as long as they have the same width. With the width known and each step in a copy of
    /// its own, a cluster that is not next to the last one costs little more than one that is.
    #[inline(always)]
    fn count_at_hand<const WIDTH: u32>(&mut self, table: &[u8], step: Step) -> Run {
        let g = self.g;
        let size = g.l2_entry_size();
        let mut all = Run::default();
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
            let Some(Some(block)) = self.blocks.get_mut(index as usize) else {
                break;
            };
            let [block] = &mut **block;
            let Some(counts) = block.counts.fields_mut::<WIDTH>() else {
                break;
            };
            let run = run::count::<WIDTH>(g, rest, counts, index, step);
            if run.entries == 0 {
                break;
            }
            if step != Step::Look {
                block.touch(step == Step::Up);
            }
            if run.changed != 0 {
                all.changed = all.entries + run.changed;
            }
            if let Some(freed) = run.freed {
                block.freed = true;
                self.next = self
                    .next
                    .min(g.first_cluster_of_block(index).0 + freed as u64);
            }
            ahead.ran(run.entries);
            all.ones |= run.ones;
            all.others |= run.others;
            all.entries += run.entries;
        }
        self.short_runs = ahead.short_runs;
        all
    }

    /// How a walk that starts here looks ahead.
    fn ahead(&self) -> Ahead {
        let far = self.memory.residents.held() > CACHED;
        Ahead {
            due_at: if far { 0 } else { usize::MAX },
            short_runs: self.short_runs,
        }
    }

    /// Load the counts of the next entries, so that the memory answers for all of them at once. A
    /// walk that jumps about waits for little else.
    #[inline(always)]
    fn touch<const WIDTH: u32>(&self, table: &[u8]) {
        let g = self.g;
        let fields = run::with_width::<WIDTH>(g);
        let mut sum = 0;
        for word in table.chunks_exact(g.l2_entry_size()).take(AHEAD) {
            let entry = BigEndian::read_u64(word);
            let index = run::block_of(g, entry).unwrap_or(u64::MAX);
            if self.outside(index) {
                continue;
            }
            let block = self.block(index);
            if let Some(counts) = block.and_then(|b| b.counts.fields::<WIDTH>()) {
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
            let Some(counts) = block.and_then(|b| b.counts.fields::<WIDTH>()) else {
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
        self.short_runs = ahead.short_runs;
        (entries, changed)
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

    /// QEMU's `alloc_clusters_noref`: the first of `n` free clusters in a row.
    fn find(&mut self, dev: &mut Device, n: u64, max_offset: u64) -> Result<u64> {
        let g = self.g;
        let mut scratch = Vec::new();
        let (mut at, mut run) = (self.next, 0);
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
            let Some(counts) = self.counts(dev, index, &mut scratch)? else {
                continue; // not reached: the entry is not zero
            };
            let entries = g.refblock_entries() as usize;
            let mut i = g.refblock_index(HostCluster(at));
            while i < entries && run < n {
                if run == 0 {
                    // Skip what is in use.
                    i = refblock::find(g, counts, i, entries, true).unwrap_or(entries);
                }
                let limit = entries.min(i.saturating_add((n - run) as usize));
                let stop = refblock::find(g, counts, i, limit, false);
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

    /// QEMU's `update_refcount(+1)` for new clusters.
    fn reserve(&mut self, dev: &mut Device, start: u64, n: u64) -> Result<Reserved> {
        let g = self.g;
        for c in start..start + n {
            if self.ensure_block(dev, HostCluster(c))? == Reserved::Again {
                // Undo, and try the same clusters first.
                for undo in start..c {
                    self.store(HostCluster(undo), 0)?;
                    self.taken.remove(undo);
                }
                self.next = self.next.min(start);
                return Ok(Reserved::Again);
            }
            debug_assert_eq!(self.get(dev, HostCluster(c))?, 0);
            self.store(HostCluster(c), 1)?;
            self.taken.insert(c)?;
        }
        debug_assert!(g.refcount_max() >= 1);
        Ok(Reserved::Done)
    }

    /// Store a count in a loaded block.
    fn store(&mut self, cluster: HostCluster, count: u64) -> Result<()> {
        let g = self.g;
        let at = g.refblock_index(cluster);
        if let Some(block) = self.block_mut(g.reftable_index(cluster)) {
            let up = count >= block.counts.get(g, at)?;
            block.counts.set(g, at, count)?;
            block.touch(up);
            block.freed |= count == 0;
            let end = block.offset.saturating_add(g.cluster_size());
            self.reach = self.reach.max(end);
        }
        Ok(())
    }

    /// QEMU's `alloc_refcount_block`.
    fn ensure_block(&mut self, dev: &mut Device, cluster: HostCluster) -> Result<Reserved> {
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
        self.taken.insert(new.0)?;
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
        let epoch = self.epoch;
        self.reach = self.reach.max(offset.saturating_add(self.g.cluster_size()));
        self.insert(index, Block::new(self.g, offset, counts, Some(epoch)))
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
        let table = Table {
            offset,
            clusters,
            entries: table,
            born: Some(self.epoch),
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
            self.taken.insert(c)?;
        }
        self.reach = self.reach.max(g.offset_of(HostCluster(end)));
        // The old table is forgotten when the header names the new one.
        self.free(
            dev,
            old.0,
            old.1 * g.cluster_size(),
            Freed::Kept,
            self.epoch,
        )
    }

    /// QEMU's `qcow2_free_clusters`: an underflow leaves the counts as they are and is no error.
    /// `forgotten_in` is the epoch whose publish removes the last reference on disk.
    pub(crate) fn free(
        &mut self,
        dev: &mut Device,
        offset: u64,
        bytes: u64,
        bytes_end_up: Freed,
        forgotten_in: usize,
    ) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let g = self.g;
        let first = g.cluster_of(offset).0;
        let last = g.cluster_of(offset.saturating_add(bytes - 1)).0;
        for c in first..=last {
            if self.get(dev, HostCluster(c))? == 0 {
                return Ok(());
            }
        }
        for c in first..=last {
            let left = self.bump(dev, HostCluster(c), false)?;
            self.store(HostCluster(c), left)?;
            if left == 0 {
                self.release(c, bytes_end_up, forgotten_in)?;
            }
        }
        Ok(())
    }

    /// Take one reference from each cluster of a data range, holes punched, nothing remembered:
    /// for the many clusters of a resize, none of which this verb writes to again.
    pub(crate) fn free_data(&mut self, dev: &mut Device, offset: u64, bytes: u64) -> Result<()> {
        let g = self.g;
        let first = g.cluster_of(offset).0;
        let last = g.cluster_of(offset.saturating_add(bytes.max(1) - 1)).0;
        for c in first..=last {
            if self.get(dev, HostCluster(c))? == 0 {
                return Ok(());
            }
        }
        for c in first..=last {
            self.bump(dev, HostCluster(c), false)?;
        }
        Ok(())
    }

    /// Note what becomes of a cluster whose count has dropped to zero by an explicit free.
    fn release(&mut self, c: u64, bytes_end_up: Freed, forgotten_in: usize) -> Result<()> {
        let born_here = self.taken.remove(c);
        if !born_here {
            self.forgotten.insert(c, forgotten_in)?;
        }
        match bytes_end_up {
            Freed::Kept => {
                self.punched.remove(c);
                self.kept.insert(c)
            }
            Freed::Punched => {
                self.kept.remove(c);
                self.punched.insert(c)
            }
        }
    }

    /// Make sure that the disk has forgotten what was in clusters that are about to get new
    /// contents: if the write that forgets belongs to this epoch, a new epoch begins. Where no epoch
    /// can do that the verb is replayed to its end all the same, for the errors that QEMU would give
    /// on the way, and [`Refcounts::check_overwrites`] refuses it.
    pub(crate) fn forget_before_writing(
        &mut self,
        dev: &mut Device,
        offset: u64,
        bytes: u64,
    ) -> Result<()> {
        if bytes == 0 || self.overwrites {
            return Ok(());
        }
        let first = self.g.cluster_of(offset).0;
        let last = self.g.cluster_of(offset.saturating_add(bytes - 1)).0;
        let mut wait_for = None;
        for c in first..=last {
            if self.count_before(dev, HostCluster(c))? != 0 {
                wait_for = wait_for.max(Some(self.forgotten.get(c).copied().unwrap_or(NEVER)));
            }
        }
        match wait_for {
            Some(NEVER) => self.overwrites = true,
            Some(epoch) if epoch >= self.epoch => self.next_epoch()?,
            _ => {}
        }
        Ok(())
    }

    /// May what the replay leaves behind be written? Asked when nothing is yet.
    pub(crate) fn check_overwrites(&self) -> Result<()> {
        // A block in the place of one that a resize drops would go with that one's table entry.
        let again = self.dropped.iter().any(|d| self.block(d.index).is_some());
        if self.overwrites || again {
            return Err(Error::Unsupported(
                "The verb would have to write to clusters that the image still uses".into(),
            ));
        }
        Ok(())
    }

    /// The count that a cluster had before the verb.
    fn count_before(&mut self, dev: &mut Device, cluster: HostCluster) -> Result<u64> {
        let g = self.g;
        let index = g.reftable_index(cluster);
        if self.before.as_ref().is_none_or(|(i, _)| *i != index) {
            let entries = self.tables.first().map(|t| &t.entries);
            let offset = entries
                .and_then(|e| e.get(index as usize))
                .copied()
                .unwrap_or(0);
            let counts = if self.block(index).is_some_and(|b| b.born.is_some()) {
                Vec::new()
            } else if offset & REFTABLE_OFFSET_MASK != 0 {
                dev.progress.pass(g.cluster_size())?;
                dev.read_vec(
                    "Could not read a refcount block",
                    offset & REFTABLE_OFFSET_MASK,
                    g.cluster_size(),
                )?
            } else {
                Vec::new()
            };
            self.before = Some((index, counts));
        }
        let at = g.refblock_index(cluster);
        Ok(self
            .before
            .as_ref()
            .map_or(0, |(_, counts)| refblock::get(g, counts, at)))
    }

    /// The count at the end of the replay of a cluster that the replay has touched.
    pub(crate) fn count_after(&self, cluster: HostCluster) -> Result<u64> {
        let at = self.g.refblock_index(cluster);
        self.block(self.g.reftable_index(cluster))
            .map_or(Ok(0), |b| b.counts.get(self.g, at))
    }

    /// Which of the dropped blocks was at `index`? They are in order.
    fn dropped_at(&self, index: u64) -> Option<usize> {
        self.dropped.binary_search_by_key(&index, |d| d.index).ok()
    }

    /// Has the verb changed counts in the block at `index`?
    pub(crate) fn may_lose(&self, index: u64) -> bool {
        match self.block(index) {
            Some(b) => b.dirty,
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
        let at = self.g.refblock_index(cluster);
        let count = |counts: &Counts| counts.get(self.g, at);
        let block = self.block(self.g.reftable_index(cluster));
        let left = block.map_or(Ok(0), |b| count(&b.counts))?;
        let peak = block.and_then(|b| b.peak.as_ref());
        let counted = peak.map_or(Ok(0), count)? != 0;
        let punched = counted || self.punched.contains(cluster.0);
        Ok(left == 0 && (new || punched || self.count_before(dev, cluster)? != 0))
    }

    /// What follows is written after the current epoch has been published.
    pub(crate) fn next_epoch(&mut self) -> Result<()> {
        self.mark_published()?;
        self.epoch += 1;
        Ok(())
    }

    /// Count a cluster once in the peak only: it is used between two publishes and free again
    /// afterwards. The replay must be over.
    pub(crate) fn count_temporarily(
        &mut self,
        dev: &mut Device,
        cluster: HostCluster,
    ) -> Result<()> {
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
        // Walks since the search for this cluster may have left the block.
        self.load(dev, index)?;
        let Some(block) = self.block_mut(index) else {
            return Err(self.not_described(cluster));
        };
        let mut peak = match block.peak.take() {
            Some(peak) => peak,
            None => Counts::new(g, room::owned(block.counts.bytes(g)?)?),
        };
        peak.set(g, at, 1)?;
        block.peak = Some(peak);
        block.raised = true;
        block.lowered = true;
        block.ours |= !block.dirty;
        block.dirty = true;
        self.account(index);
        Ok(())
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
        let (mut run, mut c) = (0, from);
        let (mut scratch, mut in_scratch) = (Vec::new(), None);
        let end = g
            .first_cluster_of_block(self.table().entries.len() as u64)
            .0;
        while c < end {
            let index = g.reftable_index(HostCluster(c));
            if in_scratch != Some(index) {
                dev.progress.pass(TABLE_ENTRY)?;
            }
            if self.entry(index) == 0 || self.block(index).is_some_and(|b| b.born.is_some()) {
                run = 0;
                c = g.first_cluster_of_block(index + 1).0;
                continue;
            }
            let at = g.refblock_index(HostCluster(c));
            if in_scratch != Some(index) {
                if let Some(block) = self.block(index) {
                    scratch = room::owned(block.counts(g)?)?;
                    if let Some(peak) = block.peak(g)? {
                        refblock::raise_to(g, &mut scratch, &peak, g.refblock_entries() as usize);
                    }
                } else {
                    self.counts(dev, index, &mut scratch)?;
                }
                in_scratch = Some(index);
            }
            // What a resize has freed in a block that is loaded is still in use on the disk.
            let counted = refblock::get(g, &scratch, at) != 0
                || self.block(index).is_some() && self.count_before(dev, HostCluster(c))? != 0;
            run = if counted || self.touched(c) {
                0
            } else {
                run + 1
            };
            c += 1;
            if run == n {
                let (first, last) = (HostCluster(c - n), HostCluster(c - 1));
                for index in g.reftable_index(first)..=g.reftable_index(last) {
                    self.load(dev, index)?;
                }
                return Ok(Some(first.0));
            }
        }
        self.find_untouched_in_dropped(dev, n)
    }

    /// [`Refcounts::find_untouched`] in the range of a block that a shrinking resize drops: until the
    /// new state is published the table names it, and afterwards its counts go with it.
    fn find_untouched_in_dropped(&mut self, dev: &mut Device, n: u64) -> Result<Option<u64>> {
        let g = self.g;
        if n > g.refblock_entries() {
            return Ok(None);
        }
        let mut dropped = std::mem::take(&mut self.dropped);
        let mut found = None;
        for d in &mut dropped {
            dev.progress.pass(g.cluster_size())?;
            let before = dev.read_vec(
                "Could not read a refcount block",
                d.offset,
                g.cluster_size(),
            )?;
            let after = d.counts.as_ref().map(|c| c.bytes(g)).transpose()?;
            let base = g.first_cluster_of_block(d.index).0;
            let mut run = 0;
            for at in 0..g.refblock_entries() as usize {
                let c = base + at as u64;
                let counted = refblock::get(g, &before, at) != 0
                    || after.as_ref().is_some_and(|b| refblock::get(g, b, at) != 0);
                run = if counted || self.touched(c) || c == 0 {
                    0
                } else {
                    run + 1
                };
                if run == n {
                    found = Some(c + 1 - n);
                    break;
                }
            }
            drop(after);
            if found.is_some() {
                d.peak = Some(before);
                break;
            }
        }
        self.dropped = dropped;
        Ok(found)
    }

    /// Has an allocation of this verb taken one of `n` clusters from `first` on?
    pub(crate) fn any_taken(&self, first: u64, n: u64) -> bool {
        (first..first.saturating_add(n)).any(|c| self.taken.contains(c))
    }

    /// Has the replay done anything to a cluster?
    fn touched(&self, c: u64) -> bool {
        self.forgotten.get(c).is_some()
            || self.punched.contains(c)
            || self.kept.contains(c)
            || self.taken.contains(c)
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
            self.check_aligned(index, offset)?;
            // Zeros, and a table may name a million of these: terabytes to look at.
            if offset >= dev.length() && self.block(index).is_none() {
                room::push(&mut unused, (index, offset))?;
                continue;
            }
            let mut copy = match self.block(index) {
                Some(b) => room::owned(b.counts(g)?)?,
                None => {
                    dev.progress.pass(g.cluster_size())?;
                    room::resize(&mut scratch, g.cluster_len(), 0)?;
                    dev.read("Could not read a refcount block", offset, &mut scratch)?;
                    std::mem::take(&mut scratch)
                }
            };
            let itself = g.cluster_of(offset);
            if g.reftable_index(itself) == index {
                refblock::set(g, &mut copy, g.refblock_index(itself), 0);
            }
            if copy.iter().all(|b| *b == 0) {
                room::push(&mut unused, (index, offset))?;
            }
            scratch = copy;
        }
        let end = self
            .table()
            .offset
            .saturating_add(self.table().entries.len() as u64 * TABLE_ENTRY);
        self.reach = self.reach.max(end);
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
            self.release(cluster.0, Freed::Punched, NEVER)?;
            self.table_mut().entries[index as usize] = 0;
            let block = self.take_block(index);
            if block.as_ref().is_none_or(|b| b.born.is_none()) {
                // Nothing is left in it but, at times, the block itself.
                let counts = block.map(|mut b| {
                    // Its place in the temporary file is that of the next block here.
                    b.counts.open(g)?;
                    b.counts.pack(g);
                    Ok(b.counts)
                });
                let counts = counts.transpose()?;
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
            let counts = self.counts(dev, index, &mut scratch)?.unwrap_or_default();
            // A file may have terabytes of holes: only what is not zero is taken apart.
            if let Some(byte) = counts.iter().rposition(|b| *b != 0) {
                let n = ((end - first) as usize).min(g.block_entries_in(byte + 8));
                if let Some(last) = (0..n).rev().find(|i| refblock::get(g, counts, *i) != 0) {
                    return Ok(first + last as u64);
                }
            }
            end = first;
        }
        Err(Error::Corrupt(
            "There are no references in the refcount table.".into(),
        ))
    }
}

/// "Forgotten in" an epoch that never ends: the cluster may not be written by this verb.
pub(crate) const NEVER: usize = usize::MAX;

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
    use crate::image::counts::MOST;
    use crate::io::memory::MemoryStorage;

    impl Refcounts {
        /// Leave all open blocks, as a walk does. Returns how many.
        fn forget_all_clean(&mut self) -> usize {
            let loaded = self.loaded().count();
            self.enter_window(0..u64::MAX).unwrap();
            loaded - self.loaded().count()
        }

        /// Clusters of the newest table, and of the blocks made together with it.
        fn table_and_blocks(&self) -> usize {
            let behind = self
                .loaded()
                .filter(|(_, b)| b.offset >= 64 * 256 * 512)
                .count();
            behind + self.table().clusters as usize
        }
    }

    /// 512-byte clusters, a refcount table of one cluster at 1, a block at 2.
    fn small() -> (Device, Refcounts) {
        let g = Geometry::new(9, 4, false);
        let mut file = vec![0u8; 3 * 512];
        for c in 0..3 {
            refblock::set(g, &mut file[1024..], c, 1);
        }
        let dev = Device::new(Box::new(MemoryStorage::new(file))).unwrap();
        let mut entries = vec![0; 64];
        entries[0] = 1024;
        (dev, Refcounts::new(g, 512, 1, entries, MOST))
    }

    #[test]
    fn a_temporary_table_is_counted_in_a_block_that_was_left_meanwhile() {
        let (mut dev, mut r) = small();
        assert_eq!(r.find_untouched(&mut dev, 1, 2).unwrap(), Some(3));
        assert!(r.forget_all_clean() > 0 && r.block(0).is_none());
        r.count_temporarily(&mut dev, HostCluster(3)).unwrap();
        let block = r.block(0).unwrap();
        let peak = block.peak(r.g).unwrap().unwrap();
        assert_eq!(refblock::get(r.g, &peak, 3), 1);
        assert!(block.dirty && block.raised && block.lowered);
    }

    #[test]
    fn clusters_are_found_first_fit_and_search_goes_on_behind() {
        let (mut dev, mut r) = small();
        assert_eq!(r.alloc(&mut dev, 1).unwrap(), 3 * 512);
        assert_eq!(r.alloc(&mut dev, 1025).unwrap(), 4 * 512);
        assert_eq!(r.alloc(&mut dev, 0).unwrap(), 7 * 512);
        r.free(&mut dev, 5 * 512, 1, Freed::Kept, 0).unwrap();
        assert_eq!(r.alloc(&mut dev, 512).unwrap(), 5 * 512);
    }

    /// Count a table of clusters in order, as `walk` does.
    fn count(r: &mut Refcounts, dev: &mut Device, table: &[u8], step: Step) -> Run {
        let mut all = Run::default();
        while let Some(rest) = table.get(all.entries * 8..).filter(|t| !t.is_empty()) {
            let run = r.count_run(dev, rest, step).unwrap();
            all.ones |= run.ones;
            all.others |= run.others;
            all.entries += run.entries;
            if run.entries == 0 {
                let c = r.g.cluster_of(BigEndian::read_u64(rest) & OFFSET_MASK);
                let count = r.bump(dev, c, step == Step::Up).unwrap();
                all.ones |= count == 1;
                all.entries += 1;
            }
        }
        all
    }

    #[test]
    #[cfg_attr(miri, ignore = "many minutes there")]
    fn a_walk_that_jumps_about_counts_in_narrow_fields_and_comes_to_the_same() {
        for order in [2, 4, 6] {
            let g = Geometry::new(9, order, false);
            let blocks = 3 * CACHED / 1024;
            let entries = (0..blocks).map(|b| (b + 1) * 512).collect();
            let mut file = vec![0u8; 512 + blocks as usize * 512];
            let per_block = g.refblock_entries();
            let mut want = vec![0u64; (blocks * per_block) as usize];
            let mut seed = 88_172_645_463_325_252u64;
            let mut random = |n: u64| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed % n
            };
            for (c, count) in want.iter_mut().enumerate() {
                *count = random(2);
                let at = 512 + (c as u64 / per_block * 512) as usize;
                let index = c % per_block as usize;
                refblock::set(g, &mut file[at..at + 512], index, *count);
            }
            let mut dev = Device::new(Box::new(MemoryStorage::new(file))).unwrap();
            let mut r = Refcounts::new(g, 0, 1, entries, MOST);
            let mut visited = Vec::new();
            let mut table = [0u8; 512];
            for round in 0..2000u64 {
                for word in table.chunks_exact_mut(8) {
                    // Some clusters again and again, out of what narrow fields hold.
                    let hot = round % 8 == 0 && want[77] < g.refcount_max().min(300);
                    let c = if hot {
                        77
                    } else {
                        78 + random(want.len() as u64 - 78)
                    };
                    want[c as usize] += 1;
                    visited.push(c);
                    BigEndian::write_u64(word, c << 9);
                }
                count(&mut r, &mut dev, &table, Step::Up);
            }
            let narrow = r.loaded().filter(|(_, b)| b.counts.order() < Some(order));
            assert!(narrow.count() > blocks as usize / 2, "order {order}");
            for chunk in visited.chunks(64).take(500) {
                for (word, c) in table.chunks_exact_mut(8).zip(chunk) {
                    BigEndian::write_u64(word, c << 9);
                    want[*c as usize] -= 1;
                }
                count(&mut r, &mut dev, &table, Step::Down);
                let mut flags = table;
                let mut done = 0;
                while done < 64 {
                    let (n, _) = r
                        .copied_run(&mut dev, &mut flags[done * 8..], false)
                        .unwrap();
                    assert_ne!(n, 0);
                    done += n;
                }
                for (word, c) in flags.chunks_exact(8).zip(chunk) {
                    let copied = BigEndian::read_u64(word) >> 63 == 1;
                    assert_eq!(copied, want[*c as usize] == 1, "order {order} cluster {c}");
                }
                let look = count(&mut r, &mut dev, &table, Step::Look);
                assert_eq!(look.ones, chunk.iter().any(|c| want[*c as usize] == 1));
                assert_eq!(look.others, chunk.iter().any(|c| want[*c as usize] != 1));
            }
            for (index, block) in r.loaded() {
                let first = (index * per_block) as usize;
                let counts = block.counts(g).unwrap();
                for (i, want) in want[first..].iter().take(per_block as usize).enumerate() {
                    let count = refblock::get(g, &counts, i);
                    assert_eq!(count, *want, "order {order} block {index}");
                }
            }
        }
    }

    #[test]
    fn a_new_block_leaves_the_first_free_cluster_to_the_data() {
        let (mut dev, mut r) = small();
        assert_eq!(r.alloc(&mut dev, 253 * 512).unwrap(), 3 * 512);
        // Clusters 0 to 255 are full: QEMU puts the L1 copy at 256 and 257, the block at 258.
        assert_eq!(r.alloc(&mut dev, 1024).unwrap(), 256 * 512);
        assert_eq!(r.table().entries[1], 258 * 512);
        assert_eq!(r.alloc(&mut dev, 512).unwrap(), 259 * 512);
    }

    #[test]
    #[cfg_attr(miri, ignore = "many minutes there")]
    fn the_table_grows_behind_everything_described() {
        let (mut dev, mut r) = small();
        // 64 entries describe 64 * 256 clusters; one by one nothing is skipped for new blocks.
        let mut at = 0;
        while r.tables.len() == 1 {
            at = r.alloc(&mut dev, 512).unwrap();
        }
        assert_eq!(r.taken.len(), 64 * 256 - 3 + 1 + r.table_and_blocks());
        assert!(r.table().entries.len() > 64);
        // The old table's cluster is free and below everything: QEMU takes it at once.
        assert_eq!(at, 512);
        assert_eq!(r.forgotten.get(1), Some(&0));
        r.forget_before_writing(&mut dev, at, 512).unwrap();
        assert_eq!(r.epoch, 1);
    }
}
