//! The inner loop of every verb: a run of L2 entries against the refcount block that counts them.
//!
//! A fully mapped 1 TiB disk has 16.8 million entries, nearly all of them standard clusters whose
//! counts lie in the block that the entry before was counted in. This loop does just these, one
//! copy of it for each refcount width, and leaves everything else (compressed clusters, flags,
//! damage, the next block) to the caller.

use super::entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use super::geometry::Geometry;
use super::refblock::{self, with_width};
use byteorder::{BigEndian, ByteOrder};
use std::ops::Range;

/// What is done to each count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tally {
    /// One more.
    Up,
    /// So many less.
    Down(u64),
    /// It is only looked at.
    Look,
}

/// What a run of entries came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tallied {
    /// Entries that were dealt with; the one behind them is not for this loop.
    pub entries: usize,
    /// Behind the last entry whose bit 63 does not say whether its count is one; 0 for none.
    pub changed: usize,
    /// Some cluster's count is one now.
    pub ones: bool,
    /// Some cluster's count is not one; only noted where counts are just looked at.
    pub others: bool,
    /// The lowest index in the block whose count became zero.
    pub freed: Option<usize>,
    /// The refcount block that counts the next entry, if that is a standard cluster of another one.
    pub next: Option<u64>,
}

/// How the entries of a table are read, worked out once for all of them.
#[derive(Clone, Copy)]
pub struct Entries {
    /// Bytes of one.
    pub size: usize,
    /// Bits that no standard cluster's has.
    others: u64,
    /// log2 of the clusters that a refcount block counts.
    block_bits: u32,
    g: Geometry,
}

impl Entries {
    /// Those of an image.
    pub fn of(g: Geometry) -> Entries {
        let zero_flag = if g.extended_l2 { 0 } else { ZERO };
        Entries {
            size: g.l2_entry_size(),
            others: COMPRESSED | zero_flag | g.in_cluster(OFFSET_MASK),
            block_bits: g.refblock_bits(),
            g,
        }
    }

    /// The refcount block that counts `entry`, if that is a standard cluster.
    #[inline(always)]
    pub fn block_of(self, entry: u64) -> Option<u64> {
        let offset = entry & OFFSET_MASK;
        let standard = entry & self.others == 0 && offset != 0;
        standard.then(|| self.g.cluster_of(offset).0.wrapping_shr(self.block_bits))
    }

    /// The place of its count in that block.
    #[inline(always)]
    pub fn index_of(self, entry: u64) -> usize {
        self.g
            .refblock_index(self.g.cluster_of(entry & OFFSET_MASK))
    }
}

/// Go through `table` as long as entries are zero words or standard clusters whose counts stand in
/// `counts`, the refcount block at `block` of the refcount table. In memory its fields may be
/// narrower than on disk: `WIDTH`.
#[inline(always)]
pub fn count<const WIDTH: u32>(
    e: Entries,
    table: &[u8],
    counts: &mut [u8],
    block: u64,
    tally: Tally,
) -> Tallied {
    let fields = with_width::<WIDTH>(e.g);
    let max = fields.refcount_max();
    let size = e.size;
    let (mut run, mut one_by_one) = (Tallied::default(), 0);
    let mut rest = table;
    while let Some(word) = rest.get(..size) {
        let entry = BigEndian::read_u64(word);
        if entry == 0 {
            let n = zeros(rest, size);
            run.entries = run.entries.wrapping_add(n);
            rest = rest.get(n.wrapping_mul(size)..).unwrap_or_default();
            continue;
        }
        let of = e.block_of(entry);
        if of != Some(block) {
            run.next = of;
            break;
        }
        let index = e.index_of(entry);
        if run.entries >= one_by_one {
            if let Some((n, bytes)) = by_the_byte(e, fields, rest, entry, index) {
                match counts
                    .get_mut(bytes)
                    .and_then(|c| count_all::<WIDTH>(c, tally))
                {
                    Some(all) => {
                        run.add(fields, all, n, index, entry & COPIED != 0, tally);
                        rest = rest.get(n.wrapping_mul(size)..).unwrap_or_default();
                        continue;
                    }
                    // One of them is at its bound.
                    None => one_by_one = run.entries.wrapping_add(n),
                }
            }
        }
        let old = refblock::get(fields, counts, index);
        let new = match tally {
            Tally::Up if old == max => break,
            Tally::Up => old.wrapping_add(1),
            Tally::Down(n) if old < n => break,
            Tally::Down(n) => old.wrapping_sub(n),
            Tally::Look => old,
        };
        if tally != Tally::Look {
            refblock::set(fields, counts, index, new);
        }
        run.ones |= new == 1;
        run.others |= tally == Tally::Look && new != 1;
        if down(tally) && new == 0 && run.freed.is_none_or(|f| index < f) {
            run.freed = Some(index);
        }
        if (entry & COPIED != 0) != (new == 1) {
            run.changed = run.entries.wrapping_add(1);
        }
        run.entries = run.entries.wrapping_add(1);
        rest = rest.get(size..).unwrap_or_default();
    }
    run
}

#[inline(always)]
fn down(tally: Tally) -> bool {
    matches!(tally, Tally::Down(_))
}

/// How many entries from the first on are zero words. A disk may be mapped here and there.
/// Not a part of the loops that call it, which are tight where no entry is zero.
#[inline(never)]
pub fn zeros(table: &[u8], size: usize) -> usize {
    let zero = |word: &&[u8]| BigEndian::read_u64(word) == 0;
    // 64 bytes at a time, without a branch for each word.
    let none = |bytes: &&[u8]| {
        let words = bytes.chunks_exact(8).map(BigEndian::read_u64);
        words.fold(0, |any, word| any | word) == 0
    };
    let whole = table.chunks_exact(64).take_while(none).count();
    let n = whole.wrapping_mul(if size == 8 { 8 } else { 4 });
    let rest = table.get(n.wrapping_mul(size)..).unwrap_or_default();
    n.wrapping_add(rest.chunks_exact(size).take_while(zero).count())
}

/// How many entries from the first on, which is `entry` and counted at `index`, are clusters in order whose
/// counts, in the width of `fields`, are whole bytes of the block; and which bytes. None where counts are
/// wider, which is rare.
#[inline(always)]
fn by_the_byte(
    e: Entries,
    fields: Geometry,
    table: &[u8],
    entry: u64,
    index: usize,
) -> Option<(usize, Range<usize>)> {
    let per_byte = fields.block_entries_in(1);
    if index.checked_rem(per_byte) != Some(0) || !has_next(e, table, entry) {
        return None;
    }
    let bytes = in_order(e, table, entry, index).checked_div(per_byte)?;
    let first = index.checked_div(per_byte)?;
    let range = first..first.wrapping_add(bytes);
    (bytes != 0).then(|| (bytes.wrapping_mul(per_byte), range))
}

/// Are all the counts in these bytes, some of which stand in each, this one?
#[inline(always)]
fn are_all(fields: Geometry, bytes: &[u8], count: u64) -> bool {
    let ones = 0xffu64.checked_div(fields.refcount_max()).unwrap_or(0);
    let all = count.wrapping_mul(ones);
    bytes.iter().all(|b| u64::from(*b) == all)
}

/// Is the second entry the cluster behind the first, which is `entry`, with the same flags?
#[inline(always)]
fn has_next(e: Entries, table: &[u8], entry: u64) -> bool {
    let next = table.get(e.size..).and_then(|r| r.get(..8));
    next == Some(&entry.wrapping_add(e.g.cluster_size()).to_be_bytes()[..])
}

/// How many entries from the first on, which is `entry` and counted at `index`, are clusters behind
/// one another with the same flags, as far as the block reaches.
#[inline(always)]
fn in_order(e: Entries, table: &[u8], entry: u64, index: usize) -> usize {
    let (size, step) = (e.size, e.g.cluster_size());
    let left = (e.g.refblock_entries() as usize).saturating_sub(index);
    let (mut n, mut next) = (0usize, entry);
    // Eight at a time, without a branch for each.
    for eight in table.chunks_exact(size.wrapping_mul(8)).take(left >> 3) {
        let (mut expected, mut differ) = (next, 0);
        for word in eight.chunks_exact(size) {
            differ |= BigEndian::read_u64(word) ^ expected;
            expected = expected.wrapping_add(step);
        }
        if differ != 0 {
            break;
        }
        (n, next) = (n.wrapping_add(8), expected);
    }
    let rest = table.get(n.wrapping_mul(size)..).unwrap_or_default();
    for word in rest.chunks_exact(size).take(left.saturating_sub(n)) {
        if BigEndian::read_u64(word) != next {
            break;
        }
        (n, next) = (n.wrapping_add(1), next.wrapping_add(step));
    }
    n
}

/// What counting clusters in order came to.
#[derive(Default)]
struct All<'a> {
    /// Their counts now.
    counts: &'a [u8],
    /// Some count is one, is not one, is zero, has become higher, lower.
    ones: bool,
    others: bool,
    zeros: bool,
    higher: bool,
    lower: bool,
}

/// Do `tally` to all of these counts, some of which stand in each byte; none, and nothing done, if one of
/// them is at its bound. In one go, without a branch for each: what went beyond its bound is taken back.
#[inline(always)]
fn count_all<const WIDTH: u32>(counts: &mut [u8], tally: Tally) -> Option<All<'_>> {
    let add = match tally {
        Tally::Up => 1,
        Tally::Down(n) => u8::try_from(n)
            .ok()
            .filter(|n| *n <= highest::<WIDTH>())?
            .wrapping_neg(),
        Tally::Look => 0,
    };
    let mut all = add_to_all::<WIDTH>(counts, add);
    if if down(tally) { all.higher } else { all.lower } {
        add_to_all::<WIDTH>(counts, add.wrapping_neg());
        return None;
    }
    all.counts = counts;
    Some(all)
}

/// The highest count in a field of this width, which is a byte at most.
#[inline(always)]
fn highest<const WIDTH: u32>() -> u8 {
    u8::MAX.wrapping_shr(8u32.wrapping_sub(1 << WIDTH))
}

#[inline(always)]
fn add_to_all<const WIDTH: u32>(counts: &mut [u8], add: u8) -> All<'static> {
    let mut all = All::default();
    let mask = highest::<WIDTH>();
    for byte in counts {
        let mut sum = 0;
        for shift in (0..8).step_by(1 << WIDTH) {
            let old = byte.wrapping_shr(shift) & mask;
            let new = old.wrapping_add(add) & mask;
            sum |= new.wrapping_shl(shift);
            all.ones |= new == 1;
            all.others |= new != 1;
            all.zeros |= new == 0;
            all.higher |= new > old;
            all.lower |= new < old;
        }
        *byte = sum;
    }
    all
}

impl Tallied {
    /// Take in `n` entries, all with the same bit 63, whose counts begin at `index` of the block.
    #[inline(always)]
    fn add(
        &mut self,
        g: Geometry,
        all: All<'_>,
        n: usize,
        index: usize,
        copied: bool,
        tally: Tally,
    ) {
        let count = |i: &usize| refblock::get(g, all.counts, *i);
        self.ones |= all.ones;
        self.others |= tally == Tally::Look && all.others;
        if down(tally) && all.zeros {
            let first = (0..n).find(|i| count(i) == 0).unwrap_or(0);
            let freed = index.wrapping_add(first);
            self.freed = Some(self.freed.map_or(freed, |f| f.min(freed)));
        }
        if if copied { all.others } else { all.ones } {
            let last = (0..n).rfind(|i| (count(i) == 1) != copied).unwrap_or(0);
            self.changed = self.entries.wrapping_add(last).wrapping_add(1);
        }
        self.entries = self.entries.wrapping_add(n);
    }
}

/// Set bit 63 in the entries of `table` as `counts` demand, for as long as [`count`] would go on.
/// With `only_clear` it is never set. Tells the entries dealt with, and behind which none has changed.
#[inline(always)]
pub fn set_copied<const WIDTH: u32>(
    e: Entries,
    table: &mut [u8],
    counts: &[u8],
    block: u64,
    only_clear: bool,
) -> Tallied {
    let (fields, size) = (with_width::<WIDTH>(e.g), e.size);
    let (mut run, mut one_by_one) = (Tallied::default(), 0);
    let mut rest = table;
    while let Some(word) = rest.get(..size) {
        let entry = BigEndian::read_u64(word);
        if entry == 0 {
            let n = zeros(rest, size);
            run.entries = run.entries.wrapping_add(n);
            rest = rest.get_mut(n.wrapping_mul(size)..).unwrap_or_default();
            continue;
        }
        let of = e.block_of(entry);
        if of != Some(block) {
            run.next = of;
            break;
        }
        let index = e.index_of(entry);
        let count = refblock::get(fields, counts, index);
        let copied = count == 1;
        let differs = (entry & COPIED != 0) != copied && !(only_clear && copied);
        if run.entries >= one_by_one {
            if let Some((n, bytes)) = by_the_byte(e, fields, rest, entry, index) {
                if are_all(fields, counts.get(bytes).unwrap_or_default(), count) {
                    let words = rest
                        .chunks_exact_mut(size)
                        .take(if differs { n } else { 0 });
                    words.flat_map(|w| w.first_mut()).for_each(|b| *b ^= 0x80);
                    run.entries = run.entries.wrapping_add(n);
                    if differs {
                        run.changed = run.entries;
                    }
                    rest = rest.get_mut(n.wrapping_mul(size)..).unwrap_or_default();
                    continue;
                }
                one_by_one = run.entries.wrapping_add(n);
            }
        }
        if differs {
            BigEndian::write_u64(rest, entry ^ COPIED);
            run.changed = run.entries.wrapping_add(1);
        }
        run.entries = run.entries.wrapping_add(1);
        rest = rest.get_mut(size..).unwrap_or_default();
    }
    run
}

#[cfg(test)]
mod tests {
    #![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
    use super::{refblock, Entries, Geometry, Tallied, Tally, COMPRESSED, COPIED, ZERO};
    use crate::by_refcount_width;
    use byteorder::{BigEndian, ByteOrder};

    fn count(g: Geometry, table: &[u8], counts: &mut [u8], block: u64, tally: Tally) -> Tallied {
        by_refcount_width!(g, W => super::count::<W>(Entries::of(g), table, counts, block, tally))
    }

    fn set_copied(
        g: Geometry,
        t: &mut [u8],
        counts: &[u8],
        block: u64,
        only_clear: bool,
    ) -> (usize, bool) {
        let run = by_refcount_width!(g, W => super::set_copied::<W>(Entries::of(g), t, counts, block, only_clear));
        (run.entries, run.changed != 0)
    }

    /// A table whose entries name clusters 1, 2, 3, ... with COPIED.
    fn table(g: Geometry, n: u64) -> Vec<u8> {
        let mut t = vec![0u8; g.cluster_len()];
        for (i, word) in t
            .chunks_exact_mut(g.l2_entry_size())
            .take(n as usize)
            .enumerate()
        {
            BigEndian::write_u64(word, ((i as u64 + 1) << g.cluster_bits) | COPIED);
        }
        t
    }

    #[test]
    fn counts_of_every_width_go_up_and_down_and_stop_at_their_bounds() {
        for order in 0..=6 {
            for extended in [false, true] {
                let g = Geometry::new(14, order, extended);
                let t = table(g, 5);
                let mut counts = vec![0u8; g.cluster_len()];
                let all = t.len() / g.l2_entry_size();
                let up = count(g, &t, &mut counts, 0, Tally::Up);
                assert_eq!((up.entries, up.changed, up.freed), (all, 0, None));
                let look = count(g, &t, &mut counts, 0, Tally::Look);
                assert_eq!((look.entries, look.changed), (all, 0));
                refblock::set(g, &mut counts, 3, g.refcount_max());
                assert_eq!(
                    count(g, &t, &mut counts, 0, Tally::Up).entries,
                    if order == 0 { 0 } else { 2 }
                );
                refblock::set(g, &mut counts, 3, 0);
                let down = count(g, &t, &mut counts, 0, Tally::Down(1));
                assert_eq!(down.entries, 2);
            }
        }
    }

    #[test]
    fn clusters_in_order_come_to_the_same_as_one_by_one() {
        let mut seed = 88_172_645_463_325_252u64;
        let mut random = |n: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % n
        };
        for round in 0..if cfg!(miri) { 20 } else { 5000 } {
            let g = Geometry::new(9, round % 5, round % 4 == 0);
            let mut t = vec![0u8; 512];
            let (mut cluster, mut flags) = (1, 0);
            for word in t.chunks_exact_mut(g.l2_entry_size()) {
                match random(12) {
                    0 => cluster = random(260),
                    3 => cluster = g.refblock_entries() - 40 + random(44), // the block's end
                    1 => flags = [0, COPIED, ZERO, COPIED, 0][random(5) as usize],
                    2 => continue,
                    _ => {}
                }
                BigEndian::write_u64(word, (cluster << g.cluster_bits) | flags);
                cluster += 1;
            }
            let mut counts = vec![0u8; 512];
            for i in 0..g.refblock_entries() as usize {
                let kinds = if round % 2 == 0 { 4 } else { 6 };
                let count = [1, 1, 1, 2, 0, u64::MAX][random(kinds) as usize];
                refblock::set(g, &mut counts, i, count & g.refcount_max());
            }
            for tally in [
                Tally::Up,
                Tally::Look,
                Tally::Down(1),
                Tally::Down(2),
                Tally::Down(300),
            ] {
                let mut one_by_one = counts.clone();
                let mut want = Tallied::default();
                for word in t.chunks_exact(g.l2_entry_size()) {
                    let one = count(g, word, &mut one_by_one, 0, tally);
                    if one.entries == 0 {
                        want.next = one.next;
                        break;
                    }
                    want.ones |= one.ones;
                    want.others |= one.others;
                    if one.changed != 0 {
                        want.changed = want.entries + 1;
                    }
                    want.freed = want.freed.into_iter().chain(one.freed).min();
                    want.entries += 1;
                }
                let mut together = counts.clone();
                assert_eq!(
                    count(g, &t, &mut together, 0, tally),
                    want,
                    "{round} {tally:?}"
                );
                assert_eq!(together, one_by_one, "{round} {tally:?}");
            }
            for only_clear in [false, true] {
                let (mut together, mut one_by_one) = (t.clone(), t.clone());
                let (n, changed) = set_copied(g, &mut together, &counts, 0, only_clear);
                let (mut done, mut any) = (0, false);
                for word in one_by_one.chunks_exact_mut(g.l2_entry_size()) {
                    let one = set_copied(g, word, &counts, 0, only_clear);
                    if one.0 == 0 {
                        break;
                    }
                    (done, any) = (done + 1, any | one.1);
                }
                assert_eq!((n, changed), (done, any), "{round} {only_clear}");
                assert_eq!(together, one_by_one, "{round} {only_clear}");
            }
        }
    }

    #[test]
    fn flags_of_clusters_in_order_come_to_the_same_as_one_by_one() {
        for (order, extended) in [(1, false), (2, true), (3, false), (4, true)] {
            for only_clear in [false, true] {
                let g = Geometry::new(9, order, extended);
                let all = 512 / g.l2_entry_size();
                let mut t = table(g, 40);
                let mut counts = vec![0u8; 512];
                for i in 0..256 {
                    let count = [1, 2, 1, 0, 257, 256][i * 7 % 6];
                    refblock::set(g, &mut counts, i, count & g.refcount_max());
                }
                for (i, word) in t.chunks_exact_mut(g.l2_entry_size()).enumerate() {
                    word[0] &= if i % 16 < 9 { 0xff } else { 0x7f };
                    word[4] |= u8::from(i == 20); // the next is not in order
                }
                let (mut together, mut one_by_one) = (t.clone(), t.clone());
                let (n, changed) = set_copied(g, &mut together, &counts, 0, only_clear);
                let mut any = false;
                for word in one_by_one.chunks_exact_mut(g.l2_entry_size()).take(n) {
                    any |= set_copied(g, word, &counts, 0, only_clear).1;
                }
                assert_eq!((together, changed), (one_by_one, any));
                assert_eq!(n, if all < 20 { all } else { 20 });
            }
        }
    }

    #[test]
    fn what_is_not_a_standard_cluster_of_the_block_is_left_to_the_caller() {
        let g = Geometry::new(9, 4, false);
        let mut counts = vec![0u8; 512];
        for odd in [
            COMPRESSED | 512,
            ZERO | 512,
            ZERO,
            513 << 9,
            1 << 9 | 1,
            COPIED,
        ] {
            let mut t = table(g, 3);
            BigEndian::write_u64(&mut t[16..], odd);
            assert_eq!(
                count(g, &t, &mut counts, 0, Tally::Look).entries,
                2,
                "{odd:#x}"
            );
        }
    }

    #[test]
    fn copied_follows_the_counts_and_is_not_set_before_its_time() {
        let g = Geometry::new(9, 4, false);
        let mut counts = vec![0u8; 512];
        refblock::set(g, &mut counts, 1, 2);
        refblock::set(g, &mut counts, 2, 1);
        let mut t = table(g, 2);
        BigEndian::write_u64(&mut t[8..], 2 << 9);
        let mut clear = t.clone();
        assert_eq!(set_copied(g, &mut clear, &counts, 0, true), (64, true));
        assert_eq!(
            (
                BigEndian::read_u64(&clear),
                BigEndian::read_u64(&clear[8..])
            ),
            (512, 1024)
        );
        assert_eq!(set_copied(g, &mut t, &counts, 0, false), (64, true));
        assert_eq!(
            (BigEndian::read_u64(&t), BigEndian::read_u64(&t[8..])),
            (512, 1024 | COPIED)
        );
    }
}
