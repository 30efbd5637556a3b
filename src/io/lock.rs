//! QEMU's image locks, and the few system calls that the standard library does not wrap or not as
//! a library needs them.
//!
//! A quarter of this long file is its tests; the rest must be the one place of system calls.
//!
//! QEMU lets programs agree about an image with open-file-description locks on single bytes
//! (`block/file-posix.c`, `raw_apply_lock_bytes()` and `raw_check_lock_bytes()`):
//!
//! ```text
//!   byte 100 + i   shared lock held by whoever uses permission i
//!   byte 200 + i   shared lock held by whoever refuses permission i to everybody else
//!                  i: 0 consistent read, 1 write, 2 write unchanged, 3 resize
//! ```
//!
//! Nobody ever holds an exclusive lock. Everybody first takes its shared locks and then asks,
//! without taking it, whether an exclusive lock on the opposite byte would be granted. Since
//! both sides lock before they ask, two racing openers may both fail, but never both succeed.
//! The bytes need not exist in the file.
//!
//! This is the only file outside `capi` that may contain `unsafe`; the blocks are system calls.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::Path;

use crate::error::{Error, Result};

/// Which of QEMU's locks an open takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// None at all.
    None,
    /// As a read-only user: nobody may be writing.
    ReadOnly,
    /// As a read-write user: nobody else may have the image open.
    ReadWrite,
    /// As `qemu-img -U`: reading beside a writer, refusing nothing to others.
    ForceShare,
}

/// The lowest descriptor that is none of the standard ones.
const LOWEST: libc::c_int = libc::STDERR_FILENO + 1;

/// First byte of the "I use permission i" locks.
const USES: i64 = 100;
/// First byte of the "I refuse permission i to others" locks.
const REFUSES: i64 = 200;

const CONSISTENT_READ: u8 = 0;
const WRITE: u8 = 1;
const RESIZE: u8 = 3;

impl LockMode {
    /// The permissions used and the permissions refused to others, ascending.
    const fn permissions(self) -> (&'static [u8], &'static [u8]) {
        match self {
            LockMode::None => (&[], &[]),
            LockMode::ReadOnly => (&[CONSISTENT_READ], &[WRITE, RESIZE]),
            LockMode::ReadWrite => (&[CONSISTENT_READ, WRITE, RESIZE], &[WRITE, RESIZE]),
            LockMode::ForceShare => (&[CONSISTENT_READ], &[]),
        }
    }
}

/// QEMU's name of a permission, as its messages spell it.
const fn permission_name(permission: u8) -> &'static str {
    match permission {
        CONSISTENT_READ => "consistent read",
        WRITE => "write",
        RESIZE => "resize",
        _ => "write unchanged",
    }
}

/// The lock bytes that were taken on one open file.
///
/// Dropping it releases nothing, for lack of a descriptor; [`ImageLock::release`] does. Closing
/// the descriptor is not enough where the open file is shared with somebody (a descriptor that
/// was only duplicated, a forked child that has not yet called exec).
#[derive(Debug, Default)]
pub struct ImageLock {
    held: Vec<i64>,
}

impl ImageLock {
    /// Take the locks of `mode`; `image` is what messages call the image.
    ///
    /// Where the kernel or the file system cannot even say whether there are such locks none are
    /// taken, as QEMU's `locking=auto` does: then QEMU does not hold any either.
    ///
    /// # Errors
    /// `InUse` when somebody else's locks forbid it, `Os` when a lock call fails. Nothing is
    /// held afterwards.
    pub fn take(fd: BorrowedFd<'_>, mode: LockMode, image: &str) -> Result<ImageLock> {
        let mut lock = ImageLock::default();
        if mode == LockMode::None || !locks_work(fd) {
            return Ok(lock);
        }
        match lock.take_and_test(fd, mode, image) {
            Ok(()) => Ok(lock),
            Err(e) => {
                // The conflict is what the caller has to know.
                let _ = lock.release(fd);
                Err(e)
            }
        }
    }

    fn take_and_test(&mut self, fd: BorrowedFd<'_>, mode: LockMode, image: &str) -> Result<()> {
        let (uses, refuses) = mode.permissions();
        let bytes = uses
            .iter()
            .map(|&p| USES + i64::from(p))
            .chain(refuses.iter().map(|&p| REFUSES + i64::from(p)));
        for byte in bytes {
            match set_lock(fd, libc::F_RDLCK, byte) {
                Ok(()) => self.held.push(byte),
                Err(e) => return Err(refused(e, format!("Failed to lock byte {byte}"), image)),
            }
        }
        for &p in uses {
            let what = format!("Failed to get \"{}\" lock", permission_name(p));
            test_byte(fd, REFUSES + i64::from(p), what, image)?;
        }
        for &p in refuses {
            let what = format!("Failed to get shared \"{}\" lock", permission_name(p));
            test_byte(fd, USES + i64::from(p), what, image)?;
        }
        Ok(())
    }

    /// Release what is held: every byte is tried, the first failure is returned.
    ///
    /// # Errors
    /// What the system says.
    pub fn release(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let mut result = Ok(());
        for byte in self.held.drain(..) {
            result = result.and(set_lock(fd, libc::F_UNLCK, byte));
        }
        result
    }
}

/// Fail when somebody else holds a lock on this byte.
fn test_byte(fd: BorrowedFd<'_>, byte: i64, what: String, image: &str) -> Result<()> {
    match is_locked(fd, byte, 1) {
        Ok(false) => Ok(()),
        Ok(true) => Err(in_use(&what, image)),
        Err(e) => Err(refused(e, what, image)),
    }
}

/// A lock call failed. Linux says EAGAIN where somebody else has the lock; EACCES, which POSIX allows
/// for that too, comes from a security module or a server: nobody else is to blame.
fn refused(e: io::Error, what: String, image: &str) -> Error {
    match e.raw_os_error() {
        Some(libc::EAGAIN) => in_use(&what, image),
        _ => Error::Os {
            context: what,
            source: e,
        },
    }
}

fn in_use(what: &str, image: &str) -> Error {
    Error::InUse(format!(
        "The image is in use: {what}. Is another process using the image [{image}]?"
    ))
}

/// Does this file have open-file-description locks? Asked with a query that takes nothing, and
/// whatever the failure it means no (QEMU's `qemu_has_file_lock`): an old kernel, a sandbox, a
/// network file system without a lock service.
fn locks_work(fd: BorrowedFd<'_>) -> bool {
    is_locked(fd, 0, 0).is_ok()
}

/// Take or release one byte without waiting.
fn set_lock(fd: BorrowedFd<'_>, kind: libc::c_int, byte: i64) -> io::Result<()> {
    lock_call(fd, libc::F_OFD_SETLK, kind, byte, 1).map(|_| ())
}

/// Would an exclusive lock on this range be refused? `bytes` 0 means up to any end of file.
fn is_locked(fd: BorrowedFd<'_>, start: i64, bytes: i64) -> io::Result<bool> {
    let answer = lock_call(fd, libc::F_OFD_GETLK, libc::F_WRLCK, start, bytes)?;
    Ok(i32::from(answer.l_type) != libc::F_UNLCK)
}

fn lock_call(
    fd: BorrowedFd<'_>,
    command: libc::c_int,
    kind: libc::c_int,
    start: i64,
    bytes: i64,
) -> io::Result<libc::flock> {
    // SAFETY: `flock` consists of integers only, for which all zeros is a value. Some
    // architectures pad it, so it cannot be spelled as a literal; `l_pid` must be 0 anyway.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    range.l_start = start as libc::off_t;
    range.l_len = bytes as libc::off_t;
    retry(|| {
        // SAFETY: `fd` is open for as long as it is borrowed, and both commands read and write
        // exactly one `flock`, which `range` is.
        unsafe { libc::fcntl(fd.as_raw_fd(), command, &mut range) }
    })?;
    Ok(range)
}

/// Repeat a call that a signal interrupted; -1 becomes the error in `errno`.
fn retry(mut call: impl FnMut() -> libc::c_int) -> io::Result<libc::c_int> {
    loop {
        let answer = call();
        if answer != -1 {
            return Ok(answer);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// The flags of an open file (`F_GETFL`). The number comes from a caller: it may be anything.
pub(super) fn file_flags(fd: RawFd) -> io::Result<libc::c_int> {
    // SAFETY: F_GETFL takes no argument and changes nothing; a number that is not an open
    // descriptor is answered with EBADF.
    retry(|| unsafe { libc::fcntl(fd, libc::F_GETFL) })
}

/// Open a file: the one place where that is done. The standard library adds O_CLOEXEC.
///
/// The descriptor is no standard one. With descriptor 0, 1 or 2 closed the system gives that number to
/// the next file, and what the program prints would go into the image.
pub(super) fn open(options: &OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.open(path)?;
    if file.as_raw_fd() >= LOWEST {
        return Ok(file);
    }
    duplicate(file.as_raw_fd()).map(File::from)
}

/// A second descriptor for the same open file, closed on exec and no standard one.
pub(super) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes an integer; a number that is not an open descriptor is
    // answered with EBADF.
    let new = retry(|| unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, LOWEST) })?;
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// What a descriptor refers to: its file type (`S_IFMT` bits) and its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileKind {
    pub(super) format: u32,
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// `fstat` of a descriptor that we do not own; the number may be anything. A block device is known by
/// its number, whatever node in whatever file system names it: inode 0 is no file's.
pub(super) fn file_kind(fd: RawFd) -> io::Result<FileKind> {
    // SAFETY: `stat` consists of integers only, for which all zeros is a value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one `stat`, which is what the reference points at; a number that
    // is not an open descriptor is answered with EBADF.
    retry(|| unsafe { libc::fstat(fd, &mut stat) })?;
    // The widths of these fields differ from one architecture to another.
    #[allow(clippy::unnecessary_cast)]
    Ok(match (stat.st_mode & libc::S_IFMT) as u32 {
        format @ libc::S_IFBLK => FileKind {
            format,
            device: stat.st_rdev as u64,
            inode: 0,
        },
        format => FileKind {
            format,
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
        },
    })
}

/// Length of a block device. The descriptor's position stays, which may be a caller's.
pub(super) fn device_length(fd: BorrowedFd<'_>) -> io::Result<u64> {
    const BLKGETSIZE64: libc::Ioctl = libc::_IOR::<usize>(0x12, 114);
    let mut bytes = 0u64;
    // SAFETY: `fd` is open for as long as it is borrowed. Block devices write one u64; nothing else
    // knows this number, which has the device's type in it.
    retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, &mut bytes) })?;
    Ok(bytes)
}

/// Is a block device write-protected? The kernel opens it for writing all the same.
pub(super) fn device_is_read_only(fd: BorrowedFd<'_>) -> io::Result<bool> {
    const BLKROGET: libc::Ioctl = libc::_IO(0x12, 94);
    let mut read_only: libc::c_int = 0;
    // SAFETY: as above, with one int.
    retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), BLKROGET, &mut read_only) })?;
    Ok(read_only != 0)
}

/// Tell a block device that nobody needs these bytes: what they read as afterwards is up to it.
pub(super) fn discard_on_device(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<()> {
    const BLKDISCARD: libc::Ioctl = libc::_IO(0x12, 119);
    let range = [offset, bytes];
    // SAFETY: as above, with two u64 that are only read.
    retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD, &range) })?;
    Ok(())
}

/// Punch a hole, keeping the length of the file.
pub(super) fn punch_hole(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<()> {
    let too_far = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let offset = libc::off_t::try_from(offset).map_err(too_far)?;
    let bytes = libc::off_t::try_from(bytes).map_err(too_far)?;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: all arguments are integers, and `fd` is open for as long as it is borrowed.
    retry(|| unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, bytes) })?;
    Ok(())
}

/// Let the system begin to read a range; a hint.
pub(super) fn will_need(fd: BorrowedFd<'_>, offset: u64, bytes: u64) {
    let (Ok(offset), Ok(bytes)) = (libc::off_t::try_from(offset), libc::off_t::try_from(bytes))
    else {
        return;
    };
    let advice = libc::POSIX_FADV_WILLNEED;
    // SAFETY: all arguments are integers, and `fd` is open for as long as it is borrowed.
    let _ = unsafe { libc::posix_fadvise(fd.as_raw_fd(), offset, bytes, advice) };
}

/// Let the system begin to bring a range that was written to the disk, so that a later barrier finds little
/// left to wait for. A hint: what goes wrong is for the barrier to say (none of the flags takes an error
/// away from it).
pub fn start_writeback(file: &File, offset: u64, bytes: u64) {
    let (Ok(offset), Ok(bytes)) = (libc::off_t::try_from(offset), libc::off_t::try_from(bytes))
    else {
        return;
    };
    let begin = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: all arguments are integers, and `file` is open for as long as it is borrowed.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, bytes, begin) };
}

/// The first place from `offset` on that holds data (`SEEK_DATA`) or does not (`SEEK_HOLE`); `None`
/// if there is none before the end of the file. Moves the descriptor's position.
pub(super) fn seek(fd: BorrowedFd<'_>, offset: u64, to_data: bool) -> io::Result<Option<u64>> {
    let Ok(offset) = libc::off_t::try_from(offset) else {
        return Ok(None);
    };
    let whence = if to_data {
        libc::SEEK_DATA
    } else {
        libc::SEEK_HOLE
    };
    // SAFETY: all arguments are integers, and `fd` is open for as long as it is borrowed.
    let found = unsafe { libc::lseek(fd.as_raw_fd(), offset, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            e => Err(e),
        },
    }
}

/// Close a descriptor and say what the file system says, which dropping it would swallow.
pub(super) fn close(fd: OwnedFd) -> io::Result<()> {
    // SAFETY: `into_raw_fd` gives up the ownership, so this is the only close of it.
    if unsafe { libc::close(fd.into_raw_fd()) } == 0 {
        return Ok(());
    }
    let e = io::Error::last_os_error();
    // Linux has released the descriptor even then: calling again could close somebody else's.
    if e.kind() == io::ErrorKind::Interrupted {
        return Ok(());
    }
    Err(e)
}

/// Make a request that may grow a file past the process's limit (`ulimit -f`): it fails with
/// EFBIG, and the SIGXFSZ that would end the program does not come.
///
/// The kernel sends that signal to the thread that writes. It is blocked during the request, and
/// taken away again before anybody can see it. One that was there before stays.
pub(super) fn without_sigxfsz<T>(request: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // SAFETY: signal sets are integers, for which all zeros is a value.
    let (mut only, mut before, mut pending): (libc::sigset_t, libc::sigset_t, libc::sigset_t) =
        unsafe { std::mem::zeroed() };
    // SAFETY: the three sets are ours to read and to write. Only what was blocked can be pending.
    let theirs = unsafe {
        libc::sigemptyset(&mut only);
        libc::sigaddset(&mut only, libc::SIGXFSZ);
        libc::pthread_sigmask(libc::SIG_BLOCK, &only, &mut before);
        libc::sigismember(&before, libc::SIGXFSZ) == 1
            && libc::sigpending(&mut pending) == 0
            && libc::sigismember(&pending, libc::SIGXFSZ) == 1
    };
    let result = request();
    if !theirs && matches!(&result, Err(e) if e.raw_os_error() == Some(libc::EFBIG)) {
        let now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Nothing to take is an answer as well: EFBIG has other causes.
        // SAFETY: a set and a time to read; nobody wants to know more of the signal.
        let _ = retry(|| unsafe { libc::sigtimedwait(&only, std::ptr::null_mut(), &now) });
    }
    // SAFETY: the set was filled in by the first call.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
    result
}

/// Does the program run with rights that its caller does not have (set-uid, file capabilities)?
/// This is what `secure_getenv()` asks.
pub(super) fn has_foreign_rights() -> bool {
    // SAFETY: no precondition.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// Our limit for the helpers of one call. QEMU unpacks on four threads.
const MOST_HELPERS: usize = 3;

/// Processors that this thread may run on, as far as more of them would help here.
fn processors() -> usize {
    // SAFETY: a `cpu_set_t` is an array of integers, for which all zeros is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes at most as many bytes as it is told the set has.
    let got = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) };
    // A kernel with more processors than the set has room for says EINVAL: no helpers there.
    let most = if got == 0 { MOST_HELPERS + 1 } else { 1 };
    // SAFETY: every number asked about is below CPU_SETSIZE.
    (0..libc::CPU_SETSIZE as usize)
        .filter(|i| unsafe { libc::CPU_ISSET(*i, &set) })
        .take(most)
        .count()
}

/// Call `work` on this thread and at the same time on helper threads, one for each further
/// processor up to a few; all have ended when this returns. Each call takes a share of the work until
/// none is left, so where no thread can be started this one does it alone. What a panic on a helper
/// leaves undone the caller finds undone.
///
/// Threads of the system, not of the standard library: starting one of those leaves a destructor
/// behind in the calling thread, and the library could not be unloaded. They block all signals,
/// whose handlers are the program's and not to run there.
pub(crate) fn together(work: &(dyn Fn() + Sync)) {
    extern "C" fn start(work: *mut libc::c_void) -> *mut libc::c_void {
        // SAFETY: `together` made this pointer from a reference, and joins this thread while that
        // lives. What is behind it is Sync.
        let work = unsafe { *work.cast::<&(dyn Fn() + Sync)>() };
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        std::ptr::null_mut()
    }
    /// Joined even if `work` panics on this thread.
    struct Team([Option<libc::pthread_t>; MOST_HELPERS]);
    impl Drop for Team {
        fn drop(&mut self) {
            for thread in self.0.iter_mut().filter_map(Option::take) {
                // SAFETY: a thread that was started here and that nobody else joins or detaches.
                unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
            }
        }
    }

    let mut team = Team([None; MOST_HELPERS]);
    // SAFETY: signal sets are integers, for which all zeros is a value.
    let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: both sets are ours to write; a new thread has the mask of the one that starts it.
    unsafe {
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
    }
    for slot in team.0.iter_mut().take(processors().saturating_sub(1)) {
        let mut thread: libc::pthread_t = 0;
        let argument = std::ptr::from_ref(&work).cast_mut().cast();
        // SAFETY: the argument lives in this frame, which `team` does not leave before the thread
        // has ended; no attributes means the defaults.
        if unsafe { libc::pthread_create(&mut thread, std::ptr::null(), start, argument) } != 0 {
            break;
        }
        *slot = Some(thread);
    }
    // SAFETY: the set was filled in by the first call.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
    work();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::os::fd::AsFd;

    const MODES: [LockMode; 4] = [
        LockMode::None,
        LockMode::ReadOnly,
        LockMode::ReadWrite,
        LockMode::ForceShare,
    ];

    fn open(path: &Path) -> File {
        super::open(File::options().read(true).write(true), path).unwrap()
    }

    /// The bytes between 0 and 300 that somebody other than `file` has locked.
    fn locked_bytes(file: &File) -> Vec<i64> {
        (0..300)
            .filter(|&b| is_locked(file.as_fd(), b, 1).unwrap())
            .collect()
    }

    #[test]
    fn each_mode_holds_exactly_qemus_bytes_until_released() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(image.path()), open(image.path()));
        for (mode, bytes) in [
            (LockMode::None, vec![]),
            (LockMode::ReadOnly, vec![100, 201, 203]),
            (LockMode::ReadWrite, vec![100, 101, 103, 201, 203]),
            (LockMode::ForceShare, vec![100]),
        ] {
            let mut lock = ImageLock::take(a.as_fd(), mode, "x").unwrap();
            assert_eq!(locked_bytes(&b), bytes, "{mode:?}");
            lock.release(a.as_fd()).unwrap();
            assert_eq!(locked_bytes(&b), vec![], "{mode:?}");
        }
    }

    #[test]
    fn two_users_exclude_each_other_as_qemu_says_and_the_loser_holds_nothing() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (a, b, watcher) = (open(image.path()), open(image.path()), open(image.path()));
        for first in MODES {
            for second in MODES {
                let mut held = ImageLock::take(a.as_fd(), first, "x").unwrap();
                let before = locked_bytes(&watcher);
                let got = ImageLock::take(b.as_fd(), second, "x");
                let both = [first, second];
                let share = !both.contains(&LockMode::ReadWrite)
                    || both.contains(&LockMode::ForceShare)
                    || both.contains(&LockMode::None);
                assert_eq!(got.is_ok(), share, "{first:?} then {second:?}");
                match got {
                    Ok(mut lock) => lock.release(b.as_fd()).unwrap(),
                    Err(e) => assert_eq!(e.errno(), libc::EAGAIN),
                }
                assert_eq!(locked_bytes(&watcher), before);
                held.release(a.as_fd()).unwrap();
            }
        }
    }

    #[test]
    fn the_message_uses_qemus_words() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(image.path()), open(image.path()));
        let _lock = ImageLock::take(a.as_fd(), LockMode::ReadWrite, "a.qcow2").unwrap();
        let text = |mode| {
            ImageLock::take(b.as_fd(), mode, "a.qcow2")
                .unwrap_err()
                .to_string()
        };
        let hint = "Is another process using the image [a.qcow2]?";
        assert_eq!(
            text(LockMode::ReadWrite),
            format!("The image is in use: Failed to get \"write\" lock. {hint}")
        );
        assert_eq!(
            text(LockMode::ReadOnly),
            format!("The image is in use: Failed to get shared \"write\" lock. {hint}")
        );
    }

    #[test]
    fn somebodys_exclusive_lock_on_our_byte_is_a_conflict_too() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(image.path()), open(image.path()));
        set_lock(a.as_fd(), libc::F_WRLCK, 103).unwrap();
        let e = ImageLock::take(b.as_fd(), LockMode::ReadWrite, "x").unwrap_err();
        assert_eq!(e.errno(), libc::EAGAIN);
        assert!(e.to_string().contains("Failed to lock byte 103"), "{e}");
        // 103 itself is a's.
        assert_eq!(locked_bytes(&a), vec![]);
    }

    #[test]
    fn a_read_only_descriptor_can_hold_every_lock() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let file = File::open(image.path()).unwrap();
        for mode in MODES {
            let mut lock = ImageLock::take(file.as_fd(), mode, "x").unwrap();
            lock.release(file.as_fd()).unwrap();
        }
    }

    #[test]
    fn numbers_that_are_no_descriptors_are_ebadf() {
        for fd in [-1, i32::MAX] {
            let errno = |e: io::Error| e.raw_os_error().unwrap();
            assert_eq!(errno(file_flags(fd).unwrap_err()), libc::EBADF);
            assert_eq!(errno(file_kind(fd).unwrap_err()), libc::EBADF);
            assert_eq!(errno(duplicate(fd).unwrap_err()), libc::EBADF);
        }
    }

    #[test]
    fn work_is_done_once_on_every_thread_whatever_panics_there() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let (next, sum) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let here = std::thread::current().id();
        together(&|| loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= 1000 {
                break;
            }
            sum.fetch_add(n, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 499_500);

        // Helpers see no signal; the mask of this thread is as before.
        let mask = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let line = status.lines().find(|l| l.starts_with("SigBlk:")).unwrap();
            u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
        };
        let before = mask();
        together(&|| {
            if std::thread::current().id() != here {
                // All but KILL and STOP, which nobody can block, and two of the C library.
                assert_eq!(mask() | 0x1_8004_0100, u64::MAX);
                panic!("on a helper: not the caller's concern");
            }
        });
        assert_eq!(mask(), before);
        let panicked = std::panic::catch_unwind(|| {
            together(&|| {
                assert!(
                    std::thread::current().id() != here,
                    "on the caller's thread"
                )
            })
        });
        assert!(panicked.is_err());
    }

    #[test]
    fn close_reports_what_the_system_says() {
        let image = tempfile::NamedTempFile::new().unwrap();
        close(OwnedFd::from(open(image.path()))).unwrap();
    }
}
