//! The one loop that carries steps out, and the only place from which anything is written.

use super::passes::Holes;
use super::steps::{Step, What, Write};
use super::{no_room, Temporary};
use crate::error::Result;
use crate::image::device::{self, failed, Device};
use crate::image::refcount::Refcounts;
use crate::image::Outcome;
use crate::io::{DiscardKind, Run, MAX_REQUEST};
use std::borrow::Cow;

/// Carry the steps out. Returns what is true of the image then, which is also what is true should
/// a step have failed.
pub(super) fn execute(
    dev: &mut Device,
    refs: &mut Refcounts,
    steps: &[Step],
) -> (Outcome, Result<()>) {
    let (mut outcome, mut holes) = (Outcome::Unchanged, Holes::default());
    for step in steps {
        if let Err(e) = carry_out(dev, refs, &mut holes, step) {
            let unknown = matches!(step, Step::Publish(_)) && outcome != Outcome::Done;
            return (if unknown { Outcome::Unknown } else { outcome }, Err(e));
        }
        if matches!(step, Step::Done) {
            outcome = Outcome::Done;
        }
    }
    (outcome, Ok(()))
}

fn carry_out(dev: &mut Device, refs: &mut Refcounts, holes: &mut Holes, step: &Step) -> Result<()> {
    let g = refs.geometry();
    match step {
        Step::Begin(stage, clusters) => dev.progress.begin(*stage, || clusters << g.cluster_bits),
        Step::End => dev.progress.end()?,
        Step::Write(write) => emit(dev, refs, write)?,
        Step::Try(write, undo) => {
            let result = emit(dev, refs, write);
            if result.as_ref().is_err_and(no_room) {
                for step in undo {
                    carry_out(dev, refs, holes, step)?;
                }
            }
            result?;
        }
        Step::Fill(at, bytes) => dev.fill_holes(*at, *bytes)?,
        Step::Publish(writes) | Step::Entries(writes) => {
            writes.iter().try_for_each(|write| emit(dev, refs, write))?;
            dev.barrier()?;
        }
        Step::Barrier => dev.barrier()?,
        Step::Done => {}
        Step::Stream(pass) => pass.run(dev, refs, holes)?,
        Step::Punch(ranges, share) => holes.punch(dev, g, ranges, share << g.cluster_bits)?,
        Step::Discard(at, bytes) => dev.discard(*at, *bytes, DiscardKind::Other),
        Step::GiveBack(temporary) => give_back(dev, temporary)?,
        Step::Truncate(length) => dev.truncate(*length)?,
        Step::Grow(length) if dev.length() < *length => dev.truncate(*length)?,
        // What is cut off is unused: a failure costs space only.
        Step::Cut(length) if dev.length() > *length => drop(dev.truncate(*length)),
        Step::Grow(_) | Step::Cut(_) => {}
    }
    Ok(())
}

/// Put back what was where a temporary L1 table is; what lies past the end of the file goes with the
/// last cut.
fn give_back(dev: &mut Device, temporary: &Temporary) -> Result<()> {
    let (at, old) = (temporary.offset, &temporary.old);
    if old.iter().all(|b| *b == 0) {
        let bytes = old.len() as u64;
        dev.discard(at, bytes, DiscardKind::Other);
        // Not every storage punches holes, and not every hole reads as zeros.
        if dev.read_vec("Could not read free clusters", at, bytes)? == *old {
            return Ok(());
        }
    }
    dev.write("free clusters", at, old)
}

/// Write to clusters that are free on the disk, before the plan that takes them is complete.
pub(crate) fn write_ahead(
    dev: &mut Device,
    label: &'static str,
    offset: u64,
    data: &[u8],
) -> Result<()> {
    dev.write(label, offset, data)?;
    // The disk works while more is read; the barrier waits for what is left.
    dev.storage.will_flush(offset, data.len() as u64);
    Ok(())
}

/// One request.
fn emit(dev: &mut Device, refs: &Refcounts, write: &Write) -> Result<()> {
    let g = refs.geometry();
    let bytes = match &write.what {
        What::Bytes(bytes) => Cow::Borrowed(bytes.as_slice()),
        What::Words(edit, when, bytes) => edit.encoded(*when, bytes)?.into(),
        What::Block(index) => {
            let mut counts = device::zeroed(g.cluster_size())?;
            if let Some(block) = refs.block(*index) {
                block.peak_counts(g, &[], &mut counts)?;
            }
            counts.into()
        }
        What::Table { table, epoch } => new_table(refs, *table, *epoch)?.into(),
    };
    dev.write(write.label, write.at, &bytes)
}

/// The contents of a new refcount table: without the blocks that are made later, with those that
/// are dropped when the verb has taken effect.
fn new_table(refs: &Refcounts, table: usize, epoch: usize) -> Result<Vec<u8>> {
    let entries = refs.tables().get(table).map(|t| t.entries.as_slice());
    let mut bytes = device::bytes_of(entries.unwrap_or_default())?;
    let mut enter = |index: u64, offset: u64| {
        let at = index as usize * 8;
        if let Some(word) = bytes.get_mut(at..at + 8) {
            word.copy_from_slice(&offset.to_be_bytes());
        }
    };
    for (index, block) in refs.loaded() {
        let later = block.born.is_some_and(|e| e > epoch);
        let named = entries.and_then(|e| e.get(index as usize)) == Some(&block.offset);
        if later && named {
            enter(index, 0);
        }
    }
    for dropped in refs.dropped() {
        enter(dropped.index, dropped.offset);
    }
    Ok(bytes)
}

/// What changes the file: for this module and those below it, and for `maintain/repair.rs`, which has
/// no plan.
impl Device {
    /// Write `data` at `offset`. `label` says which structure it is, to the storage too.
    pub(crate) fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> Result<()> {
        let mut at = offset;
        let full = |_| failed(label, offset)(std::io::Error::from_raw_os_error(libc::ENOSPC));
        self.check_room(offset.saturating_add(data.len() as u64))
            .map_err(full)?;
        self.changed = true;
        for part in data.chunks(MAX_REQUEST) {
            let written = self.storage.write(label, at, part);
            written.map_err(failed(label, at))?;
            at = at.saturating_add(part.len() as u64);
            self.length = self.length.max(at);
        }
        Ok(())
    }

    /// Where a hole is in this range, write what it reads as: a later write here needs no space.
    fn fill_holes(&mut self, offset: u64, bytes: u64) -> Result<()> {
        let end = offset.saturating_add(bytes);
        let mut at = offset;
        while at < end {
            let (hole, n) = match self.run(at) {
                Run::Data(n) => (false, n),
                Run::Hole(n) => (true, n.unwrap_or(u64::MAX)),
            };
            let n = n.clamp(1, end - at);
            if hole {
                let there = self.read_vec("Could not read a hole", at, n)?;
                self.write("hole", at, &there)?;
            }
            at += n;
        }
        Ok(())
    }

    /// Set the file's length.
    fn truncate(&mut self, length: u64) -> Result<()> {
        self.changed = true;
        let resized = self.storage.truncate(length);
        resized.map_err(failed("Could not resize the image file", length))?;
        if !self.fixed_length() {
            self.length = length;
        }
        Ok(())
    }

    /// Punch a hole; failures cost space only and are ignored, as QEMU does.
    pub(crate) fn discard(&mut self, offset: u64, bytes: u64, kind: DiscardKind) {
        let end = offset.saturating_add(bytes).min(self.length);
        if offset < end {
            self.changed = true;
            let _ = self.storage.discard_kind(offset, end - offset, kind);
        }
    }

    /// Wait until everything before is stable.
    pub(crate) fn barrier(&mut self) -> Result<()> {
        self.changed = true;
        let flushed = self.storage.barrier();
        flushed.map_err(failed("Could not flush the image file", 0))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::format::geometry::Geometry;
    use crate::format::header::Places;
    use crate::io::memory::MemoryStorage;

    #[test]
    fn a_new_table_names_no_block_that_is_made_later() {
        // The first of the blocks is full, and alone.
        let mut file = vec![0; 1024];
        file[512..].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 1].repeat(64));
        let places = Places {
            l1_offset: 0,
            l1_size: 0,
            reftable_offset: 0,
            reftable_clusters: 1,
        };
        let mut entries = vec![0; 64];
        entries[0] = 512;
        let mut dev = Device::new(Box::new(MemoryStorage::new(file))).unwrap();
        let g = Geometry::new(9, 6, false);
        let mut refs = Refcounts::new(g, places, entries, 1024, 1 << 20);
        refs.alloc(&mut dev, 512).unwrap();
        refs.next_epoch().unwrap();
        refs.alloc(&mut dev, 64 * 512).unwrap();
        let all = [0, 1, 2].map(|index| refs.entry(index));
        assert!(all.iter().all(|offset| *offset != 0));
        for (epoch, wanted) in [(0, [all[0], all[1], 0]), (1, all)] {
            let table = device::words(&new_table(&refs, 0, epoch).unwrap()).unwrap();
            assert_eq!((&table[..3], &table[3..]), (&wanted[..], &[0; 61][..]));
        }
    }
}
