//! Small images made by hand.

/// A word of a table.
pub fn put(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

/// An image of `size` bytes without data, of so many clusters, all counted: header, refcount table, refcount block, and
/// somewhere the L1 table.
pub fn empty(bits: u32, size: u64, clusters: usize, l1: usize) -> Vec<u8> {
    let cluster = 1 << bits;
    let mut image = vec![0; clusters * cluster];
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    image[20..24].copy_from_slice(&bits.to_be_bytes());
    put(&mut image, 24, size);
    let entries = (size >> bits) as u32 / (cluster / 8) as u32;
    image[36..40].copy_from_slice(&entries.to_be_bytes());
    put(&mut image, 40, (l1 * cluster) as u64);
    put(&mut image, 48, cluster as u64);
    image[56..60].copy_from_slice(&1u32.to_be_bytes());
    image[96..104].copy_from_slice(&[0, 0, 0, 4, 0, 0, 0, 104]);
    put(&mut image, cluster, 2 * cluster as u64);
    for n in 0..clusters {
        image[2 * cluster + 2 * n + 1] = 1;
    }
    image
}
