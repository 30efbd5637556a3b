//! An image behind a caller's functions.

use std::fmt;
use std::io::{Error, Result};

use super::{discard_unsupported, DiscardKind, FlushState, Storage, MAX_REQUEST};

/// A caller's functions. Each returns 0 (or a length) or a negative errno; anything else counts
/// as `-EIO`. Requests are whole, and at most [`MAX_REQUEST`] bytes long.
pub trait Callbacks {
    /// Fill `buf` from `offset`; bytes past the end are zeros.
    fn pread(&mut self, offset: u64, buf: &mut [u8]) -> i32;
    /// Write all of `buf` at `offset`; past the end it extends.
    fn pwrite(&mut self, offset: u64, buf: &[u8]) -> i32;
    /// Make everything earlier stable.
    fn flush(&mut self) -> i32;
    /// The length in bytes, or rounded up to whole sectors of 512.
    fn getlength(&mut self) -> i64;
    /// Set the length; growing adds zeros.
    fn truncate(&mut self, length: u64) -> i32;
    /// Make a range read as zeros; `None` when the caller has no such function.
    fn discard(&mut self, offset: u64, bytes: u64) -> Option<i32>;
    /// The same, asked instead: a range of any length, and what it held. `None` when the caller has no
    /// such function.
    fn discard_kind(&mut self, _offset: u64, _bytes: u64, _kind: DiscardKind) -> Option<i32> {
        None
    }
    /// Open another file that the image names, for reading; `None` when the caller has no such
    /// function. What comes back closes itself when dropped.
    fn open_file(&mut self, _name: &[u8], _format: &[u8]) -> Option<Result<Box<dyn Callbacks>>> {
        None
    }
    /// Called before each write, barrier and discard, with its label.
    fn event(&mut self, _label: &'static str) {}
    /// The length of what the backing file shows; `None` when the caller has no such function.
    fn backing_length(&mut self) -> Option<i64> {
        None
    }
    /// The last call, exactly once; never when the open failed.
    fn close(&mut self);
}

/// A caller's functions as an image's storage.
///
/// Only [`Storage::close`] calls the caller's `close`; dropping the storage does not, for then
/// the open has failed and what is behind the functions stays the caller's.
pub struct CallbackStorage {
    callbacks: Box<dyn Callbacks>,
    discard: bool,
    flush: FlushState,
}

impl CallbackStorage {
    /// A storage over these functions; `no_flush` and `no_discard` as for a file.
    pub fn new(callbacks: Box<dyn Callbacks>, no_flush: bool, no_discard: bool) -> CallbackStorage {
        CallbackStorage {
            callbacks,
            discard: !no_discard,
            flush: FlushState::new(no_flush),
        }
    }
}

impl fmt::Debug for CallbackStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallbackStorage")
            .field("discard", &self.discard)
            .field("flush", &self.flush)
            .finish_non_exhaustive()
    }
}

/// The error that a caller's function means by an answer that is not a success. 4095 is the
/// largest errno there is, and the kernel's own limit for a small negative number.
pub(crate) fn failure(answer: i64) -> Error {
    Error::from_raw_os_error(match answer {
        -4095..=-1 => -answer as i32,
        _ => libc::EIO,
    })
}

fn status(answer: i32) -> Result<()> {
    match answer {
        0 => Ok(()),
        other => Err(failure(i64::from(other))),
    }
}

/// A request must not wrap around the end of the address space.
fn check_range(offset: u64, bytes: u64) -> Result<()> {
    match offset.checked_add(bytes) {
        Some(_) => Ok(()),
        None => Err(Error::from_raw_os_error(libc::EFBIG)),
    }
}

impl Storage for CallbackStorage {
    fn length(&mut self) -> Result<u64> {
        let answer = self.callbacks.getlength();
        u64::try_from(answer).map_err(|_| failure(answer))
    }

    fn length_in_sectors(&self) -> bool {
        true
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(offset, buf.len() as u64)?;
        let mut at = offset;
        for piece in buf.chunks_mut(MAX_REQUEST) {
            status(self.callbacks.pread(at, piece))?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> Result<()> {
        check_range(offset, data.len() as u64)?;
        self.callbacks.event(label);
        // Before the attempt: a write that fails may have written something.
        self.flush.changed();
        let mut at = offset;
        for piece in data.chunks(MAX_REQUEST) {
            status(self.callbacks.pwrite(at, piece))?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn truncate(&mut self, length: u64) -> Result<()> {
        self.flush.changed();
        status(self.callbacks.truncate(length))
    }

    fn discard(&mut self, offset: u64, bytes: u64) -> Result<()> {
        self.discard_kind(offset, bytes, DiscardKind::Other)
    }

    fn discard_kind(&mut self, offset: u64, bytes: u64, kind: DiscardKind) -> Result<()> {
        check_range(offset, bytes)?;
        let end = offset + bytes;
        let mut at = offset;
        if self.discard {
            self.callbacks.event("discard");
        }
        while self.discard && at < end {
            let mut piece = end - at;
            let mut answer = self.callbacks.discard_kind(at, piece, kind);
            if answer.is_none() {
                piece = piece.min(MAX_REQUEST as u64);
                answer = self.callbacks.discard(at, piece);
            }
            let Some(answer) = answer else {
                self.discard = false;
                break;
            };
            self.flush.changed();
            match status(answer) {
                Err(e) if discard_unsupported(&e) => self.discard = false,
                result => result?,
            }
            at += piece;
        }
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        let callbacks = &mut self.callbacks;
        self.flush.barrier(|| {
            callbacks.event("barrier");
            status(callbacks.flush())
        })
    }

    fn backing_length(&mut self) -> Option<Result<u64>> {
        let answer = self.callbacks.backing_length()?;
        Some(u64::try_from(answer).map_err(|_| failure(answer)))
    }

    fn open_named(&mut self, name: &[u8], format: &[u8]) -> Option<Result<Box<dyn Storage>>> {
        let opened = self.callbacks.open_file(name, format)?;
        Some(opened.map(|functions| -> Box<dyn Storage> {
            Box::new(CallbackStorage::new(functions, true, true))
        }))
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        self.callbacks.close();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// Answers everything with one number and keeps the calls.
    struct Fake {
        answer: i64,
        has_discard: bool,
        has_kinds: bool,
        calls: Rc<RefCell<Vec<String>>>,
    }

    impl Fake {
        fn note(&self, call: String) -> i32 {
            self.calls.borrow_mut().push(call);
            self.answer as i32
        }
    }

    impl Callbacks for Fake {
        fn pread(&mut self, offset: u64, buf: &mut [u8]) -> i32 {
            buf.fill(9);
            self.note(format!("pread {offset} {}", buf.len()))
        }
        fn pwrite(&mut self, offset: u64, buf: &[u8]) -> i32 {
            self.note(format!("pwrite {offset} {}", buf.len()))
        }
        fn flush(&mut self) -> i32 {
            self.note("flush".into())
        }
        fn getlength(&mut self) -> i64 {
            self.note("getlength".into());
            self.answer
        }
        fn truncate(&mut self, length: u64) -> i32 {
            self.note(format!("truncate {length}"))
        }
        fn discard(&mut self, offset: u64, bytes: u64) -> Option<i32> {
            self.has_discard
                .then(|| self.note(format!("discard {offset} {bytes}")))
        }
        fn discard_kind(&mut self, offset: u64, bytes: u64, kind: DiscardKind) -> Option<i32> {
            self.has_kinds
                .then(|| self.note(format!("discard {kind:?} {offset} {bytes}")))
        }
        fn close(&mut self) {
            self.note("close".into());
        }
    }

    type Calls = Rc<RefCell<Vec<String>>>;

    fn storage(
        answer: i64,
        has_discard: bool,
        no_flush: bool,
        no_discard: bool,
    ) -> (CallbackStorage, Calls) {
        let calls = Calls::default();
        let fake = Fake {
            answer,
            has_discard,
            has_kinds: false,
            calls: Rc::clone(&calls),
        };
        (
            CallbackStorage::new(Box::new(fake), no_flush, no_discard),
            calls,
        )
    }

    #[test]
    fn long_requests_are_split() {
        const MAX: usize = MAX_REQUEST;
        let (mut s, calls) = storage(0, true, false, false);
        let mut buf = vec![0; 2 * MAX + 1];
        s.read(5, &mut buf).unwrap();
        assert!(buf.iter().all(|&b| b == 9));
        s.write("x", 7, &buf[..MAX + 2]).unwrap();
        s.write("x", 7, &buf[..MAX]).unwrap();
        s.discard(3, MAX as u64 + 4).unwrap();
        assert_eq!(
            *calls.borrow(),
            [
                format!("pread 5 {MAX}"),
                format!("pread {} {MAX}", 5 + MAX),
                format!("pread {} 1", 5 + 2 * MAX),
                format!("pwrite 7 {MAX}"),
                format!("pwrite {} 2", 7 + MAX),
                format!("pwrite 7 {MAX}"),
                format!("discard 3 {MAX}"),
                format!("discard {} 4", 3 + MAX),
            ]
        );
    }

    #[test]
    fn a_discard_of_a_kind_is_whole_and_in_the_place_of_the_other() {
        let calls = Calls::default();
        let fake = Fake {
            answer: 0,
            has_discard: true,
            has_kinds: true,
            calls: Rc::clone(&calls),
        };
        let mut s = CallbackStorage::new(Box::new(fake), false, false);
        s.discard_kind(3, 1 << 40, DiscardKind::Snapshot).unwrap();
        s.discard(4, 1 << 30).unwrap();
        s.discard_kind(5, 0, DiscardKind::Snapshot).unwrap();
        s.barrier().unwrap();
        assert_eq!(
            *calls.borrow(),
            [
                format!("discard Snapshot 3 {}", 1u64 << 40),
                format!("discard Other 4 {}", 1 << 30),
                "flush".into()
            ]
        );
    }

    #[test]
    fn empty_requests_call_nobody() {
        let (mut s, calls) = storage(-5, true, false, false);
        s.read(5, &mut []).unwrap();
        s.write("x", 5, &[]).unwrap();
        s.discard(5, 0).unwrap();
        assert!(calls.borrow().is_empty());
    }

    #[test]
    fn requests_that_wrap_around_are_refused_before_any_call() {
        let (mut s, calls) = storage(0, true, false, false);
        assert!(s.read(u64::MAX, &mut [0; 2]).is_err());
        assert!(s.write("x", u64::MAX, &[0; 2]).is_err());
        assert!(s.discard(2, u64::MAX).is_err());
        assert!(calls.borrow().is_empty());
    }

    #[test]
    fn anything_but_zero_or_a_negative_errno_is_eio() {
        for (answer, errno) in [
            (-libc::ENOSPC, libc::ENOSPC),
            (-4095, 4095),
            (-4096, libc::EIO),
            (1, libc::EIO),
            (i32::MAX, libc::EIO),
            (i32::MIN, libc::EIO),
        ] {
            let check = |result: Result<()>| {
                assert_eq!(result.unwrap_err().raw_os_error(), Some(errno), "{answer}");
            };
            let (mut s, _) = storage(answer.into(), true, false, false);
            check(s.read(0, &mut [0; 1]));
            check(s.write("x", 0, &[0; 1]));
            check(s.truncate(0));
            check(s.discard(0, 1));
            check(s.barrier());
        }
        for (answer, errno) in [
            (-5, 5),
            (-4096, libc::EIO),
            (i64::MIN, libc::EIO),
            (-(1 << 32), libc::EIO),
        ] {
            let (mut s, _) = storage(answer, true, false, false);
            assert_eq!(
                s.length().unwrap_err().raw_os_error(),
                Some(errno),
                "{answer}"
            );
        }
        let (mut s, _) = storage(1 << 40, true, false, false);
        assert_eq!(s.length().unwrap(), 1 << 40);
    }

    #[test]
    fn a_discard_that_is_missing_or_unsupported_is_a_success_and_not_tried_again() {
        let (mut s, calls) = storage(0, false, false, false);
        s.discard(0, 1).unwrap();
        s.barrier().unwrap();
        assert!(calls.borrow().is_empty());
        let (mut s, calls) = storage((-libc::EOPNOTSUPP).into(), true, false, false);
        s.discard(0, 1).unwrap();
        s.discard(0, 1).unwrap();
        assert_eq!(*calls.borrow(), ["discard 0 1"]);
    }

    #[test]
    fn flags_keep_flush_and_discard_from_being_called() {
        let (mut s, calls) = storage(0, true, true, true);
        s.write("x", 0, &[1]).unwrap();
        s.discard(0, 1).unwrap();
        s.barrier().unwrap();
        assert_eq!(*calls.borrow(), ["pwrite 0 1"]);
    }

    #[test]
    fn flush_is_called_once_after_changes() {
        let (mut s, calls) = storage(0, true, false, false);
        s.barrier().unwrap();
        s.truncate(3).unwrap();
        s.barrier().unwrap();
        s.barrier().unwrap();
        assert_eq!(*calls.borrow(), ["truncate 3", "flush"]);
    }

    #[test]
    fn close_is_called_by_close_and_not_by_drop() {
        let (s, calls) = storage(0, true, false, false);
        drop(s);
        assert!(calls.borrow().is_empty());
        let (s, calls) = storage(0, true, false, false);
        Box::new(s).close().unwrap();
        assert_eq!(*calls.borrow(), ["close"]);
    }
}
