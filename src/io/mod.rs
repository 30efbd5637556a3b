//! Bytes and devices. Nothing in this module knows qcow2.
//!
//! [`Storage`] is the whole interface between the library and an image: a plain file
//! ([`file`]), a caller's functions ([`callbacks`]), memory ([`memory`]) and the recorder
//! used by the crash and fault tests ([`trace`]) implement the same trait.

use std::io::Result;

pub mod callbacks;
pub mod file;
pub mod lock;
pub mod memory;
pub mod trace;

/// The longest single request that reaches a [`Storage`], in bytes (2 MiB).
pub const MAX_REQUEST: usize = 2 << 20;

/// One image's bytes.
///
/// Requests are whole: each either does everything that was asked or fails. Errors carry a
/// raw OS error; one without counts as `EIO`. Callers keep requests at or below
/// [`MAX_REQUEST`] bytes.
pub trait Storage {
    /// Length in bytes.
    fn length(&mut self) -> Result<u64>;

    /// Fill `buf` from `offset`; bytes past the end read as zeros.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Write `data` at `offset`; a write past the end extends, with zeros between.
    ///
    /// `label` names what is written (for example `"refcount block"`); plain storages ignore
    /// it, the recorder keeps it.
    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> Result<()>;

    /// Set the length; growing adds zeros.
    fn truncate(&mut self, length: u64) -> Result<()>;

    /// Make `offset..offset + bytes` read as zeros and give the space back, keeping the length.
    /// May do nothing where holes cannot be punched: then the bytes are unspecified.
    fn discard(&mut self, offset: u64, bytes: u64) -> Result<()>;

    /// When this returns, everything written, truncated or discarded before is stable.
    fn barrier(&mut self) -> Result<()>;

    /// Release what the storage holds (descriptor, locks). Called once, last.
    fn close(self: Box<Self>) -> Result<()>;
}
