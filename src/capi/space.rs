//! What QEMU has no function for: what snapshots hold, deleting many, renaming.

use std::ffi::{c_char, c_int};
use std::ptr::NonNull;

use super::error::Qcow2Error;
use super::guard::{guard_image, null, Entered, Kind, Qcow2Image};
use super::types::Qcow2Usage;
use super::verbs::bytes as text;
use crate::error::{Error, Result};
use crate::room;

/// What snapshots hold, taken together, and what deleting them would free. The figure of a set is
/// not the sum of its members': what two snapshots share with each other, and with nothing
/// else, is freed only when both go.
///
/// The figures come from the delete itself, short of writing it: after
/// qcow2_snapshot_delete_many() of the same snapshots exactly `exclusive` bytes of clusters are
/// free, and what the snapshot table has become shorter. Nothing is written. It takes about as
/// long as the looking half of a delete: each L2 table of the set is read once, however many
/// of the set share it. What load_tmp shows makes no difference.
///
/// @param bs         the handle, read-only or not
/// @param snapshots  `n` texts: for each the ID of a snapshot or, if none has this ID, its name
///                   (of several the first); NULL stands for the active disk. The same twice
///                   is the same once.
/// @param n          how many; 0: the active disk alone, and `snapshots` may be NULL
/// @param usage      where to put the answer; cleared if the call fails
/// @param errp       NULL, or where to put the error: must hold NULL on entry, set only on
///                   failure, then owned by the caller (qcow2_error_free())
/// @return           0, or -errno:
///                   -EINVAL   bs or usage is NULL; snapshots is NULL and n is not 0; a
///                             snapshot's L1 table is not where one can be; or a refcount is
///                             lower than the references of the set
///                   -ENOENT   no such snapshot; the message names it
///                   -EFBIG    a snapshot's L1 table exceeds QEMU's limit
///                   -ENOTSUP  the image was not closed properly (dirty bit), so that its
///                             refcounts say nothing; or an external data file
///                   -EIO      the image is damaged there or cannot be read; or an earlier
///                             failure spent the handle
///                   -ECANCELED  qcow2_set_progress()
///                   -ENOMEM, -EBUSY, and what the I/O functions return
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_usage(
    bs: *mut Qcow2Image,
    snapshots: *const *const c_char,
    n: usize,
    usage: *mut Qcow2Usage,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let out = NonNull::new(usage);
    if let Some(out) = out {
        // SAFETY: not null, and writable as the header demands. All zeros is a value.
        unsafe { out.write_bytes(0, 1) };
    }
    let body = |it: &mut Entered| {
        let out = out.ok_or_else(|| null("usage"))?;
        // SAFETY: NULL or an array of `n` texts, as the header demands.
        let states = unsafe { texts(snapshots, n) }?;
        let held = it.image().snapshot_usage(&states)?;
        let answer = Qcow2Usage {
            referenced: held.referenced,
            exclusive: held.exclusive,
            tables: held.tables,
            vm_state: held.vm_state,
            allocated: held.allocated,
            reserved: [0; 3],
        };
        // SAFETY: as above.
        unsafe { out.write(answer) };
        Ok(0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Reads, body) }
}

/// Delete snapshots, all of them or none, in one verb: what several of them share is gone through
/// once. When it returns 0 the change is complete and on stable storage. Afterwards list,
/// disks and refcounts are what deleting them one after the other leaves. Those that cannot be
/// read go as by qcow2_snapshot_delete().
///
/// @param bs         the handle, opened with QCOW2_O_RDWR
/// @param snapshots  `n` texts: for each the ID of a snapshot or, if none has this ID, its name
///                   (of several the first). All are looked up in the list as it is before the
///                   call, so that the same name twice is one snapshot: use IDs where names
///                   repeat.
/// @param n          how many; 0: nothing is done, and `snapshots` may be NULL
/// @param errp       NULL, or where to put the error: must hold NULL on entry, set only on
///                   failure, then owned by the caller (qcow2_error_free())
/// @return           0, or -errno; on failure see qcow2_last_outcome():
///                   -EINVAL   bs, or one of the texts, is NULL; snapshots is NULL and n is not
///                             0; or a refcount contradicts its use
///                   -ENOENT   no such snapshot; the message names it, and none is deleted
///                   -EACCES   the handle is read-only
///                   -EFBIG, -ENOTSUP, -ENOSPC, -EIO, -ECANCELED  as qcow2_snapshot_delete()
///                   -ECANCELED  qcow2_set_progress()
///                   -ENOMEM, -EBUSY, and what the I/O functions return
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_delete_many(
    bs: *mut Qcow2Image,
    snapshots: *const *const c_char,
    n: usize,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let body = |it: &mut Entered| {
        // SAFETY: NULL or an array of `n` texts, as the header demands.
        let states = unsafe { texts(snapshots, n) }?;
        let named = room::collected(states.iter().copied().flatten())?;
        if named.len() != states.len() {
            return Err(null("One of the snapshots"));
        }
        it.image().snapshot_delete_many(&named).map(|()| 0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Changes, body) }
}

/// Give a snapshot another name. It keeps its ID, its date, everything else and its place in the
/// list. Only the snapshot table is written, to a new place. When it returns 0 the change is
/// complete and on stable storage.
///
/// @param bs        the handle, opened with QCOW2_O_RDWR
/// @param snapshot  the ID or, if no snapshot has this ID, the name; of several with the same
///                  name the first. Text ending in NUL, of any length.
/// @param new_name  the name that it gets, at most 255 bytes; may be empty, and in use
/// @param errp      NULL, or where to put the error: must hold NULL on entry, set only on
///                  failure, then owned by the caller (qcow2_error_free())
/// @return          0, or -errno; on failure see qcow2_last_outcome():
///                  -EINVAL   bs, snapshot or new_name is NULL; the new name is too long; or a
///                            refcount contradicts its use
///                  -ENOENT   no such snapshot; the message names it
///                  -EACCES   the handle is read-only
///                  -EFBIG    the table would exceed QEMU's limit of 64 MiB, the image file or
///                            its refcount table what QEMU allows, or the file the process's
///                            limit
///                  -ENOTSUP  the image has a feature that rules this out; the words name it
///                  -ENOSPC   the disk is full; the image is unchanged
///                  -EIO      the image is damaged where the verb must go, or cannot be read
///                            or written, or an earlier failure spent the handle
///                  -ECANCELED  the progress function has cancelled it
///                  -ENOMEM, -EBUSY, and what the I/O functions return
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_rename(
    bs: *mut Qcow2Image,
    snapshot: *const c_char,
    new_name: *const c_char,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let body = |it: &mut Entered| {
        // SAFETY: NULL or text, as the header demands.
        let (snapshot, new_name) = unsafe { (text(snapshot), text(new_name)) };
        let snapshot = snapshot.ok_or_else(|| null("snapshot"))?;
        let new_name = new_name.ok_or_else(|| null("new_name"))?;
        it.image().snapshot_rename(snapshot, new_name).map(|()| 0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Changes, body) }
}

/// The texts of an array, `None` for each that is NULL.
///
/// # Safety
/// `array` is NULL or points to `n` pointers, each NULL or a text ending in NUL; all of it stays as it
/// is as long as the result is used.
unsafe fn texts<'a>(array: *const *const c_char, n: usize) -> Result<Vec<Option<&'a [u8]>>> {
    let mut texts = Vec::new();
    if n == 0 {
        return Ok(texts);
    }
    if array.is_null() {
        return Err(Error::Invalid("snapshots is NULL".into()));
    }
    for i in 0..n {
        // SAFETY: within the array, by our caller's promise.
        let one = unsafe { array.add(i).read() };
        // SAFETY: NULL or text, by our caller's promise.
        room::push(&mut texts, unsafe { text(one) })?;
    }
    Ok(texts)
}
