//! `qcow2_snapshot_load_tmp`.

use crate::error::{Error, Result};
use crate::flags::OpenFlags;
use crate::image::{Image, View};

impl Image {
    /// Show the snapshot with this ID, this name, or both, in place of the active disk: reads see
    /// its data and its size. Memory only. (QEMU keeps the active disk's size.)
    ///
    /// # Errors
    /// `Invalid` on a read-write handle; `NotFound`; `TooBig` or `Invalid` for an L1 table out of
    /// bounds.
    pub fn snapshot_load_tmp(&mut self, id: Option<&[u8]>, name: Option<&[u8]>) -> Result<()> {
        self.begin_look()?;
        if self.flags.has(OpenFlags::RDWR) {
            return Err(Error::Invalid("Device is not readonly".into()));
        }
        if !self.snapshots.loaded {
            self.load_snapshots()?;
        }
        let found = self
            .find(id, name)
            .and_then(|i| self.snapshots.entries.get(i))
            .cloned();
        let Some(snapshot) = found else {
            return Err(Error::NotFound("Can't find snapshot".into()));
        };

        let l1 = self.snapshot_l1(snapshot.l1_table_offset, snapshot.l1_size)?;
        self.forget_reads();
        self.view = Some(View {
            l1,
            size: snapshot.disk_size & !511,
            of: snapshot,
            gone: false,
        });
        Ok(())
    }
}
