//! The counts of one refcount block in memory, in as little of it as they need.
//!
//! A verb holds every refcount block that it changes. Two things keep that small and fast:
//!
//! * A disk that was written in order has long runs of the same count. Blocks that the walk has left
//!   behind are *packed* as such runs: 10 TiB then need no more memory than 1 TiB.
//! * A disk in random order has no runs, and every block is needed all the time. But its counts are
//!   small numbers: where a walk jumps about they are kept in *narrow* fields of 2, 4 or 8 bits, which
//!   the same loops count in. 16 TiB take 64 MiB instead of 512, and most of the waiting for memory
//!   is gone, for less of it is looked up.
//!
//! What even so takes more than [`MOST`] is put *away* in a temporary file. A walk that jumps about
//! then goes over its tables several times, each time counting in a part of the blocks
//! (`residency`).

use crate::error::{Error, Result};
use crate::format::geometry::Geometry;
use crate::format::refblock;
use crate::image::room;
use crate::io::scratch::Scratch;
use std::borrow::Cow;
use std::sync::Arc;

/// What counts may take at most, in bytes. (Little for tests of what happens beyond.)
pub(crate) const MOST: u64 = if cfg!(qcow2_little_memory) {
    1000
} else {
    224 << 20
};

/// The narrowest fields, as a refcount order: 2 bits hold the counts of a disk with a snapshot or two.
const NARROWEST: u32 = 1;

/// The counts of a block.
#[derive(Debug)]
pub(crate) enum BlockCounts {
    /// Fields of `1 << order` bits, laid out as in a refcount block of that width.
    Open { order: u32, bytes: Vec<u8> },
    /// Runs of equal 8-byte words of the block.
    Packed(Vec<(u32, [u8; 8])>),
    /// In a temporary file.
    Away(Away),
}

/// Fields as in [`BlockCounts::Open`], at this place of a temporary file.
#[derive(Debug)]
pub(crate) struct Away {
    order: u32,
    at: u64,
    /// [`sum`] of the bytes.
    sum: u64,
    scratch: Arc<Scratch>,
}

impl Away {
    /// The bytes of the fields.
    fn fetch(&self, g: Geometry) -> Result<Vec<u8>> {
        let mut bytes =
            crate::image::device::zeroed(g.cluster_size() >> (g.refcount_order - self.order))?;
        let error = |context: &str, source| Error::Os {
            context: context.into(),
            source,
        };
        let read = self.scratch.read(self.at, &mut bytes);
        read.map_err(|e| error("Could not read a temporary file", e))?;
        if sum(&bytes) != self.sum {
            let eio = std::io::Error::from_raw_os_error(libc::EIO);
            return Err(error(
                "A temporary file has lost what was written to it",
                eio,
            ));
        }
        Ok(bytes)
    }
}

/// What bytes in a temporary file must still come to: a disk that fails when they are written back
/// may give zeros afterwards, which would free every cluster of the block.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(bytes.len() as u64, |sum, chunk| {
        let word = chunk.iter().fold(0, |w, b| w << 8 | u64::from(*b));
        (sum.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

/// Fields of an order in the block's own width.
fn widened(g: Geometry, order: u32, bytes: Cow<'_, [u8]>) -> Result<Cow<'_, [u8]>> {
    if order == g.refcount_order {
        return Ok(bytes);
    }
    let wide = refblock::converted(of_order(g, order), &bytes, g)?;
    Ok(Cow::Owned(wide))
}

fn of_order(g: Geometry, order: u32) -> Geometry {
    Geometry {
        refcount_order: order,
        ..g
    }
}

impl BlockCounts {
    /// BlockCounts as the bytes of a block.
    pub(crate) fn new(g: Geometry, bytes: Vec<u8>) -> BlockCounts {
        let order = g.refcount_order;
        BlockCounts::Open { order, bytes }
    }

    /// The bytes of the block.
    pub(crate) fn bytes(&self, g: Geometry) -> Result<Cow<'_, [u8]>> {
        Ok(match self {
            BlockCounts::Open { order, bytes } => widened(g, *order, Cow::Borrowed(bytes))?,
            BlockCounts::Packed(runs) => Cow::Owned(unpacked(runs)?),
            BlockCounts::Away(away) => widened(g, away.order, Cow::Owned(away.fetch(g)?))?,
        })
    }

    /// Put the bytes of the block into `to`, which is as long.
    pub(super) fn put(&self, g: Geometry, to: &mut [u8]) -> Result<()> {
        match self {
            BlockCounts::Packed(runs) => {
                let mut rest = to;
                for (n, value) in runs {
                    let (run, behind) = rest.split_at_mut((*n as usize * 8).min(rest.len()));
                    run.chunks_exact_mut(8)
                        .for_each(|w| w.copy_from_slice(value));
                    rest = behind;
                }
            }
            _ => to.copy_from_slice(&self.bytes(g)?),
        }
        Ok(())
    }

    /// The width of the fields, if the counts are open.
    #[inline]
    pub(crate) fn order(&self) -> Option<u32> {
        match self {
            BlockCounts::Open { order, .. } => Some(*order),
            BlockCounts::Packed(_) | BlockCounts::Away(_) => None,
        }
    }

    /// The width of the fields, or of those that would do, as a refcount order.
    pub(crate) fn fields_needed(&self, g: Geometry) -> u32 {
        match self {
            BlockCounts::Open { order, .. } | BlockCounts::Away(Away { order, .. }) => *order,
            BlockCounts::Packed(runs) => {
                let highest = runs
                    .iter()
                    .map(|(_, word)| refblock::highest(g, word))
                    .max();
                order_for(g, highest.unwrap_or(0).saturating_add(1))
            }
        }
    }

    /// The fields, if they have this width.
    #[inline(always)]
    pub(crate) fn fields<const WIDTH: u32>(&self) -> Option<&[u8]> {
        match self {
            BlockCounts::Open { order, bytes } if *order == WIDTH => Some(bytes),
            _ => None,
        }
    }

    /// [`BlockCounts::fields`], to be changed.
    #[inline(always)]
    pub(crate) fn fields_mut<const WIDTH: u32>(&mut self) -> Option<&mut [u8]> {
        match self {
            BlockCounts::Open { order, bytes } if *order == WIDTH => Some(bytes),
            _ => None,
        }
    }

    /// The count at `index`.
    pub(crate) fn get(&self, g: Geometry, index: usize) -> Result<u64> {
        Ok(match self {
            BlockCounts::Open { order, bytes } => refblock::get(of_order(g, *order), bytes, index),
            BlockCounts::Packed(runs) => {
                let (mut word, within) = g.refcount_in_word(index);
                let run = runs.iter().find(|(n, _)| {
                    let here = word < *n as usize;
                    word = word.saturating_sub(*n as usize);
                    here
                });
                run.map_or(0, |(_, value)| refblock::get(g, value, within))
            }
            BlockCounts::Away(away) => {
                refblock::get(of_order(g, away.order), &away.fetch(g)?, index)
            }
        })
    }

    /// Store a count, which the block's own width can hold.
    pub(crate) fn set(&mut self, g: Geometry, index: usize, count: u64) -> Result<()> {
        self.open(g)?;
        if let BlockCounts::Open { order, bytes } = self {
            if count > of_order(g, *order).refcount_max() {
                let wider = order_for(g, count);
                *bytes = refblock::converted(of_order(g, *order), bytes, of_order(g, wider))?;
                *order = wider;
            }
            refblock::set(of_order(g, *order), bytes, index, count);
        }
        Ok(())
    }

    /// Unpack, or read from the temporary file.
    pub(crate) fn open(&mut self, g: Geometry) -> Result<()> {
        match self {
            BlockCounts::Open { .. } => {}
            BlockCounts::Packed(runs) => *self = BlockCounts::new(g, unpacked(runs)?),
            BlockCounts::Away(away) => {
                let (order, bytes) = (away.order, away.fetch(g)?);
                *self = BlockCounts::Open { order, bytes };
            }
        }
        Ok(())
    }

    /// Write the counts to the temporary file, at `at`, and forget them.
    pub(crate) fn put_away(&mut self, g: Geometry, scratch: &Arc<Scratch>, at: u64) -> Result<()> {
        if matches!(self, BlockCounts::Away(_)) {
            return Ok(());
        }
        self.open(g)?;
        self.narrow(g);
        if let BlockCounts::Open { order, bytes } = self {
            scratch.write(at, bytes).map_err(|source| Error::Os {
                context: "Could not write a temporary file".into(),
                source,
            })?;
            *self = BlockCounts::Away(Away {
                order: *order,
                at,
                sum: sum(bytes),
                #[allow(clippy::disallowed_methods)] // an Arc
                scratch: Arc::clone(scratch),
            });
        }
        Ok(())
    }

    /// Keep the counts in the narrowest fields that have room for one more of each.
    pub(crate) fn narrow(&mut self, g: Geometry) {
        if let BlockCounts::Open { order, bytes } = self {
            if *order == g.refcount_order {
                let fit = order_for(g, refblock::highest(g, bytes).saturating_add(1));
                if fit < *order {
                    // Without memory for that they stay as they are.
                    if let Ok(narrow) = refblock::converted(g, bytes, of_order(g, fit)) {
                        (*bytes, *order) = (narrow, fit);
                    }
                }
            }
        }
    }

    /// What the counts take, in bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            BlockCounts::Open { bytes, .. } => bytes.len() as u64,
            BlockCounts::Packed(runs) => size_of_val(runs.as_slice()) as u64,
            BlockCounts::Away(_) => 0,
        }
    }

    /// Keep the counts as runs, if that saves most of the memory, else in narrow fields.
    pub(crate) fn pack(&mut self, g: Geometry) {
        if self.order().is_none() {
            return;
        }
        match self.bytes(g).ok().and_then(|bytes| packed(&bytes)) {
            Some(runs) => *self = BlockCounts::Packed(runs),
            None => self.narrow(g),
        }
    }
}

/// The narrowest width that holds `count`.
fn order_for(g: Geometry, count: u64) -> u32 {
    let fits = |order: &u32| of_order(g, *order).refcount_max() >= count;
    (NARROWEST..g.refcount_order)
        .find(fits)
        .unwrap_or(g.refcount_order)
}

/// The runs of equal words, unless they are too many, or there is no memory for them.
fn packed(bytes: &[u8]) -> Option<Vec<(u32, [u8; 8])>> {
    let most = bytes.len() / 64;
    let mut runs: Vec<(u32, [u8; 8])> = Vec::new();
    for word in bytes.chunks_exact(8) {
        let mut value = [0; 8];
        value.copy_from_slice(word);
        let full = runs.len() == most;
        match runs.last_mut() {
            Some((n, last)) if *last == value => *n += 1,
            _ if full => return None,
            _ => room::push(&mut runs, (1, value)).ok()?,
        }
    }
    runs.shrink_to_fit();
    Some(runs)
}

fn unpacked(runs: &[(u32, [u8; 8])]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let words: usize = runs.iter().map(|(n, _)| *n as usize).sum();
    room::reserve(&mut bytes, words * 8)?;
    for (n, value) in runs {
        for _ in 0..*n {
            room::append(&mut bytes, value)?;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn g() -> Geometry {
        Geometry::new(16, 4, false)
    }

    #[test]
    fn packed_counts_come_back_and_irregular_ones_stay_open() {
        let mut bytes = vec![0u8; 65536];
        bytes
            .chunks_exact_mut(2)
            .take(30_000)
            .for_each(|c| c.copy_from_slice(&[0, 2]));
        let mut counts = BlockCounts::new(g(), bytes.clone());
        counts.pack(g());
        assert_eq!(counts.order(), None);
        assert_eq!(counts.bytes(g()).unwrap(), bytes);
        let get = |i| counts.get(g(), i).unwrap();
        assert_eq!((get(29_999), get(30_000)), (2, 0));
        counts.open(g()).unwrap();
        assert_eq!(counts.bytes(g()).unwrap(), bytes);
        let noise: Vec<u8> = (0..65536u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let mut counts = BlockCounts::new(g(), noise.clone());
        counts.pack(g());
        assert_eq!(counts.order(), Some(4));
        assert_eq!(counts.bytes(g()).unwrap(), noise);
    }

    #[test]
    fn narrow_counts_hold_what_they_are_given_whatever_the_width() {
        // Miri would need minutes for thousands of counts in a block.
        for order in if cfg!(miri) { 4 } else { 0 }..=6 {
            let g = Geometry::new(9, order, false);
            let entries = g.refblock_entries() as usize;
            let mut counts = BlockCounts::new(g, vec![0; 512]);
            let mut want = vec![0u64; entries];
            for (i, count) in want.iter_mut().enumerate() {
                *count = (i as u64 * 7 % 3).min(g.refcount_max());
                counts.set(g, i, *count).unwrap();
            }
            counts.narrow(g);
            assert_eq!(counts.order(), Some(order.min(NARROWEST)), "order {order}");
            for (round, count) in [3u64, 4, 15, 16, 255, 256, 70_000].into_iter().enumerate() {
                let (at, count) = (round * 31 % entries, count.min(g.refcount_max()));
                counts.set(g, at, count).unwrap();
                want[at] = count;
                let bytes = counts.bytes(g).unwrap();
                for (i, w) in want.iter().enumerate() {
                    assert_eq!(counts.get(g, i).unwrap(), *w, "order {order} index {i}");
                    assert_eq!(refblock::get(g, &bytes, i), *w);
                }
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no O_TMPFILE")]
    fn counts_that_are_away_come_back_or_are_an_error() {
        let scratch = Arc::new(Scratch::new().unwrap());
        let noise: Vec<u8> = (0..65536u32)
            .map(|i| u8::from(i % 2 == 1) * (i.wrapping_mul(2_654_435_761) >> 30) as u8)
            .collect();
        let mut counts = BlockCounts::new(g(), noise.clone());
        counts.put_away(g(), &scratch, 1 << 20).unwrap();
        assert!(matches!(counts, BlockCounts::Away(_)) && counts.size() == 0);
        assert_eq!(counts.bytes(g()).unwrap(), noise);
        assert_eq!(counts.get(g(), 3).unwrap(), u64::from(noise[7]));
        // What a disk that has failed may give.
        scratch.write(1 << 20, &[0; 16384]).unwrap();
        assert_eq!(counts.bytes(g()).unwrap_err().errno(), libc::EIO);
        assert_eq!(counts.open(g()).unwrap_err().errno(), libc::EIO);
        assert_eq!(counts.get(g(), 3).unwrap_err().errno(), libc::EIO);
    }
}
