//! An image in a regular file or on a block device.
//!
//! Nearly half of this long file is its tests.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::lock::{self, FileKind, ImageLock};
use super::{discard_unsupported, FlushState, Run, Stamp, Storage};
use crate::error::{Error, Result};
use crate::words::printable;

pub use super::lock::LockMode;

/// How a file is opened.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    /// For reading and writing; otherwise for reading only.
    pub write: bool,
    /// Never wait for stable storage.
    pub no_flush: bool,
    /// Never punch holes.
    pub no_discard: bool,
    /// The locks to take.
    pub lock: LockMode,
}

/// A regular file or a block device as an image's storage.
///
/// The image locks are the open file's own. Classic POSIX record locks (`F_SETLK`) are not:
/// those that this process holds on the same file go away whenever any descriptor for it is
/// closed, ours included. That is how the system defines them.
#[derive(Debug)]
pub struct FileStorage {
    /// Taken out by close only.
    file: Option<File>,
    lock: ImageLock,
    write: bool,
    /// A block device: its length is its own.
    device: bool,
    punch: bool,
    /// The position of the open file is nobody else's: asking for holes may move it.
    own_position: bool,
    flush: FlushState,
}

impl FileStorage {
    /// Open a plain path.
    ///
    /// # Errors
    /// `Os` with the system's errno when it cannot be opened, or when a block device is
    /// write-protected (`EACCES`), `Invalid` for what is neither a regular file nor a block device,
    /// `InUse` when the locks of somebody else forbid it.
    pub fn open_path(path: &Path, options: &FileOptions) -> Result<FileStorage> {
        FileStorage::open_path_as(path, path, options)
    }

    /// Open a plain path that messages call `shown`.
    ///
    /// # Errors
    /// As [`FileStorage::open_path`].
    pub fn open_path_as(path: &Path, shown: &Path, options: &FileOptions) -> Result<FileStorage> {
        let name = printable(shown.as_os_str().as_bytes());
        let context = format!("Could not open '{name}'");
        let file = open(path, options.write).map_err(|e| os_error(&context, e))?;
        let kind = lock::file_kind(file.as_raw_fd()).map_err(|e| os_error(&context, e))?;
        require_image_file(kind, &name).map_err(|e| e.context(&context))?;
        FileStorage::start(file, options, &name).map_err(|e| e.context(&context))
    }

    /// Open what a caller's descriptor refers to; the descriptor stays the caller's.
    ///
    /// The file is opened anew through the proc file system with the access that is asked for,
    /// so that the image locks are this storage's own. Where that does not work (no proc file
    /// system, or a process that may no longer open the file by itself) the descriptor is
    /// duplicated. The locks are then shared with every other duplicate of it: they exclude
    /// other processes as before, but not a second storage made from the same descriptor.
    ///
    /// # Errors
    /// `Os` with `EBADF` for what is not a descriptor, `Invalid` for one opened with `O_PATH`,
    /// `O_APPEND` or `O_DIRECT`, `Access` when it does not allow what is asked for; otherwise as
    /// [`FileStorage::open_path`].
    pub fn open_fd(fd: RawFd, options: &FileOptions) -> Result<FileStorage> {
        let name = format!("file descriptor {fd}");
        let context = format!("Could not open {name}");
        let flags = lock::file_flags(fd).map_err(|e| os_error(&context, e))?;
        check_flags(flags, options.write).map_err(|e| e.context(&context))?;
        let kind = lock::file_kind(fd).map_err(|e| os_error(&context, e))?;
        require_image_file(kind, &name).map_err(|e| e.context(&context))?;
        let reopened = reopen(fd, kind, options.write).map_err(|e| os_error(&context, e))?;
        let own_position = reopened.is_some();
        let file = match reopened {
            Some(file) => file,
            None => File::from(lock::duplicate(fd).map_err(|e| os_error(&context, e))?),
        };
        let mut storage =
            FileStorage::start(file, options, &name).map_err(|e| e.context(&context))?;
        storage.own_position = own_position;
        Ok(storage)
    }

    fn start(file: File, options: &FileOptions, name: &str) -> Result<FileStorage> {
        let failed = |e| os_error("Could not look at the device", e);
        let kind = lock::file_kind(file.as_raw_fd()).map_err(failed)?;
        let device = kind.format == libc::S_IFBLK;
        if device && options.write && lock::device_is_read_only(file.as_fd()).map_err(failed)? {
            return Err(os_error("The device is not writable", raw(libc::EACCES)));
        }
        let lock = ImageLock::take(file.as_fd(), options.lock, name)?;
        Ok(FileStorage {
            file: Some(file),
            lock,
            write: options.write,
            device,
            punch: !options.no_discard,
            own_position: true,
            flush: FlushState::new(options.no_flush),
        })
    }

    fn file(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| raw(libc::EBADF))
    }

    /// The file, for a request that changes it. A duplicated descriptor may allow more than was
    /// asked for, so the system alone would not refuse.
    fn changeable(&self) -> io::Result<&File> {
        if self.write {
            self.file()
        } else {
            Err(raw(libc::EBADF))
        }
    }
}

impl Storage for FileStorage {
    fn length(&mut self) -> io::Result<u64> {
        match self.device {
            true => lock::device_length(self.file()?.as_fd()),
            false => Ok(self.file()?.metadata()?.len()),
        }
    }

    fn fixed_length(&self) -> bool {
        self.device
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let file = self.file()?;
        // The kernel refuses offsets that no file can reach. They are past the end like others.
        let reach = usize::try_from((i64::MAX as u64).saturating_sub(offset)).unwrap_or(usize::MAX);
        let (mut buf, rest) = buf.split_at_mut(reach.min(buf.len()));
        rest.fill(0);
        let mut at = offset;
        while !buf.is_empty() {
            match file.read_at(buf, at) {
                Ok(0) => {
                    buf.fill(0);
                    break;
                }
                Ok(n) => {
                    at += n as u64;
                    buf = buf.get_mut(n..).unwrap_or_default();
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write(&mut self, _label: &'static str, offset: u64, mut data: &[u8]) -> io::Result<()> {
        self.changeable()?;
        // Before the attempt: a write that fails may have written something.
        self.flush.changed();
        let file = self.file()?;
        lock::without_sigxfsz(|| {
            let mut at = offset;
            while !data.is_empty() {
                if at >= i64::MAX as u64 {
                    return Err(raw(libc::EFBIG));
                }
                match file.write_at(data, at) {
                    Ok(0) => return Err(raw(libc::EIO)),
                    Ok(n) => {
                        at += n as u64;
                        data = data.get(n..).unwrap_or_default();
                    }
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        })
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.changeable()?;
        if i64::try_from(length).is_err() {
            return Err(raw(libc::EFBIG));
        }
        if self.device {
            return match length <= self.length()? {
                true => Ok(()),
                false => Err(raw(libc::ENOSPC)),
            };
        }
        self.flush.changed();
        let file = self.file()?;
        lock::without_sigxfsz(|| file.set_len(length))
    }

    fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        self.changeable()?;
        if !self.punch || bytes == 0 {
            return Ok(());
        }
        self.flush.changed();
        let discard = match self.device {
            true => lock::discard_on_device,
            false => lock::punch_hole,
        };
        match discard(self.file()?.as_fd(), offset, bytes) {
            Err(e) if discard_unsupported(&e) => {
                self.punch = false;
                Ok(())
            }
            result => result,
        }
    }

    fn barrier(&mut self) -> io::Result<()> {
        let file = self.file.as_ref().ok_or_else(|| raw(libc::EBADF))?;
        self.flush.barrier(|| file.sync_data())
    }

    fn will_read(&mut self, offset: u64, bytes: u64) {
        if let Ok(file) = self.file() {
            lock::will_need(file.as_fd(), offset, bytes);
        }
    }

    fn will_flush(&mut self, offset: u64, bytes: u64) {
        if let (Ok(file), false) = (self.file(), self.flush.never) {
            lock::start_writeback(file, offset, bytes);
        }
    }

    /// QEMU's `find_allocation`; as there, a failure means that nothing is known.
    fn run(&mut self, offset: u64) -> Option<Run> {
        // Devices know no holes.
        if !self.own_position || self.device {
            return None;
        }
        let fd = self.file().ok()?.as_fd();
        let Some(data) = lock::seek(fd, offset, true).ok()? else {
            return Some(Run::Hole(None));
        };
        if let Some(hole) = data.checked_sub(offset).filter(|n| *n > 0) {
            return Some(Run::Hole(Some(hole)));
        }
        let end = lock::seek(fd, offset, false).ok()??;
        end.checked_sub(offset).filter(|n| *n > 0).map(Run::Data)
    }

    fn allocated(&mut self) -> Option<u64> {
        use std::os::unix::fs::MetadataExt;
        let blocks = self.file().ok()?.metadata().ok()?.blocks();
        (!self.device).then_some(blocks.saturating_mul(512))
    }

    fn host_file(&self) -> Option<File> {
        self.file.as_ref()?.try_clone().ok()
    }

    fn identity(&mut self) -> Option<(u64, u64)> {
        let kind = lock::file_kind(self.file().ok()?.as_raw_fd()).ok()?;
        Some((kind.device, kind.inode))
    }

    fn stamp(&mut self) -> Option<Stamp> {
        use std::os::unix::fs::MetadataExt;
        let m = self.file().ok()?.metadata().ok()?;
        // What is written to a device leaves no trace at its node.
        (!self.device).then_some(Stamp {
            length: m.len(),
            seconds: m.ctime(),
            nanoseconds: m.ctime_nsec(),
        })
    }

    fn close(mut self: Box<Self>) -> io::Result<()> {
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        let unlocked = self.lock.release(file.as_fd());
        let closed = lock::close(OwnedFd::from(file));
        unlocked.and(closed)
    }
}

impl Drop for FileStorage {
    /// For an open that fails after this storage exists: closing a duplicated descriptor would
    /// leave the locks on the caller's.
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            let _ = self.lock.release(file.as_fd());
        }
    }
}

fn raw(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn os_error(context: &str, source: io::Error) -> Error {
    // A path with a NUL byte in it is refused by the standard library, without an errno.
    let source = match source.raw_os_error() {
        None if source.kind() == ErrorKind::InvalidInput => raw(libc::EINVAL),
        _ => source,
    };
    Error::Os {
        context: context.to_owned(),
        source,
    }
}

/// QEMU's `file` driver takes regular files only, and `host_device` block devices.
fn require_image_file(kind: FileKind, name: &str) -> Result<()> {
    match kind.format {
        libc::S_IFREG | libc::S_IFBLK => Ok(()),
        _ => Err(Error::Invalid(format!(
            "'file' driver requires '{name}' to be a regular file"
        ))),
    }
}

/// Can a descriptor with these flags serve? Each refused flag would make requests fail or go
/// astray later: no access at all, writes at the end whatever the offset, aligned requests only.
fn check_flags(flags: i32, write: bool) -> Result<()> {
    for (flag, name) in [
        (libc::O_PATH, "O_PATH"),
        (libc::O_APPEND, "O_APPEND"),
        (libc::O_DIRECT, "O_DIRECT"),
    ] {
        if flags & flag != 0 {
            return Err(Error::Invalid(format!(
                "a descriptor opened with {name} cannot be used"
            )));
        }
    }
    match flags & libc::O_ACCMODE {
        libc::O_RDWR => Ok(()),
        libc::O_RDONLY if !write => Ok(()),
        libc::O_RDONLY => Err(Error::Access("the descriptor is read-only".into())),
        _ => Err(Error::Access(
            "the descriptor does not allow reading".into(),
        )),
    }
}

fn open(path: &Path, write: bool) -> io::Result<File> {
    let mut options = File::options();
    // O_NONBLOCK: opening a FIFO must not wait for its other end; it means nothing for a
    // regular file, and for a block device only that a drive may be empty. O_NOCTTY: opening a terminal must not make it the controlling one.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    options.read(true).write(write).custom_flags(flags);
    lock::open(&options, path)
}

/// Open the file behind `fd` a second time; `None` when that cannot be done here.
fn reopen(fd: RawFd, kind: FileKind, write: bool) -> io::Result<Option<File>> {
    // The calling thread's own table: it may differ from the main thread's (CLONE_FILES).
    let path = format!("/proc/thread-self/fd/{fd}");
    let opened = open(Path::new(&path), write);
    match opened {
        // Whatever is mounted at /proc may not be the kernel's.
        Ok(file) if lock::file_kind(file.as_raw_fd())? == kind => Ok(Some(file)),
        Ok(_) => Ok(None),
        // Passing shortages, and somebody's lease on the file: the caller can try again, and
        // must not get shared locks because of them.
        Err(e) => match e.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN) => Err(e),
            _ => Ok(None),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;

    const RW: FileOptions = FileOptions {
        write: true,
        no_flush: false,
        no_discard: false,
        lock: LockMode::ReadWrite,
    };
    const RO: FileOptions = FileOptions {
        write: false,
        lock: LockMode::ReadOnly,
        ..RW
    };

    struct Scratch {
        _dir: tempfile::TempDir,
        path: PathBuf,
    }

    fn scratch(bytes: &[u8]) -> Scratch {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, bytes).unwrap();
        Scratch { _dir: dir, path }
    }

    fn errno<T: std::fmt::Debug>(result: Result<T>) -> i32 {
        result.unwrap_err().errno()
    }

    fn raw_errno(result: io::Result<()>) -> i32 {
        result.unwrap_err().raw_os_error().unwrap()
    }

    #[test]
    fn reads_past_the_end_give_zeros_and_writes_past_it_extend() {
        let s = scratch(b"hello");
        let mut f = FileStorage::open_path(&s.path, &RW).unwrap();
        let mut buf = [7; 8];
        f.read(3, &mut buf).unwrap();
        assert_eq!(&buf, b"lo\0\0\0\0\0\0");
        for far in [1000, i64::MAX as u64 - 3, u64::MAX - 3] {
            buf = [7; 8];
            f.read(far, &mut buf).unwrap();
            assert_eq!(buf, [0; 8], "{far:#x}");
        }
        f.write("x", 10, b"abc").unwrap();
        assert_eq!(f.length().unwrap(), 13);
        f.truncate(11).unwrap();
        f.truncate(12).unwrap();
        f.barrier().unwrap();
        Box::new(f).close().unwrap();
        assert_eq!(std::fs::read(&s.path).unwrap(), b"hello\0\0\0\0\0a\0");
    }

    #[test]
    fn offsets_that_no_file_reaches_fail_without_a_panic() {
        let s = scratch(b"");
        let mut f = FileStorage::open_path(&s.path, &RW).unwrap();
        assert_eq!(raw_errno(f.write("x", u64::MAX, b"abc")), libc::EFBIG);
        assert_eq!(raw_errno(f.truncate(u64::MAX)), libc::EFBIG);
        assert_eq!(raw_errno(f.discard(u64::MAX, 1)), libc::EFBIG);
        assert_eq!(raw_errno(f.discard(0, u64::MAX)), libc::EFBIG);
        assert_eq!(f.length().unwrap(), 0);
    }

    #[test]
    fn discard_makes_a_hole_and_keeps_the_length() {
        let s = scratch(&[0xaa; 3 << 16]);
        let blocks = std::fs::metadata(&s.path).unwrap().blocks();
        let mut f = FileStorage::open_path(&s.path, &RW).unwrap();
        f.discard(1 << 16, 0).unwrap();
        f.discard(1 << 16, 1 << 16).unwrap();
        assert!(
            f.punch,
            "this test needs a file system with holes in the temporary directory"
        );
        f.discard(3 << 16, 1 << 16).unwrap();
        assert_eq!(f.length().unwrap(), 3 << 16);
        let mut buf = [1; 1 << 16];
        f.read(1 << 16, &mut buf).unwrap();
        assert!(buf.iter().all(|&b| b == 0));
        f.barrier().unwrap();
        assert!(std::fs::metadata(&s.path).unwrap().blocks() < blocks);
    }

    #[test]
    fn no_discard_leaves_the_bytes() {
        let s = scratch(&[0xaa; 1 << 16]);
        let options = FileOptions {
            no_discard: true,
            ..RW
        };
        let mut f = FileStorage::open_path(&s.path, &options).unwrap();
        f.discard(0, 1 << 16).unwrap();
        drop(f);
        assert_eq!(std::fs::read(&s.path).unwrap(), vec![0xaa; 1 << 16]);
    }

    #[test]
    fn a_read_only_storage_changes_nothing_even_over_a_read_write_descriptor() {
        let s = scratch(b"hello");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&s.path)
            .unwrap();
        let duplicate = FileStorage::start(file, &RO, "x").unwrap();
        let opened = FileStorage::open_path(&s.path, &RO).unwrap();
        for mut f in [duplicate, opened] {
            assert_eq!(raw_errno(f.write("x", 0, b"j")), libc::EBADF);
            assert_eq!(raw_errno(f.truncate(0)), libc::EBADF);
            assert_eq!(raw_errno(f.discard(0, 1)), libc::EBADF);
            f.barrier().unwrap();
        }
        assert_eq!(std::fs::read(&s.path).unwrap(), b"hello");
    }

    #[test]
    fn two_storages_in_one_process_exclude_each_other() {
        let s = scratch(b"hello");
        let first = FileStorage::open_path(&s.path, &RW).unwrap();
        let e = FileStorage::open_path(&s.path, &RW).unwrap_err();
        assert_eq!(e.errno(), libc::EAGAIN);
        let text = e.to_string();
        for part in [
            "is in use",
            "Failed to get \"write\" lock",
            "Could not open '",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(errno(FileStorage::open_path(&s.path, &RO)), libc::EAGAIN);
        let shared = FileOptions {
            lock: LockMode::ForceShare,
            ..RO
        };
        let unlocked = FileOptions {
            lock: LockMode::None,
            ..RW
        };
        drop(FileStorage::open_path(&s.path, &shared).unwrap());
        drop(FileStorage::open_path(&s.path, &unlocked).unwrap());
        assert_eq!(errno(FileStorage::open_path(&s.path, &RO)), libc::EAGAIN);
        Box::new(first).close().unwrap();

        let reader = FileStorage::open_path(&s.path, &RO).unwrap();
        let second = FileStorage::open_path(&s.path, &RO).unwrap();
        assert_eq!(errno(FileStorage::open_path(&s.path, &RW)), libc::EAGAIN);
        drop((reader, second));
        FileStorage::open_path(&s.path, &RW).unwrap();
    }

    #[test]
    fn a_missing_file_is_enoent_with_the_path_in_the_message() {
        let e = FileStorage::open_path(Path::new("/nonexistent/image"), &RO).unwrap_err();
        assert_eq!(e.errno(), libc::ENOENT);
        assert_eq!(
            e.to_string(),
            "Could not open '/nonexistent/image': No such file or directory"
        );
        assert_eq!(
            errno(FileStorage::open_path(Path::new("a\0b"), &RO)),
            libc::EINVAL
        );
    }

    #[test]
    fn what_is_not_a_regular_file_is_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(errno(FileStorage::open_path(dir.path(), &RO)), libc::EINVAL);
        assert_eq!(errno(FileStorage::open_path(dir.path(), &RW)), libc::EISDIR);
        assert_eq!(
            errno(FileStorage::open_path(Path::new("/dev/null"), &RW)),
            libc::EINVAL
        );
        let fifo = dir.path().join("fifo");
        let status = std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap();
        assert!(status.success());
        assert_eq!(errno(FileStorage::open_path(&fifo, &RO)), libc::EINVAL);
        assert_eq!(errno(FileStorage::open_path(&fifo, &RW)), libc::EINVAL);
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(
            errno(FileStorage::open_fd(socket.as_raw_fd(), &RW)),
            libc::EINVAL
        );
    }

    #[test]
    fn a_descriptor_is_opened_anew_with_locks_of_its_own() {
        let s = scratch(b"hello");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&s.path)
            .unwrap();
        let mut first = FileStorage::open_fd(file.as_raw_fd(), &RW).unwrap();
        assert_eq!(
            errno(FileStorage::open_fd(file.as_raw_fd(), &RW)),
            libc::EAGAIN
        );
        let e = FileStorage::open_path(&s.path, &RO).unwrap_err();
        assert_eq!(e.errno(), libc::EAGAIN);
        first.write("x", 0, b"j").unwrap();
        Box::new(first).close().unwrap();
        // Ours is closed, the caller's is not.
        file.write_at(b"y", 4).unwrap();
        assert_eq!(std::fs::read(&s.path).unwrap(), b"jelly");
        FileStorage::open_fd(file.as_raw_fd(), &RW).unwrap();
    }

    #[test]
    fn a_reopened_descriptor_gets_no_more_access_than_was_asked_for() {
        let s = scratch(b"hello");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&s.path)
            .unwrap();
        let f = FileStorage::open_fd(file.as_raw_fd(), &RO).unwrap();
        let flags = lock::file_flags(f.file().unwrap().as_raw_fd()).unwrap();
        assert_eq!(flags & libc::O_ACCMODE, libc::O_RDONLY);
    }

    #[test]
    fn an_unlinked_file_can_be_opened_by_descriptor() {
        let file = tempfile::tempfile().unwrap();
        let mut f = FileStorage::open_fd(file.as_raw_fd(), &RW).unwrap();
        f.write("x", 0, b"abc").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3);
        assert_eq!(
            errno(FileStorage::open_fd(file.as_raw_fd(), &RW)),
            libc::EAGAIN
        );
    }

    #[test]
    fn a_duplicated_descriptor_keeps_no_locks_after_close_or_drop() {
        let s = scratch(b"hello");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&s.path)
            .unwrap();
        let duplicate = || {
            let file = File::from(lock::duplicate(file.as_raw_fd()).unwrap());
            FileStorage::start(file, &RW, "x").unwrap()
        };
        let f = duplicate();
        assert_eq!(errno(FileStorage::open_path(&s.path, &RO)), libc::EAGAIN);
        Box::new(f).close().unwrap();
        drop(FileStorage::open_path(&s.path, &RW).unwrap());
        drop(duplicate());
        drop(FileStorage::open_path(&s.path, &RW).unwrap());
    }

    #[test]
    fn unusable_descriptors_are_refused() {
        let s = scratch(b"hello");
        let open = |flags: i32| {
            let mut o = File::options();
            match flags & libc::O_ACCMODE {
                libc::O_RDONLY => o.read(true),
                libc::O_WRONLY => o.write(true),
                _ => o.read(true).write(true),
            };
            o.custom_flags(flags & !libc::O_ACCMODE)
                .open(&s.path)
                .unwrap()
        };
        for (flags, options, expected) in [
            (libc::O_RDONLY, RW, libc::EACCES),
            (libc::O_WRONLY, RW, libc::EACCES),
            (libc::O_WRONLY, RO, libc::EACCES),
            (libc::O_RDWR | libc::O_APPEND, RW, libc::EINVAL),
            (libc::O_RDWR | libc::O_APPEND, RO, libc::EINVAL),
            (libc::O_PATH, RO, libc::EINVAL),
            (libc::O_PATH, RW, libc::EINVAL),
        ] {
            let file = open(flags);
            let e = FileStorage::open_fd(file.as_raw_fd(), &options).unwrap_err();
            assert_eq!(e.errno(), expected, "{flags:#x}: {e}");
        }
        // Not every file system has O_DIRECT, so only the check itself.
        assert_eq!(
            errno(check_flags(libc::O_RDWR | libc::O_DIRECT, true)),
            libc::EINVAL
        );
        for fd in [-1, -100, i32::MAX] {
            assert_eq!(errno(FileStorage::open_fd(fd, &RO)), libc::EBADF);
        }
    }

    #[test]
    fn closing_with_an_empty_slot_is_harmless() {
        let s = scratch(b"hello");
        let mut f = FileStorage::open_path(&s.path, &RW).unwrap();
        f.file = None;
        assert_eq!(raw_errno(f.barrier()), libc::EBADF);
        Box::new(f).close().unwrap();
    }
}
