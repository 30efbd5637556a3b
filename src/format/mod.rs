//! Bytes to types and back. No I/O happens here.
//!
//! The layout is that of QEMU's `docs/interop/qcow2.txt`. All integers are big endian. What
//! is read from an image is *raw* until a function of this module has checked it.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

pub mod compress;
pub mod entry;
pub mod extensions;
pub mod features;
pub mod geometry;
pub mod header;
pub mod probe;
pub mod record;
pub mod refblock;
pub mod run;

use byteorder::{BigEndian, ByteOrder};

fn u32_at(b: &[u8], at: usize) -> u32 {
    at.checked_add(4)
        .and_then(|end| b.get(at..end))
        .map_or(0, BigEndian::read_u32)
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    at.checked_add(8)
        .and_then(|end| b.get(at..end))
        .map_or(0, BigEndian::read_u64)
}
