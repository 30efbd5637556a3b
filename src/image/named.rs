//! The L2 tables that several L1 tables name, each once, with how often it is named.

use super::replay::walk::{check_l2_offset, Part, Share, Tables};
use super::room;
use crate::error::Result;
use crate::format::entry::OFFSET_MASK;
use crate::format::geometry::Geometry;

/// See the module's text.
#[derive(Default)]
pub(crate) struct Named {
    words: Vec<u64>,
    shares: Vec<Share>,
}

/// [`Named`] in the making: L1 tables come and go, and what they name is kept.
#[derive(Default)]
pub(crate) struct Naming {
    /// The first so many are sorted, and each is there once.
    merged: usize,
    all: Vec<(u64, Share)>,
}

impl Named {
    /// Those of one L1 table, as it names them.
    pub(crate) fn by(l1: Vec<u64>) -> Named {
        Named {
            words: l1,
            shares: Vec::new(),
        }
    }

    pub(crate) fn tables(&self) -> Tables<'_> {
        Tables {
            words: &self.words,
            shares: &self.shares,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.is_empty()
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
    pub(crate) fn named(mut self) -> Result<Named> {
        self.merge();
        Ok(Named {
            words: room::collected(self.all.iter().map(|(offset, _)| *offset))?,
            shares: room::collected(self.all.iter().map(|(_, share)| *share))?,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

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
        let Tables { words, shares } = named.tables();
        assert!(words.len() == 4001 && words.is_sorted());
        let of_seven: Vec<_> = words
            .iter()
            .zip(shares)
            .filter(|(w, _)| **w == 7 << 9)
            .collect();
        assert_eq!(of_seven.len(), 2);
        assert_eq!(
            *of_seven[0].1,
            Share {
                part: Part::Before(3),
                times: 6
            }
        );
        assert_eq!(
            *of_seven[1].1,
            Share {
                part: Part::Behind(3),
                times: 9
            }
        );
        assert!(shares
            .iter()
            .filter(|s| s.part == Part::All)
            .all(|s| s.times == 6));
    }

    #[test]
    fn what_is_no_table_is_refused_with_its_place() {
        let g = Geometry::new(16, 4, false);
        let mut naming = Naming::default();
        for word in [1 << 63, 512, 1] {
            let e = naming.add(g, word, 0x2a, Part::All);
            assert!(e.unwrap_err().to_string().contains("0x2a"));
        }
    }
}
