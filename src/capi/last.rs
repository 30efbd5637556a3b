//! What a handle remembers of its last call.

use std::ffi::{c_char, c_int};

use super::guard::{null_handle_text, Qcow2Image};

/// The message of the last call on this handle, if that call failed. This is where the
/// functions without an `errp` leave their words; those with one leave a copy.
///
/// After a call that succeeded: NULL, or a remark if there is something to know about how
/// it was done (for example that reverting could not be made atomic for want of space).
///
/// While a call on the handle is running, on another thread or around one of the caller's own I/O
/// functions, the answer is a static text that says so.
///
/// @param bs  the handle, or NULL
/// @return    a string that belongs to the handle, valid until the next call on it (asking
///            again and qcow2_last_outcome() do not count), or NULL. For a NULL handle a
///            static text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_last_error(bs: *const Qcow2Image) -> *const c_char {
    // SAFETY: null or an open handle, as the header demands.
    match unsafe { bs.as_ref() } {
        Some(handle) => handle.last_error(),
        None => null_handle_text(),
    }
}

/// What the last changing verb (create, goto, delete, qcow2_write_snapshots) did to the
/// image. Needed after a failure only; success means QCOW2_OUTCOME_DONE.
///
/// QCOW2_OUTCOME_UNCHANGED together with an error can mean an I/O error before the
/// new state was published: the disk and the snapshots are what they were, but clusters may
/// have leaked (qcow2_check() finds them) and the handle refuses further
/// changes (-EIO) until the image is opened again. QCOW2_OUTCOME_DONE together with an
/// error means that the verb took effect and that only clusters it should have freed may be
/// left over.
///
/// @param bs  the handle
/// @return    one of the QCOW2_OUTCOME values, or -EINVAL if `bs` is NULL
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_last_outcome(bs: *const Qcow2Image) -> c_int {
    // SAFETY: null or an open handle, as the header demands.
    match unsafe { bs.as_ref() } {
        Some(handle) => handle.outcome(),
        None => -libc::EINVAL,
    }
}
