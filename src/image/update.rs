//! The writing half of every verb. This order is the product:
//!
//! ```text
//! prepare  new data in clusters that nothing published refers to
//!          refcounts raised, never lowered;  COPIED cleared, never set
//!    B     (then 8-byte refcount table entries that hook up new blocks, each behind its block)
//! publish  one write within one 512-byte sector: the old state becomes the new one
//!    B
//! reclaim  refcounts lowered;  COPIED set;  holes punched where clusters became free
//!    B     (the promise of return 0)
//! ```
//!
//! `B` is a barrier. Between two barriers any subset of the writes may reach the disk, torn at 512
//! bytes. Before the publish nothing that the old state needs has changed in a way that matters to
//! it; from the publish on nothing that the new state needs is touched any more. A power cut
//! therefore leaves the old or the new state and at worst leaked clusters.
//!
//! A verb whose new data must go to clusters that the verb itself frees (QEMU reuses them at once)
//! is cut into *epochs*, each with a publish of its own that makes the disk forget these clusters.
//! One of them is *decisive*. Those before it move tables and publish nothing that a reader sees:
//! the disk size and the snapshot table stay, and a table that moves keeps its contents.
//! Counts are raised once, before the first publish, to the highest value that any epoch needs, and
//! lowered once, after the last.

use super::device::{self, Device};
use super::overlap::Kind;
use super::progress::Stage;
use super::refcount::{Block, Refcounts};
use super::replay::{Replay, Switched};
use super::room;
use super::walk::{self, Counts, Flags, Marked, Pieces, PIECE};
use super::Outcome;
use crate::error::{Error, Result};
use crate::format::entry::{COPIED, REFTABLE_OFFSET_MASK};
use crate::format::geometry::{Geometry, HostCluster, TABLE_ENTRY};
use crate::format::header::{
    self, AFTER_SNAPSHOTS, AT_L1_SIZE, AT_REFTABLE, AT_SIZE, AT_SNAPSHOTS,
};
use crate::format::refblock;
use byteorder::{BigEndian, ByteOrder};

/// Bytes 24 to 71 of the header: all that a publish can switch.
const SWITCHED: usize = (AFTER_SNAPSHOTS - AT_SIZE) as usize;

/// How the active L1 table gets new contents.
pub(crate) enum L1Change {
    /// It does not change, or only in bit 63 of its entries (`copied` below).
    None,
    /// Its changed entries lie in one sector: written in place, which publishes them.
    OneSector,
    /// The new contents stand in new clusters, to which the header is switched (QEMU grew the table).
    Moved,
    /// A temporary copy of the new contents stands at this offset. The header is switched to it, the
    /// table is written in place, the header is switched back.
    Through(u64),
    /// No place for a temporary copy: written in place, a power cut may leave a mixture.
    InPlace,
    /// Entries are published one by one, each valid with any other (VM state after create).
    EachEntry,
}

/// What a verb wants written, besides what its replay holds.
pub(crate) struct Plan {
    /// The epoch whose publish is the verb's own.
    pub(crate) decisive: usize,
    /// Tables whose entries lose COPIED in prepare.
    pub(crate) clear: Vec<Marked>,
    /// Tables whose entries get the final COPIED in reclaim.
    pub(crate) set: Vec<Marked>,
    /// The counts that decide about COPIED in both.
    pub(crate) counts: Counts,
    /// L1 tables that change in bit 63 only: (offset, words before, words after).
    pub(crate) copied: Vec<(u64, Vec<u64>, Vec<u64>)>,
    /// The L1 table that a growth has left behind: (offset, words before, words in the end). Its
    /// clusters are free, but QEMU leaves these bytes in them.
    pub(crate) left: Option<(u64, Vec<u64>, Vec<u64>)>,
    /// The active L1 before and after, where it changes in more than bit 63.
    pub(crate) l1: (L1Change, Vec<u64>, Vec<u64>),
}

impl Plan {
    pub(crate) fn new() -> Plan {
        Plan {
            decisive: 0,
            clear: Vec::new(),
            set: Vec::new(),
            counts: Counts::Final,
            copied: Vec::new(),
            left: None,
            l1: (L1Change::None, Vec::new(), Vec::new()),
        }
    }
}

/// Carries out one plan. `outcome` is what is true of the image should the next request fail.
pub(crate) struct Update<'a> {
    pub(crate) dev: &'a mut Device,
    pub(crate) outcome: Outcome,
}

impl Update<'_> {
    /// Write everything, in order.
    pub(crate) fn commit(
        &mut self,
        replay: &mut Replay,
        plan: &Plan,
        autoclear: Option<u64>,
    ) -> Result<()> {
        let g = replay.g;
        check_blocks(replay)?;
        let temporary = Temporary::of(self.dev, replay, plan)?;
        self.dev.progress.end()?;
        let refs = &replay.refs;
        let work = || blocks(refs, is_raised).saturating_add(plan.clear.len() as u64);
        self.dev
            .progress
            .begin(Stage::Prepare, || work() << g.cluster_bits);
        if let Some(bits) = autoclear {
            self.dev.write(
                "header: autoclear features",
                header::AT_AUTOCLEAR,
                &bits.to_be_bytes(),
            )?;
            self.dev.barrier()?;
        }
        if let Some(temporary) = &temporary {
            temporary.write(self.dev)?;
        }
        let crypt = self
            .dev
            .read_vec("Could not read the header", AT_SIZE, SWITCHED as u64)?;
        let mut on_disk = crypt;

        replay.close_epochs();
        for epoch in 0..=replay.refs.epoch {
            self.prepare(replay, plan, epoch)?;
            self.dev.barrier()?;
            self.hook_up_blocks(g, &replay.refs, epoch)?;

            let decisive = epoch == plan.decisive;
            if decisive {
                self.dev.progress.end()?;
            }
            let mut fields = replay
                .epoch_headers
                .get(epoch)
                .copied()
                .unwrap_or(replay.header);
            if epoch < plan.decisive {
                // An epoch before the decisive one moves tables. What a reader sees stays.
                fields = Switched {
                    l1_size: fields.l1_size,
                    l1_offset: fields.l1_offset,
                    ..replay.before
                };
            }
            self.publish_epoch(replay, plan, fields, epoch, &mut on_disk)?;
            if decisive {
                self.outcome = Outcome::Done;
            }
        }
        self.reclaim(replay, plan, temporary.as_ref())
    }

    /// New data, counts up, COPIED cleared. What extends the file comes first, so that a full disk
    /// is found before anything else is touched.
    fn prepare(&mut self, replay: &mut Replay, plan: &Plan, epoch: usize) -> Result<()> {
        let g = replay.g;
        let length = self.dev.length();
        let mut writes = new_structures(&replay.refs, g, epoch)?;
        for w in replay.new_data.iter().filter(|w| w.epoch == epoch) {
            room::push(&mut writes, (w.label, w.offset, w.data.as_slice().into()))?;
        }
        let extends =
            |w: &(&str, u64, std::borrow::Cow<[u8]>)| w.1.saturating_add(w.2.len() as u64) > length;
        for (label, offset, data) in writes.iter().filter(|w| extends(w)) {
            self.dev.write(label, *offset, data)?;
        }
        for (label, offset, data) in writes.iter().filter(|w| !extends(w)) {
            self.dev.write(label, *offset, data)?;
        }
        if epoch == 0 {
            self.fill_holes(replay, plan)?;
            self.raise_counts(&replay.refs, g)?;
            walk::rewrite_tables(
                &mut replay.refs,
                self.dev,
                g,
                &plan.clear,
                Flags::OnlyClear,
                plan.counts,
            )?;
            for (offset, before, after) in &plan.copied {
                self.write_l1(*offset, before, &without_new_flags(before, after)?)?;
            }
        }
        Ok(())
    }

    /// What is written in place from the first publish on must not need space: a full disk is to
    /// be found now. Everything but these tables is written over something that is not zeros.
    fn fill_holes(&mut self, replay: &Replay, plan: &Plan) -> Result<()> {
        let (change, before, after) = &plan.l1;
        if !matches!(change, L1Change::None | L1Change::Moved) {
            self.fill_l1_holes(replay.header.l1_offset, before, after)?;
        }
        if let Some((offset, before, after)) = &plan.left {
            self.fill_l1_holes(*offset, before, after)?;
        }
        for table in replay.refs.tables.iter().filter(|t| t.born.is_none()) {
            for (index, _) in replay.refs.loaded().filter(|(_, b)| b.born.is_some()) {
                if index < table.entries.len() as u64 {
                    let at = table.offset.saturating_add(index * TABLE_ENTRY);
                    self.dev.fill_holes(at, TABLE_ENTRY)?;
                }
            }
        }
        Ok(())
    }

    /// [`Update::write_l1`] will need no space.
    fn fill_l1_holes(&mut self, offset: u64, before: &[u64], after: &[u64]) -> Result<()> {
        let mut before = before.iter().copied().chain(std::iter::repeat(0));
        let mut at = offset;
        for piece in after.chunks(PIECE / TABLE_ENTRY as usize) {
            let bytes = size_of_val(piece) as u64;
            let same = piece.iter().zip(before.by_ref()).filter(|(a, b)| **a == *b);
            if same.count() < piece.len() {
                self.dev.fill_holes(at, bytes)?;
            }
            at = at.saturating_add(bytes);
        }
        Ok(())
    }

    /// Bring existing refcount blocks to the peak.
    fn raise_counts(&mut self, refs: &Refcounts, g: Geometry) -> Result<()> {
        let mut out = Pieces::new("refcount block");
        let mut old = device::zeroed(g.cluster_size())?;
        let mut raised = Vec::new();
        for (_, block) in refs.loaded().filter(|(_, b)| is_raised(b)) {
            self.dev.progress.step(g.cluster_size())?;
            self.dev
                .read("Could not read a refcount block", block.offset, &mut old)?;
            if block.only_raised() {
                out.write_changes(self.dev, block.offset, &old, &block.counts(g)?)?;
                continue;
            }
            raised.clear();
            room::append(&mut raised, &old)?;
            raise(g, &mut raised, block.peak(g)?.as_deref(), &block.counts(g)?);
            out.write_changes(self.dev, block.offset, &old, &raised)?;
        }
        for dropped in &refs.dropped {
            if let Some(peak) = &dropped.peak {
                self.dev
                    .read("Could not read a refcount block", dropped.offset, &mut old)?;
                out.write_changes(self.dev, dropped.offset, &old, peak)?;
            }
        }
        out.finish(self.dev)
    }

    /// Enter the epoch's new blocks in tables that are older than they: a block whose own count
    /// stands in another new block waits for that one's entry.
    fn hook_up_blocks(&mut self, g: Geometry, refs: &Refcounts, epoch: usize) -> Result<()> {
        let mut entries = Vec::new();
        for (t, table) in refs.tables.iter().enumerate() {
            if table.born == Some(epoch) {
                continue; // written whole
            }
            for (index, block) in refs.loaded().filter(|(_, b)| b.born == Some(epoch)) {
                let entry = table.entries.get(index as usize).copied().unwrap_or(0);
                if entry & REFTABLE_OFFSET_MASK == block.offset {
                    room::push(&mut entries, (t, index, block.offset))?;
                }
            }
        }
        let mut known: Vec<u64> = Vec::new();
        while !entries.is_empty() {
            let waits = |index: u64, offset: u64| {
                let describing = g.reftable_index(g.cluster_of(offset));
                describing != index
                    && !known.contains(&describing)
                    && refs
                        .block(describing)
                        .is_some_and(|b| b.born == Some(epoch))
            };
            let (mut later, mut now) = (Vec::new(), Vec::new());
            for entry in entries {
                let list = if waits(entry.1, entry.2) {
                    &mut later
                } else {
                    &mut now
                };
                room::push(list, entry)?;
            }
            if now.is_empty() {
                return Err(Error::Corrupt(
                    "Refcount blocks describe each other in a circle".into(),
                ));
            }
            for (t, index, offset) in now {
                let at = refs
                    .tables
                    .get(t)
                    .map_or(0, |table| table.offset)
                    .saturating_add(index * TABLE_ENTRY);
                self.dev
                    .write("refcount table entry", at, &offset.to_be_bytes())?;
                room::push(&mut known, index)?;
            }
            self.dev.barrier()?;
            entries = later;
        }
        Ok(())
    }

    /// Switch the header, or write what else publishes this epoch.
    fn publish_epoch(
        &mut self,
        replay: &Replay,
        plan: &Plan,
        fields: Switched,
        epoch: usize,
        on_disk: &mut Vec<u8>,
    ) -> Result<()> {
        let decisive = epoch == plan.decisive;
        let (change, before, after) = &plan.l1;
        let target = encode(fields, &replay.refs, epoch, on_disk);
        let bare = without_new_flags(before, after)?;
        match change {
            L1Change::Through(temp) if decisive => {
                let via = encode(
                    Switched {
                        l1_offset: *temp,
                        ..fields
                    },
                    &replay.refs,
                    epoch,
                    on_disk,
                );
                self.switch_header(on_disk, via)?;
                self.outcome = Outcome::Done;
                self.write_l1(fields.l1_offset, before, &bare)?;
                self.dev.barrier()?;
                self.switch_header(on_disk, target)
            }
            L1Change::OneSector | L1Change::InPlace if decisive => {
                self.switch_header(on_disk, target)?;
                let on_disk = before.iter().copied().chain(std::iter::repeat(0));
                if bare
                    .iter()
                    .copied()
                    .zip(on_disk)
                    .all(|(new, old)| new == old)
                {
                    return Ok(()); // nothing is published: only bit 63 comes later
                }
                self.outcome = Outcome::Unknown;
                self.write_l1(fields.l1_offset, before, &bare)?;
                self.dev.barrier()
            }
            L1Change::EachEntry if epoch == replay.refs.epoch => {
                self.switch_header(on_disk, target)?;
                // The verb is done; these entries only let go of the VM state.
                self.write_l1(fields.l1_offset, before, after)?;
                self.dev.barrier()
            }
            _ => self.switch_header(on_disk, target),
        }
    }

    /// One write within the header's first sector, and a barrier. Nothing if nothing changes.
    fn switch_header(&mut self, on_disk: &mut Vec<u8>, target: Vec<u8>) -> Result<()> {
        let differs = |(a, b): (&u8, &u8)| a != b;
        let Some(first) = on_disk.iter().zip(&target).position(differs) else {
            return Ok(());
        };
        let last = on_disk
            .iter()
            .zip(&target)
            .rposition(differs)
            .unwrap_or(first);
        let (outcome, bytes) = (self.outcome, target.get(first..=last).unwrap_or_default());
        if outcome != Outcome::Done {
            self.outcome = Outcome::Unknown;
        }
        self.dev.write("header", AT_SIZE + first as u64, bytes)?;
        self.dev.barrier()?;
        self.outcome = outcome;
        *on_disk = target;
        Ok(())
    }

    /// The changed 4 KiB pieces of an L1 table.
    fn write_l1(&mut self, offset: u64, before: &[u64], after: &[u64]) -> Result<()> {
        const WORDS: usize = walk::PIECE / 8;
        let mut out = Pieces::new("L1 table");
        let (mut at, mut piece) = (offset, [0; walk::PIECE]);
        let mut old = before.iter().copied().chain(std::iter::repeat(0));
        for words in after.chunks(WORDS) {
            let mut same = true;
            for word in words {
                same &= old.next() == Some(*word);
            }
            let bytes = piece.get_mut(..words.len() * 8).unwrap_or_default();
            if !same {
                BigEndian::write_u64_into(words, bytes);
                out.push(self.dev, at, bytes)?;
            }
            at = at.saturating_add(bytes.len() as u64);
        }
        out.finish(self.dev)
    }

    /// Counts down, COPIED set, holes. Nothing that is referred to changes its meaning.
    fn reclaim(
        &mut self,
        replay: &mut Replay,
        plan: &Plan,
        temp: Option<&Temporary>,
    ) -> Result<()> {
        let g = replay.g;
        let (freed, tables) = (blocks(&replay.refs, |b| b.freed), plan.set.len() as u64);
        let work = || blocks(&replay.refs, is_lowered) + tables + freed;
        self.dev
            .progress
            .begin(Stage::Reclaim, || work() << g.cluster_bits);
        self.unhook_blocks(&replay.refs)?;
        let mut holes = Holes::default();
        self.lower_counts(&replay.refs, g, temp, &mut holes)?;
        walk::rewrite_tables(
            &mut replay.refs,
            self.dev,
            g,
            &plan.set,
            Flags::AsCounted,
            plan.counts,
        )?;
        let (change, _, last) = &plan.l1;
        for (offset, before, after) in &plan.copied {
            let bare = without_new_flags(before, after)?;
            // Entries published one by one are on the disk already, and stay: pieces are written whole.
            let published = matches!(change, L1Change::EachEntry)
                && *offset == replay.header.l1_offset
                && bare != *after;
            self.write_l1(*offset, &bare, if published { last } else { after })?;
        }
        let (change, before, after) = &plan.l1;
        if !matches!(change, L1Change::None | L1Change::EachEntry) {
            self.write_l1(
                replay.header.l1_offset,
                &without_new_flags(before, after)?,
                after,
            )?;
        }
        if let Some((offset, before, after)) = &plan.left {
            self.write_l1(*offset, before, after)?;
        }
        if let Some(temp) = temp {
            temp.restore(self.dev)?;
        }
        holes.punch(self.dev, g, freed << g.cluster_bits)?;

        let length = final_length(replay);
        if self.dev.length() < length {
            self.dev.truncate(length)?;
        }
        // Unless something that lying counts called free is in a dropped block's cluster.
        for dropped in &replay.refs.dropped {
            if replay.refs.count_after(g.cluster_of(dropped.offset))? == 0 {
                self.dev.discard(dropped.offset, g.cluster_size());
            }
        }
        if self.dev.length() > length {
            // What is cut off is unused: a failure costs space only.
            let _ = self.dev.truncate(length);
        }
        self.dev.barrier()?;
        self.dev.progress.end()
    }

    /// Take dropped blocks out of the refcount table. A block's own count, which another block may
    /// hold, goes down only when the table has stopped naming it; and so does its hole come later.
    fn unhook_blocks(&mut self, refs: &Refcounts) -> Result<()> {
        if refs.dropped.is_empty() {
            return Ok(());
        }
        let table = refs.table().offset;
        for dropped in &refs.dropped {
            let at = table.saturating_add(dropped.index * TABLE_ENTRY);
            self.dev.write("refcount table entry", at, &[0; 8])?;
        }
        self.dev.barrier()
    }

    /// Bring refcount blocks from the peak to the final counts and note what became free.
    fn lower_counts(
        &mut self,
        refs: &Refcounts,
        g: Geometry,
        temp: Option<&Temporary>,
        holes: &mut Holes,
    ) -> Result<()> {
        let mut out = Pieces::new("refcount block");
        let mut old = device::zeroed(g.cluster_size())?;
        for (index, block) in refs.loaded().filter(|(_, b)| is_lowered(b)) {
            self.dev.progress.step(g.cluster_size())?;
            self.dev
                .read("Could not read a refcount block", block.offset, &mut old)?;
            let counts = block.counts(g)?;
            if old != *counts {
                out.write_changes(self.dev, block.offset, &old, &counts)?;
                if block.freed {
                    holes.add_freed(refs, g, index, &old, &counts, temp)?;
                }
            }
        }
        out.finish(self.dev)?;
        for dropped in &refs.dropped {
            if let Some(counts) = &dropped.counts {
                self.dev
                    .read("Could not read a refcount block", dropped.offset, &mut old)?;
                // The block itself goes later, behind a barrier.
                let itself = g.cluster_of(dropped.offset);
                if g.reftable_index(itself) == dropped.index {
                    refblock::set(g, &mut old, g.refblock_index(itself), 0);
                }
                holes.add_freed(refs, g, dropped.index, &old, &counts.bytes(g)?, temp)?;
            }
        }
        let mut blocks = room::collected(refs.dropped.iter().map(|d| g.cluster_of(d.offset).0))?;
        blocks.sort_unstable();
        // What was freed and then used again without new contents of its own keeps its bytes: only
        // a refcount block, or something that lying counts called free.
        for c in refs.punched.sorted()? {
            if blocks.binary_search(&c).is_err() && refs.count_after(HostCluster(c))? == 0 {
                holes.add(c)?;
            }
        }
        Ok(())
    }
}

/// Do the counts of a block on disk go up before the publish?
fn is_raised(b: &Block) -> bool {
    b.born.is_none() && (b.raised || b.has_peak())
}

/// Do they go down after it?
fn is_lowered(b: &Block) -> bool {
    b.dirty && !b.only_raised()
}

/// How many blocks are such?
fn blocks(refs: &Refcounts, such: impl Fn(&Block) -> bool) -> u64 {
    refs.loaded().filter(|(_, b)| such(b)).count() as u64
}

/// The file's length in the end.
pub(super) fn final_length(replay: &Replay) -> u64 {
    let blocks = replay.refs.loaded().filter(|(_, b)| b.dirty && !b.ours);
    let end = blocks
        .map(|(_, b)| b.offset.saturating_add(replay.g.cluster_size()))
        .max()
        .unwrap_or(0);
    replay.length().max(end)
}

/// `after` with bit 63 only where `before` has it too: nothing is set before its time.
fn without_new_flags(before: &[u64], after: &[u64]) -> Result<Vec<u64>> {
    let old = before.iter().copied().chain(std::iter::repeat(0));
    room::collected(after.iter().zip(old).map(|(new, old)| {
        if new & !COPIED == old & !COPIED {
            new & (old | !COPIED)
        } else {
            new & !COPIED
        }
    }))
}

/// Raise `new` to the counts that any published state needs.
fn raise(g: Geometry, new: &mut [u8], peak: Option<&[u8]>, counts: &[u8]) {
    let entries = g.refblock_entries() as usize;
    refblock::raise_to(g, new, counts, entries);
    if let Some(peak) = peak {
        refblock::raise_to(g, new, peak, entries);
    }
}

type Write<'a> = (&'static str, u64, std::borrow::Cow<'a, [u8]>);

/// Refcount blocks and tables that this epoch makes, whole.
fn new_structures(refs: &Refcounts, g: Geometry, epoch: usize) -> Result<Vec<Write<'static>>> {
    let mut writes: Vec<Write> = Vec::new();
    for (_, block) in refs.loaded().filter(|(_, b)| b.born == Some(epoch)) {
        let mut counts = room::owned(block.counts(g)?)?;
        if let Some(peak) = block.peak(g)? {
            refblock::raise_to(g, &mut counts, &peak, g.refblock_entries() as usize);
        }
        room::push(&mut writes, ("refcount block", block.offset, counts.into()))?;
    }
    for table in refs.tables.iter().filter(|t| t.born == Some(epoch)) {
        let mut entries = room::copy_of(&table.entries)?;
        for (index, block) in refs
            .loaded()
            .filter(|(_, b)| b.born.is_some_and(|e| e > epoch))
        {
            if let Some(entry) = entries
                .get_mut(index as usize)
                .filter(|e| **e == block.offset)
            {
                *entry = 0;
            }
        }
        for dropped in &refs.dropped {
            if let Some(entry) = entries.get_mut(dropped.index as usize) {
                *entry = dropped.offset;
            }
        }
        let bytes = device::bytes_of(&entries)?.into();
        room::push(&mut writes, ("refcount table", table.offset, bytes))?;
    }
    Ok(writes)
}

/// Bytes 24 to 71 as they are to be after `epoch`; the encryption method stays as it is on disk.
fn encode(h: Switched, refs: &Refcounts, epoch: usize, on_disk: &[u8]) -> Vec<u8> {
    #[allow(clippy::disallowed_methods)] // 48 bytes
    let mut b = on_disk.to_vec();
    let mut put = |at: u64, bytes: &[u8]| {
        let from = (at - AT_SIZE) as usize;
        b[from..from + bytes.len()].copy_from_slice(bytes);
    };
    put(AT_SIZE, &h.size.to_be_bytes());
    put(AT_L1_SIZE, &header::encode_l1(h.l1_size, h.l1_offset));
    let table = refs
        .tables
        .iter()
        .rev()
        .find(|t| t.born.is_none_or(|e| e <= epoch));
    if let Some(t) = table {
        put(
            AT_REFTABLE,
            &header::encode_reftable(t.offset, t.clusters as u32),
        );
    }
    put(
        AT_SNAPSHOTS,
        &header::encode_snapshots(h.nb_snapshots, h.snapshots_offset),
    );
    b
}

/// QEMU checks each refcount block that it writes against the other structures.
fn check_blocks(replay: &Replay) -> Result<()> {
    for (_, block) in replay.refs.loaded().filter(|(_, b)| b.dirty) {
        replay
            .overlap
            .check(block.offset, replay.g.cluster_size(), Some(Kind::Refblock))?;
    }
    Ok(())
}

const TEMPORARY_L1: &str = "temporary L1 table";

/// Has a verb failed because there was no room for its temporary L1 table?
pub(crate) fn no_room(e: &Error) -> bool {
    let full = [libc::ENOSPC, libc::EDQUOT, libc::EFBIG];
    matches!(e, Error::Io { op, .. } if *op == TEMPORARY_L1) && full.contains(&e.errno())
}

/// A copy of the new L1 contents that lives from one header switch to the next.
pub(crate) struct Temporary {
    offset: u64,
    contents: Vec<u8>,
    /// What was in the clusters before, as far as the file went.
    old: Vec<u8>,
    first: u64,
    clusters: u64,
}

impl Temporary {
    fn of(dev: &mut Device, replay: &Replay, plan: &Plan) -> Result<Option<Temporary>> {
        let (L1Change::Through(offset), before, after) = &plan.l1 else {
            return Ok(None);
        };
        let g = replay.g;
        let contents = device::bytes_of(&without_new_flags(before, after)?)?;
        let bytes = contents.len() as u64;
        let inside = dev.length().saturating_sub(*offset).min(bytes);
        let old = dev.read_vec("Could not read free clusters", *offset, inside)?;
        Ok(Some(Temporary {
            offset: *offset,
            contents,
            old,
            first: g.cluster_of(*offset).0,
            clusters: g.clusters_for(bytes),
        }))
    }

    fn holds(&self, cluster: u64) -> bool {
        (self.first..self.first + self.clusters).contains(&cluster)
    }

    /// The first write of the verb: where the disk is full it is undone, and there are other ways.
    fn write(&self, dev: &mut Device) -> Result<()> {
        let length = dev.length();
        let result = dev.write(TEMPORARY_L1, self.offset, &self.contents);
        if result.as_ref().is_err_and(no_room) {
            if self.offset.saturating_add(self.contents.len() as u64) > length {
                dev.truncate(length)?;
            }
            self.restore(dev)?;
        }
        result
    }

    /// Put back what was there; what lies past the end of the file goes with the last truncate.
    fn restore(&self, dev: &mut Device) -> Result<()> {
        if self.old.iter().all(|b| *b == 0) {
            let bytes = self.old.len() as u64;
            dev.discard(self.offset, bytes);
            // Not every storage punches holes, and not every hole reads as zeros.
            if dev.read_vec("Could not read free clusters", self.offset, bytes)? == self.old {
                return Ok(());
            }
        }
        dev.write("free clusters", self.offset, &self.old)
    }
}

/// Ranges to punch, neighbours merged.
#[derive(Default)]
struct Holes {
    clusters: Vec<(u64, u64)>,
}

impl Holes {
    fn add(&mut self, cluster: u64) -> Result<()> {
        match self.clusters.last_mut() {
            Some((first, n)) if *first + *n == cluster => *n += 1,
            _ => room::push(&mut self.clusters, (cluster, 1))?,
        }
        Ok(())
    }

    /// Clusters whose count goes from something to nothing, but for those whose bytes QEMU keeps.
    fn add_freed(
        &mut self,
        refs: &Refcounts,
        g: Geometry,
        index: u64,
        old: &[u8],
        new: &[u8],
        temp: Option<&Temporary>,
    ) -> Result<()> {
        let base = g.first_cluster_of_block(index).0;
        for i in 0..g.refblock_entries() as usize {
            if refblock::get(g, old, i) != 0 && refblock::get(g, new, i) == 0 {
                let c = base + i as u64;
                if !refs.kept.contains(c) && !temp.is_some_and(|t| t.holds(c)) {
                    self.add(c)?;
                }
            }
        }
        Ok(())
    }

    /// `share`: what of the verb's progress all this is.
    fn punch(mut self, dev: &mut Device, g: Geometry, share: u64) -> Result<()> {
        // What an explicit free has punched became free in a block as well.
        self.clusters.sort_unstable();
        self.clusters.dedup_by(|next, last| {
            let (end, next_end) = (last.0 + last.1, next.0 + next.1);
            let touches = next.0 <= end;
            if touches {
                last.1 = end.max(next_end) - last.0;
            }
            touches
        });
        for (first, n) in &self.clusters {
            dev.progress.step(share / self.clusters.len() as u64)?;
            dev.discard(g.offset_of(HostCluster(*first)), n << g.cluster_bits);
        }
        Ok(())
    }
}
