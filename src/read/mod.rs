//! Questions about what the image holds that are not QEMU's.

pub(crate) mod changes;
mod tables;

pub use changes::{Change, Changes, Mapping};
