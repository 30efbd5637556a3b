//! The functions of QEMU's `block/qcow2-snapshot.c`, and reading disk and VM state.
//!
//! Nearly half of this long file is the manual of its functions.

use std::ffi::{c_char, c_int, c_void, CStr};
use std::mem::{offset_of, size_of, MaybeUninit};
use std::ptr::{self, NonNull};

use super::cancel::Uncancellable;
use super::error::Qcow2Error;
use super::guard::{guard_image, null, Entered, Kind, Qcow2Image};
use super::types::{
    Qcow2Extent, Qcow2SnapshotInfo, QCOW2_BLOCK_ALLOCATED, QCOW2_BLOCK_COMPRESSED,
    QCOW2_BLOCK_DATA, QCOW2_BLOCK_OFFSET_VALID, QCOW2_BLOCK_ZERO,
};
use crate::error::{Error, Result};
use crate::snapshot::{NewSnapshot, Snapshot};

/// Load the snapshot table from the image, in place of the list in memory. Opening the
/// image has done this already; it is needed only to bring back what
/// qcow2_free_snapshots() dropped, and every verb does that by itself.
///
/// @param bs  the handle
/// @return    0, or -errno with the words in qcow2_last_error():
///            -EINVAL  bs is NULL, or the table's position or an entry is not valid
///            -EFBIG   the table has more than 65536 entries or 64 MiB, or an entry more
///                     extra data than QEMU accepts (1 KiB)
///            -EIO     the image cannot be read, or an earlier failure spent the handle
///            -ENOMEM, -EBUSY, and what the I/O functions return
///
/// QEMU: qcow2_read_snapshots() of block/qcow2-snapshot.c
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_read_snapshots(bs: *mut Qcow2Image) -> c_int {
    let body = |it: &mut Entered| it.image().read_snapshots().map(|()| 0);
    // SAFETY: the header demands an open handle or NULL.
    unsafe { guard_image(bs, ptr::null_mut(), Kind::Reads, body) }
}

/// Drop the list of snapshots from memory. The image is not touched, and nothing can be
/// erased by it: qcow2_snapshot_list() answers 0 until qcow2_read_snapshots() or a verb
/// loads the table again. Closing the handle does this by itself.
///
/// @param bs  the handle; NULL is fine
///
/// QEMU: qcow2_free_snapshots() of block/qcow2-snapshot.c
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_free_snapshots(bs: *mut Qcow2Image) {
    let body = |it: &mut Entered| {
        it.image().free_snapshots();
        Ok(0)
    };
    // SAFETY: the header demands an open handle or NULL.
    let _: c_int = unsafe { guard_image(bs, ptr::null_mut(), Kind::Reads, body) };
}

/// Write the snapshot table to a new place in the image, point the header at it and free
/// the old place: the table part of a delete, with nothing deleted.
///
/// @param bs  the handle, opened with QCOW2_O_RDWR
/// @return    0, or -errno with the words in qcow2_last_error(); on failure see
///            qcow2_last_outcome():
///            -EINVAL  bs is NULL, or a refcount of the image contradicts its use
///            -EACCES  the handle is read-only
///            -EFBIG   the table would exceed QEMU's limit of 64 MiB, the image file or its
///                     refcount table what QEMU allows, or the file the process's limit
///            -ENOSPC  the disk is full; the image is unchanged
///            -EIO     the image is damaged where the verb must go, or cannot be written,
///                     or an earlier failure spent the handle
///            -ECANCELED  the progress function has cancelled it
///            -ENOMEM, -EBUSY, and what the I/O functions return
///
/// QEMU: qcow2_write_snapshots() of block/qcow2-snapshot.c
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_write_snapshots(bs: *mut Qcow2Image) -> c_int {
    let body = |it: &mut Entered| it.image().write_snapshots().map(|()| 0);
    // SAFETY: the header demands an open handle or NULL.
    unsafe { guard_image(bs, ptr::null_mut(), Kind::Changes, body) }
}

/// Take a snapshot of the disk as it is now. When it returns 0 the snapshot is complete and
/// on stable storage.
///
/// Date, VM clock, VM state size and icount are stored as given; the library does not ask
/// the clock, and a date of 0 is 1970. `vm_state_size` counts bytes that a virtual machine
/// has saved behind the disk, with QEMU's means; use 0 for a snapshot of the disk only.
/// The name may be empty and need not be unique.
///
/// @param bs       the handle, opened with QCOW2_O_RDWR
/// @param sn_info  the new snapshot, belongs to the caller. An empty `id_str` stands for the
///                 next free number, which is written back here on success; any other is
///                 used as it is and must be new. Both texts end at their NUL or at the end
///                 of the array.
/// @return         0, or -errno with the words in qcow2_last_error(); on failure see
///                 qcow2_last_outcome():
///                 -EINVAL   bs or sn_info is NULL; the VM state reaches past what the disk's
///                           L1 table covers; or a refcount would overflow its width or
///                           contradicts its use (QEMU's errno for both)
///                 -EEXIST   a snapshot has this ID
///                 -EACCES   the handle is read-only
///                 -EFBIG    65536 snapshots exist; the table would exceed 64 MiB, the image
///                           file or its refcount table what QEMU allows, or the file the
///                           process's limit
///                 -ENOTSUP  the image has a feature that rules this out; the words name it
///                 -ENOSPC   the disk is full; the image is unchanged
///                 -EIO      the image is damaged where the verb must go, or cannot be read
///                           or written, or an earlier failure spent the handle
///                 -ECANCELED  the progress function has cancelled it
///                 -ENOMEM, -EBUSY, and what the I/O functions return
///
/// QEMU: qcow2_snapshot_create() of block/qcow2-snapshot.c. QEMU of today always makes its
/// own ID; QEMU 2.1 kept the caller's, as this does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_create(
    bs: *mut Qcow2Image,
    sn_info: *mut Qcow2SnapshotInfo,
) -> c_int {
    let body = |it: &mut Entered| {
        let at = NonNull::new(sn_info).ok_or_else(|| null("sn_info"))?;
        // SAFETY: not null, and as long as the struct that the program was compiled with,
        // which the flag of the handle tells.
        let info = unsafe { read_info(at, it.compat_2_1) };
        let new = NewSnapshot {
            id: text_of(&info.id_str).to_vec(),
            name: text_of(&info.name).to_vec(),
            date_sec: info.date_sec,
            date_nsec: info.date_nsec,
            vm_clock_nsec: info.vm_clock_nsec,
            vm_state_size: info.vm_state_size,
            icount: info.icount,
        };
        let id = it.image().snapshot_create(&new)?;
        if new.id.is_empty() {
            let mut id_str = [0; 128];
            put_text(&mut id_str, &id);
            // SAFETY: as above; only the first member is written, byte by byte, so neither
            // the length of the struct nor its alignment matters.
            unsafe { at.cast::<[c_char; 128]>().write_unaligned(id_str) };
        }
        Ok(0)
    };
    // SAFETY: the header demands an open handle or NULL.
    unsafe { guard_image(bs, ptr::null_mut(), Kind::Changes, body) }
}

/// Revert the disk to a snapshot. What was written since and is in no other snapshot is
/// lost; the snapshot stays. If it was taken with another disk size, the disk gets that
/// size. When it returns 0 the change is complete and on stable storage.
///
/// @param bs           the handle, opened with QCOW2_O_RDWR
/// @param snapshot_id  the ID or, if no snapshot has this ID, the name; of several with the
///                     same name the first. Text ending in NUL, of any length.
/// @return             0, or -errno with the words in qcow2_last_error(); on failure see
///                     qcow2_last_outcome():
///                     -EINVAL   bs is NULL; the snapshot's L1 table is not where one can be;
///                               or a refcount would overflow its width or contradicts its
///                               use
///                     -ENOENT   no such snapshot, or snapshot_id is NULL: "Can't find the
///                               snapshot"
///                     -EACCES   the handle is read-only
///                     -ENOENT, -EACCES, -EAGAIN and the errnos of qcow2_pread() for files
///                               behind the image: the snapshot's disk is larger than the
///                               active one, and the backing file that tells how much of it is
///                               covered is missing, not readable or in use. The words begin
///                               "Could not learn the length of the backing file"
///                     -EBUSY    the image has active dirty bitmaps
///                     -EFBIG    the snapshot's L1 table exceeds QEMU's limit; or the image
///                               file or its refcount table would exceed what QEMU allows, or
///                               the file the process's limit
///                     -ENOTSUP  another disk size, and the image is of version 2, the
///                               handle is one of QCOW2_SNAPSHOT_COMPAT_2_1, or the words
///                               name another reason
///                     -ENOSPC   the disk is full; the image is unchanged
///                     -EIO      the image is damaged where the verb must go, or cannot be
///                               read or written, or an earlier failure spent the handle
///                     -ECANCELED  the progress function has cancelled it
///                     -ENOMEM, and what the I/O functions return
///
/// QEMU: qcow2_snapshot_goto() of block/qcow2-snapshot.c; -EBUSY is bdrv_snapshot_goto()'s
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_goto(
    bs: *mut Qcow2Image,
    snapshot_id: *const c_char,
) -> c_int {
    let body = |it: &mut Entered| {
        // SAFETY: NULL or text, as the header demands.
        let wanted =
            unsafe { bytes(snapshot_id) }.ok_or_else(|| no_such("Can't find the snapshot"))?;
        it.image().snapshot_goto(wanted).map(|()| 0)
    };
    // SAFETY: the header demands an open handle or NULL.
    unsafe { guard_image(bs, ptr::null_mut(), Kind::Changes, body) }
}

/// Delete a snapshot and free what only it uses. When it returns 0 the change is complete
/// and on stable storage.
///
/// Of a snapshot whose L1 table, or an L2 table that it names, cannot be read or is not where
/// one can be, the entry goes and nothing is freed: what it holds is not known.
/// qcow2_last_error() says so, and qcow2_check() with QCOW2_FIX_LEAKS gives the space back.
///
/// @param bs           the handle, opened with QCOW2_O_RDWR
/// @param snapshot_id  the ID, or NULL for any
/// @param name         the name, or NULL for any. Given both, one snapshot must have both;
///                     of several that match the first is deleted. Both are texts ending in
///                     NUL, of any length, compared in full.
/// @param errp         NULL, or where to put the error: must hold NULL on entry, set only on
///                     failure, then owned by the caller (qcow2_error_free())
/// @return             0, or -errno; on failure see qcow2_last_outcome():
///                     -EINVAL   bs is NULL; or a refcount contradicts its use
///                     -ENOENT   no such snapshot, or neither ID nor name given
///                     -EACCES   the handle is read-only
///                     -EFBIG    the image file or its refcount table would exceed what QEMU
///                               allows, or the file the process's limit
///                     -ENOTSUP  the image has a feature that rules this out; the words
///                               name it
///                     -ENOSPC   the disk is full; the image is unchanged
///                     -EIO      the image is damaged where the verb must go, or cannot be
///                               read or written, or an earlier failure spent the handle
///                     -ECANCELED  the progress function has cancelled it
///                     -ENOMEM, -EBUSY, and what the I/O functions return
///
/// QEMU: qcow2_snapshot_delete() of block/qcow2-snapshot.c
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_delete(
    bs: *mut Qcow2Image,
    snapshot_id: *const c_char,
    name: *const c_char,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let body = |it: &mut Entered| {
        // SAFETY: NULL or text, as the header demands.
        let (id, name) = unsafe { (bytes(snapshot_id), bytes(name)) };
        if id.is_none() && name.is_none() {
            return Err(no_such("Can't find the snapshot"));
        }
        it.image().snapshot_delete(id, name).map(|()| 0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Changes, body) }
}

/// List the snapshots, in the order of the table in the image.
///
/// @param bs      the handle
/// @param psn_tab where to put the array, which then belongs to the caller: one block from
///                malloc(), released by free(), g_free() or qcow2_snapshot_list_free(). Set
///                to NULL if there are no snapshots or the call fails.
/// @return        the number of snapshots, or -errno with the words in qcow2_last_error():
///                -EINVAL   bs or psn_tab is NULL
///                -ENOMEM   no memory for the array
///                -ENOTSUP  the image has a feature that rules this out; the words name it
///                -EIO      an earlier failure spent the handle
///                -EBUSY
///
/// QEMU: qcow2_snapshot_list() of block/qcow2-snapshot.c
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_list(
    bs: *mut Qcow2Image,
    psn_tab: *mut *mut Qcow2SnapshotInfo,
) -> c_int {
    let out = NonNull::new(psn_tab);
    if let Some(out) = out {
        // SAFETY: not null, and writable as the header demands.
        unsafe { out.write(ptr::null_mut()) };
    }
    let body = |it: &mut Entered| {
        let out = out.ok_or_else(|| null("psn_tab"))?;
        let compat_2_1 = it.compat_2_1;
        let snapshots = it.image().snapshot_list()?;
        let count = c_int::try_from(snapshots.len())
            .map_err(|_| Error::TooBig("Too many snapshots".into()))?;
        if let Some(array) = malloc_list(snapshots, compat_2_1)? {
            // SAFETY: as above.
            unsafe { out.write(array.as_ptr()) };
        }
        Ok(count)
    };
    // SAFETY: the header demands an open handle or NULL.
    unsafe { guard_image(bs, ptr::null_mut(), Kind::Reads, body) }
}

/// Free an array that qcow2_snapshot_list() returned. NULL is fine.
///
/// @param sn_tab  the array, or NULL
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_list_free(sn_tab: *mut Qcow2SnapshotInfo) {
    let _uncancellable = Uncancellable::new();
    // SAFETY: NULL, or from `malloc_list`, as the header demands.
    unsafe { libc::free(sn_tab.cast::<c_void>()) };
}

/// See a snapshot through this handle: from now on qcow2_pread() and qcow2_getlength()
/// answer for the snapshot instead of the disk. Nothing is written, other handles do not
/// notice, and only closing the handle or another qcow2_snapshot_load_tmp() ends it.
///
/// @param bs           the handle, opened read-only
/// @param snapshot_id  the ID, or NULL for any
/// @param name         the name, or NULL for any. Given both, one snapshot must have both;
///                     of several that match the first is taken. Both are texts ending in
///                     NUL, of any length, compared in full.
/// @param errp         NULL, or where to put the error: must hold NULL on entry, set only on
///                     failure, then owned by the caller (qcow2_error_free())
/// @return             0, or -errno, and then the handle sees what it saw before:
///                     -EINVAL   bs is NULL, the handle is read-write, or the snapshot's L1
///                               table is not where one can be
///                     -ENOENT   no such snapshot, or neither ID nor name given
///                     -EFBIG    the snapshot's L1 table exceeds QEMU's limit
///                     -EIO      the L1 table cannot be read, or an earlier failure spent
///                               the handle
///                     -ENOMEM, -EBUSY, and what the I/O functions return
///
/// QEMU: qcow2_snapshot_load_tmp() of block/qcow2-snapshot.c. QEMU keeps the size of the
/// disk where this takes the size of the snapshot.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_load_tmp(
    bs: *mut Qcow2Image,
    snapshot_id: *const c_char,
    name: *const c_char,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let body = |it: &mut Entered| {
        // SAFETY: NULL or text, as the header demands.
        let (id, name) = unsafe { (bytes(snapshot_id), bytes(name)) };
        if id.is_none() && name.is_none() {
            return Err(no_such("Can't find snapshot"));
        }
        it.image().snapshot_load_tmp(id, name).map(|()| 0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Reads, body) }
}

/// The size of the disk that the handle sees, as a guest would: of the image, after
/// qcow2_snapshot_load_tmp() of that snapshot. Not the length of the image file.
///
/// @param bs  the handle
/// @return    bytes, or -errno: -EINVAL if bs is NULL, -EBUSY
///
/// QEMU: bdrv_getlength()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_getlength(bs: *const Qcow2Image) -> i64 {
    let body = |it: &mut Entered| {
        i64::try_from(it.image().length())
            .map_err(|_| Error::TooBig("The disk is too large".into()))
    };
    // SAFETY: the header demands an open handle or NULL.
    unsafe { guard_image(bs, ptr::null_mut(), Kind::Reads, body) }
}

/// Read from the disk that the handle sees, as a guest would.
///
/// @param bs      the handle
/// @param offset  where, in bytes from the start of the disk; any alignment
/// @param buf     room for `bytes` bytes, belongs to the caller; its contents are
///                unspecified after a failure
/// @param bytes   how many; 0 is fine
/// @param errp    NULL, or where to put the error: must hold NULL on entry, set only on
///                failure, then owned by the caller (qcow2_error_free())
/// @return        0 when all bytes have been read, or -errno:
///                -EINVAL   bs is NULL, or buf is NULL and bytes is not 0
///                -EIO      the range is not within the disk; the image is damaged there or
///                          cannot be read; or an earlier failure spent the handle
///                -ENOTSUP  the guest's data is encrypted, or a backing file is needed that
///                          QCOW2_O_NO_BACKING forbids, that is in no format this library
///                          reads, or whose name is not a plain path; or the backing chain
///                          has more than 200 files, or L1 tables of more than 256 MiB
///                          behind the image; the words say which
///                -EINVAL   likewise, if the backing chain is a loop
///                -ENOENT, -EACCES and the like if a backing file cannot be opened
///                -ENOENT   the snapshot that is shown was deleted (QCOW2_O_FORCE_SHARE)
///                -EBUSY, and what the I/O functions return
///
/// QEMU: bdrv_pread()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_pread(
    bs: *mut Qcow2Image,
    offset: i64,
    buf: *mut c_void,
    bytes: usize,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let body = |it: &mut Entered| {
        let outside = || {
            Error::Corrupt(format!(
                "The range {offset} + {bytes} is not within the disk"
            ))
        };
        let start = u64::try_from(offset).map_err(|_| outside())?;
        let length = it.image().length();
        if isize::try_from(bytes).is_err() || start > length || (bytes as u64) > length - start {
            return Err(outside());
        }
        if bytes == 0 {
            return Ok(0);
        }
        let buf = NonNull::new(buf.cast::<u8>()).ok_or_else(|| null("buf"))?;
        // SAFETY: the header demands room for `bytes` bytes, which fit an isize. They are
        // cleared first, since the caller's memory may never have been written.
        let slice = unsafe {
            buf.write_bytes(0, bytes);
            std::slice::from_raw_parts_mut(buf.as_ptr(), bytes)
        };
        it.image().read(start, slice).map(|()| 0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Reads, body) }
}

/// What the disk that the handle sees is made of: the run of bytes of one kind that begins at
/// an offset. For copying without the zeros, and for finding what is allocated where:
///
///   for (int64_t at = 0; at < qcow2_getlength(bs); at += e.length)
///       if (qcow2_block_status(bs, at, INT64_MAX, &e, NULL) < 0) break; else ...
///
/// Each call gives one entry of "qemu-img map --output=json", no shorter: neighbours that
/// are alike are one. The differences: after qcow2_snapshot_load_tmp() it is the map of the
/// snapshot, which qemu-img cannot show; and behind the caller's own I/O functions, or a
/// descriptor that had to be duplicated (qcow2_open_fd()), holes are not known: clusters that
/// were allocated ahead are data without QCOW2_BLOCK_ZERO there, and so are the holes of raw
/// backing files.
///
/// @param bs      the handle
/// @param offset  where, in bytes from the start of the disk; any alignment
/// @param bytes   look at no more than this many; INT64_MAX for as far as it goes. What the
///                call reads grows with the run that it finds.
/// @param extent  where to put the answer; cleared if the call fails
/// @param errp    NULL, or where to put the error: must hold NULL on entry, set only on
///                failure, then owned by the caller (qcow2_error_free())
/// @return        0, or -errno:
///                -EINVAL   bs or extent is NULL, or bytes is negative
///                -EIO      the offset is not within the disk (its end is, with a length of
///                          0); the image is damaged there or cannot be read; or an earlier
///                          failure spent the handle
///                -ENOTSUP and the errnos of opening a backing file, as qcow2_pread()
///                -EBUSY, and what the I/O functions return
///
/// QEMU: bdrv_block_status() down the backing chain, as qemu-img map
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_block_status(
    bs: *mut Qcow2Image,
    offset: i64,
    bytes: i64,
    extent: *mut Qcow2Extent,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let out = NonNull::new(extent);
    if let Some(out) = out {
        // SAFETY: not null, and writable as the header demands. All zeros is a value.
        unsafe { out.write_bytes(0, 1) };
    }
    let body = |it: &mut Entered| {
        let out = out.ok_or_else(|| null("extent"))?;
        let max = u64::try_from(bytes)
            .map_err(|_| Error::Invalid(format!("The number of bytes is negative: {bytes}")))?;
        let start = u64::try_from(offset)
            .map_err(|_| Error::Corrupt(format!("The offset {offset} is not within the disk")))?;
        let found = it.image().block_status(start, max)?;
        let flags = [
            (found.data, QCOW2_BLOCK_DATA),
            (found.zero, QCOW2_BLOCK_ZERO),
            (found.offset.is_some(), QCOW2_BLOCK_OFFSET_VALID),
            (found.present, QCOW2_BLOCK_ALLOCATED),
            (found.compressed, QCOW2_BLOCK_COMPRESSED),
        ];
        let name = match found.offset {
            Some(_) => it.image().host_name(found.depth),
            None => None,
        };
        let answer = Qcow2Extent {
            start: found.start,
            length: found.length,
            host_offset: found.offset.unwrap_or(0),
            flags: flags
                .iter()
                .filter(|(set, _)| *set)
                .fold(0, |all, (_, bit)| all | *bit as u32),
            depth: found.depth,
            filename: name.map_or(ptr::null(), CStr::as_ptr),
            reserved: [0; 3],
        };
        // SAFETY: as above.
        unsafe { out.write(answer) };
        Ok(0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Reads, body) }
}

/// Read VM state: of the snapshot that qcow2_snapshot_load_tmp() shows or, without one, of
/// the disk itself, where qcow2_snapshot_goto() brings that of the snapshot. The bytes are
/// those that QEMU would load to resume the guest; how many there are is `vm_state_size` of
/// the snapshot. What was never saved reads as zeros, as with QEMU.
///
/// @param bs      the handle
/// @param pos     where, in bytes from the start of the VM state; any alignment
/// @param buf     room for `bytes` bytes, belongs to the caller; its contents are
///                unspecified after a failure
/// @param bytes   how many; 0 is fine
/// @param errp    NULL, or where to put the error: must hold NULL on entry, set only on
///                failure, then owned by the caller (qcow2_error_free())
/// @return        0 when all bytes have been read, or -errno:
///                -EINVAL   bs is NULL, or buf is NULL and bytes is not 0
///                -EIO      pos is negative or beyond what can be; the image is damaged there
///                          or cannot be read; or an earlier failure spent the handle
///                -ENOTSUP and the errnos of opening a backing file, as qcow2_pread()
///                -EBUSY, and what the I/O functions return
///
/// QEMU: qcow2_load_vmstate() of block/qcow2.c, through bdrv_load_vmstate()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_load_vmstate(
    bs: *mut Qcow2Image,
    pos: i64,
    buf: *mut c_void,
    bytes: usize,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let body = |it: &mut Entered| {
        let outside = || Error::Corrupt(format!("The VM state position {pos} is out of range"));
        let start = u64::try_from(pos).map_err(|_| outside())?;
        // Before the buffer is touched: does the image allow such a range at all?
        it.image().load_vmstate(start, &mut [])?;
        if bytes == 0 {
            return Ok(0);
        }
        if isize::try_from(bytes).is_err() {
            return Err(outside());
        }
        let buf = NonNull::new(buf.cast::<u8>()).ok_or_else(|| null("buf"))?;
        // SAFETY: the header demands room for `bytes` bytes, which fit an isize. They are
        // cleared first, since the caller's memory may never have been written.
        let slice = unsafe {
            buf.write_bytes(0, bytes);
            std::slice::from_raw_parts_mut(buf.as_ptr(), bytes)
        };
        it.image().load_vmstate(start, slice).map(|()| 0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Reads, body) }
}

fn no_such(words: &str) -> Error {
    Error::NotFound(words.to_owned())
}

/// A C string's bytes, or None for NULL.
///
/// # Safety
/// `text` is null or a NUL-terminated string that lives as long as the result is used.
pub(super) unsafe fn bytes<'a>(text: *const c_char) -> Option<&'a [u8]> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, terminated and alive by our caller's promise.
    Some(unsafe { CStr::from_ptr(text) }.to_bytes())
}

/// The length of the struct that the program was compiled with.
fn info_size(compat_2_1: bool) -> usize {
    if compat_2_1 {
        // The struct of 2014 ends where `icount` begins today.
        offset_of!(Qcow2SnapshotInfo, icount)
    } else {
        size_of::<Qcow2SnapshotInfo>()
    }
}

/// Copy a caller's struct. A struct of 2014 has no instruction count: UINT64_MAX then.
///
/// # Safety
/// `at` points to `info_size(compat_2_1)` readable bytes.
unsafe fn read_info(at: NonNull<Qcow2SnapshotInfo>, compat_2_1: bool) -> Qcow2SnapshotInfo {
    let mut info = MaybeUninit::<Qcow2SnapshotInfo>::zeroed();
    // SAFETY: the source is that long by our caller's promise, and the target no shorter. Every
    // member is an integer or an array of them, for which zeros and any bytes are values.
    let mut info = unsafe {
        ptr::copy_nonoverlapping(
            at.as_ptr().cast::<u8>(),
            info.as_mut_ptr().cast::<u8>(),
            info_size(compat_2_1),
        );
        info.assume_init()
    };
    if compat_2_1 {
        info.icount = u64::MAX;
    }
    info
}

/// The text in a caller's array: up to its NUL, or the whole array.
fn text_of(array: &[c_char]) -> &[u8] {
    // SAFETY: c_char and u8 have the same size and alignment, and any bits are a value.
    let bytes = unsafe { std::slice::from_raw_parts(array.as_ptr().cast::<u8>(), array.len()) };
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

/// Put text into an array of zeros, cut so that a NUL remains.
fn put_text(array: &mut [c_char], text: &[u8]) {
    let room = array.len().saturating_sub(1);
    for (to, from) in array.iter_mut().take(room).zip(text) {
        *to = *from as c_char;
    }
}

/// The array that `qcow2_snapshot_list()` returns, from malloc; None for an empty list.
fn malloc_list(
    snapshots: &[Snapshot],
    compat_2_1: bool,
) -> Result<Option<NonNull<Qcow2SnapshotInfo>>> {
    if snapshots.is_empty() {
        return Ok(None);
    }
    let stride = info_size(compat_2_1);
    // SAFETY: no precondition; calloc checks the product.
    let array = unsafe { libc::calloc(snapshots.len(), stride) }.cast::<u8>();
    let array = NonNull::new(array).ok_or(Error::NoMemory(
        (snapshots.len() as u64).saturating_mul(stride as u64),
    ))?;
    for (i, sn) in snapshots.iter().enumerate() {
        let mut info = Qcow2SnapshotInfo {
            id_str: [0; 128],
            name: [0; 256],
            vm_state_size: sn.vm_state_size,
            date_sec: sn.date_sec,
            date_nsec: sn.date_nsec,
            vm_clock_nsec: sn.vm_clock_nsec,
            icount: sn.icount,
        };
        put_text(&mut info.id_str, &sn.id);
        put_text(&mut info.name, &sn.name);
        // SAFETY: element `i` lies within the array, and `stride` is no longer than `info`.
        // Copied as bytes: with the stride of 2014 the last member stays behind.
        unsafe {
            ptr::copy_nonoverlapping(
                ptr::from_ref(&info).cast::<u8>(),
                array.add(i * stride).as_ptr(),
                stride,
            );
        }
    }
    Ok(Some(array.cast::<Qcow2SnapshotInfo>()))
}
