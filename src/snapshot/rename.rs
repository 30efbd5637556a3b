//! `qcow2_snapshot_rename`.

use super::copies;
use crate::error::{Error, Result};
use crate::image::plan::Plan;
use crate::image::progress::Stage;
use crate::image::Image;
use crate::room;

/// The longest new name, in bytes: what QEMU's struct for a snapshot has room for.
const LONGEST_NAME: usize = 255;

impl Image {
    /// Give the snapshot with this ID, else with this name, another name, which may be empty or in use.
    /// The table is written anew, to another place.
    ///
    /// # Errors
    /// `Invalid` for a name of more than 255 bytes or with a NUL, `NotFound`, `TooBig` where the table
    /// would have more than 64 MiB. None of these changes a byte.
    pub fn snapshot_rename(&mut self, snapshot: &[u8], new_name: &[u8]) -> Result<()> {
        self.begin_change()?;
        if new_name.len() > LONGEST_NAME {
            return Err(Error::Invalid(format!(
                "The new name has {} bytes; a name may have {LONGEST_NAME}",
                new_name.len()
            )));
        }
        if new_name.contains(&0) {
            return Err(Error::Invalid("The new name contains a NUL byte".into()));
        }
        let (found, _) = self.find_all(&[Some(snapshot)])?;

        let (mut replay, mut plan) = (self.replay()?, Plan::default());
        self.dev.progress.begin(Stage::Check, || 0);
        let mut list = copies(&self.snapshots.entries)?;
        if let Some(entry) = found.first().and_then(|i| list.get_mut(*i)) {
            entry.name = room::copy_of(new_name)?;
        }
        let size = self.replay_table(&mut replay, &mut plan, &list)?;

        let list = self.as_written(list);
        self.commit(replay, plan, list, size)
    }
}
