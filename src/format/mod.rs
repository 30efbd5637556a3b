//! Bytes to types and back. No I/O happens here.
//!
//! The layout is that of QEMU's `docs/interop/qcow2.txt`. All integers are big endian. What
//! is read from an image is *raw* until a function of this module has checked it.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

pub mod compress;
pub mod entry;
pub mod features;
pub mod geometry;
pub mod header;
pub mod probe;
pub mod record;
pub mod refblock;
pub mod run;
