//! Sizes that follow from the header: every shift of the crate is here.

/// QEMU's limit for an L1 table, in bytes (`QCOW_MAX_L1_SIZE`).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// QEMU's limit for the refcount table, in bytes (`QCOW_MAX_REFTABLE_SIZE`).
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// QEMU's limit for the number of snapshots (`QCOW_MAX_SNAPSHOTS`).
pub const MAX_SNAPSHOTS: u64 = 65_536;
/// QEMU's limit for the snapshot table, in bytes (`QCOW_MAX_SNAPSHOTS_SIZE`).
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * MAX_SNAPSHOTS;
/// QEMU's limit for the extra data of one entry, in bytes (`QCOW_MAX_SNAPSHOT_EXTRA_DATA`).
pub const MAX_EXTRA_DATA: u32 = 1024;
/// The largest cluster offset that an L2 entry can hold (`QCOW_MAX_CLUSTER_OFFSET`).
pub const MAX_CLUSTER_OFFSET: u64 = (1 << 56) - 1;
/// Bytes of an entry in the L1 table and in the refcount table.
pub const TABLE_ENTRY: u64 = 8;
/// QEMU's default bound of the L2 cache, in bytes (`DEFAULT_L2_CACHE_MAX_SIZE`).
const L2_CACHE_MAX: u64 = 32 << 20;

/// The number of a cluster in the image file: its offset divided by the cluster size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostCluster(pub u64);

/// Sizes and shifts of one image. Plain numbers, made once by [`Geometry::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the refcount width in bits, 0 to 6.
    pub refcount_order: u32,
    /// L2 entries are 16 bytes long (extended L2, subclusters).
    pub extended_l2: bool,
}

#[allow(clippy::arithmetic_side_effects)] // widths are bounded by `new`, see each function
impl Geometry {
    /// `cluster_bits` must be 9..=21 and `refcount_order` 0..=6, which the header check ensures.
    pub fn new(cluster_bits: u32, refcount_order: u32, extended_l2: bool) -> Geometry {
        debug_assert!((9..=21).contains(&cluster_bits) && refcount_order <= 6);
        Geometry {
            cluster_bits,
            refcount_order,
            extended_l2,
        }
    }

    /// Bytes of a cluster.
    #[inline]
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of a cluster, for buffers.
    #[inline]
    pub fn cluster_len(self) -> usize {
        1 << self.cluster_bits
    }

    /// Offset within its cluster.
    #[inline]
    pub fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The cluster that holds `offset`.
    #[inline]
    pub fn cluster_of(self, offset: u64) -> HostCluster {
        HostCluster(offset >> self.cluster_bits)
    }

    /// Offset of a cluster's first byte. Saturates, so that a number taken from a damaged image cannot wrap.
    #[inline]
    pub fn offset_of(self, cluster: HostCluster) -> u64 {
        if cluster.0 >> (64 - self.cluster_bits) != 0 {
            return !(self.cluster_size() - 1);
        }
        cluster.0 << self.cluster_bits
    }

    /// Clusters that `bytes` need.
    #[inline]
    pub fn clusters_for(self, bytes: u64) -> u64 {
        (bytes >> self.cluster_bits) + u64::from(self.in_cluster(bytes) != 0)
    }

    /// `offset` rounded up to a cluster; saturates at the last cluster boundary below 2^64.
    #[inline]
    pub fn round_up(self, offset: u64) -> u64 {
        self.offset_of(HostCluster(self.clusters_for(offset)))
    }

    /// Bytes of an L2 entry.
    #[inline]
    pub fn l2_entry_size(self) -> usize {
        if self.extended_l2 {
            16
        } else {
            8
        }
    }

    /// log2 of the entries in an L2 table.
    #[inline]
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Entries in an L2 table.
    #[inline]
    pub fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// L1 entries that a disk of `size` bytes needs (QEMU's `size_to_l1`).
    #[inline]
    pub fn l1_entries_for(self, size: u64) -> u64 {
        let shift = self.cluster_bits + self.l2_bits();
        (size >> shift) + u64::from(size & ((1 << shift) - 1) != 0)
    }

    /// Index in the L1 table for a guest offset.
    #[inline]
    pub fn l1_index(self, guest: u64) -> u64 {
        guest >> (self.cluster_bits + self.l2_bits())
    }

    /// Index in the L2 table for a guest offset.
    #[inline]
    pub fn l2_index(self, guest: u64) -> u64 {
        (guest >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// Guest offset that the first entry of the L2 table at `l1_index` maps, if it is below 2^64.
    #[inline]
    pub fn guest_of_l1(self, l1_index: u64) -> Option<u64> {
        let shift = self.cluster_bits + self.l2_bits();
        (l1_index >> (64 - shift) == 0).then(|| l1_index << shift)
    }

    /// Bytes of the L2 slice that QEMU's cache writes at once on a disk of `disk_size` bytes: a
    /// cluster, but 4 KiB where 32 MiB of cache do not cover the disk (`read_cache_sizes`).
    pub fn l2_slice_bytes(self, disk_size: u64) -> u64 {
        let disk_clusters = self.clusters_for(disk_size);
        let needed = disk_clusters.saturating_mul(self.l2_entry_size() as u64);
        let rounded = self.round_up(needed);
        if rounded > L2_CACHE_MAX {
            self.cluster_size().min(4096)
        } else {
            self.cluster_size()
        }
    }

    /// Bits of a refcount.
    #[inline]
    pub fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount that the width can hold.
    #[inline]
    pub fn refcount_max(self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// log2 of the refcounts in a refcount block.
    #[inline]
    pub fn refblock_bits(self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Refcounts in a refcount block.
    #[inline]
    pub fn refblock_entries(self) -> u64 {
        1 << self.refblock_bits()
    }

    /// Refcounts in `bytes` of fields of this width.
    #[inline]
    pub fn block_entries_in(self, bytes: usize) -> usize {
        (bytes << 3) >> self.refcount_order
    }

    /// Index in the refcount table for a cluster.
    #[inline]
    pub fn reftable_index(self, cluster: HostCluster) -> u64 {
        cluster.0 >> self.refblock_bits()
    }

    /// Index in its refcount block for a cluster.
    #[inline]
    pub fn refblock_index(self, cluster: HostCluster) -> usize {
        (cluster.0 & (self.refblock_entries() - 1)) as usize
    }

    /// The first cluster that the refcount block at `reftable_index` describes.
    #[inline]
    pub fn first_cluster_of_block(self, reftable_index: u64) -> HostCluster {
        HostCluster(reftable_index << self.refblock_bits())
    }

    /// Refcount-table entries in one cluster of the table.
    #[inline]
    pub fn reftable_entries_per_cluster(self) -> u64 {
        self.cluster_size() / TABLE_ENTRY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_qemus() {
        assert_eq!(MAX_L1_BYTES, 33_554_432);
        assert_eq!(MAX_REFTABLE_BYTES, 8_388_608);
        assert_eq!(MAX_SNAPSHOT_TABLE_BYTES, 67_108_864);
        assert_eq!(MAX_CLUSTER_OFFSET, 0x00ff_ffff_ffff_ffff);
    }

    /// Every shift says what a division says.
    #[test]
    fn sizes_and_places_are_those_of_plain_arithmetic() {
        for bits in 9..=21 {
            for order in 0..=6 {
                for (extended, entry) in [(false, 8), (true, 16)] {
                    agrees(Geometry::new(bits, order, extended), entry);
                }
            }
        }
    }

    #[allow(clippy::arithmetic_side_effects)]
    fn agrees(g: Geometry, l2_entry: u64) {
        let cluster = 2u64.pow(g.cluster_bits);
        let (entries, width) = (cluster / l2_entry, 2u64.pow(g.refcount_order));
        let counts = cluster * 8 / width;
        assert_eq!(
            (g.cluster_size(), g.cluster_len()),
            (cluster, cluster as usize)
        );
        assert_eq!(
            (g.l2_entry_size() as u64, g.l2_entries()),
            (l2_entry, entries)
        );
        assert_eq!(2u64.pow(g.l2_bits()), entries);
        assert_eq!(u64::from(g.refcount_bits()), width);
        assert_eq!(u128::from(g.refcount_max()), 2u128.pow(width as u32) - 1);
        assert_eq!(
            (g.refblock_entries(), 2u64.pow(g.refblock_bits())),
            (counts, counts)
        );
        assert_eq!(g.reftable_entries_per_cluster(), cluster / 8);
        assert_eq!(g.block_entries_in(cluster as usize) as u64, counts);
        assert_eq!(g.block_entries_in(8), 64 / width as usize);
        let per_table = cluster * entries;
        let last = u64::MAX / cluster * cluster;
        for at in [
            0,
            1,
            511,
            512,
            cluster,
            per_table,
            5 * per_table,
            counts * cluster,
            1 << 62,
            u64::MAX,
        ] {
            for at in [at.wrapping_sub(1), at, at.wrapping_add(1)] {
                assert_eq!(g.in_cluster(at), at % cluster);
                assert_eq!(g.cluster_of(at), HostCluster(at / cluster));
                assert_eq!(g.clusters_for(at), at.div_ceil(cluster));
                assert_eq!(
                    g.round_up(at),
                    at.checked_next_multiple_of(cluster).unwrap_or(last)
                );
                assert_eq!(
                    g.offset_of(HostCluster(at)),
                    at.checked_mul(cluster).unwrap_or(last)
                );
                assert_eq!(g.l1_entries_for(at), at.div_ceil(per_table));
                assert_eq!(g.l1_index(at), at / per_table);
                assert_eq!(g.l2_index(at), at / cluster % entries);
                assert_eq!(g.guest_of_l1(at), at.checked_mul(per_table));
                assert_eq!(g.reftable_index(HostCluster(at)), at / counts);
                assert_eq!(g.refblock_index(HostCluster(at)) as u64, at % counts);
            }
        }
        assert_eq!(g.first_cluster_of_block(3), HostCluster(3 * counts));
        // QEMU's cache of 32 MiB covers a disk to the cluster, or it has slices.
        let covered = (32 << 20) / l2_entry * cluster;
        assert_eq!(g.l2_slice_bytes(covered), cluster);
        assert_eq!(g.l2_slice_bytes(covered + 1), cluster.min(4096));
    }
}
