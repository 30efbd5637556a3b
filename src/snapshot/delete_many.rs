//! `qcow2_snapshot_delete_many`.

use crate::error::Result;
use crate::image::Image;
use crate::room;

impl Image {
    /// Delete the snapshots with these IDs, else with these names, as the list has them before the
    /// call: all or none, in one verb like [`Image::snapshot_delete`]. A table or refcount block that
    /// several of them share is read and written as if one snapshot had it.
    ///
    /// # Errors
    /// `NotFound` with the name; else those of [`Image::snapshot_delete`]. None of these changes a byte.
    pub fn snapshot_delete_many(&mut self, snapshots: &[&[u8]]) -> Result<()> {
        if snapshots.is_empty() {
            return self.nothing_to_do();
        }
        self.begin_change()?;
        let wanted = room::collected(snapshots.iter().copied().map(Some))?;
        let (gone, _) = self.find_all(&wanted)?;
        self.delete_those(&gone)
    }
}
