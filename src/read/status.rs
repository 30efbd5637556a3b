//! What the disk now seen is made of: the extents that `qemu-img map` shows.

use super::mapping::Extent;
use crate::error::{Error, Result};
use crate::format::entry::REFTABLE_OFFSET_MASK;
use crate::format::geometry::HostCluster;
use crate::format::refblock;
use crate::image::reading::Layer;
use crate::image::Image;
use crate::io::Run;
use crate::room;
use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// A run of guest bytes that are all of one kind (an entry of `qemu-img map --output=json`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStatus {
    /// First byte, from the start of the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes are stored for it.
    pub data: bool,
    /// It reads as zeros. Together with `data`: a cluster that was allocated ahead and is still a
    /// hole of the file.
    pub zero: bool,
    /// The bytes are stored compressed.
    pub compressed: bool,
    /// A file of the chain has it, as data or as zeros; else it is zero for want of anything.
    pub present: bool,
    /// Which file of the chain that is: 0 the image, 1 its backing file, and so on.
    pub depth: u32,
    /// Where it stands in the file of that depth ([`Image::host_path`]).
    pub offset: Option<u64>,
}

impl BlockStatus {
    /// Is `next` what this one would be further on? (`entry_mergeable`)
    fn goes_on(&self, next: &BlockStatus) -> bool {
        let further = BlockStatus {
            start: next.start,
            length: next.length,
            offset: self.offset.map(|o| o.saturating_add(self.length)),
            ..*self
        };
        further == *next
    }
}

/// L2 entries that one answer looks at, about: a second's work. Only an L1 that names the same tables
/// again and again needs more, or a disk of a hundred terabytes of zeros.
const MOST_ENTRIES: u64 = 1 << 31;

impl Image {
    /// What the disk now seen is made of at `offset`: the kind of its bytes, and for how many of
    /// `max` bytes it stays the same. At the end of the disk the length is 0.
    ///
    /// Asked again and again, each time from the end of the answer before, it gives the entries of
    /// `qemu-img map --output=json` (whose `offset` is missing where this is `None`). Only after 2^31 L2
    /// entries an answer ends although the next is like it.
    ///
    /// # Errors
    /// `EIO` past the end of the disk and for damaged tables; those of opening a backing file.
    pub fn block_status(&mut self, offset: u64, max: u64) -> Result<BlockStatus> {
        self.begin_read()?;
        let Some(left) = self.length().checked_sub(offset) else {
            return Err(Error::Corrupt(format!(
                "The offset {offset} is not within the disk"
            )));
        };
        let max = max.min(left);
        let mut found = BlockStatus {
            start: offset,
            ..BlockStatus::default()
        };
        let pieces = (MOST_ENTRIES / self.header.geometry.l2_entries()).max(1);
        for _ in 0..pieces {
            if found.length >= max {
                break;
            }
            let next = self.piece_in_chain(0, offset + found.length, max - found.length)?;
            if found.length == 0 {
                found = next;
            } else if found.goes_on(&next) {
                found.length += next.length;
            } else {
                break;
            }
        }
        Ok(found)
    }

    /// Path of the file that offsets at a depth of the backing chain are in: the image or backing
    /// file itself, or its external data file. `None` behind callbacks and where there is no such file.
    pub fn host_path(&self, depth: u32) -> Option<PathBuf> {
        let Some(behind) = depth.checked_sub(1) else {
            return self.data_path();
        };
        match self.behind.chain.as_ref()?.get(behind as usize)? {
            Layer::Qcow2(image) => image.data_path(),
            Layer::Raw(_, path) => path.as_deref().map(Into::into),
        }
    }

    /// The open file itself that offsets at a depth are in, for reading by other means (sharing its blocks):
    /// none where the data is encrypted or behind callbacks, or the file has not been needed yet.
    pub fn host_file(&self, depth: u32) -> Option<std::fs::File> {
        let layer = match depth.checked_sub(1) {
            None => return self.own_file(),
            Some(behind) => self.behind.chain.as_ref()?.get(behind as usize)?,
        };
        match layer {
            Layer::Qcow2(image) => image.own_file(),
            Layer::Raw(dev, _) => dev.host_file(),
        }
    }

    fn own_file(&self) -> Option<std::fs::File> {
        if self.header.crypt_method != 0 {
            return None;
        }
        match self.header.has_data_file() {
            true => self.behind.data_file.as_ref()?.host_file(),
            false => self.dev.host_file(),
        }
    }

    /// [`Image::host_path`] as C text that lives as long as the image.
    pub(crate) fn host_name(&mut self, depth: u32) -> Option<&CStr> {
        let name = CString::new(self.host_path(depth)?.as_os_str().as_bytes()).ok()?;
        let known = self.behind.host_names.iter().position(|n| *n == name);
        let at = known.unwrap_or(self.behind.host_names.len());
        if known.is_none() {
            room::push(&mut self.behind.host_names, name).ok()?;
        }
        self.behind.host_names.get(at).map(CString::as_c_str)
    }

    /// Does the backing file read as zeros from `at` on, as its tables and holes say, and for how many
    /// of `max` bytes, which are not 0, does it stay so?
    pub(crate) fn zeros_behind(&mut self, at: u64, max: u64) -> Result<(bool, u64)> {
        self.open_chain()?;
        let shown = self.behind.chain.as_ref().and_then(|c| c.first());
        let left = shown.map_or(0, Layer::length).saturating_sub(at);
        if left == 0 {
            return Ok((true, max));
        }
        let piece = self.piece_in_chain(1, at, max.min(left))?;
        Ok((piece.zero, piece.length.max(1)))
    }

    /// The first layer from `depth` on that says something of what is at `at` (qemu-img's
    /// `get_block_status`).
    pub(super) fn piece_in_chain(
        &mut self,
        mut depth: u32,
        at: u64,
        mut max: u64,
    ) -> Result<BlockStatus> {
        loop {
            let piece = self.piece_of_layer(depth, at, max)?;
            if piece.data || piece.zero || piece.length == 0 {
                return Ok(piece);
            }
            max = piece.length;
            depth += 1;
        }
    }

    /// What one layer says (`bdrv_co_do_block_status`): neither data nor zero means that those
    /// behind it are to be asked.
    fn piece_of_layer(&mut self, depth: u32, at: u64, max: u64) -> Result<BlockStatus> {
        let layer = match depth.checked_sub(1) {
            None => None,
            Some(behind) => self
                .behind
                .chain
                .as_mut()
                .and_then(|c| c.get_mut(behind as usize)),
        };
        let (image, has_more) = match layer {
            None => {
                let more = !self.backing_file.is_empty();
                (&mut *self, more)
            }
            Some(Layer::Qcow2(image)) => {
                let more = !image.backing_file.is_empty();
                (&mut **image, more)
            }
            Some(raw @ Layer::Raw(..)) => {
                let max = max.min(raw.length().saturating_sub(at));
                return Ok(raw_piece(raw, depth, at, max));
            }
        };
        let max = max.min(image.length().saturating_sub(at));
        let mut piece = image.own_piece(at, max)?;
        piece.depth = depth;
        if !piece.present {
            piece.zero = !has_more || {
                self.open_chain()?;
                let behind = self
                    .behind
                    .chain
                    .as_ref()
                    .and_then(|c| c.get(depth as usize));
                behind.is_none_or(|layer| at >= layer.length())
            };
        }
        Ok(piece)
    }

    /// What the image's own tables say (`qcow2_co_block_status`).
    fn own_piece(&mut self, at: u64, max: u64) -> Result<BlockStatus> {
        let (extent, length) = self.extent(None, at, max)?;
        let mut piece = BlockStatus {
            start: at,
            length,
            ..BlockStatus::default()
        };
        match extent {
            Extent::Unallocated(host) => piece.offset = host,
            Extent::Zero(host) => (piece.zero, piece.offset) = (true, host),
            Extent::Data(host) => (piece.data, piece.offset) = (true, Some(host)),
            Extent::Compressed { .. } => (piece.data, piece.compressed) = (true, true),
        }
        piece.present = piece.data || piece.zero;
        if self.header.crypt_method != 0 {
            // The bytes there are not the guest's.
            piece.offset = None;
        }
        if let (true, Some(host)) = (piece.data, piece.offset) {
            if self.metadata_preallocated() {
                self.look_for_hole(host, &mut piece)?;
            }
        }
        Ok(piece)
    }

    /// Data in an image whose clusters were allocated ahead: what the file has not stored is zero.
    fn look_for_hole(&mut self, host: u64, piece: &mut BlockStatus) -> Result<()> {
        let dev = self.data_device()?;
        let total = dev.length().div_ceil(512).saturating_mul(512);
        let Some(left) = total.checked_sub(host).filter(|n| *n > 0) else {
            piece.zero = true;
            return Ok(());
        };
        let n = piece.length.min(left);
        match dev.run(host) {
            Run::Data(bytes) => piece.length = n.min(bytes),
            Run::Hole(bytes) => {
                piece.zero = true;
                let n = n.min(bytes.unwrap_or(u64::MAX));
                // A hole that reaches the end of the file goes on behind it.
                if n < left {
                    piece.length = n;
                }
            }
        }
        Ok(())
    }

    /// Does the file take much less space than its clusters in use? Then it is worth asking for
    /// holes (`qcow2_detect_metadata_preallocation`). Found out once, as QEMU does.
    fn metadata_preallocated(&mut self) -> bool {
        if let Some(known) = self.caches.preallocated {
            return known;
        }
        let found = self.count_preallocated().unwrap_or(false);
        self.caches.preallocated = Some(found);
        found
    }

    fn count_preallocated(&mut self) -> Result<bool> {
        let g = self.header.geometry;
        let Some(allocated) = self.dev.allocated() else {
            return Ok(false);
        };
        let stored = allocated >> g.cluster_bits;
        let threshold = (stored.saturating_mul(10) / 9).max(stored.saturating_add(2));
        let end = g.clusters_for(self.dev.length().div_ceil(512).saturating_mul(512));
        let table = self.dev.read_vec(
            "Could not read the refcount table",
            self.header.reftable_offset,
            self.header.reftable_bytes(),
        )?;
        let table = crate::image::device::words(&table)?;
        let mut used = 0u64;
        for (index, entry) in table.iter().enumerate() {
            let first: HostCluster = g.first_cluster_of_block(index as u64);
            let first = g.offset_of(first) >> g.cluster_bits;
            if first >= end || used >= threshold {
                break;
            }
            let offset = entry & REFTABLE_OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            if g.in_cluster(offset) != 0 {
                return Ok(false);
            }
            // Behind the end of the file no count is anything but zero.
            if offset >= self.dev.length() {
                continue;
            }
            let block =
                self.dev
                    .read_vec("Could not read a refcount block", offset, g.cluster_size())?;
            let here = g.refblock_entries().min(end - first) as usize;
            used += (0..here)
                .filter(|i| refblock::get(g, &block, *i) != 0)
                .count() as u64;
        }
        Ok(used >= threshold)
    }
}

/// A raw file: data and holes as the file system says (`raw_co_block_status`).
fn raw_piece(layer: &mut Layer, depth: u32, at: u64, max: u64) -> BlockStatus {
    let run = match layer {
        Layer::Raw(dev, _) => dev.run(at),
        Layer::Qcow2(_) => Run::Data(max),
    };
    let (data, n) = match run {
        Run::Data(bytes) => (true, bytes),
        Run::Hole(bytes) => (false, bytes.unwrap_or(u64::MAX)),
    };
    BlockStatus {
        start: at,
        length: n.min(max),
        data,
        zero: !data,
        compressed: false,
        present: true,
        depth,
        offset: Some(at),
    }
}
