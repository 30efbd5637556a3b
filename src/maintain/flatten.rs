//! Letting go of the backing file: what it shows in the active disk and in each snapshot is copied in.
//!
//! ```text
//!   look     every L2 table once: damage, counts that would not fit, how much there is to copy
//!   then, in generations of at most 64 MiB:
//!     { guest data, new L2 tables; their counts, of as many states as reach them }                B
//!     { L2 entries; L1 entries of the disk and of snapshots: the image reads the same with any }  B
//!     { counts of what entries have left; COPIED where a count is one now }                       B
//!   at last  header bytes 8..20
//! ```
//! No generation changes what a state reads, so a power cut costs the clusters of one at most, and the
//! next call finds what is entered and goes on behind it.
//!
//! States that have the same L1 entry at an index are one [`Node`]: what is entered in its L2 table is
//! entered for all of them. A guest cluster that several nodes lack gets one host cluster, named by all
//! their tables. What is found here is written in `generation`.

mod generation;
mod lack;
mod subclusters;

use crate::error::{Error, Result};
use crate::format::entry::OFFSET_MASK;
use crate::format::geometry::{Geometry, TABLE_ENTRY};
use crate::format::header::Header;
use crate::image::device::{self, zeroed};
use crate::image::plan::Plan;
use crate::image::progress::{Progress, Stage};
use crate::image::replay::named;
use crate::image::replay::NewData;
use crate::image::{Image, Outcome};
use crate::room;
use byteorder::{BigEndian, ByteOrder};
use generation::Generation;
use std::ops::Range;

/// What is written and not yet entered, in bytes: what a power cut may leak.
const GENERATION: u64 = 64 << 20;
/// What is read of the backing file at once, in bytes, but for a larger cluster.
const REQUEST: u64 = 2 << 20;
/// L1 entries of all states, and L2 entries of all tables of an L1 index, that are in memory at a time,
/// in bytes.
const WINDOW: u64 = 16 << 20;
/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

/// A state of the disk.
struct Disk {
    l1_offset: u64,
    l1_size: u64,
    /// Where the state ends, or the backing file if that ends before.
    end: u64,
    active: bool,
}

/// States whose L1 entries at an index are the same.
struct Node {
    /// Their L2 table; 0: none.
    table: u64,
    /// The states, by where they end.
    disks: Vec<usize>,
    /// Where the first and the last of them end.
    ends: (u64, u64),
    /// It is the active disk alone.
    active: bool,
    /// Entries of the table, from the span's first on; empty: all zeros.
    slice: Vec<u8>,
    /// The generation that makes the table, and its place there.
    made: Option<(u64, usize)>,
    /// The table's count says that something else may name it too: it is not written to.
    foreign: bool,
}

/// What one entry leaves to the backing file.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Lack {
    word: u64,
    bitmap: u64,
    /// The cluster that is held for other subclusters; 0: none.
    host: u64,
    /// Subclusters that are missing; all bits without extended L2 entries.
    missing: u32,
    /// How many bytes of the cluster the node gets; zeros behind.
    len: usize,
}

/// What a walk over all states is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// To say how much it is.
    Estimate,
    /// To find what forbids it, before anything is written.
    Look,
    Copy,
}

/// Entries of an L1 index that are gone over at once.
struct Span {
    index: u64,
    /// The first entry, and how many.
    first: u64,
    n: u64,
    /// The first guest byte.
    start: u64,
}

/// See the module's text.
struct Flatten<'a> {
    image: &'a mut Image,
    g: Geometry,
    disks: Vec<Disk>,
    /// Where the last of them ends.
    end: u64,
    zeros: Zeros,
    work: Work,
    /// The most that is to be copied, in all and in one generation.
    bytes: u64,
    most: u64,
    /// What is being put together.
    pending: Option<Generation>,
    /// How many were written, and where the last one's search for free clusters ended.
    written: u64,
    searched: u64,
    /// For what is read, again and again.
    buffer: Vec<u8>,
}

/// What is known of the backing file's zeros: of one stretch.
#[derive(Default)]
struct Zeros {
    stretch: Range<u64>,
    zero: bool,
}

impl Zeros {
    /// May there be something else in these bytes?
    fn data_in(&mut self, image: &mut Image, bytes: Range<u64>) -> Result<bool> {
        let mut at = bytes.start;
        while at < bytes.end {
            if !self.stretch.contains(&at) {
                let (zero, n) = image.zeros_behind(at, i64::MAX as u64)?;
                image.dev.progress.pass(8)?;
                (self.stretch, self.zero) = (at..at.saturating_add(n), zero);
            }
            if !self.zero {
                return Ok(true);
            }
            at = self.stretch.end;
        }
        Ok(false)
    }

    /// Where zeros that begin at `at` are known to end.
    fn end_from(&self, at: u64) -> u64 {
        let known = self.zero && self.stretch.contains(&at);
        if known {
            self.stretch.end
        } else {
            at
        }
    }
}

impl Image {
    /// Copy in what the backing file shows in the active disk and in each snapshot, then let go of it.
    /// Every state reads as before. A cluster that several states lack is copied once.
    ///
    /// # Errors
    /// `Unsupported` for encrypted images that lack data, a snapshot whose L1 table is shorter than its
    /// disk, and backing files that cannot or must not be opened; `Invalid` for counts that would not fit
    /// their width; `Corrupt` for damaged tables. None of these changes a byte. Later ones leave every
    /// state as it was; another call goes on from there, after a failed write on a new handle.
    pub fn flatten(&mut self) -> Result<()> {
        self.flatten_in(GENERATION)
    }

    /// [`Image::flatten`] in generations of at most so many bytes.
    #[doc(hidden)]
    pub fn flatten_in(&mut self, generation: u64) -> Result<()> {
        self.begin_change()?;
        if self.backing_file.is_empty() {
            return self.nothing_to_do();
        }
        let behind = self.lengths_behind()?;
        let marker = self.end_marker()?;
        let mut all = Flatten::new(self, behind.1, Work::Look)?;
        all.most = generation;
        let entries = all.g.clusters_for(all.end) * all.g.l2_entry_size() as u64;
        all.image.dev.progress.begin(Stage::Check, || entries);
        all.go_over()?;
        all.image.dev.progress.end()?;
        let bytes = all.bytes;
        all.image.dev.progress.begin(Stage::Prepare, || bytes);
        all.copy().map_err(|e| match e {
            Error::Cancelled(_) => Error::Cancelled(
                "Cancelled: the disk and all snapshots read as before; what is copied stays, and another call goes on from there"
                    .into(),
            ),
            e => e,
        })?;
        if self.lengths_behind()? != behind {
            return Err(Error::Invalid(
                "A backing file has changed its length meanwhile: the image still names it; flatten it again"
                    .into(),
            ));
        }
        self.stop_naming_backing(marker)
    }

    /// The most that [`Image::flatten`] would copy, in bytes of guest data.
    ///
    /// # Errors
    /// As of [`Image::flatten`] before anything is written, but for those of the handle and of counts.
    pub fn flatten_estimate(&mut self) -> Result<u64> {
        self.begin_look()?;
        if self.header.has_data_file() {
            return Err(Error::Unsupported(
                "Internal snapshots are not supported on images with an external data file".into(),
            ));
        }
        if self.backing_file.is_empty() {
            return Ok(0);
        }
        if !self.snapshots.loaded {
            self.load_snapshots()?;
        }
        let (_, shown) = self.lengths_behind()?;
        let progress = std::mem::replace(&mut self.dev.progress, Progress::new(None));
        let bytes = Flatten::new(self, shown, Work::Estimate).and_then(|mut all| {
            all.go_over()?;
            Ok(all.bytes)
        });
        self.dev.progress = progress;
        bytes
    }

    /// Zeros that must stand where the backing file's name does, so that the header extensions end
    /// there as before when the header stops naming it (offset, bytes).
    fn end_marker(&mut self) -> Result<Option<(u64, u64)>> {
        let cs = self.header.geometry.cluster_size();
        let mut first = self.dev.read_vec("Could not read qcow2 header", 0, cs)?;
        let (name, _) = self.header.backing_name;
        let bytes = 8.min(cs.saturating_sub(name));
        let reads_the_same = |first: &[u8]| {
            let read = Header::parse(first, true).and_then(|h| h.extensions(first));
            read.is_ok_and(|extensions| extensions == self.extensions)
        };
        first.get_mut(8..20).unwrap_or_default().fill(0);
        if reads_the_same(&first) {
            return Ok(None);
        }
        let there = name as usize..name.saturating_add(bytes) as usize;
        first.get_mut(there).unwrap_or_default().fill(0);
        if reads_the_same(&first) {
            return Ok(Some((name, bytes)));
        }
        Err(Error::Unsupported(
            "The header extensions end with the backing file's name and have no end without it"
                .into(),
        ))
    }

    /// The last step: nothing is read through the backing file any more.
    fn stop_naming_backing(&mut self, marker: Option<(u64, u64)>) -> Result<()> {
        let (mut replay, mut plan) = (self.replay()?, Plan::default());
        if let Some((offset, bytes)) = marker {
            // An empty name until the header names none.
            let data = NewData {
                label: "header extension",
                offset,
                data: zeroed(bytes)?,
                epoch: 0,
            };
            room::push(&mut replay.new_data, data)?;
        }
        plan.let_go = true;
        let result = self.commit_part(replay, plan, true);
        if self.last_outcome() == Outcome::Done {
            self.let_go_of_chain();
            self.dev.progress.begin(Stage::Reclaim, || 0);
            self.dev.progress.end()?;
        }
        result
    }

    /// All states of the disk, the active one first; their L1 tables stand apart and are whole.
    /// `shown`: where the backing file ends.
    fn disks(&mut self, shown: u64) -> Result<Vec<Disk>> {
        let g = self.header.geometry;
        named::check_repeats(g, &self.l1)?;
        let mut all = Vec::new();
        let active = Disk {
            l1_offset: self.header.l1_offset,
            l1_size: self.l1.len() as u64,
            end: self.header.disk_size().min(shown),
            active: true,
        };
        room::push(&mut all, active)?;
        for i in 0..self.snapshots.entries.len() {
            let s = &self.snapshots.entries[i];
            let (offset, entries, size) = (s.l1_table_offset, s.l1_size, s.disk_size & !511);
            if u64::from(entries) < g.l1_entries_for(size) {
                return Err(Error::Unsupported(format!(
                    "The L1 table of snapshot '{}' is shorter than its disk",
                    String::from_utf8_lossy(&s.id)
                )));
            }
            named::check_repeats(g, &self.snapshot_l1(offset, entries)?)?;
            let disk = Disk {
                l1_offset: offset,
                l1_size: entries.into(),
                end: size.min(shown),
                active: false,
            };
            room::push(&mut all, disk)?;
        }
        let places = all.iter().filter(|d| d.l1_size != 0);
        let mut places = room::collected(places.map(|d| (d.l1_offset, d.l1_size)))?;
        places.sort_unstable();
        let overlap = |w: &[(u64, u64)]| w[0].0.saturating_add(w[0].1 * TABLE_ENTRY) > w[1].0;
        if places.windows(2).any(overlap) {
            return Err(Error::Corrupt("Two L1 tables overlap".into()));
        }
        Ok(all)
    }
}

impl<'a> Flatten<'a> {
    fn new(image: &'a mut Image, shown: u64, work: Work) -> Result<Flatten<'a>> {
        let disks = image.disks(shown)?;
        Ok(Flatten {
            g: image.header.geometry,
            end: disks.iter().map(|d| d.end).max().unwrap_or(0),
            image,
            disks,
            zeros: Zeros::default(),
            work,
            bytes: 0,
            most: GENERATION,
            pending: None,
            written: 0,
            searched: 0,
            buffer: Vec::new(),
        })
    }

    /// All has been looked at: copy it.
    fn copy(mut self) -> Result<()> {
        (self.work, self.pending) = (Work::Copy, None);
        self.go_over()?;
        self.write_generation()?;
        self.image.dev.progress.end()
    }

    /// Go over what all states map, L1 index by L1 index.
    fn go_over(&mut self) -> Result<()> {
        let indices = self.g.l1_entries_for(self.end);
        let window = (WINDOW / TABLE_ENTRY / self.disks.len().max(1) as u64).max(64);
        let mut first = 0;
        while first < indices {
            let n = window.min(indices - first);
            let mut words: Vec<Vec<u64>> = Vec::new();
            for disk in &self.disks {
                let here = n.min(disk.l1_size.saturating_sub(first));
                let part = if disk.active {
                    let all = self.image.l1.iter().skip(first as usize);
                    room::collected(all.take(here as usize).copied())?
                } else {
                    let at = disk.l1_offset.saturating_add(first * TABLE_ENTRY);
                    let op = "Failed to read l1 table for snapshot";
                    device::words(&self.image.dev.read_vec(op, at, here * TABLE_ENTRY)?)?
                };
                room::push(&mut words, part)?;
            }
            for i in 0..n {
                let word = |l1: &Vec<u64>| l1.get(i as usize).copied().unwrap_or(0);
                let tables = room::collected(words.iter().map(|l1| word(l1) & OFFSET_MASK))?;
                self.go_over_index(first + i, &tables)?;
            }
            first += n;
        }
        Ok(())
    }

    /// Go over what all states map at one L1 index, where they have these L2 tables.
    fn go_over_index(&mut self, index: u64, tables: &[u64]) -> Result<()> {
        let g = self.g;
        let start = g.guest_of_l1(index).unwrap_or(u64::MAX);
        let end = g.guest_of_l1(index + 1).unwrap_or(u64::MAX).min(self.end);
        let entries = g.clusters_for(end - start);
        if self.zeros.data_in(self.image, start..end)? {
            let mut nodes = self.nodes(index, start, tables)?;
            // As many entries at a time as fit in memory, of all tables.
            let per = nodes.len() * g.l2_entry_size();
            let most = (WINDOW / per.max(1) as u64).max(64);
            let mut first = 0;
            while first < entries {
                let n = most.min(entries - first);
                let span = Span {
                    index,
                    first,
                    n,
                    start: start + (first << g.cluster_bits),
                };
                for node in &mut nodes {
                    node.slice = self.entries(node, &span)?;
                }
                self.go_over_span(&span, &mut nodes)?;
                first += n;
            }
        }
        if self.work == Work::Look {
            let bytes = entries * g.l2_entry_size() as u64;
            self.image.dev.progress.step(bytes)?;
        }
        Ok(())
    }

    /// States with the same table, for all tables.
    fn nodes(&mut self, index: u64, start: u64, tables: &[u64]) -> Result<Vec<Node>> {
        let g = self.g;
        let states = tables.iter().zip(&self.disks).enumerate();
        let mut sorted = room::collected(states.map(|(i, (table, disk))| (*table, disk.end, i)))?;
        // A hole behind a state's end stays one.
        sorted.retain(|(table, end, _)| *table != 0 || *end > start);
        sorted.sort_unstable();
        let mut nodes = Vec::new();
        for same in sorted.chunk_by(|a, b| a.0 == b.0) {
            let table = same[0].0;
            if g.in_cluster(table) != 0 {
                return Err(Error::Corrupt(format!(
                    "L2 table offset {table:#x} unaligned (L1 index: {index:#x})"
                )));
            }
            let mut node = self.node(table, room::collected(same.iter().map(|s| s.2))?);
            if table != 0 && self.work != Work::Estimate {
                let named = node.disks.len() as u64;
                let count = self.count(table)?;
                if count < named {
                    return Err(Error::Corrupt(format!(
                        "The L2 table at {table:#x} is named {named} times, but its refcount is {count}"
                    )));
                }
                node.foreign = count > named;
            }
            room::push(&mut nodes, node)?;
        }
        Ok(nodes)
    }

    /// A node of these states, which stand in the order in which they end.
    fn node(&self, table: u64, disks: Vec<usize>) -> Node {
        let end = |d: Option<&usize>| d.and_then(|d| self.disks.get(*d)).map_or(0, |d| d.end);
        Node {
            table,
            ends: (end(disks.first()), end(disks.last())),
            // The active disk is the first.
            active: disks == [0],
            disks,
            slice: Vec::new(),
            made: None,
            foreign: false,
        }
    }

    /// The entries of a span in a node's table.
    fn entries(&mut self, node: &Node, span: &Span) -> Result<Vec<u8>> {
        let size = self.g.l2_entry_size() as u64;
        let (at, bytes) = (span.first * size, span.n * size);
        if node.table == 0 {
            return Ok(Vec::new());
        }
        if let Some(table) = self.made(node) {
            let here = table.get(at as usize..(at + bytes) as usize);
            return room::copy_of(here.unwrap_or_default());
        }
        let (what, offset) = ("Could not read an L2 table", node.table.saturating_add(at));
        self.image.dev.progress.pass(bytes)?;
        self.image.dev.read_vec(what, offset, bytes)
    }

    /// Go over a span: find runs of clusters that some state lacks and that the backing file may have.
    fn go_over_span(&mut self, span: &Span, nodes: &mut Vec<Node>) -> Result<()> {
        let (bits, cs) = (self.g.cluster_bits, self.g.cluster_size());
        let mut c = 0;
        while c < span.n {
            let at = span.start + (c << bits);
            let end = nodes.iter().map(|n| n.ends.1).max().unwrap_or(0);
            let (mut n, mut need) = (0, 0);
            while c + n < span.n && (n == 0 || (n + 1) * cs <= REQUEST) {
                let from = at + n * cs;
                let shown = from..end.min(from + cs);
                if shown.is_empty() || !self.zeros.data_in(self.image, shown)? {
                    break;
                }
                let more = self.need(span, nodes, c + n)?;
                if more == 0 || n > 0 && need + more > self.most {
                    break;
                }
                (n, need) = (n + 1, need + more);
            }
            if at >= end {
                break;
            }
            if n == 0 {
                // On to where there is something again.
                let zeros = self.zeros.end_from(at).min(end);
                c += (zeros.saturating_sub(at) >> bits).max(1);
                continue;
            }
            if self.work == Work::Copy {
                self.make_room(need, nodes)?;
                n = self.copy_run(span, nodes, c..c + n)?;
                if n > 0 {
                    self.image.dev.progress.step(need)?;
                }
            } else {
                self.bytes = self.bytes.saturating_add(need);
                self.look_at_run(span, nodes, c..c + n)?;
            }
            c += n;
        }
        Ok(())
    }
}

impl Node {
    /// The entry for a cluster of the span, and its subcluster bitmap.
    fn entry(&self, g: Geometry, c: u64) -> (u64, u64) {
        let size = g.l2_entry_size();
        let bytes = self.slice.get(c as usize * size..).unwrap_or_default();
        let word = |at: usize| bytes.get(at..at + 8).map_or(0, BigEndian::read_u64);
        (word(0), if g.extended_l2 { word(8) } else { 0 })
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let any = |part: &[u8]| part.iter().fold(0, |all, b| all | b) != 0;
    !bytes.chunks(4096).any(any)
}

/// Bytes up to the last one that is not zero.
fn used(bytes: &[u8]) -> usize {
    let mut parts = bytes.chunks(4096).enumerate().rev();
    let last = parts.find(|(_, part)| !is_zero(part));
    last.map_or(0, |(i, part)| {
        let within = part.iter().rposition(|b| *b != 0);
        i * 4096 + within.map_or(0, |at| at + 1)
    })
}
