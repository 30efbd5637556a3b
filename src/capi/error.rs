//! Error objects.

use std::ffi::{c_char, CString};

use super::cancel::Uncancellable;

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
