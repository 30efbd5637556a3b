//! Where guest data is: reading the disk now seen.

use super::{device, Image};
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, OFFSET_MASK};
use byteorder::{BigEndian, ByteOrder};

/// What a run of guest bytes is.
enum Source {
    Zeros,
    File(u64),
}

impl Image {
    /// Read `buf.len()` bytes of the disk now seen, from `offset` (QEMU's `qcow2_co_preadv`).
    ///
    /// # Errors
    /// `EIO` past the end of the disk; `ENOTSUP` for compressed or encrypted clusters, external data
    /// files and clusters of a backing file, which this version does not read yet.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.usable()?;
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|e| e > self.length()) {
            return Err(Error::Io {
                op: "Read past the end of the disk",
                offset,
                source: std::io::Error::from_raw_os_error(libc::EIO),
            });
        }
        if self.header.has_data_file() {
            return Err(Error::Unsupported("Reading from an external data file is not supported yet".into()));
        }
        if self.header.crypt_method != 0 {
            return Err(Error::Unsupported("Reading encrypted guest data is not supported".into()));
        }
        let g = self.header.geometry;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let in_cluster = g.in_cluster(at);
            let n = rest.len().min((g.cluster_size() - in_cluster) as usize);
            let (part, behind) = rest.split_at_mut(n);
            if g.extended_l2 {
                self.read_subclusters(at, part)?;
            } else {
                let entry = self.l2_entry(at)?;
                match self.source(entry.0, in_cluster, at)? {
                    Source::Zeros => part.fill(0),
                    Source::File(host) => self.dev.read("Could not read guest data", host, part)?,
                }
            }
            at += n as u64;
            rest = behind;
        }
        Ok(())
    }

    /// The L2 entry for a guest offset, and its subcluster bitmap.
    fn l2_entry(&mut self, guest: u64) -> Result<(u64, u64)> {
        let g = self.header.geometry;
        let l1 = self.view.as_ref().map_or(&self.l1, |v| &v.l1);
        let slot = l1.get(g.l1_index(guest) as usize).copied().unwrap_or(0);
        let table = slot & OFFSET_MASK;
        if table == 0 {
            return Ok((0, 0));
        }
        if g.in_cluster(table) != 0 {
            return Err(Error::Corrupt(format!("L2 table offset {table:#x} unaligned")));
        }
        if self.l2_cache.as_ref().is_none_or(|(offset, _)| *offset != table) {
            self.l2_cache = None;
            let bytes = self.dev.read_vec("Could not read an L2 table", table, g.cluster_size())?;
            self.l2_cache = Some((table, bytes));
        }
        let at = g.l2_index(guest) as usize * g.l2_entry_size();
        let word = self.l2_cache.as_ref().and_then(|(_, t)| t.get(at..at + g.l2_entry_size())).unwrap_or_default();
        let bitmap = if g.extended_l2 { word.get(8..).map_or(0, BigEndian::read_u64) } else { 0 };
        Ok((word.get(..8).map_or(0, BigEndian::read_u64), bitmap))
    }

    fn source(&self, entry: u64, in_cluster: u64, guest: u64) -> Result<Source> {
        let g = self.header.geometry;
        match entry::cluster(g, entry) {
            Cluster::ZeroPlain | Cluster::ZeroAllocated(_) => Ok(Source::Zeros),
            Cluster::Unallocated => self.from_backing(),
            Cluster::Standard(host) => {
                if g.in_cluster(host) != 0 {
                    return Err(Error::Corrupt(format!(
                        "Cluster allocation offset {host:#x} unaligned (guest offset: {guest:#x})"
                    )));
                }
                Ok(Source::File(host + in_cluster))
            }
            Cluster::Compressed { .. } => {
                Err(Error::Unsupported("Reading compressed clusters is not supported yet".into()))
            }
        }
    }

    /// Nothing is allocated: zeros, unless a backing file shows through.
    fn from_backing(&self) -> Result<Source> {
        if self.backing_file.is_empty() {
            return Ok(Source::Zeros);
        }
        Err(Error::Unsupported("Reading from a backing file is not supported yet".into()))
    }

    /// Extended L2: each of 32 subclusters is allocated, zero or neither.
    fn read_subclusters(&mut self, guest: u64, part: &mut [u8]) -> Result<()> {
        let g = self.header.geometry;
        let (entry, bitmap) = self.l2_entry(guest)?;
        let sub = g.cluster_size() / 32;
        let (mut at, mut rest) = (g.in_cluster(guest), part);
        while !rest.is_empty() {
            let index = at / sub;
            let n = rest.len().min((sub - at % sub) as usize);
            let (piece, behind) = rest.split_at_mut(n);
            let (allocated, zero) = (bitmap >> index & 1 != 0, bitmap >> (32 + index) & 1 != 0);
            if entry & entry::COMPRESSED != 0 {
                self.source(entry, at, guest)?;
            } else if allocated && zero {
                return Err(Error::Corrupt(format!("Invalid subcluster bitmap (guest offset: {guest:#x})")));
            }
            let from = match (allocated, zero) {
                (_, true) => Source::Zeros,
                (true, _) if entry & OFFSET_MASK != 0 => self.source(entry, at, guest)?,
                (true, _) => {
                    return Err(Error::Corrupt(format!("Subcluster without a cluster (guest offset: {guest:#x})")))
                }
                (false, false) => self.from_backing()?,
            };
            match from {
                Source::Zeros => piece.fill(0),
                Source::File(host) => self.dev.read("Could not read guest data", host, piece)?,
            }
            at += n as u64;
            rest = behind;
        }
        Ok(())
    }

    /// The L1 table of a snapshot, checked as QEMU checks it (`qcow2_validate_table`).
    pub(crate) fn snapshot_l1(&mut self, offset: u64, entries: u32) -> Result<Vec<u64>> {
        use crate::format::geometry::{MAX_L1_BYTES, TABLE_ENTRY};
        let g = self.header.geometry;
        crate::format::header::validate_table(
            g,
            offset,
            entries.into(),
            TABLE_ENTRY,
            MAX_L1_BYTES,
            "Snapshot L1 table",
        )?;
        let bytes =
            self.dev.read_vec("Failed to read l1 table for snapshot", offset, u64::from(entries) * TABLE_ENTRY)?;
        device::words(&bytes)
    }
}
