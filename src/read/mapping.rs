//! Where guest data is: extents, and reading the disk now seen.

use super::packed::{unpack_all, Portion, ToUnpack, MOST_CLUSTERS};
use crate::error::{Error, Result};
use crate::format::compress;
use crate::format::entry::{self, Cluster, OFFSET_MASK};
use crate::format::geometry::{Geometry, MAX_L1_BYTES, TABLE_ENTRY};
use crate::format::header::validate_table;
use crate::image::device::Device;
use crate::image::reading::Layer;
use crate::image::reading::{L2Cache, Unpacked};
use crate::image::{device, Image};
use crate::room;
use byteorder::{BigEndian, ByteOrder};

/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

/// What a run of guest bytes is in one image, backing files left aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Nothing here: the backing file shows through, or zeros. A cluster may be held at this
    /// offset for other subclusters.
    Unallocated(Option<u64>),
    /// Zeros; a cluster may be held at this offset.
    Zero(Option<u64>),
    /// The file's bytes from this offset (of the external data file, if there is one).
    Data(u64),
    /// Within one compressed cluster: the entry, and the first byte's place in the cluster.
    Compressed { entry: u64, at: u64 },
}

impl Extent {
    /// The extent `by` bytes further on.
    fn advanced(self, by: u64) -> Extent {
        match self {
            Extent::Data(host) => Extent::Data(host.saturating_add(by)),
            Extent::Unallocated(Some(host)) => Extent::Unallocated(Some(host.saturating_add(by))),
            Extent::Zero(Some(host)) => Extent::Zero(Some(host.saturating_add(by))),
            other => other,
        }
    }
}

/// Bytes of an L2 table that are read at once.
fn slice_bytes(g: Geometry) -> u64 {
    g.cluster_size().min(L2Cache::SLICE)
}

impl Image {
    /// Read `buf.len()` bytes of the disk now seen, from `offset` (QEMU's `qcow2_co_preadv`).
    ///
    /// # Errors
    /// `EIO` past the end of the disk and for damaged tables or compressed clusters; `ENOTSUP` for
    /// encrypted guest data and for backing files that cannot or must not be opened.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.begin_read()?;
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|e| e > self.length()) {
            return Err(Error::Io {
                op: "Read past the end of the disk",
                offset,
                source: std::io::Error::from_raw_os_error(libc::EIO),
            });
        }
        self.read_through(None, offset, buf)
    }

    /// Read VM state from `pos` on: of the snapshot that `load_tmp` shows, or of the one that goto made
    /// current (QEMU's `qcow2_load_vmstate`). It stands behind the disk in the L1 table.
    ///
    /// # Errors
    /// `EIO` for a position beyond what an L1 table can reach; else as [`Image::read`].
    pub fn load_vmstate(&mut self, pos: u64, buf: &mut [u8]) -> Result<()> {
        self.begin_read()?;
        let g = self.header.geometry;
        let start = g.guest_of_l1(g.l1_entries_for(self.length()));
        let offset = start.and_then(|s| s.checked_add(pos));
        let end = offset
            .and_then(|o| o.checked_add(buf.len() as u64))
            .filter(|e| *e <= i64::MAX as u64);
        match (offset, end) {
            (Some(offset), Some(_)) => self.read_through(None, offset, buf),
            _ => Err(Error::Corrupt(
                "The VM state position is out of range".into(),
            )),
        }
    }

    /// Read, whatever the disk's size, through the backing chain: the state that this L1 table maps,
    /// or the disk now seen.
    pub(crate) fn read_through(
        &mut self,
        l1: Option<&[u64]>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        if self.header.crypt_method != 0 {
            return Err(Error::Unsupported(
                "Reading encrypted guest data is not supported".into(),
            ));
        }
        self.read_from(0, l1, offset, buf)
    }

    /// Read what the backing file shows; zeros behind its end.
    pub(crate) fn read_backing(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_from(1, None, offset, buf)
    }

    /// Read from this layer of the chain and those behind it.
    fn read_from(
        &mut self,
        layer: usize,
        l1: Option<&[u64]>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        // Pieces still to read: (layer, offset, from, to); layer 0 is the image itself.
        let mut todo = vec![(layer, offset, 0usize, buf.len())];
        while let Some((layer, at, from, to)) = todo.pop() {
            let Some(part) = buf.get_mut(from..to).filter(|p| !p.is_empty()) else {
                continue;
            };
            match self.read_layer(l1, layer, at, part)? {
                // What the layer has is read; what it leaves to those behind follows.
                Some((done, through)) => {
                    let mid = from + done;
                    if mid + through < to {
                        let rest = (layer, at + (done + through) as u64, mid + through, to);
                        room::push(&mut todo, rest)?;
                    }
                    room::push(&mut todo, (layer + 1, at + done as u64, mid, mid + through))?;
                }
                None => continue,
            }
        }
        Ok(())
    }

    /// Read from one layer until something is not allocated there: returns how many bytes were read
    /// and how many behind them belong to the layers behind. `None`: all read.
    fn read_layer(
        &mut self,
        l1: Option<&[u64]>,
        layer: usize,
        at: u64,
        part: &mut [u8],
    ) -> Result<Option<(usize, usize)>> {
        if layer == 0 {
            return self.read_own(l1, at, part);
        }
        self.open_chain()?;
        let found = self
            .behind
            .chain
            .as_mut()
            .and_then(|c| c.get_mut(layer - 1));
        let Some(found) = found else {
            part.fill(0);
            return Ok(None);
        };
        let inside = found.length().saturating_sub(at).min(part.len() as u64) as usize;
        let (part, beyond) = part.split_at_mut(inside);
        beyond.fill(0);
        match found {
            Layer::Raw(dev, _) => dev
                .read("Could not read the backing file", at, part)
                .map(|()| None),
            Layer::Qcow2(image) => {
                if image.header.crypt_method != 0 {
                    return Err(Error::Unsupported(
                        "Reading encrypted guest data is not supported".into(),
                    ));
                }
                image.read_own(None, at, part)
            }
        }
    }

    /// The part of [`Image::read_layer`] that concerns this image alone.
    fn read_own(
        &mut self,
        l1: Option<&[u64]>,
        at: u64,
        part: &mut [u8],
    ) -> Result<Option<(usize, usize)>> {
        let mut done = 0;
        let cluster = self.header.geometry.cluster_size();
        while done < part.len() {
            let rest = part.get_mut(done..).unwrap_or_default();
            let (extent, n) = self.extent(l1, at + done as u64, rest.len() as u64)?;
            let n = n as usize;
            if matches!(extent, Extent::Compressed { at: 0, .. })
                && n as u64 == cluster
                && n < rest.len()
            {
                done += self.read_compressed_run(l1, at + done as u64, rest)?;
                continue;
            }
            let piece = rest.get_mut(..n).unwrap_or_default();
            match extent {
                Extent::Unallocated(_) if self.backing_file.is_empty() => piece.fill(0),
                Extent::Unallocated(_) => return Ok(Some((done, n))),
                Extent::Zero(_) => piece.fill(0),
                Extent::Data(host) => {
                    self.data_device()?
                        .read("Could not read guest data", host, piece)?
                }
                Extent::Compressed { entry, at } => self.read_compressed(entry, at, piece)?,
            }
            done += n;
        }
        Ok(None)
    }

    pub(crate) fn data_device(&mut self) -> Result<&mut Device> {
        if self.header.has_data_file() {
            return self.data_file();
        }
        Ok(&mut self.dev)
    }

    /// Where the bytes of a compressed cluster are; their end is known to a sector only.
    pub(super) fn packed(&self, entry: u64) -> Result<(u64, u64)> {
        let Cluster::Compressed { offset, length } = entry::cluster(self.header.geometry, entry)
        else {
            return Err(Error::Corrupt("Not a compressed cluster".into()));
        };
        if self.header.has_data_file() {
            return Err(Error::Corrupt(
                "Compressed cluster entry found in an image with an external data file".into(),
            ));
        }
        Ok((offset, length))
    }

    /// Read whole compressed clusters from `guest` on, as far as they follow one another, and no
    /// more than a portion of the file at once: neighbours in the file in one request, then
    /// unpacked on all processors. Returns how much of `out` that is: at least one cluster.
    fn read_compressed_run(
        &mut self,
        l1: Option<&[u64]>,
        guest: u64,
        out: &mut [u8],
    ) -> Result<usize> {
        let size = self.header.geometry.cluster_size();
        let mut portion = Portion::default();
        for n in 0..(out.len() as u64 / size).min(MOST_CLUSTERS) {
            let (extent, _) = self.extent_at(l1, guest + n * size, size)?;
            let Extent::Compressed { entry, at: 0 } = extent else {
                break;
            };
            let (offset, bytes) = self.packed(entry)?;
            if !portion.takes(bytes) {
                break;
            }
            portion.add(offset, bytes)?;
        }
        let mut packed = Vec::new();
        portion.read(&mut self.dev, &mut packed)?;
        let places = portion.clusters.into_iter();
        let mut jobs = room::collected(places.zip(out.chunks_exact_mut(size as usize)).map(
            |(place, out)| ToUnpack {
                packed: packed.get(place).unwrap_or_default(),
                out,
                done: Err(Error::NoMemory(size)),
            },
        ))?;
        unpack_all(self.header.compression, &mut jobs);
        let done = jobs.len() * size as usize;
        jobs.into_iter().try_for_each(|job| job.done.map(|_| ()))?;
        Ok(done)
    }

    fn read_compressed(&mut self, entry: u64, at: u64, piece: &mut [u8]) -> Result<()> {
        if self
            .caches
            .unpacked
            .as_ref()
            .is_none_or(|u| u.entry != entry)
        {
            let (offset, length) = self.packed(entry)?;
            self.caches.unpacked = None;
            let packed =
                self.dev
                    .read_vec("Could not read a compressed cluster", offset, length)?;
            let mut bytes = device::zeroed(self.header.geometry.cluster_size())?;
            compress::unpack(self.header.compression, &packed, &mut bytes)?;
            self.caches.unpacked = Some(Unpacked { entry, bytes });
        }
        let from = at as usize;
        let bytes = self
            .caches
            .unpacked
            .as_ref()
            .and_then(|u| u.bytes.get(from..from + piece.len()));
        piece.copy_from_slice(
            bytes.ok_or_else(|| Error::Corrupt("Read behind a compressed cluster".into()))?,
        );
        Ok(())
    }

    /// What the guest bytes from `guest` on are, and for how many of `max` bytes that holds. Runs
    /// that go on in the file are given whole, within one L2 table.
    pub(crate) fn extent(
        &mut self,
        l1: Option<&[u64]>,
        guest: u64,
        max: u64,
    ) -> Result<(Extent, u64)> {
        let (first, mut n) = self.extent_at(l1, guest, max)?;
        let g = self.header.geometry;
        let l1_index = g.l1_index(guest);
        while n < max {
            let next = guest.saturating_add(n);
            if g.l1_index(next) != l1_index || matches!(first, Extent::Compressed { .. }) {
                break;
            }
            let (extent, more) = self.extent_at(l1, next, max - n)?;
            if extent != first.advanced(n) {
                break;
            }
            n += more;
        }
        Ok((first, n.min(max)))
    }

    /// The extent at `guest`, at least up to the end of its cluster or subcluster; up to the end of
    /// the next L2 table's range where there is no table.
    fn extent_at(&mut self, l1: Option<&[u64]>, guest: u64, max: u64) -> Result<(Extent, u64)> {
        let g = self.header.geometry;
        let shown = || self.view.as_ref().map_or(&self.l1, |v| &v.l1);
        let l1 = l1.unwrap_or_else(|| shown());
        let slot = l1.get(g.l1_index(guest) as usize).copied().unwrap_or(0);
        let table = slot & OFFSET_MASK;
        // A table behind the end of the file is all zeros, and an L1 may name millions of them.
        let absent = table == 0 || g.in_cluster(table) == 0 && self.dev.ends_before(table)?;
        if absent {
            // A snapshot's disk may be said to be exabytes long: nothing is behind its L1 table.
            let (mut index, mut end) = (g.l1_index(guest), guest);
            while end - guest < max {
                index = index.saturating_add(1);
                let behind = (index as usize) < l1.len();
                end = g.guest_of_l1(index).filter(|_| behind).unwrap_or(u64::MAX);
                if l1.get(index as usize).is_some_and(|e| e & OFFSET_MASK != 0) {
                    break;
                }
            }
            return Ok((Extent::Unallocated(None), end - guest));
        }
        let (word, bitmap) = self.l2_entry(table, guest)?;
        let (extent, n) = self.entry_extent(word, bitmap, guest)?;
        // Whole clusters behind it that are alike, if all of this one is.
        let whole = !g.extended_l2 || [0, 0xffff_ffff, 0xffff_ffff << 32].contains(&bitmap);
        let more = match extent {
            Extent::Compressed { .. } => 0,
            _ if !whole => 0,
            Extent::Data(_) | Extent::Zero(Some(_)) | Extent::Unallocated(Some(_)) => {
                self.alike(table, guest, max, g.cluster_size())
            }
            _ => self.alike(table, guest, max, 0),
        };
        Ok((extent, n + more))
    }

    /// What an L2 entry (with its subcluster bitmap) says of the bytes from `guest` on, and for how
    /// many: to the end of the cluster, or of the subclusters that are alike.
    pub(crate) fn entry_extent(&self, word: u64, bitmap: u64, guest: u64) -> Result<(Extent, u64)> {
        let g = self.header.geometry;
        let at = g.in_cluster(guest);
        let cluster = entry::cluster(g, word);
        let host = match cluster {
            Cluster::Standard(host) | Cluster::ZeroAllocated(host) if g.in_cluster(host) != 0 => {
                return Err(Error::Corrupt(format!(
                    "Cluster allocation offset {host:#x} unaligned (guest offset: {guest:#x})"
                )));
            }
            Cluster::Standard(host) | Cluster::ZeroAllocated(host) => Some(host + at),
            // In an external data file offset 0 is a place like any other.
            Cluster::Unallocated if self.header.has_data_file() && word & entry::COPIED != 0 => {
                Some(at)
            }
            _ => None,
        };
        if self.header.version < 3
            && matches!(cluster, Cluster::ZeroPlain | Cluster::ZeroAllocated(_))
        {
            return Err(Error::Corrupt(format!(
                "Zero cluster entry found in pre-v3 image (guest offset: {guest:#x})"
            )));
        }
        if let Cluster::Compressed { .. } = cluster {
            return Ok((
                Extent::Compressed { entry: word, at },
                g.cluster_size() - at,
            ));
        }
        if !g.extended_l2 {
            let extent = match (cluster, host) {
                (Cluster::ZeroPlain | Cluster::ZeroAllocated(_), host) => Extent::Zero(host),
                (_, Some(host)) => Extent::Data(host),
                (_, None) => Extent::Unallocated(None),
            };
            return Ok((extent, g.cluster_size() - at));
        }
        let size = g.cluster_size() / SUBCLUSTERS;
        let (allocated, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
        if allocated & zero != 0 || (host.is_none() && allocated != 0) {
            return Err(Error::Corrupt(format!(
                "Invalid subcluster bitmap {bitmap:#x} (guest offset: {guest:#x})"
            )));
        }
        let index = at / size;
        let extent = match (allocated >> index & 1, zero >> index & 1, host) {
            (_, 1, host) => Extent::Zero(host),
            (1, _, Some(host)) => Extent::Data(host),
            (_, _, host) => Extent::Unallocated(host),
        };
        // The subclusters behind it that are alike.
        let bits = |map: u64| (map >> index) as u32;
        let wanted = (allocated >> index & 1, zero >> index & 1);
        let differ = (bits(allocated) ^ if wanted.0 == 1 { u32::MAX } else { 0 })
            | (bits(zero) ^ if wanted.1 == 1 { u32::MAX } else { 0 });
        let same = u64::from(differ.trailing_zeros()).clamp(1, SUBCLUSTERS - index);
        Ok((extent, size * same - at % size))
    }

    /// Bytes behind the cluster of `guest` that are as it is and go on in the file where it does
    /// (`stride` bytes further on with each entry): whole entries of the slice in the cache, no
    /// more of them than `max` bytes need.
    fn alike(&self, table: u64, guest: u64, max: u64, stride: u64) -> u64 {
        let g = self.header.geometry;
        let size = g.l2_entry_size();
        let (offset, at) = self.slice_of(table, guest);
        let Some(slice) = self.caches.l2.get(offset) else {
            return 0;
        };
        // Bits that say nothing here are left out; COPIED tells offset 0 of a data file from none.
        let mut mask = OFFSET_MASK | entry::COMPRESSED;
        if !g.extended_l2 {
            mask |= entry::ZERO;
        }
        if self.header.has_data_file() {
            mask |= entry::COPIED;
        }
        let mut words = slice.get(at..).unwrap_or_default().chunks_exact(size);
        let Some(first) = words.next() else {
            return 0;
        };
        let bitmap = first.get(8..);
        let mut expected = BigEndian::read_u64(first) & mask;
        let most = max.div_ceil(g.cluster_size());
        let mut count = 0;
        for word in words {
            expected = expected.wrapping_add(stride);
            if count >= most
                || BigEndian::read_u64(word) & mask != expected
                || word.get(8..) != bitmap
            {
                break;
            }
            count += 1;
        }
        count * g.cluster_size()
    }

    /// The L2 table at `table` has been read already: have the slice of it that maps `guest` where
    /// reads look for it.
    pub(crate) fn keep_slice(&mut self, table: u64, guest: u64, bytes: &[u8]) -> Result<()> {
        let (offset, _) = self.slice_of(table, guest);
        let from = (offset - table) as usize;
        let slice = bytes.get(from..from + slice_bytes(self.header.geometry) as usize);
        if let (None, Some(slice)) = (self.caches.l2.get(offset), slice) {
            let mut copy = device::zeroed(slice.len() as u64)?;
            copy.copy_from_slice(slice);
            self.caches.l2.put(offset, copy);
        }
        Ok(())
    }

    /// The slice of an L2 table that the entry for a guest offset is in, and the entry's place there.
    fn slice_of(&self, table: u64, guest: u64) -> (u64, usize) {
        let g = self.header.geometry;
        let at = g.l2_index(guest) * g.l2_entry_size() as u64;
        let within = at % slice_bytes(g);
        (table.saturating_add(at - within), within as usize)
    }

    /// The L2 entry for a guest offset in the table at `table`, and its subcluster bitmap.
    fn l2_entry(&mut self, table: u64, guest: u64) -> Result<(u64, u64)> {
        let g = self.header.geometry;
        if g.in_cluster(table) != 0 {
            return Err(Error::Corrupt(format!(
                "L2 table offset {table:#x} unaligned"
            )));
        }
        let (offset, at) = self.slice_of(table, guest);
        if self.caches.l2.get(offset).is_none() {
            let bytes = self
                .dev
                .read_vec("Could not read an L2 table", offset, slice_bytes(g))?;
            self.caches.l2.put(offset, bytes);
        }
        let word = self
            .caches
            .l2
            .get(offset)
            .and_then(|slice| slice.get(at..at + g.l2_entry_size()))
            .unwrap_or_default();
        let bitmap = if g.extended_l2 {
            word.get(8..).map_or(0, BigEndian::read_u64)
        } else {
            0
        };
        Ok((word.get(..8).map_or(0, BigEndian::read_u64), bitmap))
    }

    /// Is this a place for a snapshot's L1 table, and wholly in the file?
    pub(crate) fn check_snapshot_l1(&mut self, offset: u64, entries: u32) -> Result<()> {
        let g = self.header.geometry;
        validate_table(
            g,
            offset,
            entries.into(),
            TABLE_ENTRY,
            MAX_L1_BYTES,
            "Snapshot L1 table",
        )?;
        let bytes = u64::from(entries) * TABLE_ENTRY;
        self.dev
            .check_inside(format_args!("The snapshot's L1 table"), offset, bytes)
    }

    /// The L1 table of a snapshot, checked as QEMU checks it (`qcow2_validate_table`), and whole.
    pub(crate) fn snapshot_l1(&mut self, offset: u64, entries: u32) -> Result<Vec<u64>> {
        self.check_snapshot_l1(offset, entries)?;
        let bytes = u64::from(entries) * TABLE_ENTRY;
        let table = self
            .dev
            .read_vec("Failed to read l1 table for snapshot", offset, bytes)?;
        device::words(&table)
    }
}
