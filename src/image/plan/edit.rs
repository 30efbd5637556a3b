//! A change of the words of an L1 table.

use super::super::device;
use super::super::tables::{changed_runs, PIECE};
use crate::error::Result;
use crate::format::entry::COPIED;
use crate::format::geometry::TABLE_ENTRY;
use crate::room;
use std::ops::Range;
use std::rc::Rc;

/// One L1 table before and after the verb.
#[derive(Debug)]
pub(crate) struct Edit {
    /// Where it stands.
    pub(crate) offset: u64,
    /// Its words before; those that are missing were zero, or nobody's.
    pub(crate) before: Vec<u64>,
    /// Its words in the end.
    pub(crate) after: Vec<u64>,
}

/// A moment in the life of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    Before,
    /// As it is published: [`At::After`], but bit 63 only where it was set before. Nothing is
    /// flagged before its time.
    Published,
    After,
}

impl Edit {
    pub(crate) fn new(offset: u64, before: &[u64], after: &[u64]) -> Result<Rc<Edit>> {
        Ok(Rc::new(Edit {
            offset,
            before: room::copy_of(before)?,
            after: room::copy_of(after)?,
        }))
    }

    /// How long the table is in the end.
    pub(crate) fn bytes(&self) -> u64 {
        self.after.len() as u64 * TABLE_ENTRY
    }

    fn word(&self, index: usize, when: At) -> u64 {
        let old = self.before.get(index).copied().unwrap_or(0);
        let new = self.after.get(index).copied().unwrap_or(0);
        match when {
            At::Before => old,
            At::After => new,
            At::Published if (new ^ old) & !COPIED == 0 => new & (old | !COPIED),
            At::Published => new & !COPIED,
        }
    }

    /// Words as bytes, for these bytes of the table.
    pub(crate) fn encoded(&self, when: At, bytes: &Range<usize>) -> Result<Vec<u8>> {
        let mut out = device::zeroed(bytes.len() as u64)?;
        let first = bytes.start / 8;
        for (index, word) in (first..).zip(out.chunks_exact_mut(8)) {
            word.copy_from_slice(&self.word(index, when).to_be_bytes());
        }
        Ok(out)
    }

    /// The bytes that differ: whole pieces.
    pub(crate) fn changes(&self, from: At, to: At) -> Result<Vec<Range<usize>>> {
        let mut runs = Vec::new();
        let words = self.after.len();
        let piece = |i: usize| i * PIECE / 8..((i + 1) * PIECE / 8).min(words);
        let changed = |i: usize| piece(i).any(|w| self.word(w, from) != self.word(w, to));
        changed_runs(words * 8, PIECE, changed, |run| room::push(&mut runs, run))?;
        Ok(runs)
    }

    /// The sectors of the file in which the published table differs from the one before.
    pub(crate) fn sectors_published(&self) -> impl Iterator<Item = u64> + '_ {
        let changed = |i: &usize| self.word(*i, At::Before) != self.word(*i, At::Published);
        let mut last = None;
        let changed = (0..self.after.len()).filter(changed);
        let sectors = changed.map(|i| self.offset.saturating_add(i as u64 * TABLE_ENTRY) / 512);
        sectors.filter(move |sector| last.replace(*sector) != Some(*sector))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn bit_63_is_not_set_before_its_time() {
        let edit = Edit {
            offset: 0,
            before: vec![512 | COPIED, 1024 | COPIED, 1536],
            after: vec![512 | COPIED, 1024, 2048 | COPIED, 4096 | COPIED],
        };
        let published = edit.encoded(At::Published, &(0..32)).unwrap();
        let words: Vec<u64> = published
            .chunks(8)
            .map(|w| u64::from_be_bytes(w.try_into().unwrap()))
            .collect();
        assert_eq!(words, [512 | COPIED, 1024, 2048, 4096]);
    }

    #[test]
    fn whole_pieces_are_written_and_sectors_counted() {
        let before = vec![0; 1200];
        let mut after = before.clone();
        (after[3], after[4]) = (512, 1024);
        let mut edit = Edit {
            offset: 0,
            before,
            after,
        };
        let runs = |e: &Edit| e.changes(At::Before, At::After).unwrap();
        assert_eq!(runs(&edit), vec![0..4096]);
        assert_eq!(edit.sectors_published().count(), 1);
        edit.after[1199] = 512;
        assert_eq!(runs(&edit), [0..4096, 8192..9600]);
        assert_eq!(edit.sectors_published().collect::<Vec<_>>(), [0, 18]);
        // The sectors are the file's.
        edit.offset = 512 * 7;
        edit.after[64] = 512;
        assert_eq!(edit.sectors_published().collect::<Vec<_>>(), [7, 8, 25]);
    }
}
