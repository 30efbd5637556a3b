//! Where things are in the image: for who keeps caches of it, and for a snapshot's own disk size.

use super::Image;
use crate::error::Result;
use crate::format::header::Header;

/// What a changing verb changed, of what others may keep in a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The size of the disk.
    pub size: bool,
    /// The active L1 table: its place or its entries, the flag in bit 63 included.
    pub l1: bool,
    /// The refcount table: its place or its entries. Refcount blocks change with nearly every verb.
    pub reftable: bool,
    /// The snapshot table.
    pub snapshots: bool,
}

/// The tables of an image as they are in memory now.
#[derive(Clone, Copy, Debug)]
pub struct ImageLayout<'a> {
    pub(crate) header: &'a Header,
    /// Where the L1 table of the disk that the handle shows is.
    pub l1_offset: u64,
    /// Its entries: those of the active one, or of the snapshot that `snapshot_load_tmp` put before it.
    pub l1: &'a [u64],
    /// The refcount table's entries.
    pub reftable: &'a [u64],
    /// Bytes of the snapshot table in the image.
    pub snapshots_size: u64,
    /// What the last changing verb has changed.
    pub changed: Changed,
}

impl Image {
    /// Where the image's tables are, as they are after the last verb, or when others may change the image.
    ///
    /// # Errors
    /// `Spent` when an earlier failure left the state of the image unknown.
    pub fn layout(&mut self) -> Result<ImageLayout<'_>> {
        self.begin_look()?;
        let active = (self.header.l1_offset, self.l1.as_slice());
        let (l1_offset, l1) =
            (self.view.as_ref()).map_or(active, |v| (v.of.l1_table_offset, v.l1.as_slice()));
        Ok(ImageLayout {
            header: &self.header,
            l1_offset,
            l1,
            reftable: &self.reftable,
            snapshots_size: self.snapshots.size,
            changed: self.last.changed,
        })
    }

    /// Read header and tables again: the image was changed by other means than this handle.
    ///
    /// # Errors
    /// Those of opening the image. The handle is spent then: what it knows is not the image any more.
    pub fn reload(&mut self) -> Result<()> {
        self.usable()?;
        let loaded = self.dev.length_now().and_then(|_| self.load());
        if loaded.is_err() {
            self.poison();
        }
        loaded
    }
}
