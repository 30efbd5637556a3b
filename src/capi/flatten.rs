//! Letting go of the backing file.

use std::ffi::c_int;
use std::ptr::NonNull;

use super::error::Qcow2Error;
use super::guard::{guard_image, null, Entered, Kind, Qcow2Image};

/// Let go of the backing file without losing a snapshot: what the backing chain shows in the
/// active disk and in each snapshot is copied into the image, then the image stops naming the
/// backing file. Every state reads as before. ("qemu-img rebase -b ''" fills the active disk
/// only, and every snapshot then reads zeros where the backing file was.)
///
/// A cluster that several states lack is copied once, and zeros of the backing file take no
/// clusters. Compressed clusters, bitmaps and VM state stay as they are.
///
/// The progress function hears of bytes of the L2 tables in QCOW2_PROGRESS_CHECK and of bytes
/// that are copied in QCOW2_PROGRESS_PREPARE. A call that is cancelled, that fails or that a
/// power cut ends leaves every state reading as before, at the cost of 64 MiB of leaked
/// clusters at most; the next one goes on behind what is copied (after a failed write on a
/// new handle). Cancelled, no clusters have leaked and the handle stays good.
///
/// @param bs    the handle, opened with QCOW2_O_RDWR
/// @param errp  NULL, or where to put the error: must hold NULL on entry, set only on
///              failure, then owned by the caller (qcow2_error_free())
/// @return      0, also without a backing file (nothing is written then), or -errno; on
///              failure see qcow2_last_outcome(): QCOW2_OUTCOME_UNCHANGED says that every state
///              reads as before:
///              -EINVAL   bs is NULL; so many states would share a cluster that its refcount
///                        would overflow its width (nothing is written); the image is in its
///                        own backing chain; or a backing file changes its length meanwhile
///              -EACCES   the handle is read-only
///              -ENOTSUP  data would have to be encrypted; a snapshot's L1 table is shorter than
///                        its disk; an external data file; QCOW2_O_NO_BACKING; no way to open
///                        files behind qcow2_open_io(); a backing file in a format other than
///                        qcow2 and raw, or encrypted
///              -EFBIG    the file would pass the process's limit or QEMU's
///              -ENOSPC   the disk is full
///              -EIO      the image is damaged, cannot be read or written, or an earlier failure
///                        spent the handle
///              -ECANCELED  the progress function has cancelled it
///              -ENOMEM, -EBUSY, and what the I/O functions and opening a backing file return
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_flatten(bs: *mut Qcow2Image, errp: *mut *mut Qcow2Error) -> c_int {
    let body = |it: &mut Entered| it.image().flatten().map(|()| 0);
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Changes, body) }
}

/// The most that qcow2_flatten() would copy. Only tables are read, and the holes of the
/// backing file where the system tells of them; data that turns out to be zeros will take
/// nothing. The progress function is not called.
///
/// @param bs     the handle, read-only or not
/// @param bytes  where to put the number, in bytes of whole clusters; 0 without a backing
///               file; cleared if the call fails
/// @param errp   NULL, or where to put the error: must hold NULL on entry, set only on
///               failure, then owned by the caller (qcow2_error_free())
/// @return       0, or -errno:
///               -EINVAL   bs or bytes is NULL; or the image is in its own backing chain
///               -ENOTSUP  as of qcow2_flatten(), but for encryption
///               -EIO      the image is damaged or cannot be read; or an earlier failure
///                         spent the handle
///               -ENOMEM, -EBUSY, and what the I/O functions and opening a backing file return
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_flatten_estimate(
    bs: *mut Qcow2Image,
    bytes: *mut u64,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let out = NonNull::new(bytes);
    if let Some(out) = out {
        // SAFETY: not null, and writable as the header demands.
        unsafe { out.write(0) };
    }
    let body = |it: &mut Entered| {
        let out = out.ok_or_else(|| null("bytes"))?;
        let estimate = it.image().flatten_estimate()?;
        // SAFETY: as above.
        unsafe { out.write(estimate) };
        Ok(0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Reads, body) }
}
