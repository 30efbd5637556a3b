//! Reading what a disk holds: guest data, extents, changes. No verb needs it but goto, which asks how
//! long a backing file is.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

mod chain;
pub(crate) mod changes;
mod mapping;
mod packed;
mod status;
mod tables;

pub use changes::{Change, Changes, Mapping};
pub use packed::{PackedCluster, PackedRun};
pub use status::BlockStatus;
