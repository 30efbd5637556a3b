//! One generation of a flatten: allocated and put together in memory, then written in order.

use super::lack::subclusters_with_data;
use super::{is_zero, used, Flatten, Lack, Node, Span};
use crate::error::{Error, Result};
use crate::format::entry::COPIED;
use crate::format::geometry::{Geometry, HostCluster, TABLE_ENTRY};
use crate::format::run::Tally;
use crate::image::device::zeroed;
use crate::image::plan::{Plan, What, Write};
use crate::image::replay::overlap::Protected;
use crate::image::replay::Replay;
use crate::room;
use byteorder::{BigEndian, ByteOrder};
use std::ops::Range;

/// Entries that a generation changes, about, at most.
const MOST_PATCHES: usize = 1 << 17;
/// Entries that are neighbours are written together, but no more bytes than this.
const LONGEST: usize = 1 << 16;
const L1: &str = "L1 entry";
pub(super) const L2: &str = "L2 entry";

/// What is written together.
pub(super) struct Generation {
    pub(super) replay: Replay,
    number: u64,
    /// New L2 tables.
    tables: Vec<(u64, Vec<u8>)>,
    /// Entries of tables that are there.
    patches: Vec<Patch>,
    /// Entries again, with COPIED when counts have gone down.
    pub(super) flags: Vec<Patch>,
    /// Counts to lower. That comes last: what is named until then must not be allocated.
    pub(super) lower: Vec<(HostCluster, u64)>,
    /// The last table that was found to be one.
    checked: u64,
    pub(super) bytes: u64,
}

/// New contents of an entry.
pub(super) struct Patch {
    at: u64,
    bytes: [u8; 16],
    len: usize,
    label: &'static str,
}

/// A node, and what its entry lacks.
pub(super) type Lacking = (usize, Lack);

/// A guest cluster of a run that gets a new host cluster.
struct Job {
    /// Its number in the run.
    k: usize,
    /// How many bytes of it there are; zeros behind.
    len: usize,
    /// How many states get it.
    count: u64,
    /// The nodes that enter it, and what each of them lacks.
    nodes: Vec<Lacking>,
}

impl Flatten<'_> {
    /// The count of a table.
    pub(super) fn count(&mut self, table: u64) -> Result<u64> {
        let mut generation = self.take()?;
        let cluster = self.g.cluster_of(table);
        let count = generation.replay.refs.get(&mut self.image.dev, cluster);
        self.pending = Some(generation);
        count
    }

    /// The contents of a table that the pending generation makes.
    pub(super) fn made(&self, node: &Node) -> Option<&Vec<u8>> {
        let generation = self.pending.as_ref()?;
        let (_, place) = node
            .made
            .filter(|(number, _)| *number == generation.number)?;
        generation.tables.get(place).map(|(_, table)| table)
    }

    /// The generation that is being put together.
    fn take(&mut self) -> Result<Generation> {
        if let Some(pending) = self.pending.take() {
            return Ok(pending);
        }
        let mut replay = self.image.replay()?;
        replay.refs.next = self.searched;
        Ok(Generation {
            replay,
            number: self.written,
            tables: Vec::new(),
            patches: Vec::new(),
            flags: Vec::new(),
            lower: Vec::new(),
            checked: 0,
            bytes: 0,
        })
    }

    /// Have room for so many bytes, and for new tables of these nodes, in the pending generation.
    pub(super) fn make_room(&mut self, need: u64, nodes: &[Node]) -> Result<()> {
        let holes = nodes.iter().filter(|n| n.table == 0).count() as u64;
        let need = need.saturating_add(holes << self.g.cluster_bits);
        let most = self.most;
        let full = |p: &Generation| p.bytes + need > most || p.patches.len() > MOST_PATCHES;
        if self.pending.as_ref().is_some_and(full) {
            self.write_generation()?;
        }
        Ok(())
    }

    /// Write what has been put together.
    pub(super) fn write_generation(&mut self) -> Result<()> {
        let Some(mut generation) = self.pending.take().filter(|g| !g.patches.is_empty()) else {
            return Ok(());
        };
        let (replay, dev) = (&mut generation.replay, &mut self.image.dev);
        for (offset, table) in generation.tables {
            replay.write_new(dev, "L2 table", offset, table)?;
        }
        self.searched = replay.refs.next;
        for (cluster, n) in generation.lower {
            for _ in 0..n {
                replay.refs.tally(dev, cluster, Tally::Down(1))?;
            }
        }
        let plan = Plan {
            decisive: replay.refs.epoch(),
            entries: writes(generation.patches)?,
            flags: writes(generation.flags)?,
            ..Plan::default()
        };
        self.written += 1;
        self.image.commit_part(generation.replay, plan, false)
    }

    /// Copy a run of clusters. Returns how many are done; none if tables had to be parted first.
    pub(super) fn copy_run(
        &mut self,
        span: &Span,
        nodes: &mut Vec<Node>,
        run: Range<u64>,
    ) -> Result<u64> {
        let (g, cs) = (self.g, self.g.cluster_len());
        let start = span.start + (run.start << g.cluster_bits);
        let mut data = std::mem::take(&mut self.buffer);
        room::resize(&mut data, (run.end - run.start) as usize * cs, 0)?;
        let end = nodes.iter().map(|n| n.ends.1).max().unwrap_or(0);
        let shown = end.saturating_sub(start).min(data.len() as u64) as usize;
        self.image
            .read_backing(start, data.get_mut(..shown).unwrap_or_default())?;

        let (mut jobs, mut held): (Vec<Job>, Vec<(usize, Vec<Lacking>)>) = Default::default();
        let first_end = nodes.iter().map(|n| n.ends.0).min().unwrap_or(0);
        data.get_mut(shown..).unwrap_or_default().fill(0);
        let mut done = data.len() / cs;
        for (k, bytes) in data.chunks(cs).enumerate() {
            let (c, at) = (run.start + k as u64, start + (k * cs) as u64);
            // How far it is not zero matters only where a state ends.
            let len = match (is_zero(bytes), first_end >= at + cs as u64) {
                (true, _) => continue,
                (_, true) => cs,
                _ => used(bytes),
            };
            let mut lacking = Vec::new();
            for (i, node) in nodes.iter().enumerate() {
                if let Some(lack) = self.lack(node, span, c)? {
                    room::push(&mut lacking, (i, lack))?;
                }
            }
            let apart = |(i, _): &Lacking| nodes.get(*i).is_some_and(|n| n.must_part(at, len));
            if lacking.iter().any(apart) {
                if k == 0 {
                    return self.part(span, nodes, at, len).map(|()| 0);
                }
                done = k;
                break;
            }
            let (mut here, mut with_host): (Vec<Job>, Vec<Lacking>) = Default::default();
            for (i, mut lack) in lacking {
                lack.len = lack.len.min(len);
                let part = bytes.get(..lack.len).unwrap_or_default();
                if g.extended_l2 {
                    lack.missing &= subclusters_with_data(g, part);
                }
                if lack.missing == 0 || is_zero(part) {
                    continue;
                }
                if lack.host != 0 {
                    room::push(&mut with_host, (i, lack))?;
                    continue;
                }
                if !here.iter().any(|j| j.len == lack.len) {
                    let job = Job {
                        k,
                        len: lack.len,
                        count: 0,
                        nodes: Vec::new(),
                    };
                    room::push(&mut here, job)?;
                }
                for job in here.iter_mut().filter(|j| j.len == lack.len) {
                    job.count += nodes.get(i).map_or(0, |n| n.disks.len() as u64);
                    room::push(&mut job.nodes, (i, lack))?;
                }
            }
            for job in here {
                room::push(&mut jobs, job)?;
            }
            if !with_host.is_empty() {
                room::push(&mut held, (k, with_host))?;
            }
        }
        data.truncate(done * cs);

        let mut generation = self.take()?;
        for (k, lacking) in held {
            let bytes = data.get(k * cs..(k + 1) * cs).unwrap_or_default();
            let c = run.start + k as u64;
            self.fill_held(&mut generation, span, nodes, c, bytes, lacking)?;
        }
        self.new_clusters(&mut generation, span, nodes, run.start, &data, &jobs)?;
        self.buffer = data;
        self.pending = Some(generation);
        Ok(done as u64)
    }

    /// Give guest clusters new host clusters. Neighbours get neighbours.
    fn new_clusters(
        &mut self,
        generation: &mut Generation,
        span: &Span,
        nodes: &mut [Node],
        first: u64,
        data: &[u8],
        jobs: &[Job],
    ) -> Result<()> {
        let cs = self.g.cluster_len();
        let mut rest = jobs;
        while let Some(job) = rest.first() {
            // One that ends early goes alone, and those that follow it.
            let bytes = |j: &Job| data.get(j.k * cs..(j.k + 1) * cs).unwrap_or_default();
            let whole = |j: &Job| j.len == cs || is_zero(bytes(j).get(j.len..).unwrap_or_default());
            let follow = rest
                .windows(2)
                .take_while(|w| w[1].k == w[0].k + 1 && whole(&w[0]) && whole(&w[1]));
            let n = 1 + follow.count();
            let (these, behind) = rest.split_at(n);
            let from = job.k * cs;
            let copy;
            let mut contents = data.get(from..from + n * cs).unwrap_or_default();
            if n == 1 && !whole(job) {
                let mut part = room::copy_of(contents)?;
                part.get_mut(job.len..).unwrap_or_default().fill(0);
                copy = part;
                contents = &copy;
            }
            let offset = self.allocate(generation, n as u64)?;
            for (i, job) in these.iter().enumerate() {
                let host = offset + (i * cs) as u64;
                if job.count != 1 {
                    let cluster = self.g.cluster_of(host);
                    generation.replay.refs.count_as(cluster, job.count)?;
                }
                for (i, lack) in &job.nodes {
                    if let Some(node) = nodes.get_mut(*i) {
                        self.have_table(generation, span, node)?;
                        let c = first + job.k as u64;
                        let bitmap = lack.bitmap | u64::from(lack.missing);
                        self.enter(generation, span, node, c, host, job.count, bitmap)?;
                    }
                }
            }
            let replay = &mut generation.replay;
            if !self.image.write_ahead(replay, offset, contents)? {
                let contents = room::copy_of(contents)?;
                replay.write_new(&mut self.image.dev, "guest data", offset, contents)?;
            }
            rest = behind;
        }
        Ok(())
    }

    /// New clusters in a row, each counted once.
    pub(super) fn allocate(&mut self, generation: &mut Generation, n: u64) -> Result<u64> {
        let bytes = n << self.g.cluster_bits;
        let offset = generation.replay.refs.alloc(&mut self.image.dev, bytes)?;
        if offset == 0 {
            return Err(Error::Corrupt(
                "Preventing invalid allocation of a cluster at offset 0".into(),
            ));
        }
        generation.replay.check_new(offset, bytes)?;
        generation.bytes += bytes;
        Ok(offset)
    }

    /// Enter a host cluster of so many states for a guest cluster.
    #[allow(clippy::too_many_arguments)] // where, and what
    pub(super) fn enter(
        &mut self,
        generation: &mut Generation,
        span: &Span,
        node: &mut Node,
        c: u64,
        host: u64,
        count: u64,
        bitmap: u64,
    ) -> Result<()> {
        let copied = if count == 1 && node.active { COPIED } else { 0 };
        let mut bytes = [0; 16];
        BigEndian::write_u64(&mut bytes[..8], host | copied);
        BigEndian::write_u64(&mut bytes[8..], bitmap);
        let size = self.g.l2_entry_size();
        let at = (span.first + c) as usize * size;
        let new = bytes.get(..size).unwrap_or_default();
        let slice = c as usize * size..(c as usize + 1) * size;
        if let Some(old) = node.slice.get_mut(slice) {
            old.copy_from_slice(new);
        }
        let made = node.made.filter(|(number, _)| *number == generation.number);
        if let Some((_, place)) = made {
            let table = generation.tables.get_mut(place);
            if let Some(old) = table.and_then(|(_, t)| t.get_mut(at..at + size)) {
                old.copy_from_slice(new);
            }
            return Ok(());
        }
        generation.check_table(self.g, node.table)?;
        let patch = Patch {
            at: node.table + at as u64,
            bytes,
            len: size,
            label: L2,
        };
        room::push(&mut generation.patches, patch)
    }

    /// Where a node has no L2 table, it gets one.
    fn have_table(
        &mut self,
        generation: &mut Generation,
        span: &Span,
        node: &mut Node,
    ) -> Result<()> {
        if node.table != 0 {
            return Ok(());
        }
        let table = zeroed(self.g.cluster_size())?;
        self.new_table(generation, span, node, table)
    }

    /// A node gets a new L2 table with these contents.
    fn new_table(
        &mut self,
        generation: &mut Generation,
        span: &Span,
        node: &mut Node,
        table: Vec<u8>,
    ) -> Result<()> {
        let offset = self.allocate(generation, 1)?;
        let (cluster, count) = (self.g.cluster_of(offset), node.disks.len() as u64);
        generation.replay.refs.count_as(cluster, count)?;
        node.table = offset;
        node.made = Some((generation.number, generation.tables.len()));
        node.foreign = false;
        room::push(&mut generation.tables, (offset, table))?;
        let word = offset | if node.active { COPIED } else { 0 };
        for d in &node.disks {
            let patch = self.l1_patch(generation, span, *d, word)?;
            room::push(&mut generation.patches, patch)?;
        }
        Ok(())
    }

    /// A state's L1 entry is to be this word.
    fn l1_patch(
        &self,
        generation: &mut Generation,
        span: &Span,
        d: usize,
        word: u64,
    ) -> Result<Patch> {
        let Some(disk) = self.disks.get(d) else {
            return Err(Error::Corrupt("No such state".into())); // not reached: nodes name states
        };
        let at = disk.l1_offset + span.index * TABLE_ENTRY;
        let kind = if disk.active {
            Protected::ActiveL1
        } else {
            Protected::InactiveL1
        };
        generation
            .replay
            .overlap
            .check(at, TABLE_ENTRY, Some(kind))?;
        if disk.active {
            if let Some(slot) = generation.replay.l1.get_mut(span.index as usize) {
                *slot = word;
            }
        }
        Ok(patch(at, word, L1))
    }

    /// Give states that differ from here on tables of their own: where some end in this cluster, or before
    /// it, of which `len` bytes are not zero; and where the table may be somebody else's too.
    fn part(&mut self, span: &Span, nodes: &mut Vec<Node>, at: u64, len: usize) -> Result<()> {
        let mut parted = Vec::new();
        for node in std::mem::take(nodes) {
            if !node.must_part(at, len) {
                room::push(&mut parted, node)?;
                continue;
            }
            let share = |d: &usize| {
                let end = self.disks.get(*d).map_or(0, |d| d.end);
                end.saturating_sub(at).min(len as u64)
            };
            let mut groups: Vec<Node> = Vec::new();
            for group in node.disks.chunk_by(|a, b| share(a) == share(b)) {
                let ended = group.first().map(share) == Some(0);
                let mut new = self.node(node.table, room::copy_of(group)?);
                new.slice = room::copy_of(&node.slice)?;
                match (node.table, ended && node.foreign) {
                    // A hole behind a state's end stays one.
                    (0, _) if ended => {}
                    // Nothing will be written for these.
                    (_, true) => {
                        new.foreign = true;
                        room::push(&mut parted, new)?;
                    }
                    _ => room::push(&mut groups, new)?,
                }
            }
            if node.table != 0 {
                self.copy_tables(span, &node, &mut groups)?;
            }
            for group in groups {
                room::push(&mut parted, group)?;
            }
        }
        *nodes = parted;
        Ok(())
    }

    /// Groups of a node's states get copies of its L2 table; the last one keeps it, if it is theirs alone.
    fn copy_tables(&mut self, span: &Span, node: &Node, groups: &mut [Node]) -> Result<()> {
        // What is pending may be entered in this table.
        self.write_generation()?;
        let g = self.g;
        let what = "Could not read an L2 table";
        let table = self
            .image
            .dev
            .read_vec(what, node.table, g.cluster_size())?;
        let stays = usize::from(!node.foreign);
        let (moved, kept) = groups.split_at_mut(groups.len() - stays);
        let mut generation = self.take()?;
        let cluster = g.cluster_of(node.table);
        let mut count = generation.replay.refs.get(&mut self.image.dev, cluster)?;
        for group in moved {
            if generation.bytes + g.cluster_size() > self.most {
                self.pending = Some(generation);
                self.write_generation()?;
                generation = self.take()?;
            }
            let mut copy = room::copy_of(&table)?;
            if !node.active {
                // Others have its clusters too.
                for word in copy.chunks_exact_mut(g.l2_entry_size()) {
                    let old = BigEndian::read_u64(word);
                    BigEndian::write_u64(word, old & !COPIED);
                }
            }
            let n = group.disks.len() as u64;
            self.new_table(&mut generation, span, group, copy)?;
            room::push(&mut generation.lower, (cluster, n))?;
            count -= n;
        }
        if let Some(last) = kept.first().filter(|last| last.active && count == 1) {
            for d in &last.disks {
                let flag = self.l1_patch(&mut generation, span, *d, node.table | COPIED)?;
                room::push(&mut generation.flags, flag)?;
            }
        }
        self.pending = Some(generation);
        self.write_generation()
    }
}

impl Node {
    /// Must its states get tables of their own, before a cluster is entered of which `len` bytes are not
    /// zero?
    fn must_part(&self, at: u64, len: usize) -> bool {
        let share = |end: u64| end.saturating_sub(at).min(len as u64);
        let (first, last) = (share(self.ends.0), share(self.ends.1));
        first != last || self.foreign && last > 0
    }
}

impl Generation {
    /// May entries be written to this L2 table?
    pub(super) fn check_table(&mut self, g: Geometry, table: u64) -> Result<()> {
        if self.checked == table {
            return Ok(());
        }
        let kind = Some(Protected::ActiveL2);
        self.replay.overlap.check(table, g.cluster_size(), kind)?;
        if self.replay.refs.fates.is_taken(g.cluster_of(table).0) {
            return Err(Error::Corrupt(format!(
                "L2 table {table:#x} is in use but counted as free"
            )));
        }
        self.checked = table;
        Ok(())
    }
}

pub(super) fn patch(at: u64, word: u64, label: &'static str) -> Patch {
    let mut bytes = [0; 16];
    BigEndian::write_u64(&mut bytes[..8], word);
    Patch {
        at,
        bytes,
        len: 8,
        label,
    }
}

/// Patches as requests, in the order of the file; neighbours in one.
fn writes(mut patches: Vec<Patch>) -> Result<Vec<Write>> {
    patches.sort_unstable_by_key(|p| p.at);
    let mut all: Vec<Write> = Vec::new();
    for patch in patches {
        let new = patch.bytes.get(..patch.len).unwrap_or_default();
        if let Some(Write {
            label,
            at,
            what: What::Bytes(bytes),
        }) = all.last_mut()
        {
            let next = *at + bytes.len() as u64 == patch.at && bytes.len() < LONGEST;
            if next && *label == patch.label {
                room::append(bytes, new)?;
                continue;
            }
        }
        let write = Write {
            label: patch.label,
            at: patch.at,
            what: What::bytes(new)?,
        };
        room::push(&mut all, write)?;
    }
    Ok(all)
}
