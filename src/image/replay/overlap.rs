//! What a write must not hit (`qcow2_check_metadata_overlap`, template "cached").

use crate::error::{Error, Result};
use crate::format::entry;
use crate::format::geometry::Geometry;
use crate::room;

/// Structures that QEMU protects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protected {
    Header,
    ActiveL1,
    ActiveL2,
    Reftable,
    Refblock,
    SnapshotTable,
    InactiveL1,
    BitmapDirectory,
}

impl Protected {
    fn name(self) -> &'static str {
        match self {
            Protected::Header => "qcow2_header",
            Protected::ActiveL1 => "active L1 table",
            Protected::ActiveL2 => "active L2 table",
            Protected::Reftable => "refcount table",
            Protected::Refblock => "refcount block",
            Protected::SnapshotTable => "snapshot table",
            Protected::InactiveL1 => "inactive L1 table",
            Protected::BitmapDirectory => "bitmap directory",
        }
    }
}

/// The protected ranges of an image, as they are before a verb.
pub(crate) struct Overlap {
    g: Geometry,
    /// Few and long: (start, end, kind), end exclusive, whole clusters.
    ranges: Vec<(u64, u64, Protected)>,
    /// For each range the furthest end of it and those before it, so that a search can stop.
    furthest: Vec<u64>,
    /// Sorted offsets of active L2 tables and of refcount blocks, one cluster each.
    active_l2: Vec<u64>,
    refblocks: Vec<u64>,
}

impl Overlap {
    pub(crate) fn new(g: Geometry, l1: &[u64], reftable: &[u64]) -> Result<Overlap> {
        let ranges = vec![(0, g.cluster_size(), Protected::Header)];
        let mut overlap = Overlap {
            g,
            ranges,
            furthest: vec![g.cluster_size()],
            active_l2: Vec::new(),
            refblocks: Vec::new(),
        };
        overlap.follow(l1, reftable)?;
        Ok(overlap)
    }

    /// Protect the L2 tables and refcount blocks that these tables name, and no others.
    pub(crate) fn follow(&mut self, l1: &[u64], reftable: &[u64]) -> Result<()> {
        let sorted = |table: &[u64], mask: u64| -> Result<Vec<u64>> {
            let named = table.iter().map(|e| e & mask);
            let mut offsets = room::collected(named.filter(|o| *o != 0))?;
            offsets.sort_unstable();
            Ok(offsets)
        };
        self.active_l2 = sorted(l1, entry::OFFSET_MASK)?;
        self.refblocks = sorted(reftable, entry::REFTABLE_OFFSET_MASK)?;
        Ok(())
    }

    /// No refcount block may be in the table twice: one count would stand for two clusters. (QEMU
    /// goes on; a search through a table that names one full block a million times takes it days.)
    pub(crate) fn check_refblocks(&self) -> Result<()> {
        match self.refblocks.windows(2).find(|w| w[0] == w[1]) {
            Some(twice) => Err(Error::Corrupt(format!(
                "Refblock offset {:#x} is in the refcount table twice",
                twice[0]
            ))),
            None => Ok(()),
        }
    }

    /// Protect `bytes` at `offset`.
    pub(crate) fn protect(&mut self, kind: Protected, offset: u64, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let end = self.g.round_up(offset.saturating_add(bytes));
        let range = (offset - self.g.in_cluster(offset), end, kind);
        room::push(&mut self.ranges, range)?;
        // For `seal`, which never fails.
        room::reserve(&mut self.furthest, self.ranges.len())
    }

    /// No longer protect ranges of this kind that begin at these offsets, which are sorted.
    pub(crate) fn release(&mut self, kind: Protected, offsets: &[u64]) {
        self.ranges
            .retain(|(start, _, k)| !(*k == kind && offsets.binary_search(start).is_ok()));
        self.seal();
    }

    /// Protect the refcount table where it is now, and not where it was.
    pub(crate) fn follow_reftable(&mut self, offset: u64, bytes: u64) -> Result<()> {
        let reftable = |r: &&(u64, u64, Protected)| r.2 == Protected::Reftable;
        let old = self.ranges.iter().find(reftable).map(|r| r.0);
        if let Some(old) = old.filter(|old| *old != offset) {
            self.release(Protected::Reftable, &[old]);
            self.protect(Protected::Reftable, offset, bytes)?;
            self.seal();
        }
        Ok(())
    }

    /// Sort the ranges for [`Overlap::check`]; call after the last `protect`.
    pub(crate) fn seal(&mut self) {
        self.ranges
            .sort_unstable_by_key(|(start, end, _)| (*start, *end));
        let mut furthest = 0;
        self.furthest.clear();
        #[allow(clippy::disallowed_methods)] // `protect` has made room
        self.furthest.extend(self.ranges.iter().map(|(_, end, _)| {
            furthest = furthest.max(*end);
            furthest
        }));
    }

    /// May `bytes` at `offset` be written? `ignore` is the structure being written.
    pub(crate) fn check(&self, offset: u64, bytes: u64, ignore: Option<Protected>) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let start = offset - self.g.in_cluster(offset);
        let end = self.g.round_up(offset.saturating_add(bytes));
        if let Some(kind) = self.hit(start, end, ignore) {
            return Err(Error::Corrupt(format!(
                "Preventing invalid write on metadata (overlaps with {})",
                kind.name()
            )));
        }
        Ok(())
    }

    fn hit(&self, start: u64, end: u64, ignore: Option<Protected>) -> Option<Protected> {
        let below = self.ranges.partition_point(|(s, _, _)| *s < end);
        let candidates = self.ranges.iter().zip(&self.furthest).take(below).rev();
        candidates
            .take_while(|(_, furthest)| **furthest > start)
            .find(|((_, e, k), _)| *e > start && Some(*k) != ignore)
            .map(|((_, _, k), _)| *k)
            .or_else(|| self.hit_list(&self.active_l2, start, end, Protected::ActiveL2, ignore))
            .or_else(|| self.hit_list(&self.refblocks, start, end, Protected::Refblock, ignore))
    }

    fn hit_list(
        &self,
        list: &[u64],
        start: u64,
        end: u64,
        kind: Protected,
        ignore: Option<Protected>,
    ) -> Option<Protected> {
        if ignore == Some(kind) {
            return None;
        }
        // Unaligned offsets in damaged tables count with the cluster they begin in and the next.
        let from = list.partition_point(|o| o.saturating_add(self.g.cluster_size()) <= start);
        list.get(from).filter(|o| **o < end).map(|_| kind)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Clusters of 512 bytes: 3 is the active L1, 5 to 8 a snapshot's, 6 the snapshot table; L2 tables are 10 and
    /// 12, refcount blocks 14 and 15.
    fn overlap() -> Overlap {
        let g = Geometry::new(9, 4, false);
        let (l1, reftable) = ([0, 1 << 63 | 10 << 9, 12 << 9], [15 << 9, 0, 14 << 9]);
        let mut overlap = Overlap::new(g, &l1, &reftable).unwrap();
        overlap
            .protect(Protected::InactiveL1, 5 << 9, 3 * 512 + 1)
            .unwrap();
        overlap
            .protect(Protected::SnapshotTable, 6 << 9, 1)
            .unwrap();
        overlap.protect(Protected::ActiveL1, 3 << 9, 512).unwrap();
        overlap.protect(Protected::Reftable, 20 << 9, 512).unwrap();
        overlap
            .protect(Protected::BitmapDirectory, 30 << 9, 0)
            .unwrap();
        overlap.seal();
        overlap
    }

    /// The clusters of the first 40 that may not be written.
    fn held(overlap: &Overlap, ignore: Option<Protected>) -> Vec<u64> {
        let free = |c: &u64| overlap.check(c << 9, 1, ignore).is_ok();
        (0..40).filter(|c| !free(c)).collect()
    }

    #[test]
    fn each_cluster_of_a_structure_is_protected_and_no_other() {
        let overlap = overlap();
        let all = [0, 3, 5, 6, 7, 8, 10, 12, 14, 15, 20];
        assert_eq!(held(&overlap, None), all);
        let without = |kind, clusters: &[u64]| {
            let left: Vec<u64> = all.into_iter().filter(|c| !clusters.contains(c)).collect();
            assert_eq!(held(&overlap, Some(kind)), left, "{kind:?}");
        };
        without(Protected::Header, &[0]);
        without(Protected::ActiveL1, &[3]);
        without(Protected::InactiveL1, &[5, 7, 8]);
        without(Protected::SnapshotTable, &[]);
        without(Protected::ActiveL2, &[10, 12]);
        without(Protected::Refblock, &[14, 15]);
        without(Protected::Reftable, &[20]);
    }

    #[test]
    fn a_table_that_is_not_at_a_cluster_s_begin_counts_with_both_clusters() {
        let g = Geometry::new(10, 4, false);
        let overlap = Overlap::new(g, &[23 << 9], &[]).unwrap();
        let held = |c: &u64| overlap.check(c << 10, 1, None).is_err();
        assert_eq!((1..20).filter(held).collect::<Vec<_>>(), [11, 12]);
    }

    #[test]
    fn a_write_counts_with_all_clusters_that_it_touches_and_says_what_is_there() {
        let overlap = overlap();
        let check = |at: u64, bytes: u64| overlap.check(at, bytes, None);
        assert!(check(1 << 9, 1024).is_ok());
        assert!(check((2 << 9) + 511, 1).is_ok());
        let e = check((2 << 9) + 511, 2).unwrap_err().to_string();
        assert!(e.contains("active L1 table"), "{e}");
        assert!(check(9 << 9, 512).is_ok() && check(9 << 9, 513).is_err());
        assert!(check((3 << 9) + 511, 0).is_ok());
        assert!(check(16 << 9, 4 * 512).is_ok() && check(16 << 9, 4 * 512 + 1).is_err());
    }

    #[test]
    fn what_is_released_or_has_moved_is_not_protected() {
        let mut overlap = overlap();
        overlap.follow_reftable(20 << 9, 1024).unwrap();
        assert!(!held(&overlap, None).contains(&21));
        overlap.follow_reftable(24 << 9, 1024).unwrap();
        overlap.release(Protected::InactiveL1, &[3 << 9, 5 << 9]);
        assert_eq!(held(&overlap, None), [0, 3, 6, 10, 12, 14, 15, 24, 25]);
        overlap.follow(&[28 << 9], &[]).unwrap();
        assert_eq!(held(&overlap, None), [0, 3, 6, 24, 25, 28]);
    }

    #[test]
    fn a_refcount_block_stands_in_the_table_once() {
        let g = Geometry::new(9, 4, false);
        let twice = |table: &[u64]| Overlap::new(g, &[], table).unwrap().check_refblocks();
        assert!(twice(&[14 << 9, 0, 0, 15 << 9]).is_ok());
        assert!(twice(&[14 << 9, 15 << 9, 14 << 9]).is_err());
    }
}
