//! Where things are: for programs that keep caches of the image.

use std::ffi::{c_char, c_int, c_void, CString};
use std::ptr;

use super::error::Qcow2Error;
use super::guard::{guard_image, null, Kind, Qcow2Image};
use crate::error::Error;
use crate::format::record::KNOWN_EXTRA;

/// Qcow2ImageLayout.changed: the size of the disk.
pub const QCOW2_CHANGED_SIZE: u32 = 0x1;
/// Qcow2ImageLayout.changed: the active L1 table, its place or its entries (bit 63 too).
pub const QCOW2_CHANGED_L1: u32 = 0x2;
/// Qcow2ImageLayout.changed: the refcount table, its place or its entries.
pub const QCOW2_CHANGED_REFTABLE: u32 = 0x4;
/// Qcow2ImageLayout.changed: the snapshot table.
pub const QCOW2_CHANGED_SNAPSHOTS: u32 = 0x8;

/// One entry of the snapshot table in full, from qcow2_snapshot_layout().
#[repr(C)]
pub struct Qcow2SnapshotLayout {
    /// The ID in full length, text ending in NUL. As all pointers here it belongs to the handle
    /// and lives until the list changes: until the next changing verb, qcow2_read_snapshots(),
    /// qcow2_free_snapshots(), qcow2_reload() or qcow2_close(); with QCOW2_O_FORCE_SHARE until the next
    /// call.
    pub id: *const c_char,
    /// The name in full length, text ending in NUL.
    pub name: *const c_char,
    /// Where the snapshot's L1 table is in the image file, in bytes.
    pub l1_table_offset: u64,
    /// Size of the disk when the snapshot was taken, in bytes.
    pub disk_size: u64,
    /// Size of the VM state in bytes; 0: none.
    pub vm_state_size: u64,
    /// Entries of the L1 table, of 8 bytes each.
    pub l1_size: u32,
    /// Bytes of extra data that the entry has in the image.
    pub extra_data_size: u32,
    /// Extra data behind the 24 bytes known today, `extra_data_size` - 24 bytes; or NULL.
    pub unknown_extra_data: *const c_void,
    /// Zeros. Later versions of the library may tell more here.
    pub reserved: [u64; 4],
}

/// Where the tables of an image are, from qcow2_image_layout(). All offsets are bytes in the image
/// file.
#[repr(C)]
pub struct Qcow2ImageLayout {
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// A cluster has 1 << cluster_bits bytes.
    pub cluster_bits: u32,
    /// A refcount has 1 << refcount_order bits.
    pub refcount_order: u32,
    /// QCOW2_CHANGED values joined by "|": what the last changing verb on this handle has changed;
    /// 0 if there was none, or if it left the image unchanged. Refcounts and bit 63 of entries in
    /// L2 tables change with nearly every verb, and are not told here.
    pub changed: u32,
    /// The header's incompatible feature bits.
    pub incompatible_features: u64,
    /// The header's compatible feature bits.
    pub compatible_features: u64,
    /// The header's autoclear feature bits.
    pub autoclear_features: u64,
    /// Size of the active disk in bytes, as in the header.
    pub size: u64,
    /// Where the active L1 table is; after qcow2_snapshot_load_tmp() that of the snapshot.
    pub l1_table_offset: u64,
    /// Where the refcount table is.
    pub refcount_table_offset: u64,
    /// Where the snapshot table is; 0 or anything if there are no snapshots.
    pub snapshots_offset: u64,
    /// Entries of that L1 table.
    pub l1_size: u32,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Entries of the snapshot table in the image.
    pub nb_snapshots: u32,
    /// Zero.
    pub reserved32: u32,
    /// That L1 table: `l1_size` entries in the byte order of the host. Belongs to the handle,
    /// lives until the next changing verb, qcow2_snapshot_load_tmp(), qcow2_reload() or qcow2_close(); with
    /// QCOW2_O_FORCE_SHARE until the next call.
    pub l1_table: *const u64,
    /// Bytes of the snapshot table in the image; 0 without snapshots, or where it cannot be read.
    pub snapshots_size: u64,
    /// The refcount table: `refcount_table_clusters` clusters of entries of 8 bytes in the byte order of
    /// the host. Lives as long as `l1_table`.
    pub refcount_table: *const u64,
    /// Zeros. Later versions of the library may tell more here.
    pub reserved: [u64; 2],
}

/// One snapshot in full: what QEMUSnapshotInfo has no room for.
///
/// @param bs      the handle
/// @param index   which, as in qcow2_snapshot_list(), from 0
/// @param layout  where to put the answer; cleared if the call fails
/// @param errp    NULL, or where to put the error: must hold NULL on entry, set only on
///                failure, then owned by the caller (qcow2_error_free())
/// @return        0, or -errno:
///                -EINVAL   bs or layout is NULL
///                -ENOENT   there is no such index
///                -ENOTSUP  the image has a feature that rules this out; the words name it
///                -EIO      an earlier failure spent the handle
///                -ENOMEM, -EBUSY
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_layout(
    bs: *const Qcow2Image,
    index: usize,
    layout: *mut Qcow2SnapshotLayout,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    if !layout.is_null() {
        // SAFETY: not null, writable as the header demands; every member is valid when zero.
        unsafe { layout.write_bytes(0, 1) };
    }
    // SAFETY: the header demands a handle or NULL, and a writable pointer or NULL.
    unsafe {
        guard_image(bs, errp, Kind::Reads, |it| {
            if layout.is_null() {
                return Err(null("layout"));
            }
            let image = it.image();
            if image.snapshot_list()?.get(index).is_none() {
                let n = image.snapshots.entries.len();
                return Err(Error::NotFound(format!(
                    "There is no snapshot with the index {index}, the image has {n}"
                )));
            }
            let list = &mut image.snapshots;
            let entry = &list.entries[index];
            // What follows a NUL in a damaged table is no text.
            let [id, name] = list.texts.entry(index).or_insert_with(|| {
                [&entry.id, &entry.name].map(|text| {
                    let until_nul = text.iter().copied().take_while(|b| *b != 0);
                    CString::new(until_nul.collect::<Vec<u8>>()).unwrap_or_default()
                })
            });
            let unknown = &entry.unknown_extra_data;
            // SAFETY: as above.
            layout.write(Qcow2SnapshotLayout {
                id: id.as_ptr(),
                name: name.as_ptr(),
                l1_table_offset: entry.l1_table_offset,
                disk_size: entry.disk_size,
                vm_state_size: entry.vm_state_size,
                l1_size: entry.l1_size,
                extra_data_size: entry.extra_data_size,
                unknown_extra_data: if entry.extra_data_size > KNOWN_EXTRA && !unknown.is_empty() {
                    unknown.as_ptr().cast()
                } else {
                    ptr::null()
                },
                reserved: [0; 4],
            });
            Ok(0)
        })
    }
}

/// Where the tables of the image are as they are now, and what the last verb has changed: for a
/// program that keeps a cache of them beside this handle.
///
/// Before a changing verb such a program writes what its caches hold to the file and flushes it, then
/// empties them (a table in them would be written over the new one later), and clears the dirty
/// bit if it has set it (an image with it is refused). What it has changed itself it tells by
/// qcow2_reload() before the call. After it, it asks here, and looks nothing up that it knew before.
///
/// After a verb that failed `changed` may be 0 and yet flags in tables and refcounts in the file be
/// others than before it, which harms nothing but what goes by a copy of them: such a program then
/// opens a new handle and takes all from there.
///
/// @param bs      the handle
/// @param layout  where to put the answer; cleared if the call fails
/// @return        0, or -errno with the words in qcow2_last_error():
///                -EINVAL   bs or layout is NULL
///                -EIO      an earlier failure left the state of the image unknown
///                -EBUSY
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_image_layout(
    bs: *const Qcow2Image,
    layout: *mut Qcow2ImageLayout,
) -> c_int {
    if !layout.is_null() {
        // SAFETY: not null, writable as the header demands; every member is valid when zero.
        unsafe { layout.write_bytes(0, 1) };
    }
    // SAFETY: the header demands a handle or NULL.
    unsafe {
        guard_image(bs, ptr::null_mut(), Kind::Reads, |it| {
            if layout.is_null() {
                return Err(null("layout"));
            }
            let now = it.image().layout()?;
            let (h, changed) = (now.header, now.changed);
            let flag = |set: bool, value: u32| if set { value } else { 0 };
            // SAFETY: as above.
            layout.write(Qcow2ImageLayout {
                version: h.version,
                cluster_bits: h.geometry.cluster_bits,
                refcount_order: h.geometry.refcount_order,
                changed: flag(changed.size, QCOW2_CHANGED_SIZE)
                    | flag(changed.l1, QCOW2_CHANGED_L1)
                    | flag(changed.reftable, QCOW2_CHANGED_REFTABLE)
                    | flag(changed.snapshots, QCOW2_CHANGED_SNAPSHOTS),
                incompatible_features: h.incompatible,
                compatible_features: h.compatible,
                autoclear_features: h.autoclear,
                size: h.size,
                l1_table_offset: now.l1_offset,
                refcount_table_offset: h.reftable_offset,
                snapshots_offset: h.snapshots_offset,
                l1_size: now.l1.len() as u32,
                refcount_table_clusters: h.reftable_clusters,
                nb_snapshots: h.nb_snapshots,
                reserved32: 0,
                l1_table: now.l1.as_ptr(),
                snapshots_size: now.snapshots_size,
                refcount_table: now.reftable.as_ptr(),
                reserved: [0; 2],
            });
            Ok(0)
        })
    }
}

/// Read the image's header, tables and list of snapshots again, as opening it does: its owner has
/// changed it by other means than this handle. Nothing is written. A snapshot that
/// qcow2_snapshot_load_tmp() shows is not shown any more.
///
/// @param bs    the handle
/// @param errp  NULL, or where to put the error: must hold NULL on entry, set only on
///              failure, then owned by the caller (qcow2_error_free())
/// @return      0, or -errno as qcow2_open() for what concerns the image, and then the handle is
///              spent: close it and open the image again;
///              -EINVAL if bs is NULL, -EIO if an earlier failure spent the handle, -EBUSY
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_reload(bs: *mut Qcow2Image, errp: *mut *mut Qcow2Error) -> c_int {
    // SAFETY: the header demands a handle or NULL, and a writable pointer or NULL.
    unsafe {
        guard_image(bs, errp, Kind::Reads, |it| {
            it.image().reload()?;
            Ok(0)
        })
    }
}
