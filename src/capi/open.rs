//! Opening and closing.

use std::ffi::{c_char, c_int, c_void, CStr, CString, OsStr};
use std::io;
use std::mem::{offset_of, size_of, MaybeUninit};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use super::error::Qcow2Error;
use super::guard::{guard, guard_close, null, Qcow2Image};
use super::types::Qcow2IoOps;
use crate::error::{Error, Result};
use crate::flags::OpenFlags;
use crate::image::Image;
use crate::io::callbacks::{failure as callback_error, CallbackStorage, Callbacks};
use crate::io::DiscardKind;

/// Open the image at a path. The descriptor is close-on-exec. Opening writes nothing.
///
/// The image is locked as QEMU locks it, unless QCOW2_O_NO_LOCK is given: a read-write open
/// of an image that a guest, qemu-img or another handle has open is -EAGAIN, and so is a
/// read-only open while a guest runs (QCOW2_O_FORCE_SHARE is for that); while the handle is
/// open, qemu-img refuses the image in the same way.
///
/// A block device is opened like a file. Its length is the device's own and stays: what would need
/// more is -ENOSPC before anything is written. Freed clusters are discarded where the device can.
/// Nothing tells there that somebody else has changed the image (QCOW2_O_FORCE_SHARE):
/// qcow2_reload() looks again.
///
/// A process's classic record locks (fcntl() with F_SETLK) on the image go away whenever any
/// descriptor of the file is closed: an open may drop them already, and qcow2_close() does. That
/// is how the system defines them; F_OFD_SETLK locks stay.
///
/// @param filename  a plain path, not one of QEMU's "protocol:" names; text ending in NUL
/// @param flags     QCOW2_O values joined by "|", or 0: read-only
/// @param pbs       where to put the handle, which then belongs to the caller
///                  (qcow2_close()); set to NULL if the call fails
/// @param errp      NULL, or where to put the error: must hold NULL on entry, set only on
///                  failure, then owned by the caller (qcow2_error_free())
/// @return          0, or -errno:
///                  -EINVAL   filename or pbs is NULL; an unknown flag, or FORCE_SHARE with
///                            RDWR; neither a regular file nor a block device; or not a
///                            qcow2 image, or a field of its header is not valid
///                  -ENOENT   no such file; likewise the system's other errnos for paths
///                  -EACCES   no permission; or, with RDWR, the device is write-protected or
///                            the image marked corrupt
///                  -EAGAIN   the image is in use by somebody else
///                  -EFBIG    a table of the image exceeds QEMU's limit for it
///                  -ENOTSUP  the dirty bit with RDWR; or a feature that is not supported: the
///                            words name it
///                  -EIO      the file cannot be read, or is damaged
///                  -ENOMEM
///
/// QEMU: bdrv_open() with the driver "qcow2"
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_open(
    filename: *const c_char,
    flags: c_int,
    pbs: *mut *mut Qcow2Image,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let body = || {
        if filename.is_null() {
            return Err(null("filename"));
        }
        // SAFETY: not null, and text ending in NUL as the header demands.
        let name = unsafe { CStr::from_ptr(filename) };
        Image::open(
            Path::new(OsStr::from_bytes(name.to_bytes())),
            OpenFlags::from_bits(flags)?,
        )
    };
    // SAFETY: the header demands writable pointers or NULL.
    unsafe { open(pbs, errp, body) }
}

/// Open the image that a descriptor refers to, as qcow2_open() opens one by its path.
///
/// The descriptor stays the caller's, open and at its position, and may be closed at once:
/// the library opens the same file again through /proc, so that its locks are its own. Where
/// that fails (no /proc, or no permission for the file any more) it duplicates the
/// descriptor, and then the image locks are shared with it: they keep other programs out as
/// before, but not a second handle made from the same descriptor. A caller that holds QEMU's
/// locks on the descriptor itself must give QCOW2_O_NO_LOCK, for closing the handle would
/// release them there.
///
/// @param fd     a descriptor of a regular file or a block device; with QCOW2_O_RDWR it must
///               be writable
/// @param flags  QCOW2_O values joined by "|", or 0: read-only
/// @param pbs    where to put the handle, which then belongs to the caller
///               (qcow2_close()); set to NULL if the call fails
/// @param errp   NULL, or where to put the error: must hold NULL on entry, set only on
///               failure, then owned by the caller (qcow2_error_free())
/// @return       0, or -errno as qcow2_open(), and:
///               -EBADF    fd is not an open descriptor
///               -EINVAL   it was opened with O_PATH, O_APPEND or O_DIRECT
///               -EACCES   it was not opened for what the flags ask
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_open_fd(
    fd: c_int,
    flags: c_int,
    pbs: *mut *mut Qcow2Image,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let body = || Image::open_fd(fd, OpenFlags::from_bits(flags)?);
    // SAFETY: the header demands writable pointers or NULL.
    unsafe { open(pbs, errp, body) }
}

/// Open an image that is reached through the caller's own functions. No lock is taken:
/// keeping others out of the image is the caller's duty.
///
/// @param ops     the functions; copied, the table may go away after the call
/// @param opaque  handed to each function, otherwise not looked at; must live until the
///                handle is closed
/// @param flags   QCOW2_O values joined by "|", or 0: read-only
/// @param pbs     where to put the handle, which then belongs to the caller
///                (qcow2_close()); set to NULL if the call fails
/// @param errp    NULL, or where to put the error: must hold NULL on entry, set only on
///                failure, then owned by the caller (qcow2_error_free())
/// @return        0, or -errno as qcow2_open() for what concerns the image, and:
///                -EINVAL   ops is NULL, its size too small to hold truncate, or a function
///                          up to truncate NULL
///                or what the functions return
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_open_io(
    ops: *const Qcow2IoOps,
    opaque: *mut c_void,
    flags: c_int,
    pbs: *mut *mut Qcow2Image,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let body = || {
        let flags = OpenFlags::from_bits(flags)?;
        // SAFETY: null or a table of the length it says, as the header demands.
        let table = unsafe { copy_table(ops) }?;
        let storage = CallbackStorage::new(
            Box::new(CallerFunctions::new(&table, opaque)?),
            flags.has(OpenFlags::NO_FLUSH),
            flags.has(OpenFlags::NO_DISCARD),
        );
        Image::open_storage(Box::new(storage), flags)
    };
    // SAFETY: the header demands writable pointers or NULL.
    unsafe { open(pbs, errp, body) }
}

/// Close the image, release its locks and free the handle. Nothing is written: a verb that
/// returned 0 is on stable storage already.
///
/// @param bs  the handle, or NULL, which is fine. It is gone afterwards, whatever the answer;
///            but for -EBUSY.
/// @return    0; or an errno of closing or unlocking the file, which says nothing of the
///            image; or -EBUSY when one of the caller's own I/O functions tries to close the
///            handle that it is serving: then nothing is freed
///
/// QEMU: bdrv_unref()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_close(bs: *mut Qcow2Image) -> c_int {
    // SAFETY: the header demands an open handle or NULL, and that it is not used again.
    unsafe { guard_close(bs) }
}

/// What the three opens have in common: make the handle of an image, or an error.
///
/// # Safety
/// `pbs` and `errp` are null or point to writable pointers.
unsafe fn open(
    pbs: *mut *mut Qcow2Image,
    errp: *mut *mut Qcow2Error,
    body: impl FnOnce() -> Result<Image>,
) -> c_int {
    if !pbs.is_null() {
        // SAFETY: not null, and writable by our caller's promise.
        unsafe { pbs.write(ptr::null_mut()) };
    }
    let body = || {
        if pbs.is_null() {
            return Err(null("pbs"));
        }
        let handle = Box::new(Qcow2Image::new(body()?));
        // SAFETY: as above.
        unsafe { pbs.write(Box::into_raw(handle)) };
        Ok(0)
    };
    // SAFETY: passed on from our caller.
    unsafe { guard(errp, body) }
}

/// The bytes of the table that every caller must give: up to the last function that is
/// not optional.
const MANDATORY: usize = offset_of!(Qcow2IoOps, discard);

/// Copy the caller's table: members that it does not have become NULL, members that
/// this library does not know are left out.
///
/// # Safety
/// `ops` is null, or points to a `size` and as many bytes as it says.
unsafe fn copy_table(ops: *const Qcow2IoOps) -> Result<Qcow2IoOps> {
    if ops.is_null() {
        return Err(null("ops"));
    }
    // SAFETY: not null; the first member is there whatever the table's length.
    let size = unsafe { ops.cast::<usize>().read_unaligned() };
    if size < MANDATORY {
        return Err(Error::Invalid(format!(
            "The size of the I/O function table is {size}, at least {MANDATORY} is needed"
        )));
    }
    // Half a pointer is no pointer.
    let known = size.min(size_of::<Qcow2IoOps>());
    let whole = known - known % size_of::<usize>();
    let mut table = MaybeUninit::<Qcow2IoOps>::zeroed();
    // SAFETY: the source has `size` bytes by our caller's promise, and `whole` exceeds neither
    // that nor the target. Every member is pointer-sized and valid when zero.
    Ok(unsafe {
        ptr::copy_nonoverlapping(ops.cast::<u8>(), table.as_mut_ptr().cast::<u8>(), whole);
        table.assume_init()
    })
}

/// A caller's functions, checked.
struct CallerFunctions {
    opaque: *mut c_void,
    pread: unsafe extern "C" fn(*mut c_void, u64, *mut c_void, usize) -> c_int,
    pwrite: unsafe extern "C" fn(*mut c_void, u64, *const c_void, usize) -> c_int,
    flush: unsafe extern "C" fn(*mut c_void) -> c_int,
    getlength: unsafe extern "C" fn(*mut c_void) -> i64,
    truncate: unsafe extern "C" fn(*mut c_void, u64) -> c_int,
    discard: Option<unsafe extern "C" fn(*mut c_void, u64, u64) -> c_int>,
    close: Option<unsafe extern "C" fn(*mut c_void)>,
    open_file: Option<OpenFile>,
    event: Option<unsafe extern "C" fn(*mut c_void, *const c_char)>,
    backing_length: Option<unsafe extern "C" fn(*mut c_void) -> i64>,
    discard_kind: Option<unsafe extern "C" fn(*mut c_void, u64, u64, c_int) -> c_int>,
}

type OpenFile = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    *const c_char,
    *mut *const Qcow2IoOps,
    *mut *mut c_void,
) -> c_int;

impl CallerFunctions {
    fn new(table: &Qcow2IoOps, opaque: *mut c_void) -> Result<CallerFunctions> {
        Ok(CallerFunctions {
            opaque,
            pread: table.pread.ok_or_else(|| null("ops->pread"))?,
            pwrite: table.pwrite.ok_or_else(|| null("ops->pwrite"))?,
            flush: table.flush.ok_or_else(|| null("ops->flush"))?,
            getlength: table.getlength.ok_or_else(|| null("ops->getlength"))?,
            truncate: table.truncate.ok_or_else(|| null("ops->truncate"))?,
            discard: table.discard,
            close: table.close,
            open_file: table.open_file,
            event: table.event,
            backing_length: table.backing_length,
            discard_kind: table.discard_kind,
        })
    }
}

// In all of these the function is the caller's, called as the header says it will be.
impl Callbacks for CallerFunctions {
    fn pread(&mut self, offset: u64, buf: &mut [u8]) -> i32 {
        // SAFETY: `buf` is writable for its length.
        unsafe { (self.pread)(self.opaque, offset, buf.as_mut_ptr().cast(), buf.len()) }
    }

    fn pwrite(&mut self, offset: u64, buf: &[u8]) -> i32 {
        // SAFETY: `buf` is readable for its length.
        unsafe { (self.pwrite)(self.opaque, offset, buf.as_ptr().cast(), buf.len()) }
    }

    fn flush(&mut self) -> i32 {
        // SAFETY: nothing but the caller's pointer is handed over.
        unsafe { (self.flush)(self.opaque) }
    }

    fn getlength(&mut self) -> i64 {
        // SAFETY: nothing but the caller's pointer is handed over.
        unsafe { (self.getlength)(self.opaque) }
    }

    fn truncate(&mut self, length: u64) -> i32 {
        // SAFETY: nothing but the caller's pointer is handed over.
        unsafe { (self.truncate)(self.opaque, length) }
    }

    fn discard(&mut self, offset: u64, bytes: u64) -> Option<i32> {
        // SAFETY: nothing but the caller's pointer is handed over.
        self.discard
            .map(|discard| unsafe { discard(self.opaque, offset, bytes) })
    }

    fn discard_kind(&mut self, offset: u64, bytes: u64, kind: DiscardKind) -> Option<i32> {
        // SAFETY: nothing but the caller's pointer is handed over.
        self.discard_kind
            .map(|discard| unsafe { discard(self.opaque, offset, bytes, kind as c_int) })
    }

    fn open_file(&mut self, name: &[u8], format: &[u8]) -> Option<io::Result<Box<dyn Callbacks>>> {
        let open_file = self.open_file?;
        let (Ok(name), Ok(format)) = (CString::new(name), CString::new(format)) else {
            return Some(Err(io::Error::from_raw_os_error(libc::EINVAL)));
        };
        let (mut ops, mut opaque) = (ptr::null(), ptr::null_mut());
        // SAFETY: two texts ending in NUL and two places to write to, alive during the call.
        let answer = unsafe {
            open_file(
                self.opaque,
                name.as_ptr(),
                format.as_ptr(),
                &mut ops,
                &mut opaque,
            )
        };
        if answer != 0 {
            return Some(Err(callback_error(answer.into())));
        }
        // SAFETY: null or a table of the length it says, as the header demands.
        let table = match unsafe { copy_table(ops) } {
            Ok(table) => table,
            Err(e) => return Some(Err(io::Error::from_raw_os_error(e.errno()))),
        };
        // From here on whatever happens ends with the caller's close.
        let close = ClosesOnce {
            opaque,
            close: table.close,
        };
        Some(match CallerFunctions::new(&table, opaque) {
            Ok(functions) => Ok(Box::new(LayerFunctions { functions, close })),
            Err(e) => Err(io::Error::from_raw_os_error(e.errno())),
        })
    }

    fn event(&mut self, label: &'static str) {
        // Labels are short; one that does not fit is told as far as it goes.
        let Some(event) = self.event else { return };
        let mut text = [0u8; 64];
        for (to, from) in text.iter_mut().take(63).zip(label.bytes()) {
            *to = from;
        }
        // SAFETY: a text ending in NUL, alive during the call.
        unsafe { event(self.opaque, text.as_ptr().cast()) }
    }

    fn backing_length(&mut self) -> Option<i64> {
        // SAFETY: nothing but the caller's pointer is handed over.
        self.backing_length.map(|f| unsafe { f(self.opaque) })
    }

    fn close(&mut self) {
        if let Some(close) = self.close {
            // SAFETY: nothing but the caller's pointer is handed over.
            unsafe { close(self.opaque) }
        }
    }
}

/// Calls a caller's close function when dropped.
struct ClosesOnce {
    opaque: *mut c_void,
    close: Option<unsafe extern "C" fn(*mut c_void)>,
}

impl Drop for ClosesOnce {
    fn drop(&mut self) {
        if let Some(close) = self.close.take() {
            // SAFETY: nothing but the caller's pointer is handed over.
            unsafe { close(self.opaque) }
        }
    }
}

/// The functions of a file that the caller opened for us: they only read, and dropping them
/// closes the file.
struct LayerFunctions {
    functions: CallerFunctions,
    #[allow(dead_code)] // it is there to be dropped
    close: ClosesOnce,
}

impl Callbacks for LayerFunctions {
    fn pread(&mut self, offset: u64, buf: &mut [u8]) -> i32 {
        self.functions.pread(offset, buf)
    }

    fn pwrite(&mut self, _offset: u64, _buf: &[u8]) -> i32 {
        -libc::EBADF
    }

    fn flush(&mut self) -> i32 {
        0
    }

    fn getlength(&mut self) -> i64 {
        self.functions.getlength()
    }

    fn truncate(&mut self, _length: u64) -> i32 {
        -libc::EBADF
    }

    fn discard(&mut self, _offset: u64, _bytes: u64) -> Option<i32> {
        None
    }

    fn open_file(&mut self, name: &[u8], format: &[u8]) -> Option<io::Result<Box<dyn Callbacks>>> {
        self.functions.open_file(name, format)
    }

    fn close(&mut self) {}
}
