//! The L2 tables that several L1 tables name, each once, with how often it is named.

use crate::error::{Error, Result};
use crate::format::entry::OFFSET_MASK;
use crate::format::geometry::Geometry;
use crate::room;
use std::borrow::Cow;

/// Our limit for the entries of L2 tables that an L1 table names again: about a second.
const MAX_REPEATED_ENTRIES: u64 = 1 << 28;

/// See the module's text.
pub(crate) struct Named<'a> {
    /// Where they are, as an L1 table says it.
    pub(crate) words: Cow<'a, [u64]>,
    /// What to count of each; without it all of it, once.
    shares: Vec<Share>,
}

/// What is counted of an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) part: Part,
    /// How often, where it is taken away.
    pub(crate) times: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// The table and what it names.
    All,
    /// The table and what its first entries name, so many.
    Before(u32),
    /// What those behind them name.
    Behind(u32),
}

impl Part {
    /// These entries of the table.
    pub(super) fn of(self, table: &[u8], entry_size: usize) -> &[u8] {
        let at = |entries: u32| (entries as usize * entry_size).min(table.len());
        match self {
            Part::All => table,
            Part::Before(n) => table.get(..at(n)).unwrap_or_default(),
            Part::Behind(n) => table.get(at(n)..).unwrap_or_default(),
        }
    }
}

/// [`Named`] in the making: L1 tables come and go, and what they name is kept.
#[derive(Default)]
pub(crate) struct Naming {
    /// The first so many are sorted, and each is there once.
    merged: usize,
    all: Vec<(u64, Share)>,
}

impl<'a> Named<'a> {
    /// Those of one L1 table, as it names them.
    pub(crate) fn of(l1: impl Into<Cow<'a, [u64]>>) -> Named<'a> {
        Named {
            words: l1.into(),
            shares: Vec::new(),
        }
    }

    pub(super) fn share(&self, index: usize) -> Share {
        let all = Share {
            part: Part::All,
            times: 1,
        };
        self.shares.get(index).copied().unwrap_or(all)
    }
}

impl Naming {
    /// `part` of the L2 table that the L1 entry `word`, which is not 0, at `index` names, once more.
    pub(crate) fn add(&mut self, g: Geometry, word: u64, index: usize, part: Part) -> Result<()> {
        let offset = word & OFFSET_MASK;
        check_l2_offset(g, offset, index)?;
        room::push(&mut self.all, (offset, Share { part, times: 1 }))?;
        // What is merged is gone over again when there is as much to be added.
        if self.all.len() - self.merged > self.merged.max(4096) {
            self.merge();
        }
        Ok(())
    }

    fn merge(&mut self) {
        self.all
            .sort_unstable_by_key(|(offset, share)| (*offset, share.part));
        self.all.dedup_by(|(next, share), (last, sum)| {
            let same = *next == *last && share.part == sum.part;
            if same {
                sum.times += share.times;
            }
            same
        });
        self.merged = self.all.len();
    }

    /// All of them, in the order of the file.
    pub(crate) fn named(mut self) -> Result<Named<'static>> {
        self.merge();
        Ok(Named {
            words: room::collected(self.all.iter().map(|(offset, _)| *offset))?.into(),
            shares: room::collected(self.all.iter().map(|(_, share)| *share))?,
        })
    }
}

/// An L1 table may name an L2 table twice: QEMU counts it twice. It may not do so a million times,
/// which would take hours.
pub(crate) fn check_repeats(g: Geometry, l1: &[u64]) -> Result<()> {
    if (l1.len() as u64).saturating_mul(g.l2_entries()) <= MAX_REPEATED_ENTRIES {
        return Ok(());
    }
    let named = l1.iter().map(|e| e & OFFSET_MASK).filter(|o| *o != 0);
    let mut tables = room::collected(named)?;
    tables.sort_unstable();
    let repeats = tables.windows(2).filter(|w| w[0] == w[1]).count() as u64;
    if repeats.saturating_mul(g.l2_entries()) > MAX_REPEATED_ENTRIES {
        return Err(Error::Corrupt(format!(
            "The L1 table names L2 tables {repeats} times more than there are"
        )));
    }
    Ok(())
}

/// An L2 table must be at a cluster boundary and not in the header's cluster.
pub(crate) fn check_l2_offset(g: Geometry, offset: u64, l1_index: usize) -> Result<()> {
    if g.in_cluster(offset) != 0 {
        return Err(Error::Corrupt(format!(
            "L2 table offset {offset:#x} unaligned (L1 index: {l1_index:#x})"
        )));
    }
    if offset == 0 {
        return Err(Error::Corrupt(format!(
            "L1 entry {l1_index:#x} has flags but no offset"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_no_table_is_refused_with_its_place() {
        let g = Geometry::new(16, 4, false);
        let mut naming = Naming::default();
        for word in [1 << 63, 512, 1] {
            let e = naming.add(g, word, 0x2a, Part::All);
            assert!(e.unwrap_err().to_string().contains("0x2a"));
        }
    }

    #[test]
    fn a_table_is_named_up_to_2_to_the_28_entries_more_than_there_are() {
        // 2^18 entries in a table.
        let g = Geometry::new(21, 4, false);
        let same = |n: usize| check_repeats(g, &vec![1 << 63 | 5 << 21; n]);
        let others: Vec<u64> = (1..=1026u64).map(|n| n << 21).collect();
        assert!(same(1024).is_ok() && same(1025).is_ok());
        assert!(same(1026).is_err());
        assert!(check_repeats(g, &others).is_ok());
        assert!(check_repeats(g, &vec![0; 1026]).is_ok());
    }

    #[test]
    fn each_table_is_there_once_with_the_number_of_those_that_name_it() {
        let g = Geometry::new(9, 4, false);
        let mut naming = Naming::default();
        for round in 0..9 {
            for table in 1..=4000u64 {
                if (table + round) % 3 != 0 {
                    let part = if table == 7 {
                        Part::Before(3)
                    } else {
                        Part::All
                    };
                    naming.add(g, table << 9 | 1 << 63, 0, part).unwrap();
                }
            }
            naming.add(g, 7 << 9, 0, Part::Behind(3)).unwrap();
        }
        let named = naming.named().unwrap();
        assert!(named.words.len() == 4001 && named.words.is_sorted());
        let shares = |of: fn(u64) -> bool| {
            let all = named.words.iter().zip(&named.shares);
            let these = all.filter(move |(w, _)| of(**w >> 9));
            these.map(|(_, s)| (s.part, s.times)).collect::<Vec<_>>()
        };
        let of_seven = [(Part::Before(3), 6), (Part::Behind(3), 9)];
        assert_eq!(shares(|table| table == 7), of_seven);
        assert!(shares(|table| table != 7)
            .iter()
            .all(|s| *s == (Part::All, 6)));
    }
}
