//! L2 tables that a resize makes or changes before the goto that follows frees them again: nothing of
//! them is written, but what is in them is counted.

use crate::error::Result;
use crate::format::geometry::Geometry;
use crate::image::device;
use crate::room::{Clusters, Known};
use byteorder::{BigEndian, ByteOrder};

/// What is in an L2 table.
pub(crate) enum Contents {
    /// Nothing: no bytes are kept for that, since a resize may make millions of such tables.
    Zeros,
    Bytes(Vec<u8>),
}

impl Contents {
    /// The bytes, as far as there are any.
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Contents::Zeros => &[],
            Contents::Bytes(bytes) => bytes,
        }
    }

    /// The same, to be changed.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Contents::Zeros => &mut [],
            Contents::Bytes(bytes) => bytes,
        }
    }

    /// The bytes, all of them.
    pub(crate) fn whole(self, g: Geometry) -> Result<Vec<u8>> {
        match self {
            Contents::Zeros => device::zeroed(g.cluster_size()),
            Contents::Bytes(bytes) => Ok(bytes),
        }
    }

    /// The word at a place in the table.
    pub(crate) fn word(&self, at: usize) -> u64 {
        let word = self.bytes().get(at..at + 8);
        word.map_or(0, BigEndian::read_u64)
    }
}

/// See the module's text.
#[derive(Default)]
pub(crate) struct Remade {
    /// Contents that differ from those on the disk, by the table's offset.
    pub(crate) contents: Known<Contents>,
    /// Tables of zeros besides.
    zeros: Clusters,
    /// Clusters that are taken until the goto frees them.
    pub(crate) temporary: Clusters,
}

impl Remade {
    /// What is in the table at `offset`, if that differs from the disk.
    pub(crate) fn get(&self, g: Geometry, offset: u64) -> Option<&[u8]> {
        match self.contents.get(offset) {
            Some(contents) => Some(contents.bytes()),
            None => self.is_zeros(g, offset).then_some(&[]),
        }
    }

    /// Is the temporary table at `offset` all zeros?
    pub(crate) fn is_zeros(&self, g: Geometry, offset: u64) -> bool {
        self.zeros.contains(g.cluster_of(offset).0)
    }

    /// A cluster is taken for a while only.
    pub(crate) fn take(&mut self, g: Geometry, offset: u64) -> Result<()> {
        self.zeros.remove(g.cluster_of(offset).0);
        self.temporary.insert(g.cluster_of(offset).0)
    }

    /// [`Remade::take`], for a table of zeros.
    pub(crate) fn take_zeros(&mut self, g: Geometry, offset: u64) -> Result<()> {
        self.take(g, offset)?;
        self.contents.remove(offset);
        self.zeros.insert(g.cluster_of(offset).0)
    }
}
