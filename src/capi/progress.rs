//! Progress of a verb, and the way to cancel it.

use std::ffi::{c_int, c_void};
use std::ops::ControlFlow;
use std::ptr;

use super::guard::{guard_image, Entered, Kind, Qcow2Image};
use crate::image::{ProgressHook, Stage};

/// The caller's function for qcow2_set_progress(): how far is the verb, and shall it go on?
///
/// @param opaque  as given to qcow2_set_progress()
/// @param stage   one of the QCOW2_PROGRESS values
/// @param done    how much of the stage is done, in bytes of L2 tables and refcount blocks;
///                never goes down within a stage
/// @param total   how much there is to do; the same throughout a stage, and never 0
/// @return        0 to go on; anything else cancels the verb, if it can still be cancelled
pub type Qcow2ProgressFunc =
    Option<unsafe extern "C" fn(opaque: *mut c_void, stage: c_int, done: u64, total: u64) -> c_int>;

/// Have a function called while a changing verb or qcow2_snapshot_usage() is at work on this
/// handle: to show how far it is, and to cancel it (a user has pressed Ctrl-C, say).
/// qcow2_snapshot_usage() only looks: it has the first stage and no other.
///
/// The stages come in the order of their values. Within a stage there is a call after each
/// MiB of tables (every few milliseconds) or, in small images, each sixteenth of what is to
/// be done, and always a last one with `done` equal to `total`: after the last of
/// QCOW2_PROGRESS_CHECK the verb begins to write, after the last of QCOW2_PROGRESS_PREPARE it
/// takes effect, and the last of QCOW2_PROGRESS_RECLAIM comes when all is on stable storage.
/// A verb that fails does not come to them. Waiting for the disk between two calls may take
/// long.
///
/// A verb that is cancelled returns -ECANCELED, and qcow2_last_outcome() is
/// QCOW2_OUTCOME_UNCHANGED. In QCOW2_PROGRESS_CHECK not a byte has changed, and the handle
/// is good. In QCOW2_PROGRESS_PREPARE it is as after an I/O error: disk and snapshots are
/// what they were, but clusters may have leaked ("qcow2-snapshot check -r leaks" or
/// qcow2_check() frees them), and
/// the handle refuses further changes (-EIO) until the image is opened again. In
/// QCOW2_PROGRESS_RECLAIM the answer is ignored: the verb has been done.
///
/// The function is called on the thread that called the verb. It must not throw, longjmp, end
/// its thread or call back into the handle (-EBUSY).
///
/// @param bs      the handle
/// @param func    the function, in place of any before; NULL: none
/// @param opaque  handed to the function, otherwise not looked at; must live until the
///                handle is closed or has another function
/// @return        0, or -errno with the words in qcow2_last_error():
///                -EINVAL   bs is NULL
///                -EBUSY
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_set_progress(
    bs: *mut Qcow2Image,
    func: Qcow2ProgressFunc,
    opaque: *mut c_void,
) -> c_int {
    let body = |it: &mut Entered| {
        let hook = func.map(|func| -> Box<ProgressHook> {
            Box::new(move |stage: Stage, done, total| {
                // SAFETY: the caller's function, called as the header says it will be.
                match unsafe { func(opaque, stage as c_int, done, total) } {
                    0 => ControlFlow::Continue(()),
                    _ => ControlFlow::Break(()),
                }
            })
        });
        it.image().set_progress(hook);
        Ok(0)
    };
    // SAFETY: the header demands an open handle or NULL.
    unsafe { guard_image(bs, ptr::null_mut(), Kind::Reads, body) }
}
