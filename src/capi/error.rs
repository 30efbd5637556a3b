//! Error objects, and what a handle remembers of its last call.

use std::ffi::{c_char, c_int, CString};

use super::guard::{null_handle_text, Qcow2Image, Uncancellable};

/// Why a call failed (QEMU's Error): an opaque object that belongs to the caller.
/// It does not refer to the handle and may outlive it. The errno is the call's return
/// value; the object holds the words.
pub struct Qcow2Error {
    message: CString,
}

/// Hand `text` to the caller as a new error object, if the caller wants one.
///
/// # Safety
/// `errp` is null or points to a writable pointer.
pub(super) unsafe fn set_error(errp: *mut *mut Qcow2Error, text: CString) {
    if errp.is_null() {
        return;
    }
    let error = Box::into_raw(Box::new(Qcow2Error { message: text }));
    // SAFETY: not null, and writable by our caller's promise; the old value is not read.
    unsafe { errp.write(error) };
}

/// The message of an error object: one line of English in UTF-8, whatever the locale, with
/// whatever a terminal might obey in names of the image shown escaped.
///
/// @param err  an error object from this library (never one of QEMU's), or NULL
/// @return     a string that belongs to `err` and lives as long as it does. For NULL a
///             static text, so that the answer can always be printed.
///
/// QEMU: error_get_pretty()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_error_get_pretty(err: *const Qcow2Error) -> *const c_char {
    // SAFETY: null or an object of ours that has not been freed, as the header demands.
    match unsafe { err.as_ref() } {
        Some(error) => error.message.as_ptr(),
        None => c"No error".as_ptr(),
    }
}

/// Free an error object. NULL is fine.
///
/// @param err  an error object from this library (never one of QEMU's), or NULL
///
/// QEMU: error_free()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_error_free(err: *mut Qcow2Error) {
    let _uncancellable = Uncancellable::new();
    if !err.is_null() {
        // SAFETY: it came from `Box::into_raw` in `set_error`, and the header demands that it
        // is freed once.
        drop(unsafe { Box::from_raw(err) });
    }
}

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
