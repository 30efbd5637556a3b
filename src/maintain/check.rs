//! Looking: every reference is counted anew and compared with what the image says
//! (`qcow2_check_refcounts`). The words of the findings are qemu-img's. A long file: the findings of one
//! pass over the tables, which share its windows.
//!
//! QEMU goes through the L2 tables of each L1 table, one entry after the other. Here a table is read
//! once however many L1 tables name it, and all of them in the order of the file; each of its entries
//! then counts as often as the table is named.

use byteorder::{BigEndian, ByteOrder};
use std::ops::Range;

use super::blocks::{Blocks, Described, MAX_LENGTH};
use super::table::Table;
use super::tally::{self, References};
use super::{bitmaps, Findings};
use crate::by_refcount_width;
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use crate::format::extensions::Extensions;
use crate::format::geometry::{Geometry, HostCluster, MAX_L1_BYTES, TABLE_ENTRY};
use crate::format::header::Header;
use crate::format::refblock::with_width;
use crate::format::{entry::REFTABLE_OFFSET_MASK, refblock};
use crate::image::device::MAX_REQUEST;
use crate::image::device::{self, Device};
use crate::image::progress::Stage;

/// Reserved bits of an L1 entry, of a standard L2 entry, of a refcount table entry.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const REFTABLE_RESERVED: u64 = 0x1ff;
/// The half of an extended entry's bitmap that says which subclusters are allocated.
const ALL_ALLOCATED: u64 = 0xffff_ffff;
/// QEMU counts clusters in an `int`.
const MAX_CLUSTERS: u64 = i32::MAX as u64;
/// So many names of L2 tables are held at a time (24 bytes each).
const MOST_NAMED: usize = 1 << 21;
/// What is asked for ahead of the tables that are read, in bytes.
const AHEAD: u64 = 4 << 20;
/// So many ranges behind the end of the file are kept in mind.
pub(super) const MOST_BEHIND: usize = 1 << 18;
/// No window is smaller.
const LEAST_WINDOW: u64 = 1 << 12;

/// What of an image does not change while it is looked at.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) header: &'a Header,
    pub(super) extensions: &'a Extensions,
    pub(super) l1: &'a [u64],
    pub(super) table: &'a Table,
}

/// What has been noticed besides the numbers.
#[derive(Clone, Debug, Default)]
pub(super) struct Noticed {
    /// A hash of all findings: where it is the same, nothing has changed.
    pub(super) findings: u64,
    /// References may be missing: a table cannot be read. Then nothing may be freed.
    pub(super) blind: bool,
    /// Reading one of them fails, and it may name any cluster: nothing may be written.
    pub(super) unread: bool,
    /// The refcount structures cannot be mended where they are.
    pub(super) rebuild: bool,
    /// Clusters of the file; one more where something reaches past its end.
    pub(super) clusters: u64,
    /// The last cluster in use.
    pub(super) highest: u64,
    /// Zero entries whose preallocated cluster is not aligned.
    pub(super) misplaced: u64,
    /// Compressed clusters with COPIED.
    pub(super) compressed_flags: u64,
    /// Clusters whose count is lower than the references to them.
    pub(super) too_low: u64,
    /// Entries of the active disk whose COPIED is not as counted.
    pub(super) wrong_flags: u64,
    /// A cluster of the refcount table has another use: with a new one elsewhere that can be written.
    pub(super) reftable_shared: bool,
    /// A cluster of the active L1 table has another use.
    pub(super) l1_shared: bool,
    /// A table lies in the header: what is written there would be read as entries.
    pub(super) table_in_header: bool,
    /// From this cluster on the file belongs to an L1 table (or one of bitmaps) that its end cuts off: nothing of
    /// it is counted, but what is written there would be its entries.
    pub(super) cut_from: Option<u64>,
    /// Clusters of a snapshot table that the end of the file cuts off, as far as anything of it is kept.
    pub(super) cut_snapshots: Range<u64>,
    /// A refcount block lies there.
    pub(super) block_in_cut: bool,
    /// Clusters behind the end of the file that something refers to.
    pub(super) behind_end: Vec<Range<u64>>,
}

impl Noticed {
    /// Every reference that is known is counted, and flags are as counted; behind the end of the file nothing
    /// is counted, and what is allocated there later would seem to be what an entry means.
    pub(super) fn counts_hold(&self) -> bool {
        let counted = self.too_low == 0 && self.wrong_flags == 0 && !self.rebuild;
        counted && !self.unread && self.behind_end.is_empty()
    }

    fn is_cut(&self, cluster: u64) -> bool {
        self.cut_from.is_some_and(|from| from <= cluster) || self.cut_snapshots.contains(&cluster)
    }
}

/// An L2 table, and how often it is named.
#[derive(Clone, Copy)]
pub(super) struct NamedTables {
    pub(super) offset: u64,
    /// By all L1 tables, and by the active one.
    pub(super) total: u64,
    pub(super) active: u64,
}

/// How references are counted this time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    /// What the progress function is told; nothing if the stage has been begun before.
    pub(super) stage: Option<Stage>,
    /// The refcount table and its blocks are referred to.
    pub(super) structures: bool,
    /// Note L2 tables whose clusters have another use.
    pub(super) overlaps: bool,
    /// A table that cannot be read is an error, not a finding: what is counted is about to be relied on.
    pub(super) strict: bool,
}

/// Sees an L2 table: where it is, and its contents.
pub(super) type Visit<'v, C> = dyn FnMut(&mut C, NamedTables, &[u8]) -> Result<()> + 'v;

/// One check under way.
pub(super) struct Check<'a, 'f> {
    pub(super) dev: &'a mut Device,
    pub(super) it: Subject<'a>,
    pub(super) blocks: Blocks<'a>,
    pub(super) found: Findings<'f>,
    pub(super) noticed: Noticed,
    pub(super) window: Stretch,
    pub(super) mode: Mode,
}

/// The part of the file whose clusters are counted now.
pub(super) struct Stretch {
    pub(super) clusters: Range<u64>,
    pub(super) tally: References,
    /// A bit for each cluster: the image says that its count is one.
    ones: Vec<u64>,
    /// A block of these counts cannot be read: the bits are not all there is to know.
    bad: bool,
    /// The last window of the file.
    last: bool,
    /// Names of L2 tables in the L1 tables.
    named: u64,
}

impl Stretch {
    fn none() -> Result<Stretch> {
        Ok(Stretch {
            clusters: 0..0,
            tally: References::new(0..0, 0)?,
            ones: Vec::new(),
            bad: false,
            last: false,
            named: 0,
        })
    }

    /// Note whether a count is one.
    #[inline]
    pub(super) fn set_one(&mut self, cluster: u64, one: bool) {
        let i = cluster.wrapping_sub(self.clusters.start);
        if let Some(word) = self.ones.get_mut((i >> 6) as usize) {
            let bit = 1 << (i & 63);
            *word = if one { *word | bit } else { *word & !bit };
        }
    }

    #[inline(always)]
    pub(super) fn is_one(&self, cluster: u64) -> bool {
        let i = cluster.wrapping_sub(self.clusters.start);
        let word = self.ones.get((i >> 6) as usize).copied().unwrap_or(0);
        word >> (i & 63) & 1 != 0
    }
}

impl<'a, 'f> Check<'a, 'f> {
    pub(super) fn new(
        dev: &'a mut Device,
        it: Subject<'a>,
        reftable: &'a [u64],
        found: Findings<'f>,
        mode: Mode,
    ) -> Result<Check<'a, 'f>> {
        let g = it.header.geometry;
        let clusters = g.clusters_for(dev.length());
        let mut check = Check {
            dev,
            it,
            blocks: Blocks::new(g, reftable),
            found,
            noticed: Noticed {
                clusters,
                ..Noticed::default()
            },
            window: Stretch::none()?,
            mode,
        };
        if clusters > MAX_CLUSTERS {
            check.found.result.check_errors = 1;
            return Err(Error::TooBig(
                "The image file has more clusters than can be checked".into(),
            ));
        }
        check.found.result.total_clusters = g.clusters_for(it.header.disk_size());
        Ok(check)
    }

    pub(super) fn g(&self) -> Geometry {
        self.it.header.geometry
    }

    fn l1_tables(&self) -> u64 {
        self.it.table.entries.len() as u64 + 1
    }

    /// The parts of the file that `memory` bytes are enough for.
    pub(super) fn windows(&self, memory: u64) -> Vec<Range<u64>> {
        // One cluster behind the end: something may reach into it.
        let end = self.g().clusters_for(self.dev.length()) + 1;
        let bits = References::bits_per_cluster(self.l1_tables());
        // Whole refcount blocks, so that none has to be put together.
        let block = self.g().refblock_entries();
        let len = (memory.saturating_mul(8) / bits).max(LEAST_WINDOW);
        let len = (len / block).max(1) * block;
        (0..end.div_ceil(len))
            .map(|i| i * len..((i + 1) * len).min(end))
            .collect()
    }

    /// Look at everything.
    ///
    /// Returns the L2 tables whose clusters have another use, if these are asked for.
    pub(super) fn look(&mut self, windows: &[Range<u64>]) -> Result<Vec<u64>> {
        let mut overlapped = Vec::new();
        for index in 0..windows.len() {
            self.enter(windows, index)?;
            self.compare()?;
            if self.mode.overlaps {
                self.note_overlaps(&mut overlapped)?;
            }
        }
        overlapped.sort_unstable();
        if let Some((offset, index)) = self.blocks.unaligned {
            self.found.tell(1, format_args!(
                "qcow2: Image is corrupt: Refblock offset {offset:#x} unaligned (reftable index: {}); further non-fatal corruption events will be suppressed",
                alternate(index)
            ));
        }
        let end = self.noticed.highest.saturating_add(1);
        self.found.result.image_end_offset = self.g().offset_of(HostCluster(end));
        Ok(overlapped)
    }

    /// Count the references to the clusters of one of the windows.
    pub(super) fn enter(&mut self, windows: &[Range<u64>], index: usize) -> Result<()> {
        self.found.first = index == 0;
        let last = index + 1 == windows.len();
        let clusters = windows.get(index).cloned().unwrap_or(0..0);
        // The memory of the window before is given back first.
        self.window = Stretch::none()?;
        let n = clusters.end.saturating_sub(clusters.start);
        self.window = Stretch {
            tally: References::new(clusters.clone(), self.l1_tables())?,
            ones: tally::zeros(n.div_ceil(64))?,
            bad: false,
            clusters,
            last,
            named: 0,
        };
        self.load_ones()?;
        self.reference(0, self.g().cluster_size(), 1)?;
        self.l1_tables_refer()?;
        if let (Some(stage), 0) = (self.mode.stage, index) {
            let blocks = self.blocks.reftable.iter().filter(|e| **e != 0).count() as u64;
            let named = self.window.named + 2 * blocks;
            let total = (named * windows.len() as u64) << self.g().cluster_bits;
            self.dev.progress.begin(stage, || total);
        }
        self.each_batch(&mut |check, batch| check.count_tables(batch))?;
        let h = self.it.header;
        self.refer_to_snapshots()?;
        if self.mode.structures {
            let table = h.reftable_bytes();
            self.reference(h.reftable_offset, table, 1)?;
        }
        if let Some((offset, bytes)) = self.it.extensions.crypto_header {
            self.reference(offset, bytes, 1)?;
        }
        self.bitmaps()?;
        if self.mode.structures {
            self.refblocks()?;
        }
        self.look_at_clusters_of_tables();
        for (cluster, n) in self.window.tally.above(self.g().refcount_max()) {
            let too_many = n.saturating_sub(self.g().refcount_max());
            let offset = self.g().offset_of(HostCluster(cluster));
            self.found.corruption(
                too_many,
                format_args!("ERROR: overflow cluster offset=0x{offset:x}"),
            );
        }
        Ok(())
    }

    /// [`Check::reference`] for a table, which is read.
    fn refer_to_table(&mut self, offset: u64, bytes: u64, n: u64) -> Result<()> {
        self.noticed.table_in_header |= bytes != 0 && offset < self.g().cluster_size();
        if offset < self.dev.length() && self.exceeds(offset.saturating_add(bytes)) {
            let first = self.g().cluster_of(offset).0;
            let before = self.noticed.cut_from.unwrap_or(first);
            self.noticed.cut_from = Some(before.min(first));
        }
        self.reference(offset, bytes, n)
    }

    /// The snapshot table: a damaged entry may claim all of the file to be its extra data, which nobody keeps.
    fn refer_to_snapshots(&mut self) -> Result<()> {
        let (g, offset, table) = (self.g(), self.it.header.snapshots_offset, self.it.table);
        self.noticed.table_in_header |= table.bytes != 0 && offset < g.cluster_size();
        if self.exceeds(offset.saturating_add(table.bytes)) {
            let kept = g.clusters_for(offset.saturating_add(table.kept));
            self.noticed.cut_snapshots = g.cluster_of(offset).0..kept;
        }
        self.reference(offset, table.bytes, 1)
    }

    /// Does what ends here reach behind the end of the file by a cluster? The last cluster may be there in part.
    fn exceeds(&self, end: u64) -> bool {
        // QEMU sees a file in whole sectors.
        let sectors = self.dev.length().next_multiple_of(512);
        end > i64::MAX as u64 || end >= sectors.saturating_add(self.g().cluster_size())
    }

    /// `n` references to the clusters of `bytes` at `offset` (`qcow2_inc_refcounts_imrt`).
    fn reference(&mut self, offset: u64, bytes: u64, n: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let g = self.g();
        let end = offset.saturating_add(bytes);
        if self.exceeds(end) {
            self.found.corruption_once(n, format_args!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x{offset:x} size 0x{bytes:x}"
            ));
            // What of it is in the file is not counted, but is in use.
            self.noticed.blind |= offset < self.dev.length();
            self.note_behind_end(g.cluster_of(offset).0..g.clusters_for(end))?;
            return Ok(());
        }
        let (first, last) = (g.cluster_of(offset).0, g.cluster_of(end - 1).0);
        self.noticed.clusters = self.noticed.clusters.max(last + 1);
        let here = &self.window.clusters;
        for cluster in first.max(here.start)..(last + 1).min(here.end) {
            self.window.tally.add(cluster, n)?;
        }
        Ok(())
    }

    fn note_behind_end(&mut self, clusters: Range<u64>) -> Result<()> {
        let behind = &mut self.noticed.behind_end;
        if !self.found.first || behind.last() == Some(&clusters) {
            return Ok(());
        }
        if behind.len() == MOST_BEHIND {
            merge_ranges(behind);
        }
        if behind.len() < MOST_BEHIND {
            behind
                .try_reserve(1)
                .map_err(|_| Error::NoMemory(behind.len() as u64 * 16))?;
            behind.push(clusters);
        }
        Ok(())
    }

    /// Is this L1 table wholly in the file?
    fn in_file(&self, offset: u64, bytes: u64) -> bool {
        bytes == 0 || offset.saturating_add(bytes) <= self.dev.length()
    }

    /// The L1 tables: where they are, and what their entries say.
    fn l1_tables_refer(&mut self) -> Result<()> {
        let h = self.it.header;
        let bytes = h.l1_bytes();
        self.refer_to_table(h.l1_offset, bytes, 1)?;
        self.noticed.blind |= !self.in_file(h.l1_offset, bytes);
        for (index, l1_entry) in self.it.l1.iter().enumerate() {
            self.refer(*l1_entry, 1)?;
            self.check_l1_flag(index, *l1_entry)?;
        }
        if h.has_data_file() && !self.it.table.entries.is_empty() {
            self.found.corruption_once(
                1,
                format_args!(
                    "ERROR {} snapshots in image with data file",
                    self.it.table.entries.len()
                ),
            );
        }
        // One flipped bit of the header says this of an image whose data is in itself.
        self.noticed.blind |= h.has_data_file()
            && (!self.it.table.entries.is_empty() || self.it.extensions.data_file.is_empty());
        for (offset, entries, n) in self.inactive_l1s()? {
            let bytes = u64::from(entries) * TABLE_ENTRY;
            self.refer_to_table(offset, bytes, n)?;
            self.noticed.blind |= !self.in_file(offset, bytes);
            for l1_entry in self.read_l1(offset, bytes)? {
                self.refer(l1_entry, n)?;
            }
        }
        Ok(())
    }

    /// A snapshot's L1 table, as far as it can be read.
    fn read_l1(&mut self, offset: u64, bytes: u64) -> Result<Vec<u64>> {
        if offset > MAX_LENGTH.saturating_sub(bytes) {
            self.noticed.blind = true;
            self.found.error_once(format_args!(
                "ERROR: I/O error in check_refcounts_l1 (no such place in a file)"
            ));
            return Ok(Vec::new());
        }
        let there = self.dev.length().saturating_sub(offset);
        let there = there.min(bytes).next_multiple_of(TABLE_ENTRY);
        let op = "Could not read an L1 table";
        match self.dev.read_vec(op, offset, there) {
            Ok(bytes) => device::words(&bytes),
            Err(e @ Error::Io { .. }) if !self.mode.strict => {
                self.unreadable("check_refcounts_l1", &e.to_string());
                Ok(Vec::new())
            }
            Err(e) => Err(e),
        }
    }

    /// Hand all L2 tables to `f`, each once with how often it is named, and in the order of the file:
    /// in several parts if there are more than can be held.
    pub(super) fn each_batch(
        &mut self,
        f: &mut dyn FnMut(&mut Self, &[NamedTables]) -> Result<()>,
    ) -> Result<()> {
        // What there is to say of the L1 tables has been said.
        let mute = std::mem::replace(&mut self.found.mute, true);
        let inactive = self.inactive_l1s();
        self.found.mute = mute;
        let mut named = Vec::new();
        for l1_entry in self.it.l1 {
            self.name(&mut named, *l1_entry, 1, 1, f)?;
        }
        for (offset, entries, n) in inactive? {
            let mute = std::mem::replace(&mut self.found.mute, true);
            let l1 = self.read_l1(offset, u64::from(entries) * TABLE_ENTRY);
            self.found.mute = mute;
            for l1_entry in l1? {
                self.name(&mut named, l1_entry, n, 0, f)?;
            }
        }
        merge(&mut named);
        f(self, &named)
    }

    fn name(
        &mut self,
        named: &mut Vec<NamedTables>,
        l1_entry: u64,
        total: u64,
        active: u64,
        f: &mut dyn FnMut(&mut Self, &[NamedTables]) -> Result<()>,
    ) -> Result<()> {
        if l1_entry == 0 {
            return Ok(());
        }
        if named.len() >= MOST_NAMED {
            merge(named);
            if named.len() >= MOST_NAMED / 2 {
                f(self, named)?;
                named.clear();
            }
        }
        named
            .try_reserve(1)
            .map_err(|_| Error::NoMemory(size_of::<NamedTables>() as u64 * named.len() as u64))?;
        named.push(NamedTables {
            offset: l1_entry & OFFSET_MASK,
            total,
            active,
        });
        Ok(())
    }

    /// Are the tables that would be written alone in their clusters?
    fn look_at_clusters_of_tables(&mut self) {
        let h = self.it.header;
        let bytes = h.l1_bytes();
        self.noticed.l1_shared |= bytes != 0 && self.is_shared(h.l1_offset, bytes);
        // Its entries are never written one by one here.
        self.noticed.rebuild |= h.reftable_clusters == 0;
        let bytes = h.reftable_bytes();
        self.noticed.reftable_shared |= bytes != 0 && self.is_shared(h.reftable_offset, bytes);
    }

    /// Is a cluster of these in the window, and referred to more or less than once?
    fn is_shared(&self, offset: u64, bytes: u64) -> bool {
        let g = self.g();
        let last = g.cluster_of(offset.saturating_add(bytes - 1)).0;
        (g.cluster_of(offset).0..=last).any(|c| {
            let alone = self.window.tally.get(c) == 1 + self.discarded(c);
            self.judged_here(c) && (!alone || self.noticed.is_cut(c))
        })
    }

    /// References to this cluster by what nobody keeps of the snapshot table: they go with it.
    fn discarded(&self, cluster: u64) -> u64 {
        let table = self.it.table;
        let parts = &table.discarded;
        let at = parts.partition_point(|r| r.end <= cluster);
        let there = parts.get(at).is_some_and(|r| r.contains(&cluster));
        let end = self.it.header.snapshots_offset.saturating_add(table.bytes);
        u64::from(there && !self.exceeds(end))
    }

    /// Note the L2 tables of the window whose clusters are referred to by something else as well.
    fn note_overlaps(&mut self, overlapped: &mut Vec<u64>) -> Result<()> {
        self.each_batch(&mut |check, batch| {
            let g = check.g();
            for t in batch {
                let cluster = g.cluster_of(t.offset).0;
                let alone = g.in_cluster(t.offset) == 0
                    && check.window.tally.get(cluster) == t.total + check.discarded(cluster)
                    && !check.noticed.is_cut(cluster);
                if check.judged_here(cluster) && !alone {
                    overlapped
                        .try_reserve(1)
                        .map_err(|_| Error::NoMemory(overlapped.len() as u64 * 8))?;
                    overlapped.push(t.offset);
                }
            }
            Ok(())
        })
    }

    /// The L1 tables of the snapshots: (offset, entries, how many snapshots have it).
    fn inactive_l1s(&mut self) -> Result<Vec<(u64, u32, u64)>> {
        let g = self.g();
        let mut l1s: Vec<(u64, u32, u64)> = Vec::new();
        for s in &self.it.table.entries {
            let (offset, entries) = (s.l1_table_offset, s.l1_size);
            let who = (
                String::from_utf8_lossy(&s.id),
                String::from_utf8_lossy(&s.name),
            );
            if g.in_cluster(offset) != 0 {
                self.found.corruption_once(1, format_args!(
                    "ERROR snapshot {} ({}) l1_offset={offset:#x}: L1 table is not cluster aligned; snapshot table entry corrupted",
                    who.0, who.1
                ));
                self.noticed.blind = true;
            } else if u64::from(entries) > MAX_L1_BYTES / TABLE_ENTRY {
                self.found.corruption_once(1, format_args!(
                    "ERROR snapshot {} ({}) l1_size={entries:#x}: L1 table is too large; snapshot table entry corrupted",
                    who.0, who.1
                ));
                self.noticed.blind = true;
            } else if entries != 0 {
                l1s.push((offset, entries, 1));
            }
        }
        l1s.sort_unstable();
        l1s.dedup_by(|b, a| {
            let same = (a.0, a.1) == (b.0, b.1);
            a.2 += if same { b.2 } else { 0 };
            same
        });
        Ok(l1s)
    }

    /// An L1 entry that `n` tables have.
    fn refer(&mut self, l1_entry: u64, n: u64) -> Result<()> {
        if l1_entry == 0 {
            return Ok(());
        }
        let g = self.g();
        self.window.named += 1;
        if l1_entry & L1_RESERVED != 0 {
            self.found.corruption_once(
                n,
                format_args!("ERROR found L1 entry with reserved bits set: {l1_entry:x}"),
            );
        }
        let offset = l1_entry & OFFSET_MASK;
        self.refer_to_table(offset, g.cluster_size(), n)?;
        if g.in_cluster(offset) != 0 {
            self.found.corruption_once(
                n,
                format_args!(
                    "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
                ),
            );
            self.noticed.blind = true;
        }
        // The file may end in its last table, where that ends in zeros.
        self.noticed.blind |= offset >= self.dev.length() || offset == 0;
        Ok(())
    }

    /// Does COPIED of an entry of the active L1 say what the image's count says?
    fn check_l1_flag(&mut self, index: usize, l1_entry: u64) -> Result<()> {
        let g = self.g();
        let offset = l1_entry & OFFSET_MASK;
        let cluster = g.cluster_of(offset).0;
        if offset == 0 || self.found.mute || !self.judged_here(cluster) {
            return Ok(());
        }
        let copied = l1_entry & COPIED != 0;
        if self.window.clusters.contains(&cluster)
            && !self.window.bad
            && self.window.is_one(cluster) == copied
        {
            return Ok(());
        }
        if let Some(count) = self.blocks.count(self.dev, cluster)? {
            if (count == 1) != copied {
                self.noticed.wrong_flags += 1;
                self.found.corruption(1, format_args!(
                    "ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={l1_entry:x} refcount={count}"
                ));
            }
        }
        Ok(())
    }

    /// Is this the window in which the flags of this cluster are looked at?
    pub(super) fn judged_here(&self, cluster: u64) -> bool {
        self.window.clusters.contains(&cluster)
            || (self.window.last && cluster >= self.window.clusters.end)
    }

    fn unreadable(&mut self, place: &str, why: &str) {
        self.noticed.blind = true;
        self.noticed.unread = true;
        self.found
            .error_once(format_args!("ERROR: I/O error in {place} ({why})"));
    }

    /// Read the named tables, in the order of the file, and count what is in them.
    fn count_tables(&mut self, named: &[NamedTables]) -> Result<()> {
        self.each_table(named, &mut |check, table, bytes| {
            check.dev.progress.step(bytes.len() as u64)?;
            check.count_table(table, bytes)
        })
    }

    /// Hand the contents of each of these tables to `f`; those that are zeros or cannot be read are
    /// passed over.
    pub(super) fn each_table(
        &mut self,
        named: &[NamedTables],
        f: &mut Visit<'_, Self>,
    ) -> Result<()> {
        let g = self.g();
        let cs = g.cluster_size();
        let most = (MAX_REQUEST / g.cluster_len()).clamp(1, named.len().max(1));
        let mut buf = device::zeroed(most as u64 * cs)?;
        let (mut at, mut asked) = (0, 0);
        while let Some(first) = named.get(at) {
            // Neighbours in the file are read together.
            let mut next = first.offset;
            let run = named.get(at..).unwrap_or_default().iter().take(most);
            let n = run
                .take_while(|t| {
                    let here = t.offset == next && self.dev.length() > t.offset;
                    next = next.saturating_add(cs);
                    here
                })
                .count();
            if n == 0 {
                // Behind the end of the file: all zeros.
                self.dev.progress.step(cs)?;
                at += 1;
                continue;
            }
            self.ask_ahead(named, at + n, &mut asked);
            let together = n * g.cluster_len();
            let bytes = buf.get_mut(..together).unwrap_or_default();
            let op = "Could not read L2 tables";
            let mut bad = Vec::new();
            match self.dev.read(op, first.offset, bytes) {
                Ok(()) => {}
                Err(Error::Io { .. }) => {
                    // One by one: what can be read is looked at.
                    for (i, part) in bytes.chunks_mut(g.cluster_len()).enumerate() {
                        let offset = first.offset.saturating_add((i as u64) << g.cluster_bits);
                        match self.dev.read(op, offset, part) {
                            Ok(()) => {}
                            Err(e @ Error::Io { .. }) if !self.mode.strict => {
                                self.unreadable("check_refcounts_l2", &e.to_string());
                                bad.push(i);
                            }
                            Err(e) => return Err(e),
                        }
                    }
                }
                Err(e) => return Err(e),
            }
            let tables = named.iter().skip(at).zip(buf.chunks(g.cluster_len()));
            for (i, (table, bytes)) in tables.take(n).enumerate() {
                if !bad.contains(&i) {
                    f(self, *table, bytes)?;
                }
            }
            at += n;
        }
        Ok(())
    }

    fn ask_ahead(&mut self, named: &[NamedTables], from: usize, asked: &mut usize) {
        let cs = self.g().cluster_size();
        let ahead = (AHEAD / cs).max(1) as usize;
        if from + ahead / 2 < *asked {
            return;
        }
        let until = from + ahead;
        let (mut start, mut bytes) = (0, 0);
        let next = named.iter().take(until).skip(from.max(*asked));
        for offset in next.map(|t| t.offset) {
            if bytes != 0 && (start + bytes != offset || bytes >= 1 << 20) {
                self.dev.will_read(start, bytes);
                bytes = 0;
            }
            if bytes == 0 {
                start = offset;
            }
            bytes += cs;
        }
        if bytes != 0 {
            self.dev.will_read(start, bytes);
        }
        *asked = until;
    }

    /// Count what the entries of an L2 table refer to.
    fn count_table(&mut self, table: NamedTables, bytes: &[u8]) -> Result<()> {
        let g = self.g();
        let size = g.l2_entry_size();
        let data_file = self.it.header.has_data_file();
        let file = g.clusters_for(self.dev.length());
        let in_window = self.window.clusters.start..self.window.clusters.end.min(file);
        let frag = self.found.first && !self.found.mute;
        let judge = table.active != 0 && table.offset != 0 && !self.found.mute;
        let (mut next, mut allocated, mut fragmented) = (0u64, 0u64, 0u64);
        let mut counted = None;
        for (index, word) in bytes.chunks_exact(size).enumerate() {
            let e = BigEndian::read_u64(word);
            let bitmap = word.get(8..16).map_or(0, BigEndian::read_u64);
            let offset = e & OFFSET_MASK;
            // Nearly all entries are nothing, or a cluster in the file and nothing odd about it.
            if e | bitmap == 0 {
                continue;
            }
            let cluster = offset >> g.cluster_bits;
            let plain = e & !(OFFSET_MASK | COPIED) == 0
                && offset != 0
                && g.in_cluster(offset) == 0
                && (bitmap >> 32) & bitmap == 0
                && !data_file;
            if plain && in_window.contains(&cluster) {
                self.window.tally.add(cluster, table.total)?;
                if judge && (self.window.bad || self.window.is_one(cluster) != (e & COPIED != 0)) {
                    self.check_flag(e, cluster, table, &mut counted)?;
                }
            } else {
                let in_another_window = plain && cluster < file;
                if !in_another_window {
                    self.count_entry(table, index, e, bitmap)?;
                    let kind = kind(g, data_file, e);
                    if judge && matches!(kind, Cluster::Standard(_) | Cluster::ZeroAllocated(_)) {
                        self.check_flag(e, cluster, table, &mut counted)?;
                    }
                    if !matches!(kind, Cluster::Standard(_) | Cluster::ZeroAllocated(_)) {
                        continue;
                    }
                }
            }
            if frag {
                allocated += 1;
                fragmented += u64::from(next != 0 && offset != next);
                next = offset.wrapping_add(g.cluster_size());
            }
        }
        if frag {
            let r = &mut self.found.result;
            r.allocated_clusters += allocated * table.active;
            r.fragmented_clusters += fragmented * table.active;
        }
        Ok(())
    }

    /// Count an entry of any kind (`check_refcounts_l2`).
    #[cold]
    fn count_entry(&mut self, table: NamedTables, index: usize, e: u64, bitmap: u64) -> Result<()> {
        let g = self.g();
        let n = table.total;
        let data_file = self.it.header.has_data_file();
        if e & COMPRESSED == 0 && e & L2_RESERVED != 0 {
            self.found.corruption_once(
                n,
                format_args!("ERROR found l2 entry with reserved bits set: {e:x}"),
            );
        }
        match kind(g, data_file, e) {
            Cluster::Compressed { .. } => self.count_compressed(table, index, e, bitmap),
            Cluster::ZeroAllocated(offset) | Cluster::Standard(offset) => {
                if (bitmap >> 32) & bitmap & ALL_ALLOCATED != 0 {
                    self.found.corruption_once(n, format_args!(
                        "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
                    ));
                }
                if g.in_cluster(offset) != 0 {
                    let data = if g.extended_l2 {
                        bitmap & ALL_ALLOCATED != 0
                    } else {
                        e & ZERO == 0
                    };
                    let what = if data {
                        "Data cluster is"
                    } else {
                        self.noticed.misplaced += 1;
                        "Preallocated cluster is"
                    };
                    self.found.corruption_once(
                        n,
                        format_args!(
                        "ERROR offset={offset:x}: {what} not properly aligned; L2 entry corrupted."
                    ),
                    );
                }
                if data_file {
                    return Ok(());
                }
                self.reference(offset, g.cluster_size(), n)
            }
            Cluster::Unallocated => {
                if bitmap & ALL_ALLOCATED != 0 {
                    self.found.corruption_once(
                        n,
                        format_args!(
                            "ERROR: Unallocated cluster has non-zero subcluster allocation map"
                        ),
                    );
                }
                Ok(())
            }
            Cluster::ZeroPlain => Ok(()),
        }
    }

    fn count_compressed(
        &mut self,
        table: NamedTables,
        index: usize,
        e: u64,
        bitmap: u64,
    ) -> Result<()> {
        let (g, n) = (self.g(), table.total);
        let Cluster::Compressed { offset, length } = entry::cluster(g, e & !COPIED) else {
            return Ok(());
        };
        if e & COPIED != 0 {
            self.noticed.compressed_flags += 1;
            self.found.corruption_once(
                n,
                format_args!(
                "ERROR: coffset=0x{offset:x}: copied flag must never be set for compressed clusters"
            ),
            );
        }
        let e = e & !COPIED;
        if self.it.header.has_data_file() {
            self.found.corruption_once(
                n,
                format_args!("ERROR compressed cluster {index} with data file, entry=0x{e:x}"),
            );
            return Ok(());
        }
        if bitmap != 0 {
            self.found.corruption_once(n, format_args!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry=0x{e:x}"
            ));
            return Ok(());
        }
        self.reference(offset, length, n)?;
        if self.found.first && !self.found.mute {
            let r = &mut self.found.result;
            r.allocated_clusters += table.active;
            r.compressed_clusters += table.active;
            r.fragmented_clusters += table.active;
        }
        Ok(())
    }

    /// Does COPIED of an entry in an active L2 table say what the image's count says? QEMU asks for the table's
    /// own count first, and judges none of its entries where that cannot be read (`counted`, once it is known).
    #[cold]
    fn check_flag(
        &mut self,
        e: u64,
        cluster: u64,
        table: NamedTables,
        counted: &mut Option<bool>,
    ) -> Result<()> {
        let count = if self.it.header.has_data_file() {
            self.found.first.then_some(1)
        } else if self.judged_here(cluster) {
            self.blocks.count(self.dev, cluster)?
        } else {
            None
        };
        if let Some(count) = count {
            if (count == 1) != (e & COPIED != 0) {
                let (own, n) = (self.g().cluster_of(table.offset).0, table.active);
                if counted.is_none() {
                    *counted = Some(self.blocks.count(self.dev, own)?.is_some());
                }
                if *counted == Some(false) {
                    return Ok(());
                }
                self.noticed.wrong_flags += n;
                self.found.corruption(
                    n,
                    format_args!(
                        "ERROR OFLAG_COPIED data cluster: l2_entry={e:x} refcount={count}"
                    ),
                );
            }
        }
        Ok(())
    }

    /// Persistent bitmaps: directory, tables, clusters.
    fn bitmaps(&mut self) -> Result<()> {
        let Some((offset, bytes)) = self.it.extensions.bitmap_directory else {
            return Ok(());
        };
        let g = self.g();
        self.refer_to_table(offset, bytes, 1)?;
        let size = self.it.header.disk_size();
        let Some(tables) = bitmaps::tables(self.dev, g, self.it.extensions, size)? else {
            return self.broken_bitmaps();
        };
        for (offset, entries) in tables {
            let bytes = entries * TABLE_ENTRY;
            self.refer_to_table(offset, bytes, 1)?;
            let table = self
                .dev
                .read_vec("Could not read a bitmap table", offset, bytes)?;
            for e in device::words(&table)? {
                match bitmaps::cluster(g, e) {
                    None => return self.broken_bitmaps(),
                    Some(0) => {}
                    Some(offset) => self.reference(offset, g.cluster_size(), 1)?,
                }
            }
        }
        Ok(())
    }

    /// QEMU cannot open such an image, or ends the check.
    fn broken_bitmaps(&mut self) -> Result<()> {
        self.noticed.blind = true;
        self.found
            .corruption_once(1, format_args!("ERROR Broken bitmap directory"));
        self.found.error_once(format_args!(
            "ERROR Not all clusters of persistent bitmaps are known"
        ));
        Ok(())
    }

    /// The refcount blocks themselves (`check_refblocks`): last, since each is to be alone in its cluster.
    fn refblocks(&mut self) -> Result<()> {
        let g = self.g();
        for (i, e) in self.blocks.reftable.iter().enumerate() {
            let offset = e & REFTABLE_OFFSET_MASK;
            let cluster = g.cluster_of(offset).0;
            if e & REFTABLE_RESERVED != 0 {
                self.found.corruption_once(
                    1,
                    format_args!("ERROR refcount table entry {i} has reserved bits set"),
                );
                self.noticed.rebuild = true;
            } else if g.in_cluster(offset) != 0 {
                self.found.corruption_once(1, format_args!(
                    "ERROR refcount block {i} is not cluster aligned; refcount table entry corrupted"
                ));
                self.noticed.rebuild = true;
            } else if offset == 0 || !self.judged_here(cluster) {
            } else if cluster >= self.noticed.clusters {
                self.found
                    .corruption(1, format_args!("ERROR refcount block {i} is outside image"));
                self.noticed.rebuild = true;
            } else {
                let cs = g.cluster_size();
                let first = std::mem::replace(&mut self.found.first, true);
                self.reference(offset, cs, 1)?;
                self.found.first = first;
                let references = self.window.tally.get(cluster);
                let in_cut = self.noticed.is_cut(cluster);
                self.noticed.block_in_cut |= in_cut;
                // With counts of one bit two are not told from one, but count all the same.
                self.noticed.rebuild |= references != 1 || in_cut;
                let count = references.min(g.refcount_max());
                if count != 1 {
                    self.found
                        .corruption(1, format_args!("ERROR refcount block {i} refcount={count}"));
                }
            }
        }
        Ok(())
    }

    /// The refcount blocks that describe these clusters: (index, clusters).
    pub(super) fn blocks_of(
        &self,
        clusters: Range<u64>,
    ) -> impl Iterator<Item = (u64, Range<u64>)> {
        let bits = self.g().refblock_bits();
        let indices = clusters.start >> bits..clusters.end.div_ceil(1 << bits);
        indices.map(move |i| {
            let from = (i << bits).max(clusters.start);
            (i, from..((i + 1) << bits).min(clusters.end).max(from))
        })
    }

    /// Note for each cluster of the window whether the image says that its count is one.
    fn load_ones(&mut self) -> Result<()> {
        let g = self.g();
        self.blocks.rewind();
        for (index, clusters) in self.blocks_of(self.window.clusters.clone()) {
            self.blocks.ahead(self.dev, index);
            match self.blocks.load(self.dev, index)? {
                Described::Absent => continue,
                Described::Bad(_) => {
                    self.window.bad = true;
                    continue;
                }
                Described::Here => {}
            }
            self.dev.progress.step(g.cluster_size())?;
            let (block, start) = (self.blocks.bytes(), self.window.clusters.start);
            let ones = &mut self.window.ones;
            by_refcount_width!(g, W => {
                let g = with_width::<W>(g);
                for c in clusters {
                    if refblock::get(g, block, g.refblock_index(HostCluster(c))) == 1 {
                        let i = c - start;
                        if let Some(word) = ones.get_mut((i >> 6) as usize) {
                            *word |= 1 << (i & 63);
                        }
                    }
                }
            });
        }
        Ok(())
    }

    /// Compare the counts of the window with the references (`compare_refcounts`).
    fn compare(&mut self) -> Result<()> {
        let g = self.g();
        self.blocks.rewind();
        let end = self.window.clusters.end.min(self.noticed.clusters);
        for (index, clusters) in self.blocks_of(self.window.clusters.start..end) {
            self.blocks.ahead(self.dev, index);
            match self.blocks.load(self.dev, index)? {
                Described::Absent => {
                    if self.window.tally.is_empty(clusters.clone()) {
                        continue;
                    }
                    for c in clusters {
                        self.compare_one(c, 0);
                    }
                    self.noticed.rebuild = true;
                }
                Described::Bad(errno) => {
                    self.noticed.rebuild = true;
                    let why = std::io::Error::from_raw_os_error(errno).to_string();
                    let why = why
                        .split(" (os error")
                        .next()
                        .unwrap_or_default()
                        .to_owned();
                    for c in clusters {
                        self.found
                            .error(1, format_args!("Can't get refcount for cluster {c}: {why}"));
                    }
                }
                Described::Here => {
                    self.dev.progress.step(g.cluster_size())?;
                    self.compare_block(clusters);
                }
            }
        }
        Ok(())
    }

    fn compare_block(&mut self, clusters: Range<u64>) {
        let g = self.g();
        let mut from = clusters.start;
        // Equal counts are the rule: a tight loop to the next that differ.
        while from < clusters.end {
            let (tally, block) = (&self.window.tally, self.blocks.bytes());
            let mut used = None;
            let differs = by_refcount_width!(g, W => {
                let g = with_width::<W>(g);
                (from..clusters.end).find_map(|c| {
                    let count = refblock::get(g, block, g.refblock_index(HostCluster(c)));
                    if count != 0 {
                        used = Some(c);
                    }
                    let references = tally.get(c);
                    (count != references).then_some((c, count))
                })
            });
            if let Some(used) = used {
                self.noticed.highest = self.noticed.highest.max(used);
            }
            let Some((c, count)) = differs else {
                return;
            };
            self.compare_one(c, count);
            from = c + 1;
        }
    }

    fn compare_one(&mut self, c: u64, count: u64) {
        let references = self.window.tally.get(c).min(self.g().refcount_max());
        if count == 0 && references == 0 {
            return;
        }
        self.noticed.highest = self.noticed.highest.max(c);
        if count < references {
            self.noticed.too_low += 1;
            self.found.corruption(
                1,
                format_args!("ERROR cluster {c} refcount={count} reference={references}"),
            );
        } else if count > references {
            self.found.leak(format_args!(
                "Leaked cluster {c} refcount={count} reference={references}"
            ));
        }
    }
}

/// What an entry refers to; with an external data file offset 0 is a place (`qcow2_get_cluster_type`).
fn kind(g: Geometry, data_file: bool, e: u64) -> Cluster {
    match entry::cluster(
        g,
        e & if e & COMPRESSED != 0 {
            !COPIED
        } else {
            u64::MAX
        },
    ) {
        Cluster::Unallocated if data_file && e & COPIED != 0 => Cluster::Standard(0),
        other => other,
    }
}

/// Sort by place, one for each table.
fn merge(named: &mut Vec<NamedTables>) {
    named.sort_unstable_by_key(|t| t.offset);
    named.dedup_by(|b, a| {
        let same = a.offset == b.offset;
        if same {
            a.total = a.total.saturating_add(b.total);
            a.active = a.active.saturating_add(b.active);
        }
        same
    });
}

/// Sort ranges, and join those that touch.
pub(super) fn merge_ranges(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_unstable_by_key(|r| r.start);
    ranges.dedup_by(|b, a| {
        let touch = b.start <= a.end;
        if touch {
            a.end = a.end.max(b.end);
        }
        touch
    });
}

/// A number as C's "%#x" gives it.
fn alternate(n: u64) -> String {
    if n == 0 {
        "0".into()
    } else {
        format!("{n:#x}")
    }
}
