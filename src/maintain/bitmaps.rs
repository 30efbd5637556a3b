//! What persistent bitmaps refer to (`qcow2_check_bitmaps_refcounts`).

use byteorder::{BigEndian, ByteOrder};

use crate::error::Result;
use crate::format::extensions::Extensions;
use crate::format::geometry::Geometry;
use crate::image::device::Device;

/// Bytes of a directory entry in front of its name (QEMU's `Qcow2BitmapDirEntry`).
const ENTRY: usize = 24;
/// QEMU's limit for the clusters of one bitmap, in bytes (`BME_MAX_PHYS_SIZE`).
const MAX_BYTES: u64 = 0x2000_0000;
/// QEMU's limits for granularity and name.
const GRANULARITY: std::ops::RangeInclusive<u8> = 9..=31;
const MAX_NAME: usize = 1023;
const IN_USE: u32 = 1;
const KNOWN_FLAGS: u32 = 3;
const DIRTY_TRACKING: u8 = 1;
/// Reserved bits of an entry in a bitmap table, and its offset.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;

/// The table of one bitmap: (offset, entries).
pub(super) type Table = (u64, u64);

/// The tables that the directory names; none if the directory is damaged.
pub(super) fn tables(
    dev: &mut Device,
    g: Geometry,
    ext: &Extensions,
    disk_size: u64,
) -> Result<Option<Vec<Table>>> {
    let Some((offset, bytes)) = ext.bitmap_directory else {
        return Ok(Some(Vec::new()));
    };
    let dir = dev.read_vec("Could not read the bitmap directory", offset, bytes)?;
    let mut rest = dir.as_slice();
    let mut tables = Vec::new();
    while !rest.is_empty() {
        let Some((table, len)) = entry(g, rest, disk_size) else {
            return Ok(None);
        };
        tables.push(table);
        if tables.len() as u64 > ext.nb_bitmaps.into() {
            return Ok(None);
        }
        let Some(next) = rest.get(len..) else {
            return Ok(None);
        };
        rest = next;
    }
    Ok((tables.len() as u64 == ext.nb_bitmaps.into()).then_some(tables))
}

/// The table that the entry at the start of `dir` names, and the entry's length.
fn entry(g: Geometry, dir: &[u8], disk_size: u64) -> Option<(Table, usize)> {
    let fixed = dir.get(..ENTRY)?;
    let table_offset = BigEndian::read_u64(fixed);
    let u32_at = |at: usize| fixed.get(at..).map_or(0, BigEndian::read_u32);
    let byte_at = |at: usize| fixed.get(at).copied().unwrap_or(0);
    let (size, flags) = (u64::from(u32_at(8)), u32_at(12));
    let (kind, granularity) = (byte_at(16), byte_at(17));
    let name = usize::from(fixed.get(18..).map_or(0, BigEndian::read_u16));
    let extra = u32_at(20);
    let bytes = size.checked_shl(g.cluster_bits)?;
    let good = size != 0
        && table_offset != 0
        && g.in_cluster(table_offset) == 0
        && bytes <= MAX_BYTES
        && GRANULARITY.contains(&granularity)
        && flags & !KNOWN_FLAGS == 0
        && name <= MAX_NAME
        && kind == DIRTY_TRACKING
        && extra == 0;
    let covered = (u128::from(bytes) * 8) << granularity.min(31);
    if !good || (flags & IN_USE == 0 && u128::from(disk_size) > covered) {
        return None;
    }
    let len = ENTRY.checked_add(name)?.checked_next_multiple_of(8)?;
    (len <= dir.len()).then_some(((table_offset, size), len))
}

/// The cluster that an entry of a bitmap table names, 0 for none; no answer if the entry is damaged.
pub(super) fn cluster(g: Geometry, entry: u64) -> Option<u64> {
    let offset = entry & OFFSET;
    let bad = entry & RESERVED != 0
        || (offset != 0 && (entry & ALL_ONES != 0 || g.in_cluster(offset) != 0));
    (!bad).then_some(offset)
}
