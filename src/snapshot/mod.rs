//! The verbs, in QEMU's words. Each reads as three paragraphs: check, replay, write.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

use crate::error::Result;
use crate::room;

mod create;
mod delete;
mod delete_many;
mod goto;
mod held;
mod list;
mod load_tmp;
mod rename;
mod table;
mod usage;

pub use usage::Usage;

/// A copy of a list whose entries take up to 64 MiB.
pub(crate) fn copies<'a>(list: impl IntoIterator<Item = &'a Snapshot>) -> Result<Vec<Snapshot>> {
    let mut out = Vec::new();
    for s in list {
        let copy = Snapshot {
            id: room::copy_of(&s.id)?,
            name: room::copy_of(&s.name)?,
            unknown_extra_data: room::copy_of(&s.unknown_extra_data)?,
            ..*s
        };
        room::push(&mut out, copy)?;
    }
    Ok(out)
}

/// One snapshot of the table in memory.
#[allow(clippy::disallowed_methods)] // a derived Clone, for programs; see `copies`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Offset of the snapshot's L1 table in the image file.
    pub l1_table_offset: u64,
    /// Entries in that L1 table.
    pub l1_size: u32,
    /// Unique ID, usually a decimal number; any bytes but NUL in practice.
    pub id: Vec<u8>,
    /// Name, not unique; may be empty.
    pub name: Vec<u8>,
    /// Seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds within the second.
    pub date_nsec: u32,
    /// Guest clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// Virtual disk size in bytes when the snapshot was taken.
    pub disk_size: u64,
    /// Instruction count, or `u64::MAX` for none.
    pub icount: u64,
    /// Size of the extra data as read from the image, in bytes.
    pub extra_data_size: u32,
    /// Extra data beyond the 24 bytes known today, kept verbatim.
    pub unknown_extra_data: Vec<u8>,
}

/// What a caller says of a snapshot to create (QEMU's `QEMUSnapshotInfo`).
#[allow(clippy::disallowed_methods)] // a derived Clone, for programs
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewSnapshot {
    /// ID to use, or empty to have the next free one made.
    pub id: Vec<u8>,
    /// Name, at most 65535 bytes.
    pub name: Vec<u8>,
    /// Seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds within the second.
    pub date_nsec: u32,
    /// Guest clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state that stand in the active L1 behind the disk.
    pub vm_state_size: u64,
    /// Instruction count, stored as given.
    pub icount: u64,
}
