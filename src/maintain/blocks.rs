//! The refcounts that an image says it has, block by block.

use crate::error::{Error, Result};
use crate::format::entry::REFTABLE_OFFSET_MASK;
use crate::format::geometry::{Geometry, HostCluster};
use crate::format::refblock;
use crate::image::device::{self, Device};

/// QEMU reads nothing behind this (`BDRV_MAX_LENGTH`).
pub(super) const MAX_LENGTH: u64 = (i64::MAX as u64) & !((1 << 30) - 1);
/// So many blocks are asked for ahead of the one that is read.
const AHEAD: u64 = 32;

/// What stands at an index of the refcount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Described {
    /// Nothing: all counts are 0.
    Absent,
    /// A block, in [`Blocks::bytes`] now.
    Here,
    /// Nothing that could be read; the errno.
    Bad(i32),
}

/// Reads refcount blocks, the last of which it keeps.
pub(super) struct Blocks<'a> {
    pub(super) g: Geometry,
    pub(super) reftable: &'a [u64],
    loaded: Option<(u64, Described)>,
    bytes: Vec<u8>,
    /// Blocks before this one have been asked for.
    asked: u64,
    /// The first entry that is not cluster aligned: (offset, index).
    pub(super) unaligned: Option<(u64, u64)>,
}

impl<'a> Blocks<'a> {
    pub(super) fn new(g: Geometry, reftable: &'a [u64]) -> Blocks<'a> {
        Blocks {
            g,
            reftable,
            loaded: None,
            bytes: Vec::new(),
            asked: 0,
            unaligned: None,
        }
    }

    /// Offset of the block at `index` of the table; 0 for none.
    pub(super) fn offset(&self, index: u64) -> u64 {
        let entry = usize::try_from(index)
            .ok()
            .and_then(|i| self.reftable.get(i));
        entry.map_or(0, |e| e & REFTABLE_OFFSET_MASK)
    }

    /// What was loaded may have changed on the disk.
    pub(super) fn forget(&mut self) {
        self.loaded = None;
    }

    /// The bytes of the block that was loaded last.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Let the device begin to fetch the blocks behind `index`, when they are gone through in order.
    pub(super) fn ahead(&mut self, dev: &mut Device, index: u64) {
        if index.saturating_add(AHEAD / 2) < self.asked {
            return;
        }
        for i in self.asked.max(index)..index.saturating_add(AHEAD) {
            match self.offset(i) {
                0 => {}
                offset => dev.will_read(offset, self.g.cluster_size()),
            }
        }
        self.asked = index.saturating_add(AHEAD);
    }

    /// Begin again at the front.
    pub(super) fn rewind(&mut self) {
        self.asked = 0;
    }

    /// Load the block at `index` of the table.
    pub(super) fn load(&mut self, dev: &mut Device, index: u64) -> Result<Described> {
        if let Some((at, block)) = self.loaded {
            if at == index {
                return Ok(block);
            }
        }
        let block = self.fetch(dev, index)?;
        self.loaded = Some((index, block));
        Ok(block)
    }

    fn fetch(&mut self, dev: &mut Device, index: u64) -> Result<Described> {
        let cs = self.g.cluster_size();
        let offset = self.offset(index);
        if offset == 0 {
            return Ok(Described::Absent);
        }
        if self.g.in_cluster(offset) != 0 {
            self.unaligned.get_or_insert((offset, index));
            return Ok(Described::Bad(libc::EIO));
        }
        if offset > MAX_LENGTH.saturating_sub(cs) {
            return Ok(Described::Bad(libc::EIO));
        }
        if self.bytes.len() as u64 != cs {
            self.bytes = device::zeroed(cs)?;
        }
        match dev.read("Could not read a refcount block", offset, &mut self.bytes) {
            Ok(()) => Ok(Described::Here),
            Err(e @ Error::Io { .. }) => Ok(Described::Bad(e.errno())),
            Err(e) => Err(e),
        }
    }

    /// The count of a cluster; none where its block cannot be read.
    pub(super) fn count(&mut self, dev: &mut Device, cluster: u64) -> Result<Option<u64>> {
        let cluster = HostCluster(cluster);
        Ok(match self.load(dev, self.g.reftable_index(cluster))? {
            Described::Absent => Some(0),
            Described::Here => {
                let index = self.g.refblock_index(cluster);
                Some(refblock::get(self.g, &self.bytes, index))
            }
            Described::Bad(_) => None,
        })
    }
}
