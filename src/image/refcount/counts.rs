//! The counts of one refcount block in memory, in as little of it as they need.
//!
//! A verb holds every refcount block that it changes. Counts are small numbers: they are kept in fields
//! of 2, 4 or 8 bits where the image has more, which the same loops count in, and a field grows when its
//! count does. 16 TiB then take 64 MiB instead of 512, and a walk that jumps about, which waits for
//! little else than memory, looks up less of it.
//!
//! What even so takes more than [`MOST`] is put *away* in a temporary file, and comes back when it is
//! needed.

use crate::error::{Error, Result};
use crate::format::geometry::Geometry;
use crate::format::refblock;
use crate::image::device::zeroed;
use crate::io::scratch::Scratch;
use byteorder::{BigEndian, ByteOrder};
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

/// The counts of a block, in fields of `1 << order` bits that are laid out as in a refcount block of that
/// width.
#[derive(Debug)]
pub(crate) struct BlockCounts {
    order: u32,
    fields: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Here(Vec<u8>),
    /// In a temporary file, at this place; and the [`sum`] of the bytes.
    Away(Arc<Scratch>, u64, u64),
}

/// What bytes in a temporary file must still come to: a disk that fails when they are written back
/// may give zeros afterwards, which would free every cluster of the block.
fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(BigEndian::read_u64);
    let products = (1..).step_by(2).zip(words).map(|(k, w)| w.wrapping_mul(k));
    products.fold(0, u64::wrapping_add)
}

/// `g`, with fields of this width.
fn of_order(g: Geometry, order: u32) -> Geometry {
    Geometry {
        refcount_order: order,
        ..g
    }
}

/// The narrowest width that holds a count with these bits.
fn order_for(g: Geometry, bits: u64) -> u32 {
    let fits = |order: &u32| of_order(g, *order).refcount_max() >= bits;
    (NARROWEST..g.refcount_order)
        .find(fits)
        .unwrap_or(g.refcount_order)
}

impl BlockCounts {
    /// Those of a refcount block with these bytes.
    pub(crate) fn new(g: Geometry, block: &[u8]) -> Result<BlockCounts> {
        let order = order_for(g, refblock::bits_in_use(g, block));
        let mut bytes = zeroed(g.cluster_size() >> (g.refcount_order - order))?;
        refblock::convert(g, block, of_order(g, order), &mut bytes);
        let fields = Bytes::Here(bytes);
        Ok(BlockCounts { order, fields })
    }

    /// The fields, and a geometry with their width.
    pub(crate) fn fields(&self, g: Geometry) -> Result<(Geometry, Cow<'_, [u8]>)> {
        let narrow = self.narrow(g);
        let (scratch, at, wanted) = match &self.fields {
            Bytes::Here(bytes) => return Ok((narrow, Cow::Borrowed(bytes))),
            Bytes::Away(scratch, at, sum) => (scratch, *at, *sum),
        };
        let mut bytes = zeroed(g.cluster_size() >> (g.refcount_order - self.order))?;
        let error = |context: &str, source| Error::Os {
            context: context.into(),
            source,
        };
        let read = scratch.read(at, &mut bytes);
        read.map_err(|e| error("Could not read a temporary file", e))?;
        if sum(&bytes) != wanted {
            let eio = std::io::Error::from_raw_os_error(libc::EIO);
            return Err(error(
                "A temporary file has lost what was written to it",
                eio,
            ));
        }
        Ok((narrow, Cow::Owned(bytes)))
    }

    /// Put the bytes of the block into `to`, which is as long.
    pub(crate) fn put(&self, g: Geometry, to: &mut [u8]) -> Result<()> {
        let (narrow, fields) = self.fields(g)?;
        refblock::convert(narrow, &fields, g, to);
        Ok(())
    }

    /// The bytes of the block.
    pub(crate) fn bytes(&self, g: Geometry) -> Result<Vec<u8>> {
        let mut bytes = zeroed(g.cluster_size())?;
        self.put(g, &mut bytes)?;
        Ok(bytes)
    }

    /// `g`, with the width of the fields.
    #[inline]
    pub(crate) fn narrow(&self, g: Geometry) -> Geometry {
        of_order(g, self.order)
    }

    /// The fields, if they are here and have this width.
    #[inline(always)]
    pub(crate) fn of_width<const WIDTH: u32>(&self) -> Option<&[u8]> {
        match &self.fields {
            Bytes::Here(bytes) if self.order == WIDTH => Some(bytes),
            _ => None,
        }
    }

    /// [`BlockCounts::of_width`], to be changed.
    #[inline(always)]
    pub(crate) fn of_width_mut<const WIDTH: u32>(&mut self) -> Option<&mut [u8]> {
        match &mut self.fields {
            Bytes::Here(bytes) if self.order == WIDTH => Some(bytes),
            _ => None,
        }
    }

    /// The count at `index`.
    pub(crate) fn get(&self, g: Geometry, index: usize) -> Result<u64> {
        let (g, fields) = self.fields(g)?;
        Ok(refblock::get(g, &fields, index))
    }

    /// Store a count, which the block's own width can hold.
    pub(crate) fn set(&mut self, g: Geometry, index: usize, count: u64) -> Result<()> {
        self.fetch(g)?;
        if let Bytes::Here(bytes) = &mut self.fields {
            let (old, new) = (self.order, self.order.max(order_for(g, count)));
            if new != old {
                let mut wider = zeroed((bytes.len() as u64) << (new - old))?;
                refblock::convert(of_order(g, old), bytes, of_order(g, new), &mut wider);
                (*bytes, self.order) = (wider, new);
            }
            refblock::set(of_order(g, new), bytes, index, count);
        }
        Ok(())
    }

    /// Are they in the temporary file?
    pub(crate) fn is_away(&self) -> bool {
        matches!(self.fields, Bytes::Away(..))
    }

    /// Read them from the temporary file, if they are there.
    pub(crate) fn fetch(&mut self, g: Geometry) -> Result<()> {
        if let (_, Cow::Owned(bytes)) = self.fields(g)? {
            self.fields = Bytes::Here(bytes);
        }
        Ok(())
    }

    /// Write them to the temporary file, at `at`, and forget them.
    pub(crate) fn put_away(&mut self, scratch: &Arc<Scratch>, at: u64) -> std::io::Result<()> {
        if let Bytes::Here(bytes) = &self.fields {
            scratch.write(at, bytes)?;
            #[allow(clippy::disallowed_methods)] // an Arc
            let scratch = Arc::clone(scratch);
            self.fields = Bytes::Away(scratch, at, sum(bytes));
        }
        Ok(())
    }

    /// What they take in memory, in bytes.
    pub(crate) fn size(&self) -> u64 {
        match &self.fields {
            Bytes::Here(bytes) => bytes.len() as u64,
            Bytes::Away(..) => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn narrow_counts_hold_what_they_are_given_whatever_the_width() {
        // Miri would need minutes for thousands of counts in a block.
        for order in if cfg!(miri) { 4 } else { 0 }..=6 {
            let g = Geometry::new(9, order, false);
            let entries = g.refblock_entries() as usize;
            let (mut block, mut want) = (vec![0; 512], vec![0u64; entries]);
            for (i, count) in want.iter_mut().enumerate() {
                *count = (i as u64 * 7 % 3).min(g.refcount_max());
                refblock::set(g, &mut block, i, *count);
            }
            let mut counts = BlockCounts::new(g, &block).unwrap();
            assert_eq!(counts.order, order.min(NARROWEST), "order {order}");
            for (round, count) in [3u64, 4, 15, 16, 255, 256, 70_000].into_iter().enumerate() {
                let (at, count) = (round * 31 % entries, count.min(g.refcount_max()));
                counts.set(g, at, count).unwrap();
                want[at] = count;
                let bytes = counts.bytes(g).unwrap();
                for (i, w) in want.iter().enumerate() {
                    assert_eq!(counts.get(g, i).unwrap(), *w, "order {order} index {i}");
                    assert_eq!(refblock::get(g, &bytes, i), *w);
                }
                let again = BlockCounts::new(g, &bytes).unwrap();
                assert_eq!(again.order, counts.order, "order {order}");
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no O_TMPFILE")]
    fn counts_that_are_away_come_back_or_are_an_error() {
        let g = Geometry::new(16, 4, false);
        let scratch = Arc::new(Scratch::new().unwrap());
        let noise: Vec<u8> = (0..65536u32)
            .map(|i| u8::from(i % 2 == 1) * (i.wrapping_mul(2_654_435_761) >> 30) as u8)
            .collect();
        let mut counts = BlockCounts::new(g, &noise).unwrap();
        assert_eq!(counts.size(), 8192);
        counts.put_away(&scratch, 1 << 20).unwrap();
        assert!(counts.is_away() && counts.size() == 0);
        assert_eq!(counts.bytes(g).unwrap(), noise);
        assert_eq!(counts.get(g, 3).unwrap(), u64::from(noise[7]));
        // What a disk that has failed may give.
        scratch.write(1 << 20, &[0; 8192]).unwrap();
        assert_eq!(counts.bytes(g).unwrap_err().errno(), libc::EIO);
        assert_eq!(counts.fetch(g).unwrap_err().errno(), libc::EIO);
        assert_eq!(counts.set(g, 3, 1).unwrap_err().errno(), libc::EIO);
        assert_eq!(counts.get(g, 3).unwrap_err().errno(), libc::EIO);
    }
}
