//! The one way from C into the library.
//!
//! ```text
//!   C ──> qcow2_*() ──> guard ──> body ──> crate::Image
//!                         │
//!                         ├ pthread_cancel()       waits until the call returns
//!                         ├ NULL handle            -EINVAL
//!                         ├ handle busy            -EBUSY
//!                         ├ Err(e)                 -e.errno(), *errp, last_error
//!                         └ panic                  -EIO, handle poisoned
//! ```

use std::any::Any;
use std::cell::UnsafeCell;
use std::ffi::{c_char, c_int, CStr, CString};
use std::mem::ManuallyDrop;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use super::cancel::Uncancellable;
use super::error::{set_error, Qcow2Error};
use crate::error::{Error, Result};
use crate::flags::OpenFlags;
use crate::image::{Image, Outcome};
use crate::words::printable;

// The name and the documentation of the type are the C header's; its members are nobody's.
/// One open image (QEMU's BlockDriverState): an opaque handle from one of the
/// qcow2_open functions, released by qcow2_close().
pub struct Qcow2Image {
    /// Set while a call runs. Whoever set it owns the two cells below.
    busy: AtomicBool,
    /// Dropped by hand: `guard_close()` moves it out while the rest is still there.
    image: UnsafeCell<ManuallyDrop<Image>>,
    /// What `qcow2_last_error()` shows.
    text: UnsafeCell<Option<CString>>,
    /// What `qcow2_last_outcome()` shows; readable while a call runs.
    outcome: AtomicI32,
    compat_2_1: bool,
}

/// Does a call count as a verb for `qcow2_last_outcome()`?
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// It only looks.
    Reads,
    /// It changes the image.
    Changes,
}

/// What a body sees of the handle.
pub(super) struct Entered<'a> {
    image: &'a mut Image,
    reached: bool,
    /// Opened with `QCOW2_O_COMPAT_2_1`.
    pub(super) compat_2_1: bool,
}

impl Entered<'_> {
    /// The image. A verb whose body fails before asking for it was refused for its
    /// arguments alone and has left the image as it was.
    pub(super) fn image(&mut self) -> &mut Image {
        self.reached = true;
        self.image
    }
}

const NULL_HANDLE: &CStr = c"The image handle is NULL";
const BUSY: &CStr = c"The image handle is busy: another thread is using it, or an I/O or progress function has called back into it";

impl Qcow2Image {
    pub(super) fn new(image: Image) -> Qcow2Image {
        Qcow2Image {
            compat_2_1: image.flags().has(OpenFlags::COMPAT_2_1),
            busy: AtomicBool::new(false),
            image: UnsafeCell::new(ManuallyDrop::new(image)),
            text: UnsafeCell::new(None),
            outcome: AtomicI32::new(Outcome::None as c_int),
        }
    }

    /// Claim the handle for one call; false if one is running.
    fn enter(&self) -> bool {
        !self.busy.swap(true, Ordering::Acquire)
    }

    fn leave(&self) {
        self.busy.store(false, Ordering::Release);
    }

    /// For `qcow2_last_outcome()`.
    pub(super) fn outcome(&self) -> c_int {
        self.outcome.load(Ordering::Relaxed)
    }

    /// For `qcow2_last_error()`: the text, or null.
    pub(super) fn last_error(&self) -> *const c_char {
        // Entered and left again, so that a caller's I/O function that asks in the middle of
        // a call does not read a text that the call is about to replace.
        let _uncancellable = Uncancellable::new();
        if !self.enter() {
            return BUSY.as_ptr();
        }
        // SAFETY: `enter` succeeded, so nobody else refers to the cell. The pointer stays
        // valid until the next call replaces the text, which is what the header promises.
        let text = unsafe { &*self.text.get() };
        let shown = text.as_ref().map_or(std::ptr::null(), |t| t.as_ptr());
        self.leave();
        shown
    }
}

/// `qcow2_last_error(NULL)`.
pub(super) fn null_handle_text() -> *const c_char {
    NULL_HANDLE.as_ptr()
}

/// Run `body` and make a value, or an errno and a message, of whatever happens.
fn run<R>(body: impl FnOnce() -> Result<R>) -> Ran<R> {
    // The message is made inside the net as well: formatting is code too.
    let caught = catch_unwind(AssertUnwindSafe(|| match body() {
        Ok(value) => Ok(value),
        Err(e) => Err((e.errno(), to_c_text(&e.to_string()))),
    }));
    match caught {
        Ok(Ok(value)) => Ran::Value(value),
        Ok(Err((errno, text))) => Ran::Failed { errno, text },
        Err(payload) => Ran::Panicked(panic_text(payload)),
    }
}

enum Ran<R> {
    Value(R),
    Failed { errno: c_int, text: CString },
    Panicked(CString),
}

/// For functions without a handle (the opens): NULL is the body's business.
///
/// # Safety
/// `errp` is null or points to a writable pointer.
pub(super) unsafe fn guard(
    errp: *mut *mut Qcow2Error,
    body: impl FnOnce() -> Result<c_int>,
) -> c_int {
    let _uncancellable = Uncancellable::new();
    let (errno, text) = match run(body) {
        Ran::Value(value) => return value,
        Ran::Failed { errno, text } => (errno, text),
        Ran::Panicked(text) => (libc::EIO, text),
    };
    // SAFETY: passed on from our caller.
    unsafe { set_error(errp, text) };
    -errno
}

/// For functions on a handle.
///
/// # Safety
/// `bs` is null or a handle that a `qcow2_open*` function returned and `qcow2_close()` has
/// not released; `errp` is null or points to a writable pointer.
pub(super) unsafe fn guard_image<R: From<c_int>>(
    bs: *const Qcow2Image,
    errp: *mut *mut Qcow2Error,
    kind: Kind,
    body: impl FnOnce(&mut Entered) -> Result<R>,
) -> R {
    let _uncancellable = Uncancellable::new();
    // SAFETY: null or alive, by our caller's promise; only shared references are ever made.
    let Some(handle) = (unsafe { bs.as_ref() }) else {
        // SAFETY: passed on from our caller.
        unsafe { set_error(errp, NULL_HANDLE.to_owned()) };
        return R::from(-libc::EINVAL);
    };
    if !handle.enter() {
        // The outer call owns the text, so this refusal goes to `errp` only.
        // SAFETY: passed on from our caller.
        unsafe { set_error(errp, BUSY.to_owned()) };
        return R::from(-libc::EBUSY);
    }
    // SAFETY: `enter` succeeded: until `leave`, these are the only references to the cells.
    let (image, shown) = unsafe { (&mut *handle.image.get(), &mut *handle.text.get()) };

    let mut entered = Entered {
        image,
        reached: false,
        compat_2_1: handle.compat_2_1,
    };
    let ran = run(|| body(&mut entered));
    let Entered { image, reached, .. } = entered;

    let panicked = matches!(ran, Ran::Panicked(_));
    if panicked {
        image.poison();
    }
    if kind == Kind::Changes {
        let before = handle.outcome();
        let after = if before == Outcome::Unknown as c_int {
            before // until the image is opened again, whatever is refused meanwhile
        } else if !reached {
            Outcome::Unchanged as c_int
        } else if panicked {
            Outcome::Unknown as c_int
        } else {
            image.last_outcome() as c_int
        };
        handle.outcome.store(after, Ordering::Relaxed);
    }
    let answer = match ran {
        Ran::Value(value) => {
            *shown = match kind {
                Kind::Changes => image.remark().map(to_c_text),
                Kind::Reads => None,
            };
            value
        }
        Ran::Failed { errno, text } => {
            // SAFETY: passed on from our caller.
            unsafe { set_error(errp, text.clone()) };
            *shown = Some(text);
            R::from(-errno)
        }
        Ran::Panicked(text) => {
            // SAFETY: passed on from our caller.
            unsafe { set_error(errp, text.clone()) };
            *shown = Some(text);
            R::from(-libc::EIO)
        }
    };
    handle.leave();
    answer
}

/// Close the image and free the handle, in any case but one: a call is still running (a
/// caller's I/O function closes the handle it serves), then -EBUSY and nothing is freed.
///
/// # Safety
/// As [`guard_image`]; and unless -EBUSY is returned, `bs` is gone.
pub(super) unsafe fn guard_close(bs: *mut Qcow2Image) -> c_int {
    let _uncancellable = Uncancellable::new();
    // SAFETY: null or alive, by our caller's promise.
    let Some(handle) = (unsafe { bs.as_ref() }) else {
        return 0;
    };
    if !handle.enter() {
        return -libc::EBUSY;
    }
    // The image is moved out and closed while the rest of the handle is still there and
    // busy: the caller's close function may touch the handle one last time.
    // SAFETY: `enter` succeeded and no `leave` follows, so the cell is ours for good and the
    // image is taken once.
    let image = unsafe { ManuallyDrop::take(&mut *handle.image.get()) };
    let ran = run(|| image.close());
    // SAFETY: `bs` came from `Box::into_raw` when it was opened, and `handle` is not used
    // any more; the image in it is not dropped again.
    drop(unsafe { Box::from_raw(bs) });
    match ran {
        Ran::Value(()) => 0,
        Ran::Failed { errno, .. } => -errno,
        Ran::Panicked(_) => -libc::EIO,
    }
}

/// A message as C text: one line, as an error already is; the words of a panic may be more.
pub(super) fn to_c_text(message: &str) -> CString {
    CString::new(printable(message.as_bytes())).unwrap_or_default()
}

fn panic_text(payload: Box<dyn Any + Send>) -> CString {
    let words = match (
        payload.downcast_ref::<&str>(),
        payload.downcast_ref::<String>(),
    ) {
        (Some(s), _) => s,
        (_, Some(s)) => s.as_str(),
        _ => "no details",
    };
    let text = to_c_text(&format!("Internal error, please report: {words}"));
    // A payload may panic when dropped, and there is no net under this any more.
    std::mem::forget(payload);
    text
}

/// -EINVAL for an argument that is NULL.
pub(super) fn null(what: &str) -> Error {
    Error::Invalid(format!("{what} is NULL"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::memory::MemoryStorage;

    #[test]
    fn a_panic_becomes_text() {
        let ran = run::<()>(|| std::panic::resume_unwind(Box::new("seven 7".to_owned())));
        match ran {
            Ran::Panicked(text) => {
                assert_eq!(text.to_bytes(), b"Internal error, please report: seven 7")
            }
            _ => panic!("not caught"),
        }
    }

    /// An open handle on an empty disk of 64 KiB: header, refcount table, block, L1 table.
    fn open_empty_disk() -> *mut Qcow2Image {
        let mut bytes = vec![0; 4 << 16];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"QFI\xfb\0\0\0\x03");
        put(23, &[16]); // cluster bits
        put(29, &[1, 0, 0]); // disk size
        put(39, &[1]); // L1 entries
        put(45, &[3, 0, 0]); // L1 table
        put(53, &[1, 0, 0]); // refcount table
        put(59, &[1]); // its clusters
        put(99, &[4]); // refcount order
        put(103, &[104]); // length of the header
        put((1 << 16) + 5, &[2, 0, 0]);
        put(2 << 16, &[0, 1, 0, 1, 0, 1, 0, 1]);
        let storage = Box::new(MemoryStorage::new(bytes));
        let image = Image::open_storage(storage, OpenFlags::RDWR).expect("a valid image");
        Box::into_raw(Box::new(Qcow2Image::new(image)))
    }

    fn panic_quietly(it: &mut Entered) -> Result<c_int> {
        it.image();
        // As `panic!`, without the hook that prints.
        std::panic::resume_unwind(Box::new("on purpose"))
    }

    #[test]
    fn a_panic_is_eio_and_spends_the_handle() {
        let bs = open_empty_disk();
        let mut err = std::ptr::null_mut();
        // SAFETY: the handle is open until `guard_close`, `err` is writable and freed once.
        unsafe {
            let ret = guard_image(bs, &mut err, Kind::Changes, panic_quietly);
            assert_eq!(ret, -libc::EIO);
            let text = CStr::from_ptr(super::super::qcow2_error_get_pretty(err));
            assert_eq!(
                text.to_bytes(),
                b"Internal error, please report: on purpose"
            );
            super::super::qcow2_error_free(err);
            assert_eq!((*bs).outcome(), Outcome::Unknown as c_int);

            let ret = super::super::qcow2_write_snapshots(bs);
            assert_eq!(ret, -libc::EIO);
            assert_eq!((*bs).outcome(), Outcome::Unknown as c_int);
            assert_eq!(guard_close(bs), 0);
        }
    }

    #[test]
    fn a_call_within_a_call_is_ebusy_and_leaves_the_outer_one_alone() {
        let bs = open_empty_disk();
        let mut err = std::ptr::null_mut();
        // SAFETY: as above.
        unsafe {
            let ret: c_int = guard_image(bs, std::ptr::null_mut(), Kind::Reads, |_| {
                assert_eq!(super::super::qcow2_write_snapshots(bs), -libc::EBUSY);
                assert_eq!(super::super::qcow2_getlength(bs), -i64::from(libc::EBUSY));
                let none = std::ptr::null();
                let ret = super::super::qcow2_snapshot_delete(bs, none, none, &mut err);
                assert_eq!(ret, -libc::EBUSY);
                super::super::qcow2_error_free(err);
                assert_eq!(CStr::from_ptr((*bs).last_error()), BUSY);
                assert_eq!(guard_close(bs), -libc::EBUSY);
                Ok(7)
            });
            assert_eq!(ret, 7);
            assert!((*bs).last_error().is_null());
            assert_eq!(super::super::qcow2_getlength(bs), 1 << 16);
            assert_eq!(guard_close(bs), 0);
        }
    }

    #[test]
    fn a_message_is_one_line_and_a_nul_does_not_cut_it() {
        assert_eq!(to_c_text("a\0b\nc").to_bytes(), br"a\x00b\nc");
    }

    #[test]
    fn an_error_becomes_its_errno_and_words() {
        let ran = run::<()>(|| Err(Error::NotFound("Can't find the snapshot".into())));
        match ran {
            Ran::Failed { errno, text } => {
                assert_eq!(errno, libc::ENOENT);
                assert_eq!(text.to_bytes(), b"Can't find the snapshot");
            }
            _ => panic!("not a failure"),
        }
    }
}
