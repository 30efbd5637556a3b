//! No thread is cancelled inside the library.

use std::ffi::c_int;

extern "C" {
    // Not in the libc crate for Linux.
    fn pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
}
// The value of glibc and of musl.
const PTHREAD_CANCEL_DISABLE: c_int = 1;

/// While this lives `pthread_cancel()` of the calling thread waits. Unwinding from a cancellation
/// point would go through Rust's frames, which abort the process, and end a verb half-way.
pub(super) struct Uncancellable(c_int);

impl Uncancellable {
    pub(super) fn new() -> Uncancellable {
        let mut old = 0;
        // SAFETY: the state of the calling thread and a place for the old one.
        unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &mut old) };
        Uncancellable(old)
    }
}

impl Drop for Uncancellable {
    fn drop(&mut self) {
        let mut disabled = 0;
        // SAFETY: as above. It does not cancel by itself: that is for the next cancellation point.
        unsafe { pthread_setcancelstate(self.0, &mut disabled) };
    }
}
