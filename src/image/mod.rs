//! An open image.

use crate::error::{Error, Result};
use crate::flags::OpenFlags;
use crate::io::Storage;
use crate::snapshot::{NewSnapshot, Snapshot};

/// What the last changing verb did to the image (`qcow2_last_outcome()`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Outcome {
    /// No verb has run yet.
    None = 0,
    /// The image means what it meant before.
    Unchanged = 1,
    /// The verb is done (perhaps with leaked clusters).
    Done = 2,
    /// Old or new state: open the image again to know.
    Unknown = 3,
}

/// One open image.
pub struct Image {}

#[allow(unused_variables, missing_docs)]
impl Image {
    /// Open an image by path (takes QEMU's locks unless the flags say otherwise).
    pub fn open(path: &std::path::Path, flags: OpenFlags) -> Result<Image> { Err(Error::Unsupported("stub".into())) }
    /// Open an image on any storage. No lock is taken here. When this fails, `storage.close()` is NOT called; it is dropped.
    pub fn open_storage(storage: Box<dyn Storage>, flags: OpenFlags) -> Result<Image> { Err(Error::Unsupported("stub".into())) }
    /// Close: error of close or unlock only; never writes.
    pub fn close(self) -> Result<()> { Ok(()) }
    pub fn read_snapshots(&mut self) -> Result<()> { Ok(()) }
    pub fn free_snapshots(&mut self) {}
    pub fn write_snapshots(&mut self) -> Result<()> { Ok(()) }
    /// Returns the ID of the new snapshot.
    pub fn snapshot_create(&mut self, new: &NewSnapshot) -> Result<Vec<u8>> { Err(Error::Unsupported("stub".into())) }
    pub fn snapshot_goto(&mut self, id_or_name: &[u8]) -> Result<()> { Ok(()) }
    pub fn snapshot_delete(&mut self, id: Option<&[u8]>, name: Option<&[u8]>) -> Result<()> { Ok(()) }
    pub fn snapshot_list(&mut self) -> Result<&[Snapshot]> { Ok(&[]) }
    pub fn snapshot_load_tmp(&mut self, id: Option<&[u8]>, name: Option<&[u8]>) -> Result<()> { Ok(()) }
    /// Virtual size now seen, bytes.
    pub fn length(&self) -> u64 { 0 }
    /// Guest read.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> { Ok(()) }
    pub fn last_outcome(&self) -> Outcome { Outcome::None }
    /// A remark on the last successful verb, shown by qcow2_last_error().
    pub fn remark(&self) -> Option<&str> { None }
    /// Mark the handle as unusable for changes and reads (a caught panic).
    pub fn poison(&mut self) {}
    /// Flags given at open.
    pub fn flags(&self) -> OpenFlags { OpenFlags::read_only() }
}
