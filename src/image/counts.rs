//! The counts of one refcount block in memory, packed while nobody looks at them.
//!
//! A verb holds every refcount block that it changes. For a disk that was written in order their
//! counts are long runs of the same number, so blocks that the walk has left behind are kept as runs:
//! 10 TiB then need no more memory than 1 TiB.

use std::borrow::Cow;
use std::collections::VecDeque;

/// Plain blocks that are kept at first, in bytes.
const FEW: u64 = 24 << 20;
/// Plain blocks that are kept at most, in bytes. Beyond it a disk whose clusters are in random order
/// costs packing and unpacking.
const MOST: u64 = 256 << 20;

/// Counts, as the bytes of the block or as runs of equal 8-byte words.
#[derive(Clone, Debug)]
pub(crate) enum Counts {
    Plain(Vec<u8>),
    Packed(Vec<(u32, [u8; 8])>),
}

impl Counts {
    /// The bytes of the block.
    #[inline]
    pub(crate) fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Counts::Plain(bytes) => Cow::Borrowed(bytes),
            Counts::Packed(runs) => Cow::Owned(unpacked(runs)),
        }
    }

    /// The bytes, to be changed.
    #[inline]
    pub(crate) fn bytes_mut(&mut self) -> &mut Vec<u8> {
        if let Counts::Packed(runs) = self {
            *self = Counts::Plain(unpacked(runs));
        }
        match self {
            Counts::Plain(bytes) => bytes,
            Counts::Packed(_) => unreachable!("unpacked above"),
        }
    }

    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self, Counts::Plain(_))
    }

    /// Keep the counts as runs, if that saves most of the memory.
    pub(crate) fn pack(&mut self) {
        let Counts::Plain(bytes) = self else {
            return;
        };
        let most = bytes.len() / 64;
        let mut runs: Vec<(u32, [u8; 8])> = Vec::new();
        for word in bytes.chunks_exact(8) {
            let mut value = [0; 8];
            value.copy_from_slice(word);
            let full = runs.len() == most;
            match runs.last_mut() {
                Some((n, last)) if *last == value => *n += 1,
                _ if full => return,
                _ => runs.push((1, value)),
            }
        }
        runs.shrink_to_fit();
        *self = Counts::Packed(runs);
    }
}

fn unpacked(runs: &[(u32, [u8; 8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (n, value) in runs {
        for _ in 0..*n {
            bytes.extend_from_slice(value);
        }
    }
    bytes
}

/// Which blocks are plain, oldest first, and how many may be.
#[derive(Debug)]
pub(crate) struct Residents {
    plain: VecDeque<u64>,
    limit: usize,
    most: usize,
    /// Loads so far, and for each block the number of them when it was last left.
    now: u64,
    left: Vec<u64>,
}

impl Residents {
    pub(crate) fn new(cluster_size: u64) -> Residents {
        Residents {
            plain: VecDeque::new(),
            limit: (FEW / cluster_size) as usize,
            most: (MOST / cluster_size) as usize,
            now: 0,
            left: Vec::new(),
        }
    }

    /// How many blocks are plain.
    pub(crate) fn plain_blocks(&self) -> usize {
        self.plain.len()
    }

    /// Block `index` has become plain. Returns a block that should be left for it.
    pub(crate) fn enter(&mut self, index: u64) -> Option<u64> {
        self.now += 1;
        let left = self.left.get(index as usize).copied().unwrap_or(0);
        // Asked for again so soon: the walk jumps about, and more blocks must stay.
        if left != 0 && self.now - left < 2 * self.limit as u64 {
            self.limit = (self.limit + self.limit / 8 + 1).min(self.most);
        }
        self.plain.push_back(index);
        if self.plain.len() <= self.limit {
            return None;
        }
        let oldest = self.plain.pop_front()?;
        if self.left.len() <= oldest as usize {
            self.left.resize(oldest as usize + 1, 0);
        }
        if let Some(slot) = self.left.get_mut(oldest as usize) {
            *slot = self.now;
        }
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn packed_counts_come_back_and_irregular_ones_stay_plain() {
        let mut bytes = vec![0u8; 65536];
        bytes
            .chunks_exact_mut(2)
            .take(30_000)
            .for_each(|c| c.copy_from_slice(&[0, 2]));
        let mut counts = Counts::Plain(bytes.clone());
        counts.pack();
        assert!(!counts.is_plain());
        assert_eq!(counts.bytes(), bytes);
        assert_eq!(counts.bytes_mut(), &bytes);
        assert!(counts.is_plain());
        let noise: Vec<u8> = (0..65536u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let mut counts = Counts::Plain(noise);
        counts.pack();
        assert!(counts.is_plain());
    }

    #[test]
    fn a_walk_in_order_keeps_few_blocks_and_one_that_jumps_keeps_more() {
        let few = (FEW / 65536) as usize;
        let mut r = Residents::new(65536);
        for pass in 0..3 {
            for i in 0..10_000 {
                let _ = r.enter(i);
            }
            assert_eq!((r.limit, r.plain.len()), (few, few), "pass {pass}");
        }
        let mut r = Residents::new(65536);
        for i in 0..20_000u64 {
            let index = i.wrapping_mul(7919) % 600;
            if !r.plain.contains(&index) {
                let _ = r.enter(index);
            }
        }
        assert!(r.plain.len() == 600 && r.limit >= 600 && r.limit <= r.most);
    }
}
