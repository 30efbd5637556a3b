//! From epochs to the steps that bring the disk there. Nothing here reads or writes.

use super::epoch::{Epoch, Epochs};
use super::{At, Edit, How, Plan, Temporary, TEMPORARY_L1};
use crate::error::{Error, Result};
use crate::format::geometry::{Geometry, HostCluster, TABLE_ENTRY};
use crate::format::header::{encode_switched, Header, Meaning, Places, SWITCHED};
use crate::format::header::{AT_AUTOCLEAR, AT_BACKING, AT_SIZE};
use crate::image::progress::Stage;
use crate::image::refcount::{Block, Refcounts};
use crate::image::replay::walk::Marked;
use crate::image::replay::Replay;
use crate::room;
use std::ops::Range;
use std::rc::Rc;

/// One thing to do. Between two barriers the order of steps means nothing.
#[derive(Debug)]
pub(crate) enum Step {
    /// A stage of the verb's progress begins, in which so many clusters are gone through.
    Begin(Stage, u64),
    /// It ends. The ends of the first two are the last moments at which the verb can be cancelled.
    End,
    Write(Write),
    /// A write without which there are other ways: where the disk is full it is undone.
    Try(Write, Vec<Step>),
    /// Where a hole is in these bytes, write what it reads as: a later write there needs no space.
    Fill(u64, u64),
    /// Everything before is stable before anything behind it is written.
    Barrier,
    /// These and a barrier. Until that, whether the image means what it meant is not known.
    Publish(Vec<Write>),
    /// Entries of tables, each of which may reach the disk or not: the image reads the same. And a barrier.
    Entries(Vec<Write>),
    /// The verb has taken effect.
    Done,
    Stream(Pass),
    /// Punch these ranges of clusters (first, number), and those that became free in a [`Pass::Lower`].
    /// All that counts as so many clusters gone through.
    Punch(Vec<(u64, u64)>, u64),
    /// Punch these bytes.
    Discard(u64, u64),
    /// Put back what was where a temporary L1 table is.
    GiveBack(Rc<Temporary>),
    /// Make the file as long as this.
    Truncate(u64),
    /// Make it so, if it is shorter, or if it is longer.
    Grow(u64),
    Cut(u64),
}

/// One request.
#[derive(Debug)]
pub(crate) struct Write {
    /// Which structure it is.
    pub(crate) label: &'static str,
    pub(crate) at: u64,
    pub(crate) what: What,
}

/// Bytes to be written. What is large is encoded when its turn has come.
#[derive(Debug)]
pub(crate) enum What {
    Bytes(Vec<u8>),
    /// These bytes of an L1 table.
    Words(Rc<Edit>, At, Range<usize>),
    /// A new refcount block, by its index in the refcount table.
    Block(u64),
    /// A new refcount table with the blocks that are there after an epoch.
    Table {
        table: usize,
        epoch: usize,
    },
}

/// Many structures, gone through by the buffer: read, changed, and what has changed written.
#[derive(Debug)]
pub(crate) enum Pass {
    /// Bring these refcount blocks up to the highest counts that any published state needs.
    Raise(Vec<u64>),
    /// Bring them down to the final counts. Clusters in the range are given back as they were.
    Lower(Vec<u64>, Range<u64>),
    /// Clear COPIED in L2 tables where the counts demand it.
    Clear(Vec<Marked>),
    /// Set it too.
    Set(Vec<Marked>),
}

/// The steps of a verb; `file` is the file's length before them, `rounded` if it may be less.
pub(crate) fn steps(
    was: &Header,
    autoclear: Option<u64>,
    (file, rounded): (u64, bool),
    replay: &Replay,
    epochs: Epochs,
    mut plan: Plan,
) -> Result<Vec<Step>> {
    let refs = &replay.refs;
    let mut out = Steps {
        g: replay.g,
        list: Vec::new(),
        file,
        crypt_method: was.crypt_method,
        header: encode_switched(was.places(), was.meaning(), was.crypt_method),
    };
    let mut raised = blocks(refs, Block::is_raised)?;
    let work = raised.len() as u64 + plan.clear.len() as u64;
    out.push(Step::Begin(Stage::Prepare, work))?;
    if let Some(bits) = autoclear {
        let bits = What::bytes(&bits.to_be_bytes())?;
        out.write("header: autoclear features", AT_AUTOCLEAR, bits)?;
        out.push(Step::Barrier)?;
    }
    if let Some((edit, How::Through(temporary))) = &plan.l1 {
        out.try_temporary(edit, temporary)?;
    }
    let last = epochs.all.len().saturating_sub(1);
    for (n, mut epoch) in epochs.all.into_iter().enumerate() {
        let meaning = if n < epochs.decisive {
            was.meaning()
        } else {
            epochs.meaning
        };
        out.new_contents(refs, &mut epoch, n)?;
        if n == 0 {
            out.fill(refs, &plan)?;
            if !raised.is_empty() || !refs.dropped().is_empty() {
                out.push(Step::Stream(Pass::Raise(std::mem::take(&mut raised))))?;
            }
            let clear = std::mem::take(&mut plan.clear);
            out.push(Step::Stream(Pass::Clear(clear)))?;
            for edit in &plan.copied {
                out.edit(edit, At::Before, At::Published)?;
            }
        }
        out.push(Step::Barrier)?;
        out.enter_blocks(refs, &epoch, n)?;
        if n == epochs.decisive {
            out.push(Step::End)?;
            out.publish_decisive(epoch.places, meaning, &plan)?;
        } else {
            out.publish_header(epoch.places, meaning)?;
        }
        if n == last {
            if let Some((edit, How::EachEntry)) = &plan.l1 {
                // The verb is done; these entries only let go of the VM state.
                out.edit(edit, At::Before, At::After)?;
                out.push(Step::Barrier)?;
            }
            out.push(Step::Entries(std::mem::take(&mut plan.entries)))?;
        }
    }
    out.reclaim(replay, plan, rounded)?;
    Ok(out.list)
}

/// Refcount blocks of a kind, by index.
fn blocks(refs: &Refcounts, kind: impl Fn(&Block) -> bool) -> Result<Vec<u64>> {
    let of_kind = refs.loaded().filter(|(_, b)| kind(b));
    room::collected(of_kind.map(|(index, _)| index))
}

/// The steps so far, and what they leave.
struct Steps {
    g: Geometry,
    list: Vec<Step>,
    /// How long the file is by now.
    file: u64,
    crypt_method: u32,
    /// Bytes 24 to 71 of the header by now.
    header: [u8; SWITCHED],
}

impl Steps {
    fn push(&mut self, step: Step) -> Result<()> {
        match &step {
            Step::Stream(Pass::Clear(list) | Pass::Set(list)) if list.is_empty() => Ok(()),
            Step::Publish(list) | Step::Entries(list) if list.is_empty() => Ok(()),
            _ => room::push(&mut self.list, step),
        }
    }

    fn write(&mut self, label: &'static str, at: u64, what: What) -> Result<()> {
        self.push(Step::Write(Write { label, at, what }))
    }

    fn writes(&mut self, writes: Vec<Write>) -> Result<()> {
        writes
            .into_iter()
            .try_for_each(|w| self.push(Step::Write(w)))
    }

    /// The copy of the new L1 contents is the first write of the verb: where the disk is full it is
    /// undone, and there are other ways.
    fn try_temporary(&mut self, edit: &Rc<Edit>, temporary: &Rc<Temporary>) -> Result<()> {
        let write = Write {
            label: TEMPORARY_L1,
            at: temporary.offset,
            what: What::Words(another(edit), At::Published, 0..edit.after.len() * 8),
        };
        let mut undo = Vec::new();
        let end = temporary.offset.saturating_add(edit.bytes());
        if end > self.file {
            room::push(&mut undo, Step::Truncate(temporary.file_end))?;
        }
        room::push(&mut undo, Step::GiveBack(another(temporary)))?;
        self.file = self.file.max(end);
        self.push(Step::Try(write, undo))
    }

    /// New structures and new data of an epoch. What extends the file comes first, so that a full
    /// disk is found before anything else is touched.
    fn new_contents(&mut self, refs: &Refcounts, epoch: &mut Epoch, n: usize) -> Result<()> {
        let (mut extend, mut others) = (Vec::new(), Vec::new());
        let (file, mut end) = (self.file, self.file);
        let mut add = |label, at: u64, bytes: u64, what| {
            let behind = at.saturating_add(bytes);
            end = end.max(behind);
            let list = if behind > file {
                &mut extend
            } else {
                &mut others
            };
            room::push(list, Write { label, at, what })
        };
        for index in epoch.blocks.iter().copied() {
            let at = refs.block(index).map_or(0, |b| b.offset);
            let what = What::Block(index);
            add("refcount block", at, self.g.cluster_size(), what)?;
        }
        for index in epoch.tables.iter().copied() {
            let table = refs.tables().get(index);
            let (at, entries) = table.map_or((0, 0), |t| (t.offset, t.entries.len()));
            let what = What::Table {
                table: index,
                epoch: n,
            };
            add("refcount table", at, entries as u64 * TABLE_ENTRY, what)?;
        }
        for data in epoch.new.drain(..) {
            let bytes = data.data.len() as u64;
            add(data.label, data.offset, bytes, What::Bytes(data.data))?;
        }
        self.file = end;
        self.writes(extend)?;
        self.writes(others)
    }

    /// Enter an epoch's new blocks in the tables that are older than they: a block whose own count stands in
    /// another new block waits for that one's entry.
    fn enter_blocks(&mut self, refs: &Refcounts, epoch: &Epoch, n: usize) -> Result<()> {
        let (g, mut entries) = (self.g, Vec::new());
        // A table that the epoch makes is written whole, and so is one that is made later.
        for table in refs
            .tables()
            .iter()
            .filter(|t| t.born.is_none_or(|e| e < n))
        {
            for index in epoch.blocks.iter().copied() {
                let block = refs.block(index).map_or(0, |b| b.offset);
                if table.entry(index) == block {
                    let at = table.offset.saturating_add(index * TABLE_ENTRY);
                    room::push(&mut entries, (index, at, block))?;
                }
            }
        }
        let mut known: Vec<u64> = Vec::new();
        while !entries.is_empty() {
            let waits = |(index, _, block): &(u64, u64, u64)| {
                let describing = g.reftable_index(g.cluster_of(*block));
                describing != *index
                    && !known.contains(&describing)
                    && epoch.blocks.contains(&describing)
            };
            entries.sort_unstable_by_key(|e| (waits(e), e.1));
            let now = entries.partition_point(|e| !waits(e));
            if now == 0 {
                return Err(Error::Corrupt(
                    "Refcount blocks describe each other in a circle".into(),
                ));
            }
            for (index, at, block) in entries.drain(..now) {
                room::push(&mut known, index)?;
                let entry = What::bytes(&block.to_be_bytes())?;
                self.write("refcount table entry", at, entry)?;
            }
            self.push(Step::Barrier)?;
        }
        Ok(())
    }

    /// What is written in place from the first publish on must not need space: a full disk is to
    /// be found now. Everything but these tables is written over something that is not zeros.
    fn fill(&mut self, refs: &Refcounts, plan: &Plan) -> Result<()> {
        let l1 = plan.l1.iter().filter(|(_, how)| !matches!(how, How::Moved));
        for edit in l1.map(|(edit, _)| edit).chain(&plan.left) {
            for run in edit.changes(At::Before, At::After)? {
                let at = edit.offset.saturating_add(run.start as u64);
                self.push(Step::Fill(at, run.len() as u64))?;
            }
        }
        for table in refs.tables().iter().filter(|t| t.born.is_none()) {
            for (index, _) in refs.loaded().filter(|(_, b)| b.born.is_some()) {
                if index < table.entries.len() as u64 {
                    let at = table.offset.saturating_add(index * TABLE_ENTRY);
                    self.push(Step::Fill(at, TABLE_ENTRY))?;
                }
            }
        }
        Ok(())
    }

    /// Write the pieces of an L1 table in which it differs.
    fn edit(&mut self, edit: &Rc<Edit>, from: At, to: At) -> Result<()> {
        self.writes(changes(edit, from, to, edit)?)
    }

    /// One write within the header's first sector. Nothing if nothing changes.
    fn publish_header(&mut self, places: Places, meaning: Meaning) -> Result<()> {
        let target = encode_switched(places, meaning, self.crypt_method);
        let differs = |i: &usize| self.header.get(*i) != target.get(*i);
        let first = (0..SWITCHED).find(differs);
        let last = (0..SWITCHED).rev().find(differs);
        let (Some(first), Some(last)) = (first, last) else {
            return Ok(());
        };
        self.header = target;
        let bytes = target.get(first..=last).unwrap_or_default();
        self.publish("header", AT_SIZE + first as u64, bytes)
    }

    fn publish(&mut self, label: &'static str, at: u64, bytes: &[u8]) -> Result<()> {
        let what = What::bytes(bytes)?;
        let one = room::collected([Write { label, at, what }].into_iter())?;
        self.push(Step::Publish(one))
    }

    /// What makes the old state the new one.
    fn publish_decisive(&mut self, places: Places, meaning: Meaning, plan: &Plan) -> Result<()> {
        if let Some((edit, How::Through(temporary))) = &plan.l1 {
            let via = Places {
                l1_offset: temporary.offset,
                ..places
            };
            self.publish_header(via, meaning)?;
            self.push(Step::Done)?;
            self.edit(edit, At::Before, At::Published)?;
            self.push(Step::Barrier)?;
            return self.publish_header(places, meaning);
        }
        self.publish_header(places, meaning)?;
        if let Some((edit, how @ (How::OneSector | How::InPlace))) = &plan.l1 {
            let torn = matches!(how, How::InPlace);
            debug_assert!(torn || edit.sectors_published().count() <= 1);
            // Nothing, if only bit 63 changes: later.
            let writes = changes(edit, At::Before, At::Published, edit)?;
            self.push(Step::Publish(writes))?;
        }
        if plan.let_go {
            self.publish("header: backing file", AT_BACKING, &[0; 12])?;
        }
        self.push(Step::Done)
    }

    /// Counts down, COPIED set, holes. Nothing that is referred to changes its meaning.
    fn reclaim(&mut self, replay: &Replay, plan: Plan, rounded: bool) -> Result<()> {
        let (g, refs, length) = (self.g, &replay.refs, replay.final_length());
        let lowered = blocks(refs, Block::is_lowered)?;
        let freed = refs.loaded().filter(|(_, b)| b.frees()).count() as u64;
        let work = lowered.len() as u64 + plan.set.len() as u64 + freed;
        self.push(Step::Begin(Stage::Reclaim, work))?;
        // A dropped block's own count, which another block may hold, goes down only when the table
        // has stopped naming it; and so does its hole come later.
        for dropped in refs.dropped() {
            let table = refs.table().offset;
            let at = table.saturating_add(dropped.index * TABLE_ENTRY);
            self.write("refcount table entry", at, What::bytes(&[0; 8])?)?;
        }
        if !refs.dropped().is_empty() {
            self.push(Step::Barrier)?;
        }
        let temporary = match &plan.l1 {
            Some((edit, How::Through(temporary))) => Some((edit, temporary)),
            _ => None,
        };
        let spare = temporary.map_or(0..0, |(edit, t)| {
            let first = g.cluster_of(t.offset).0;
            first..first + g.clusters_for(edit.bytes())
        });
        self.push(Step::Stream(Pass::Lower(lowered, spare)))?;
        self.push(Step::Stream(Pass::Set(plan.set)))?;
        for edit in &plan.copied {
            // Entries published one by one are on the disk already, and stay: pieces are written whole.
            let words = match &plan.l1 {
                Some((last, How::EachEntry)) => last,
                _ => edit,
            };
            debug_assert_eq!(words.offset, edit.offset);
            self.writes(changes(edit, At::Published, At::After, words)?)?;
        }
        self.writes(plan.flags)?;
        let l1 = plan
            .l1
            .iter()
            .filter(|(_, how)| !matches!(how, How::EachEntry));
        for (edit, _) in l1 {
            self.edit(edit, At::Published, At::After)?;
        }
        if let Some(edit) = &plan.left {
            self.edit(edit, At::Before, At::After)?;
        }
        if let Some((_, temporary)) = temporary {
            self.push(Step::GiveBack(another(temporary)))?;
        }
        self.push(Step::Punch(explicit_holes(g, refs)?, freed))?;
        self.push(if rounded && replay.truncated && length == self.file {
            // It may be shorter than it was said to be, and as long it shall become.
            Step::Truncate(length)
        } else {
            Step::Grow(length)
        })?;
        // Unless something that lying counts called free is in a dropped block's cluster.
        for dropped in refs.dropped() {
            if refs.count_after(g.cluster_of(dropped.offset))? == 0 {
                self.push(Step::Discard(dropped.offset, g.cluster_size()))?;
            }
        }
        // What is cut off is unused: a failure costs space only.
        self.push(Step::Cut(length))?;
        self.push(Step::Barrier)?;
        self.push(Step::End)
    }
}

impl What {
    pub(crate) fn bytes(bytes: &[u8]) -> Result<What> {
        Ok(What::Bytes(room::copy_of(bytes)?))
    }
}

#[allow(clippy::disallowed_methods)] // an Rc
fn another<T>(shared: &Rc<T>) -> Rc<T> {
    Rc::clone(shared)
}

/// The writes of the pieces of a table that `edit` changes. They hold what `words` says of it at `to`.
fn changes(edit: &Edit, from: At, to: At, words: &Rc<Edit>) -> Result<Vec<Write>> {
    let runs = edit.changes(from, to)?.into_iter();
    let writes = runs.map(|run| Write {
        label: "L1 table",
        at: edit.offset.saturating_add(run.start as u64),
        what: What::Words(another(words), to, run),
    });
    room::collected(writes)
}

/// Ranges of clusters that QEMU punches besides those that lose their count. What was freed and
/// then used again without new contents of its own keeps its bytes: only a refcount block, or
/// something that lying counts called free.
fn explicit_holes(g: Geometry, refs: &Refcounts) -> Result<Vec<(u64, u64)>> {
    let dropped = refs.dropped().iter().map(|d| g.cluster_of(d.offset).0);
    let mut dropped = room::collected(dropped)?;
    dropped.sort_unstable();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for c in refs.fates.punched()? {
        if dropped.binary_search(&c).is_err() && refs.count_after(HostCluster(c))? == 0 {
            add_to(&mut ranges, c)?;
        }
    }
    Ok(ranges)
}

/// Another cluster, to ranges of them (first, number).
pub(super) fn add_to(ranges: &mut Vec<(u64, u64)>, cluster: u64) -> Result<()> {
    match ranges.last_mut() {
        Some((first, n)) if *first + *n == cluster => *n += 1,
        _ => room::push(ranges, (cluster, 1))?,
    }
    Ok(())
}
