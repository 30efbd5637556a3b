//! Feature bits of a version 3 header, and what this library does with each.

/// Incompatible bit 0: refcounts may be wrong (lazy refcounts, not closed cleanly).
pub const DIRTY: u64 = 1;
/// Incompatible bit 1: structures are known to be damaged.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible bit 2: guest data is in another file.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible bit 3: a compression type other than zlib is named in the header.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible bit 4: extended L2 entries with subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// All incompatible bits that are known (`QCOW2_INCOMPAT_MASK`).
pub const INCOMPATIBLE_KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;

/// Autoclear bit 0: the bitmaps extension is consistent.
pub const BITMAPS: u64 = 1;
/// Autoclear bit 1: the external data file is a raw image by itself.
pub const DATA_FILE_RAW: u64 = 1 << 1;
/// All autoclear bits that are known (`QCOW2_AUTOCLEAR_MASK`).
pub const AUTOCLEAR_KNOWN: u64 = BITMAPS | DATA_FILE_RAW;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_those_of_the_specification() {
        assert_eq!(
            [DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2],
            [1, 2, 4, 8, 16]
        );
        assert_eq!(INCOMPATIBLE_KNOWN, 0x1f);
        assert_eq!([BITMAPS, DATA_FILE_RAW, AUTOCLEAR_KNOWN], [1, 2, 3]);
    }
}
