//! The image header and its extensions.
//!
//! ```text
//!   0 magic "QFI\xfb"   4 version             8 backing name offset (u64)  16 backing name size
//!  20 cluster_bits     24 size (u64)         32 crypt_method               36 L1 entries
//!  40 L1 offset (u64)  48 reftable offset    56 reftable clusters          60 nb_snapshots
//!  64 snapshots offset 72 incompatible       80 compatible                 88 autoclear
//!  96 refcount_order  100 header_length     104 compression type          105 padding
//! ```
//! Everything that a verb switches (bytes 24 to 71) lies in the first 512-byte sector, so one
//! write of it lands whole or not at all.

use super::compress::Compression;
use super::extensions::{Extensions, Owner};
use super::features;
use super::geometry::{Geometry, MAX_L1_BYTES, MAX_REFTABLE_BYTES, MAX_SNAPSHOTS, TABLE_ENTRY};
use super::{u32_at, u64_at};
use crate::error::{Error, Result};
use crate::words::printable;

/// Bytes of the header that are read at once (QEMU's `sizeof(QCowHeader)`).
pub const HEADER_BYTES: usize = 112;
/// `"QFI\xfb"`.
pub const MAGIC: u32 = 0x5146_49fb;

/// Offset of the place of the backing file's name; its length follows at 16.
pub const AT_BACKING: u64 = 8;
/// Offset of the virtual disk size.
pub const AT_SIZE: u64 = 24;
/// Offset of the L1 entry count, which the L1 offset follows at 40.
pub const AT_L1_SIZE: u64 = 36;
/// Offset of the refcount table's offset; its cluster count follows at 56.
pub const AT_REFTABLE: u64 = 48;
/// Offset of the snapshot count; the table's offset follows at 64.
pub const AT_SNAPSHOTS: u64 = 60;
/// Offset behind the last field that a verb switches.
pub const AFTER_SNAPSHOTS: u64 = 72;
/// Offset of the incompatible feature bits.
pub const AT_INCOMPATIBLE: u64 = 72;
/// Offset of the autoclear feature bits.
pub const AT_AUTOCLEAR: u64 = 88;

/// A header whose fields QEMU would accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size, refcount width, L2 entry size.
    pub geometry: Geometry,
    /// Virtual disk size in bytes, as stored.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Offset of the active L1 table.
    pub l1_offset: u64,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Offset of the refcount table.
    pub reftable_offset: u64,
    /// Clusters of the refcount table.
    pub reftable_clusters: u32,
    /// Snapshots in the table.
    pub nb_snapshots: u32,
    /// Offset of the snapshot table.
    pub snapshots_offset: u64,
    /// Incompatible feature bits.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Bytes of the header, behind which the extensions begin.
    pub header_length: u32,
    /// How compressed clusters are packed.
    pub compression: Compression,
    /// Where the backing file's name stands, and its length; 0 for none.
    pub backing_name: (u64, u32),
}

/// QEMU's check of a table's place and size (`qcow2_validate_table`).
pub fn validate_table(
    g: Geometry,
    offset: u64,
    entries: u64,
    entry_size: u64,
    max_bytes: u64,
    what: &str,
) -> Result<()> {
    if entries > max_bytes.checked_div(entry_size).unwrap_or(0) {
        return Err(Error::TooBig(format!("{what} too large")));
    }
    let bytes = entries.saturating_mul(entry_size);
    if (i64::MAX as u64).saturating_sub(bytes) < offset || g.in_cluster(offset) != 0 {
        return Err(Error::Invalid(format!("{what} offset invalid")));
    }
    Ok(())
}

impl Header {
    /// Check and decode the first [`HEADER_BYTES`] bytes of a file, in QEMU's order
    /// (`qcow2_do_open`). `first_cluster` holds the extensions for the names of unknown features;
    /// it may be shorter than a cluster.
    pub fn parse(first_cluster: &[u8], read_write: bool) -> Result<Header> {
        Header::parse_as(first_cluster, read_write, false)
    }

    /// The header of an image that is going to be checked: the corrupt bit, a missing refcount table
    /// and whatever is said of the snapshot table are accepted, as by QEMU's `BDRV_O_CHECK`.
    pub fn parse_to_check(first_cluster: &[u8]) -> Result<Header> {
        Header::parse_as(first_cluster, false, true)
    }

    fn parse_as(first_cluster: &[u8], read_write: bool, to_check: bool) -> Result<Header> {
        let b = first_cluster;
        if u32_at(b, 0) != MAGIC {
            return Err(Error::Invalid("Image is not in qcow2 format".into()));
        }
        let version = u32_at(b, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::Unsupported(format!(
                "Unsupported qcow2 version {version}"
            )));
        }
        let cluster_bits = u32_at(b, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::Invalid(format!(
                "Unsupported cluster size: 2^{cluster_bits}"
            )));
        }
        let v3 = version == 3;
        let header_length = if v3 { u32_at(b, 100) } else { 72 };
        if v3 && header_length < 104 {
            return Err(Error::Invalid("qcow2 header too short".into()));
        }
        let plain = Geometry::new(cluster_bits, 4, false);
        let cluster_size = plain.cluster_size();
        if u64::from(header_length) > cluster_size {
            return Err(Error::Invalid("qcow2 header exceeds cluster size".into()));
        }
        let backing_offset = u64_at(b, 8);
        if backing_offset > cluster_size {
            return Err(Error::Invalid("Invalid backing file offset".into()));
        }
        let (incompatible, compatible, autoclear, refcount_order) = if v3 {
            (u64_at(b, 72), u64_at(b, 80), u64_at(b, 88), u32_at(b, 96))
        } else {
            (0, 0, 0, 4)
        };
        let compression = if header_length > 104 {
            b.get(104).copied().unwrap_or(0)
        } else {
            0
        };
        check_compression(compression, incompatible)?;

        let unknown = incompatible & !features::INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            let names =
                Extensions::parse_area(b, header_length, ext_end(backing_offset, cluster_size))
                    .unwrap_or_default()
                    .feature_names;
            return Err(Error::Unsupported(format!(
                "Unsupported qcow2 feature(s): {}",
                name_bits(unknown, &names)
            )));
        }
        if incompatible & features::CORRUPT != 0 && read_write {
            return Err(Error::Access(
                "qcow2: Image is corrupt; cannot be opened read/write".into(),
            ));
        }
        let extended_l2 = incompatible & features::EXTENDED_L2 != 0;
        if extended_l2 && cluster_bits < 14 {
            return Err(Error::Invalid(format!(
                "Unsupported subcluster size: {}",
                cluster_size.checked_div(32).unwrap_or(0)
            )));
        }
        if refcount_order > 6 {
            return Err(Error::Invalid(
                "Reference count entry width too large; may not exceed 64 bits".into(),
            ));
        }
        let geometry = Geometry::new(cluster_bits, refcount_order, extended_l2);

        let header = Header {
            version,
            geometry,
            size: u64_at(b, 24),
            crypt_method: u32_at(b, 32),
            l1_offset: u64_at(b, 40),
            l1_size: u32_at(b, 36),
            reftable_offset: u64_at(b, 48),
            reftable_clusters: u32_at(b, 56),
            nb_snapshots: u32_at(b, 60),
            snapshots_offset: u64_at(b, 64),
            incompatible,
            compatible,
            autoclear,
            header_length,
            compression: if compression == 1 {
                Compression::Zstd
            } else {
                Compression::Zlib
            },
            backing_name: (backing_offset, u32_at(b, 16)),
        };
        header.validate_tables(to_check)?;
        Ok(header)
    }

    /// Places and sizes of the refcount table, the snapshot table and the active L1 table.
    fn validate_tables(&self, to_check: bool) -> Result<()> {
        let g = self.geometry;
        if self.reftable_clusters == 0 && !to_check {
            return Err(Error::Invalid(
                "Image does not contain a reference count table".into(),
            ));
        }
        validate_table(
            g,
            self.reftable_offset,
            self.reftable_clusters.into(),
            g.cluster_size(),
            MAX_REFTABLE_BYTES,
            "Reference count table",
        )?;
        if !to_check {
            self.validate_snapshots()?;
        }
        validate_table(
            g,
            self.l1_offset,
            self.l1_size.into(),
            TABLE_ENTRY,
            MAX_L1_BYTES,
            "Active L1 table",
        )?;
        let needed = g.l1_entries_for(self.size);
        if needed > i32::MAX as u64 {
            return Err(Error::TooBig("Image is too big".into()));
        }
        if u64::from(self.l1_size) < needed {
            return Err(Error::Invalid("L1 table is too small".into()));
        }
        Ok(())
    }

    /// Number and place of the snapshots, as QEMU accepts them.
    pub fn validate_snapshots(&self) -> Result<()> {
        validate_snapshots(self.geometry, self.nb_snapshots, self.snapshots_offset)
    }

    /// Take number and place of the snapshots from header bytes 60 to 71.
    pub fn set_snapshots(&mut self, bytes: &[u8]) -> Result<()> {
        let (nb, offset) = (u32_at(bytes, 0), u64_at(bytes, 4));
        validate_snapshots(self.geometry, nb, offset)?;
        (self.nb_snapshots, self.snapshots_offset) = (nb, offset);
        Ok(())
    }

    /// Where the tables stand.
    pub fn places(&self) -> Places {
        Places {
            l1_offset: self.l1_offset,
            l1_size: self.l1_size,
            reftable_offset: self.reftable_offset,
            reftable_clusters: self.reftable_clusters,
        }
    }

    /// What a reader is told.
    pub fn meaning(&self) -> Meaning {
        Meaning {
            size: self.size,
            nb_snapshots: self.nb_snapshots,
            snapshots_offset: self.snapshots_offset,
        }
    }

    /// The header as a publish leaves it.
    pub fn switch(&mut self, places: Places, meaning: Meaning) {
        (self.l1_offset, self.l1_size) = (places.l1_offset, places.l1_size);
        self.reftable_offset = places.reftable_offset;
        self.reftable_clusters = places.reftable_clusters;
        self.size = meaning.size;
        self.nb_snapshots = meaning.nb_snapshots;
        self.snapshots_offset = meaning.snapshots_offset;
    }

    /// The virtual disk size as QEMU uses it: whole 512-byte sectors.
    pub fn disk_size(&self) -> u64 {
        self.size & !511
    }

    /// Bytes of the active L1 table.
    pub fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_size).saturating_mul(TABLE_ENTRY)
    }

    /// Bytes of the refcount table.
    pub fn reftable_bytes(&self) -> u64 {
        u64::from(self.reftable_clusters) << self.geometry.cluster_bits
    }

    /// Is guest data in another file?
    pub fn has_data_file(&self) -> bool {
        self.incompatible & features::DATA_FILE != 0
    }

    /// Bytes at the start of the file that belong to header, extensions and backing file name.
    pub fn extension_end(&self) -> u64 {
        ext_end(self.backing_name.0, self.geometry.cluster_size())
    }

    /// Check and decode the extensions (`qcow2_read_extensions`); `first_cluster` is the whole
    /// first cluster.
    pub fn extensions(&self, first_cluster: &[u8]) -> Result<Extensions> {
        let ext = Extensions::parse_area(first_cluster, self.header_length, self.extension_end())?;
        let owner = Owner {
            geometry: self.geometry,
            crypt_method: self.crypt_method,
            autoclear: self.autoclear,
            data_file: self.has_data_file(),
            area: (self.header_length, self.extension_end()),
        };
        ext.check(&owner, first_cluster)
    }

    /// The backing file's name, empty for none.
    pub fn backing_file<'a>(&self, first_cluster: &'a [u8]) -> Result<&'a [u8]> {
        let (offset, len) = self.backing_name;
        if offset == 0 {
            return Ok(&[]);
        }
        let room = self
            .geometry
            .cluster_size()
            .saturating_sub(offset)
            .min(1023);
        if u64::from(len) > room {
            return Err(Error::Invalid("Backing file name too long".into()));
        }
        let end = offset.saturating_add(len.into());
        let bytes = first_cluster
            .get(offset as usize..end as usize)
            .unwrap_or_default();
        Ok(bytes.split(|b| *b == 0).next().unwrap_or_default())
    }
}

fn validate_snapshots(g: Geometry, nb: u32, offset: u64) -> Result<()> {
    let entry = super::record::FIXED_BYTES;
    let most = entry.saturating_mul(MAX_SNAPSHOTS);
    validate_table(g, offset, nb.into(), entry, most, "Snapshot table")
}

fn ext_end(backing_offset: u64, cluster_size: u64) -> u64 {
    if backing_offset != 0 {
        backing_offset
    } else {
        cluster_size
    }
}

/// Compression type and incompatible bit 3 must agree (`validate_compression_type`).
fn check_compression(kind: u8, incompatible: u64) -> Result<()> {
    if kind > 1 {
        return Err(Error::Unsupported(format!(
            "qcow2: unknown compression type: {kind}"
        )));
    }
    let bit = incompatible & features::COMPRESSION != 0;
    match (kind, bit) {
        (0, true) => Err(Error::Invalid(
            "qcow2: Compression type incompatible feature bit must not be set".into(),
        )),
        (1, false) => Err(Error::Invalid(
            "qcow2: Compression type incompatible feature bit must be set".into(),
        )),
        _ => Ok(()),
    }
}

/// The names of unknown incompatible bits, as the image gives them.
fn name_bits(bits: u64, names: &[(u8, u8, Vec<u8>)]) -> String {
    // The first name of each bit; a table may have tens of thousands.
    let mut named: [Option<&[u8]>; 64] = [None; 64];
    for (_, bit, name) in names
        .iter()
        .filter(|(kind, _, name)| *kind == 0 && !name.is_empty())
    {
        if let Some(slot) = named.get_mut(usize::from(*bit)) {
            slot.get_or_insert(name);
        }
    }
    let mut words = Vec::new();
    for (bit, name) in named.into_iter().enumerate() {
        let bit = 1u64.checked_shl(bit as u32).unwrap_or(0);
        if bits & bit == 0 {
            continue;
        }
        words.push(match name {
            Some(name) => printable(name),
            None => format!("Unknown incompatible feature: {bit:x}"),
        });
    }
    words.join(", ")
}

/// Where the tables stand that the header names. One that moves with its contents changes nothing
/// that a reader sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// Offset of the active L1 table.
    pub l1_offset: u64,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Offset of the refcount table.
    pub reftable_offset: u64,
    /// Clusters of the refcount table.
    pub reftable_clusters: u32,
}

/// What the header tells a reader: how large the disk is, and which snapshots there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meaning {
    /// Virtual disk size in bytes.
    pub size: u64,
    /// Snapshots in the table.
    pub nb_snapshots: u32,
    /// Offset of the snapshot table.
    pub snapshots_offset: u64,
}

/// Bytes from [`AT_SIZE`] on that a publish can switch.
pub const SWITCHED: usize = 48;

/// Bytes 24 to 71: all that a publish can switch, and the encryption method among it.
pub fn encode_switched(places: Places, meaning: Meaning, crypt_method: u32) -> [u8; SWITCHED] {
    let mut b = [0; SWITCHED];
    let words: [&[u8]; 8] = [
        &meaning.size.to_be_bytes(),
        &crypt_method.to_be_bytes(),
        &places.l1_size.to_be_bytes(),
        &places.l1_offset.to_be_bytes(),
        &places.reftable_offset.to_be_bytes(),
        &places.reftable_clusters.to_be_bytes(),
        &meaning.nb_snapshots.to_be_bytes(),
        &meaning.snapshots_offset.to_be_bytes(),
    ];
    let bytes = words.into_iter().flatten();
    b.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    b
}

#[cfg(test)]
mod tests;
