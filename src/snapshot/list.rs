//! `qcow2_snapshot_list`.

use super::Snapshot;
use crate::error::{Error, Result};
use crate::image::Image;

impl Image {
    /// The snapshots in the order of the table; none after [`Image::free_snapshots`].
    ///
    /// # Errors
    /// `Unsupported` for images with an external data file, as QEMU answers; those of
    /// [`Image::read_snapshots`] on an image that is opened to be checked and whose table is damaged.
    pub fn snapshot_list(&mut self) -> Result<&[Snapshot]> {
        self.begin_look()?;
        if self.header.has_data_file() {
            return Err(Error::Unsupported(
                "Internal snapshots are not supported on images with an external data file".into(),
            ));
        }
        if self.unchecked() && !self.snapshots.loaded {
            self.load_snapshots()?;
        }
        Ok(&self.snapshots.entries)
    }
}
