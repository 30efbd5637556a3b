//! How often each cluster is referred to, counted anew.
//!
//! One field for each cluster of a *window* of the file; what does not fit into a field is in a map. A
//! window is as long as the memory bound allows, and nearly always that is the whole file: a terabyte
//! takes 16 MiB.

use std::collections::HashMap;
use std::ops::Range;

use crate::error::{Error, Result};

/// With more L1 tables than this a cluster that all of them share needs a wide field.
const NARROW_TABLES: u64 = 200;

enum Fields {
    Narrow(Vec<u8>),
    Wide(Vec<u16>),
}

/// References to the clusters of a window.
pub(super) struct References {
    first: u64,
    fields: Fields,
    /// Totals of clusters whose field is full.
    big: HashMap<u64, u64>,
}

/// A field of the full value stands for "see the map".
fn add_to<T: Copy + Into<u64> + TryFrom<u64>>(field: &mut T, full: u64, n: u64) -> bool {
    let sum = (*field).into().saturating_add(n);
    match T::try_from(sum) {
        Ok(small) if sum < full => {
            *field = small;
            true
        }
        _ => false,
    }
}

impl References {
    /// So many bytes a cluster takes, with a bit for whether its count is one.
    pub(super) fn bits_per_cluster(l1_tables: u64) -> u64 {
        if l1_tables > NARROW_TABLES {
            17
        } else {
            9
        }
    }

    pub(super) fn new(window: Range<u64>, l1_tables: u64) -> Result<References> {
        let n = window.end.saturating_sub(window.start);
        let fields = if l1_tables > NARROW_TABLES {
            Fields::Wide(zeros(n)?)
        } else {
            Fields::Narrow(zeros(n)?)
        };
        Ok(References {
            first: window.start,
            fields,
            big: HashMap::new(),
        })
    }

    /// `n` more references to `cluster`; nothing if it is outside the window.
    #[inline(always)]
    pub(super) fn add(&mut self, cluster: u64, n: u64) -> Result<()> {
        let index = cluster.wrapping_sub(self.first) as usize;
        let fitted = match &mut self.fields {
            Fields::Narrow(f) => f.get_mut(index).is_none_or(|c| add_to(c, 0xff, n)),
            Fields::Wide(f) => f.get_mut(index).is_none_or(|c| add_to(c, 0xffff, n)),
        };
        if fitted {
            return Ok(());
        }
        self.add_big(cluster, index, n)
    }

    #[cold]
    fn add_big(&mut self, cluster: u64, index: usize, n: u64) -> Result<()> {
        let old = self.get(cluster);
        self.big
            .try_reserve(1)
            .map_err(|_| Error::NoMemory(self.big.len() as u64 * 32))?;
        self.big.insert(cluster, old.saturating_add(n));
        match &mut self.fields {
            Fields::Narrow(f) => f.get_mut(index).map(|c| *c = 0xff).unwrap_or(()),
            Fields::Wide(f) => f.get_mut(index).map(|c| *c = 0xffff).unwrap_or(()),
        }
        Ok(())
    }

    /// References to `cluster`.
    #[inline]
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let index = cluster.wrapping_sub(self.first) as usize;
        let (count, full) = match &self.fields {
            Fields::Narrow(f) => (f.get(index).map_or(0, |c| u64::from(*c)), 0xff),
            Fields::Wide(f) => (f.get(index).map_or(0, |c| u64::from(*c)), 0xffff),
        };
        if count == full {
            return self.big.get(&cluster).copied().unwrap_or(0);
        }
        count
    }

    /// The clusters that are referred to more often than `most`, and how often.
    pub(super) fn above(&self, most: u64) -> Vec<(u64, u64)> {
        let mut above: Vec<(u64, u64)> = if most >= 0xff {
            self.big
                .iter()
                .map(|(c, n)| (*c, *n))
                .filter(|(_, n)| *n > most)
                .collect()
        } else {
            let len = match &self.fields {
                Fields::Narrow(f) => f.len(),
                Fields::Wide(f) => f.len(),
            };
            (self.first..self.first.saturating_add(len as u64))
                .map(|c| (c, self.get(c)))
                .filter(|(_, n)| *n > most)
                .collect()
        };
        above.sort_unstable();
        above
    }

    /// Is nothing in this part of the window referred to?
    pub(super) fn is_empty(&self, clusters: Range<u64>) -> bool {
        let from = clusters.start.saturating_sub(self.first) as usize;
        let to = clusters.end.saturating_sub(self.first) as usize;
        match &self.fields {
            Fields::Narrow(f) => all_zero(f, from, to),
            Fields::Wide(f) => all_zero(f, from, to),
        }
    }
}

fn all_zero<T: Copy + Default + PartialEq>(fields: &[T], from: usize, to: usize) -> bool {
    let to = to.min(fields.len());
    fields
        .get(from.min(to)..to)
        .is_none_or(|part| part.iter().all(|c| *c == T::default()))
}

/// `n` zero fields, if there is memory for them.
pub(super) fn zeros<T: Copy + Default>(n: u64) -> Result<Vec<T>> {
    let bytes = n.saturating_mul(size_of::<T>() as u64);
    let len = usize::try_from(n).map_err(|_| Error::NoMemory(bytes))?;
    let mut out = Vec::new();
    out.try_reserve_exact(len)
        .map_err(|_| Error::NoMemory(bytes))?;
    out.resize(len, T::default());
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn counts_go_on_where_a_field_is_full_and_stay_in_their_window() {
        for tables in [1, 1000] {
            let mut t = References::new(10..20, tables).unwrap();
            for n in [1, 200, 54, 1, 70_000, 1 << 40] {
                t.add(13, n).unwrap();
            }
            t.add(9, 1).unwrap();
            t.add(20, 1).unwrap();
            t.add(19, 255).unwrap();
            assert_eq!(t.get(13), 70_256 + (1 << 40));
            assert_eq!((t.get(9), t.get(19), t.get(20)), (0, 255, 0));
            assert_eq!(t.above(300), [(13, 70_256 + (1 << 40))]);
            assert_eq!(t.above(3).len(), 2);
            assert!(t.is_empty(10..13) && !t.is_empty(13..14) && t.is_empty(14..19));
        }
    }
}
