//! Bytes and devices. Nothing in this module knows qcow2.
//!
//! [`Storage`] is the whole interface between the library and an image: a file or block device
//! ([`mod@file`]), a caller's functions ([`callbacks`]), memory ([`memory`]) and the recorder
//! used by the crash and fault tests ([`trace`]) implement the same trait.

use std::io::{Error, Result};
use std::time::{SystemTime, UNIX_EPOCH};

pub mod callbacks;
pub mod file;
pub mod lock;
pub mod memory;
pub(crate) mod scratch;
pub mod trace;

/// The longest single request that reaches a [`Storage`], in bytes (2 MiB).
pub const MAX_REQUEST: usize = 2 << 20;

/// What a file holds from some offset on, up to where that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// That many bytes are stored.
    Data(u64),
    /// A hole of that many bytes; `None`: nothing but a hole up to the end, or past it.
    Hole(Option<u64>),
}

/// What is given back by a discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum DiscardKind {
    /// What snapshots or the disk held and a verb no longer needs, and old snapshot tables.
    Snapshot = 1,
    /// What a repair frees, refcount blocks that a shrinking goto drops, a temporary table.
    Other = 2,
}

/// What changes with a file: its length, and when it was last changed (the inode's `ctime`, which
/// every write sets).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Length in bytes.
    pub length: u64,
    /// Seconds since the epoch.
    pub seconds: i64,
    /// Nanoseconds within the second.
    pub nanoseconds: i64,
}

impl Stamp {
    /// A change after this stamp was taken gets another one: not so right after a change, since file
    /// systems count time in steps (of 2 s at most).
    pub(crate) fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.is_ok_and(|now| (now.as_secs() as i64).saturating_sub(self.seconds) > 2)
    }
}

/// One image's bytes.
///
/// Requests are whole: each either does everything that was asked or fails. Errors carry a
/// raw OS error; one without counts as `EIO`. Callers keep requests at or below
/// [`MAX_REQUEST`] bytes.
pub trait Storage {
    /// Length in bytes.
    fn length(&mut self) -> Result<u64>;

    /// Does the length stay as it is, as a block device's does? Then a truncate to less does nothing.
    fn fixed_length(&self) -> bool {
        false
    }

    /// May [`Storage::length`] be rounded up to whole sectors of 512 bytes?
    fn length_in_sectors(&self) -> bool {
        false
    }

    /// Fill `buf` from `offset`; bytes past the end read as zeros.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Write `data` at `offset`; a write past the end extends, with zeros between.
    ///
    /// `label` names what is written (for example `"refcount block"`); plain storages ignore
    /// it, the recorder keeps it.
    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> Result<()>;

    /// Set the length; growing adds zeros.
    fn truncate(&mut self, length: u64) -> Result<()>;

    /// Make `offset..offset + bytes` read as zeros and give the space back, keeping the length.
    /// May do nothing where holes cannot be punched: then the bytes are unspecified.
    fn discard(&mut self, offset: u64, bytes: u64) -> Result<()>;

    /// The same, for storages to which it matters what is given back.
    fn discard_kind(&mut self, offset: u64, bytes: u64, _kind: DiscardKind) -> Result<()> {
        self.discard(offset, bytes)
    }

    /// When this returns, everything written, truncated or discarded before is stable.
    fn barrier(&mut self) -> Result<()>;

    /// These bytes will be read soon: the storage may begin to fetch them, and must not wait for
    /// them. Only a hint.
    fn will_read(&mut self, _offset: u64, _bytes: u64) {}

    /// These bytes were written, nobody writes them again, and a barrier will come: the storage may begin to
    /// bring them to the medium, and must not wait for it. Only a hint.
    fn will_flush(&mut self, _offset: u64, _bytes: u64) {}

    /// Is there data or a hole at `offset`? `None` where the storage cannot tell.
    fn run(&mut self, _offset: u64) -> Option<Run> {
        None
    }

    /// Bytes that the file takes on its medium, holes left out. `None` where the storage cannot
    /// tell.
    fn allocated(&mut self) -> Option<u64> {
        None
    }

    /// What tells this file from every other (device and inode). `None` where the storage cannot
    /// tell.
    fn identity(&mut self) -> Option<(u64, u64)> {
        None
    }

    /// The open file, once more. `None` where the storage is no file.
    fn host_file(&self) -> Option<std::fs::File> {
        None
    }

    /// What tells whether somebody has changed this file. `None` where the storage cannot tell.
    fn stamp(&mut self) -> Option<Stamp> {
        None
    }

    /// Open, for reading, another file that the image names. `None` where the storage has no means
    /// of its own for that: then a name is a path.
    fn open_named(&mut self, _name: &[u8], _format: &[u8]) -> Option<Result<Box<dyn Storage>>> {
        None
    }

    /// The length of what the image's backing file shows, asked of the storage's owner. `None` where
    /// the storage has no means of its own for that: then the file is opened.
    fn backing_length(&mut self) -> Option<Result<u64>> {
        None
    }

    /// Release what the storage holds (descriptor, locks). Called once, last. A storage on which
    /// no image could be opened is dropped instead: that releases what the storage opened itself.
    fn close(self: Box<Self>) -> Result<()>;
}

/// Does this answer to a discard mean "not here", rather than "not this time"? QEMU stops
/// trying after one of these, and the caller has lost nothing.
fn discard_unsupported(e: &Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY)
    )
}

/// When a barrier has to reach the device, and what it may promise.
#[derive(Debug)]
struct FlushState {
    never: bool,
    changed: bool,
    failed: Option<i32>,
}

impl FlushState {
    fn new(never: bool) -> FlushState {
        FlushState {
            never,
            changed: false,
            failed: None,
        }
    }

    /// Something is about to change.
    fn changed(&mut self) {
        self.changed = true;
    }

    /// Call `flush` unless nothing has changed since the last time, as QEMU does.
    ///
    /// A failure is for ever: the kernel reports a lost page once and then takes it for clean,
    /// so a second attempt would succeed without having written it.
    fn barrier(&mut self, flush: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.never {
            return Ok(());
        }
        if let Some(errno) = self.failed {
            return Err(Error::from_raw_os_error(errno));
        }
        if self.changed {
            if let Err(e) = flush() {
                self.failed = Some(e.raw_os_error().unwrap_or(libc::EIO));
                return Err(e);
            }
            self.changed = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_barrier_reaches_the_device_only_after_a_change() {
        let mut state = FlushState::new(false);
        let mut flushes = 0;
        for (change, expected) in [(false, 0), (true, 1), (false, 1), (true, 2)] {
            if change {
                state.changed();
            }
            state
                .barrier(|| {
                    flushes += 1;
                    Ok(())
                })
                .unwrap();
            assert_eq!(flushes, expected);
        }
    }

    #[test]
    fn after_a_failed_barrier_every_later_one_fails() {
        let mut state = FlushState::new(false);
        state.changed();
        let enospc = || Err(Error::from_raw_os_error(libc::ENOSPC));
        for _ in 0..3 {
            let e = state.barrier(enospc).unwrap_err();
            assert_eq!(e.raw_os_error(), Some(libc::ENOSPC));
            let e = state.barrier(|| Ok(())).unwrap_err();
            assert_eq!(e.raw_os_error(), Some(libc::ENOSPC));
        }
    }

    #[test]
    fn no_flush_never_asks_the_device() {
        let mut state = FlushState::new(true);
        state.changed();
        state
            .barrier(|| Err(Error::from_raw_os_error(libc::EIO)))
            .unwrap();
    }
}
