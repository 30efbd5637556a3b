//! Refcount blocks: arrays of 1 to 64 bit counts.
//!
//! Widths below 8 bits start at the least significant bit of each byte; wider ones are big endian.

use super::geometry::Geometry;
use byteorder::{BigEndian, ByteOrder};

/// Call `$call` with the constant `$width` standing for the refcount width of `$g`: one copy of the
/// loop for each of the seven.
#[macro_export]
#[doc(hidden)]
macro_rules! by_refcount_width {
    ($g:expr, $width:ident => $call:expr) => {
        match $g.refcount_order {
            0 => {
                const $width: u32 = 0;
                $call
            }
            1 => {
                const $width: u32 = 1;
                $call
            }
            2 => {
                const $width: u32 = 2;
                $call
            }
            3 => {
                const $width: u32 = 3;
                $call
            }
            4 => {
                const $width: u32 = 4;
                $call
            }
            5 => {
                const $width: u32 = 5;
                $call
            }
            _ => {
                const $width: u32 = 6;
                $call
            }
        }
    };
}

/// `g` with its refcount width known to the compiler: `get` and `set` shrink to a load and a store.
#[inline(always)]
pub fn with_width<const WIDTH: u32>(g: Geometry) -> Geometry {
    Geometry {
        refcount_order: WIDTH,
        ..g
    }
}

/// The count at `index`; 0 past the end of the block.
#[inline]
pub fn get(g: Geometry, block: &[u8], index: usize) -> u64 {
    match g.refcount_order {
        order @ 0..=2 => {
            let (byte, shift, mask) = narrow(order, index);
            block
                .get(byte)
                .map_or(0, |b| u64::from((b >> shift) & mask))
        }
        3 => block.get(index).map_or(0, |b| u64::from(*b)),
        4 => word(block, index, 2).map_or(0, |b| u64::from(BigEndian::read_u16(b))),
        5 => word(block, index, 4).map_or(0, |b| u64::from(BigEndian::read_u32(b))),
        _ => word(block, index, 8).map_or(0, BigEndian::read_u64),
    }
}

/// Store `count` at `index`; the caller has checked the width. Past the end: nothing.
#[inline]
pub fn set(g: Geometry, block: &mut [u8], index: usize, count: u64) {
    debug_assert!(count <= g.refcount_max());
    match g.refcount_order {
        order @ 0..=2 => {
            let (byte, shift, mask) = narrow(order, index);
            if let Some(b) = block.get_mut(byte) {
                *b = (*b & !(mask << shift)) | ((count as u8 & mask) << shift);
            }
        }
        3 => {
            if let Some(b) = block.get_mut(index) {
                *b = count as u8;
            }
        }
        4 => {
            if let Some(b) = word_mut(block, index, 2) {
                BigEndian::write_u16(b, count as u16);
            }
        }
        5 => {
            if let Some(b) = word_mut(block, index, 4) {
                BigEndian::write_u32(b, count as u32);
            }
        }
        _ => {
            if let Some(b) = word_mut(block, index, 8) {
                BigEndian::write_u64(b, count);
            }
        }
    }
}

/// The first index in `from..end` whose count is zero (`want_zero`) or not zero.
pub fn find(g: Geometry, block: &[u8], from: usize, end: usize, want_zero: bool) -> Option<usize> {
    let per_word = usize::try_from(64u64 >> g.refcount_order).unwrap_or(1);
    let mut index = from;
    while index < end {
        // Eight bytes at a time where none of their counts can be what is looked for.
        if index & per_word.wrapping_sub(1) == 0 {
            let word =
                word(block, index >> per_word.trailing_zeros(), 8).map_or(0, BigEndian::read_u64);
            let none_here = if want_zero {
                !has_zero(g, word)
            } else {
                word == 0
            };
            if none_here {
                index = index.saturating_add(per_word);
                continue;
            }
        }
        if (get(g, block, index) == 0) == want_zero {
            return Some(index);
        }
        index = index.saturating_add(1);
    }
    None
}

/// Is one of the counts in eight bytes zero? May also say so when none is, never the reverse.
#[inline]
fn has_zero(g: Geometry, word: u64) -> bool {
    if g.refcount_order == 0 {
        return word != u64::MAX;
    }
    // The classic test of lanes: subtracting one borrows into the top bit of a lane that was zero.
    let ones = u64::MAX.checked_div(g.refcount_max()).unwrap_or(1);
    let tops = ones.wrapping_shl(g.refcount_bits().wrapping_sub(1));
    word.wrapping_sub(ones) & !word & tops != 0
}

/// The bits that any count of a block has: as many as the highest has.
pub fn bits_in_use(g: Geometry, block: &[u8]) -> u64 {
    let words = block.chunks_exact(8).map(BigEndian::read_u64);
    let mut bits = words.fold(0, |any, word| any | word);
    for shift in (g.refcount_order..6).rev() {
        bits |= bits >> (1u64 << shift);
    }
    bits & g.refcount_max()
}

/// The counts of a block of `from` in fields of `to`, which must be able to hold them, into `out`.
pub fn convert(from: Geometry, block: &[u8], to: Geometry, out: &mut [u8]) {
    by_refcount_width!(from, FROM => by_refcount_width!(to, TO => {
        // Eight counts are whole bytes in any width.
        let eights = block.chunks_exact(1 << FROM).zip(out.chunks_exact_mut(1 << TO));
        for (old, new) in eights {
            for i in 0..8 {
                set(with_width::<TO>(to), new, i, get(with_width::<FROM>(from), old, i));
            }
        }
    }));
}

/// Raise each count of `into` to that of `other` where that is higher.
pub fn raise_to(g: Geometry, into: &mut [u8], other: &[u8]) {
    // Whole equal chunks are the rule; only chunks that differ are taken apart.
    for (a, b) in into.chunks_mut(64).zip(other.chunks(64)) {
        if a != b {
            for i in 0..g.block_entries_in(a.len()) {
                let (x, y) = (get(g, a, i), get(g, b, i));
                if y > x {
                    set(g, a, i, y);
                }
            }
        }
    }
}

/// Byte, shift and mask of a count narrower than a byte.
#[inline]
#[allow(clippy::arithmetic_side_effects)] // order <= 2: shifts stay below 8
fn narrow(order: u32, index: usize) -> (usize, u32, u8) {
    let per_byte_bits = 3 - order;
    let byte = index >> per_byte_bits;
    let within = (index & ((1 << per_byte_bits) - 1)) as u32;
    let mask = ((1u16 << (1 << order)) - 1) as u8;
    (byte, within << order, mask)
}

#[inline]
fn word(block: &[u8], index: usize, size: usize) -> Option<&[u8]> {
    let start = index.checked_mul(size)?;
    block.get(start..start.checked_add(size)?)
}

#[inline]
fn word_mut(block: &mut [u8], index: usize, size: usize) -> Option<&mut [u8]> {
    let start = index.checked_mul(size)?;
    block.get_mut(start..start.checked_add(size)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
    use super::*;

    /// Miri is a thousand times slower: it takes one of so many.
    const STEP: usize = if cfg!(miri) { 61 } else { 1 };

    #[test]
    fn every_width_stores_and_returns_each_count_without_touching_its_neighbours() {
        for order in 0..=6 {
            let g = Geometry::new(9, order, false);
            let entries = g.refblock_entries() as usize;
            let mut block = vec![0u8; 512];
            let mut want = vec![0u64; entries];
            for round in (1..40u64).step_by(STEP) {
                let index = (round as usize * 37) % entries;
                let count = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) & g.refcount_max();
                set(g, &mut block, index, count);
                want[index] = count;
                for (i, w) in want.iter().enumerate() {
                    assert_eq!(get(g, &block, i), *w, "order {order} index {i}");
                }
            }
        }
    }

    #[test]
    fn one_bit_counts_start_at_the_least_significant_bit() {
        let g = Geometry::new(9, 0, false);
        let mut block = vec![0u8; 512];
        set(g, &mut block, 0, 1);
        set(g, &mut block, 9, 1);
        assert_eq!(&block[..2], &[0x01, 0x02]);
    }

    #[test]
    fn finding_agrees_with_looking_at_each_count() {
        for order in 0..=6 {
            let g = Geometry::new(9, order, false);
            let n = g.refblock_entries() as usize;
            let mut block = vec![0u8; 512];
            for i in 0..n {
                if (i / 7 + i / 40) % 3 != 0 {
                    set(g, &mut block, i, ((i as u64) & g.refcount_max()).max(1));
                }
            }
            for want_zero in [false, true] {
                for from in (0..n).step_by(STEP) {
                    let end = (from + 97).min(n);
                    let want = (from..end).find(|i| (get(g, &block, *i) == 0) == want_zero);
                    assert_eq!(
                        find(g, &block, from, end, want_zero),
                        want,
                        "order {order} from {from}"
                    );
                }
            }
        }
    }

    #[test]
    fn one_count_among_many_is_found_from_wherever_the_search_begins() {
        for order in 0..=6 {
            let g = Geometry::new(9, order, false);
            let n = g.refblock_entries() as usize;
            for (fill, other) in [(0u8, 1), (0xff, 0)] {
                for at in [0, 1, 7, 8, 33, n / 2 + 5, n - 1]
                    .into_iter()
                    .filter(|at| *at < n)
                {
                    let mut block = vec![fill; 512];
                    set(g, &mut block, at, other);
                    for from in (0..n).step_by(STEP) {
                        let want = (from <= at).then_some(at);
                        assert_eq!(find(g, &block, from, n, other == 0), want, "{order} {from}");
                    }
                }
            }
        }
    }

    #[test]
    fn low_counts_are_passed_over_eight_bytes_at_a_time() {
        for order in 0..=6 {
            let g = Geometry::new(9, order, false);
            let mut block = [0; 8];
            let n = g.block_entries_in(8);
            (0..n).for_each(|i| set(g, &mut block, i, 1));
            assert!(!has_zero(g, BigEndian::read_u64(&block)), "{order}");
            for i in 0..n {
                set(g, &mut block, i, 0);
                assert!(has_zero(g, BigEndian::read_u64(&block)), "{order} {i}");
                set(g, &mut block, i, 1);
            }
        }
    }

    #[test]
    fn raising_takes_the_higher_count_of_each_pair() {
        for order in 0..=6 {
            let g = Geometry::new(9, order, false);
            let n = g.refblock_entries() as usize;
            let (mut a, mut b) = (vec![0u8; 512], vec![0u8; 512]);
            for i in 0..n {
                set(g, &mut a, i, (i as u64 * 7) & g.refcount_max());
                set(g, &mut b, i, (i as u64 * 11 + 3) & g.refcount_max());
            }
            let before = a.clone();
            raise_to(g, &mut a, &b);
            for i in 0..n {
                assert_eq!(get(g, &a, i), get(g, &before, i).max(get(g, &b, i)));
            }
        }
    }
}
