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
