//! Words of the L1, L2 and refcount tables, and what they mean.

use super::geometry::Geometry;

/// Bit 63 of L1 and L2 entries: the refcount of the cluster is exactly one, so that a guest
/// write may go to it in place (`QCOW_OFLAG_COPIED`).
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of L2 entries: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of standard L2 entries: the cluster reads as zeros.
pub const ZERO: u64 = 1;
/// Bits 9 to 55: the offset in an L1 or standard L2 entry (`L1E_OFFSET_MASK`).
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 9 to 63: the offset in a refcount table entry (`REFT_OFFSET_MASK`).
pub const REFTABLE_OFFSET_MASK: u64 = 0xffff_ffff_ffff_fe00;
/// The bitmap of an extended L2 entry that says "all 32 subclusters read as zeros".
pub const SUBCLUSTERS_ALL_ZERO: u64 = 0xffff_ffff_0000_0000;
/// Compressed data is counted in sectors of this many bytes.
const COMPRESSED_SECTOR: u64 = 512;

/// What a standard or compressed L2 entry refers to (`qcow2_get_cluster_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Nothing here: backing file or zeros.
    Unallocated,
    /// Zeros, no cluster held.
    ZeroPlain,
    /// Zeros, and a cluster is held at this offset.
    ZeroAllocated(u64),
    /// Data at this offset.
    Standard(u64),
    /// Compressed data: the bytes `offset..offset + length` of the file.
    Compressed {
        /// First byte, at any alignment.
        offset: u64,
        /// Bytes up to the end of the last 512-byte sector.
        length: u64,
    },
}

/// The meaning of an L2 entry's first word.
#[inline]
pub fn cluster(g: Geometry, entry: u64) -> Cluster {
    let offset = entry & OFFSET_MASK;
    if entry & COMPRESSED != 0 {
        compressed(g, entry)
    } else if entry & ZERO != 0 && !g.extended_l2 {
        if offset != 0 {
            Cluster::ZeroAllocated(offset)
        } else {
            Cluster::ZeroPlain
        }
    } else if offset == 0 {
        Cluster::Unallocated
    } else {
        Cluster::Standard(offset)
    }
}

/// Does bit 63 of this L2 entry hang on a count: is it [`Cluster::Standard`] or
/// [`Cluster::ZeroAllocated`]?
#[inline(always)]
pub fn is_counted(entry: u64) -> bool {
    entry & COMPRESSED == 0 && entry & OFFSET_MASK != 0
}

/// Split a compressed entry: bits 0..x are the offset and x..62 the number of further sectors,
/// where x = 62 - (cluster_bits - 8) (`qcow2_parse_compressed_l2_entry`).
#[allow(clippy::arithmetic_side_effects)] // 8 < cluster_bits < 62; the sum is below 2^62 + 2^22
fn compressed(g: Geometry, entry: u64) -> Cluster {
    let shift = 62 - (g.cluster_bits - 8);
    let offset = entry & ((1 << shift) - 1);
    let sectors = ((entry >> shift) & ((1 << (g.cluster_bits - 8)) - 1)) + 1;
    let length = sectors * COMPRESSED_SECTOR - (offset & (COMPRESSED_SECTOR - 1));
    Cluster::Compressed { offset, length }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_entry_is_told_from_the_others() {
        for extended in [false, true] {
            let g = Geometry::new(16, 4, extended);
            let zero = |plain, as_bits| if extended { as_bits } else { plain };
            let standard = Cluster::Standard(0x30000);
            for (entry, want, counted) in [
                (0, Cluster::Unallocated, false),
                (0x30000, standard, true),
                (COPIED | 0x30000, standard, true),
                // Reserved bits say nothing.
                (0x3f << 56 | 0x1fe | 0x30000, standard, true),
                (ZERO, zero(Cluster::ZeroPlain, Cluster::Unallocated), false),
                (
                    ZERO | 0x30000,
                    zero(Cluster::ZeroAllocated(0x30000), standard),
                    true,
                ),
            ] {
                assert_eq!(cluster(g, entry), want, "{entry:#x}");
                assert_eq!(is_counted(entry), counted, "{entry:#x}");
            }
        }
        assert!(!is_counted(COMPRESSED | 0x30000));
    }

    #[test]
    fn a_compressed_entry_has_its_offset_below_its_sectors() {
        for cluster_bits in 9..=21 {
            let g = Geometry::new(cluster_bits, 4, false);
            // As the specification has it.
            let x = 62 - (cluster_bits - 8);
            let most = (1 << (cluster_bits - 8)) - 1;
            for (offset, more) in [(0x1200u64, 0u64), (0x12f3, 1), ((1 << x) - 1, most)] {
                let entry = COMPRESSED | more << x | offset;
                let length = (more + 1) * 512 - offset % 512;
                assert_eq!(cluster(g, entry), Cluster::Compressed { offset, length });
            }
        }
    }
}
