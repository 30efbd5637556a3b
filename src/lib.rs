//! Internal snapshots of qcow2 images, in-process and byte for byte as QEMU makes them.
//!
//! (The map of the crate and the example come here.)

mod error;
mod flags;
pub mod format;
pub mod image;
pub mod io;
pub mod snapshot;

#[doc(hidden)]
pub mod capi;

pub use error::{Error, Result};
pub use flags::OpenFlags;
pub use image::{Image, Outcome};
pub use snapshot::{NewSnapshot, Snapshot};
