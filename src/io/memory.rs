//! An image in memory, for tests and for callers that have one there.

use std::cell::{RefCell, RefMut};
use std::io::{Error, Result};
use std::rc::Rc;

use super::Storage;

/// A vector of bytes as an image's storage; it is always stable.
///
/// The contents are shared with every [`MemoryStorage::handle`], so that they can be looked at
/// when the storage has been closed. A request while a handle is borrowed fails with `EBUSY`.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    bytes: Rc<RefCell<Vec<u8>>>,
}

impl MemoryStorage {
    /// A storage with these contents.
    pub fn new(bytes: Vec<u8>) -> MemoryStorage {
        MemoryStorage {
            bytes: Rc::new(RefCell::new(bytes)),
        }
    }

    /// The contents, shared with this storage.
    pub fn handle(&self) -> Rc<RefCell<Vec<u8>>> {
        Rc::clone(&self.bytes)
    }

    fn bytes(&self) -> Result<RefMut<'_, Vec<u8>>> {
        self.bytes
            .try_borrow_mut()
            .map_err(|_| Error::from_raw_os_error(libc::EBUSY))
    }
}

impl Storage for MemoryStorage {
    fn length(&mut self) -> Result<u64> {
        Ok(self.bytes()?.len() as u64)
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        read_bytes(&self.bytes()?, offset, buf);
        Ok(())
    }

    fn write(&mut self, _label: &'static str, offset: u64, data: &[u8]) -> Result<()> {
        write_bytes(&mut *self.bytes()?, offset, data)
    }

    fn truncate(&mut self, length: u64) -> Result<()> {
        resize_bytes(&mut *self.bytes()?, length)
    }

    fn discard(&mut self, offset: u64, bytes: u64) -> Result<()> {
        zero_bytes(&mut self.bytes()?, offset, bytes);
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }

    fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

/// The part of `bytes` from `offset` on that exists; at most `length` long.
fn existing(bytes: &mut [u8], offset: u64, length: u64) -> &mut [u8] {
    let start = usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .min(bytes.len());
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let end = start.saturating_add(length).min(bytes.len());
    bytes.get_mut(start..end).unwrap_or_default()
}

pub(super) fn read_bytes(bytes: &[u8], offset: u64, buf: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let source = bytes.get(start..).unwrap_or_default();
    let n = source.len().min(buf.len());
    let (filled, rest) = buf.split_at_mut(n);
    filled.copy_from_slice(source.get(..n).unwrap_or_default());
    rest.fill(0);
}

pub(super) fn write_bytes(bytes: &mut Vec<u8>, offset: u64, data: &[u8]) -> Result<()> {
    if data.is_empty() {
        return Ok(());
    }
    let end = offset
        .checked_add(data.len() as u64)
        .ok_or_else(|| Error::from_raw_os_error(libc::EFBIG))?;
    if end > bytes.len() as u64 {
        resize_bytes(bytes, end)?;
    }
    existing(bytes, offset, data.len() as u64).copy_from_slice(data);
    Ok(())
}

pub(super) fn resize_bytes(bytes: &mut Vec<u8>, length: u64) -> Result<()> {
    let length = usize::try_from(length).map_err(|_| Error::from_raw_os_error(libc::EFBIG))?;
    bytes
        .try_reserve(length.saturating_sub(bytes.len()))
        .map_err(|_| Error::from_raw_os_error(libc::ENOSPC))?;
    bytes.resize(length, 0);
    Ok(())
}

pub(super) fn zero_bytes(bytes: &mut [u8], offset: u64, length: u64) {
    existing(bytes, offset, length).fill(0);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn behaves_as_a_file_and_the_handle_sees_it_after_close() {
        let mut m = MemoryStorage::new(b"hello".to_vec());
        let handle = m.handle();
        let mut buf = [7; 8];
        m.read(3, &mut buf).unwrap();
        assert_eq!(&buf, b"lo\0\0\0\0\0\0");
        m.read(u64::MAX, &mut buf).unwrap();
        assert_eq!(buf, [0; 8]);
        m.write("x", 8, b"abc").unwrap();
        m.write("x", 100, b"").unwrap();
        assert_eq!(m.length().unwrap(), 11);
        m.discard(9, u64::MAX).unwrap();
        m.discard(1000, 5).unwrap();
        m.truncate(10).unwrap();
        m.truncate(12).unwrap();
        m.barrier().unwrap();
        Box::new(m).close().unwrap();
        assert_eq!(handle.borrow().as_slice(), b"hello\0\0\0a\0\0\0");
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri ends where its memory ends")]
    fn lengths_that_no_memory_can_hold_fail_without_a_panic() {
        let mut m = MemoryStorage::new(vec![1]);
        assert_eq!(
            m.write("x", u64::MAX, b"ab").unwrap_err().raw_os_error(),
            Some(libc::EFBIG)
        );
        assert_eq!(
            m.truncate(1 << 62).unwrap_err().raw_os_error(),
            Some(libc::ENOSPC)
        );
        assert_eq!(
            m.truncate(u64::MAX).unwrap_err().raw_os_error(),
            Some(libc::ENOSPC)
        );
        assert_eq!(*m.handle().borrow(), [1]);
    }

    #[test]
    fn a_borrowed_handle_makes_requests_busy_instead_of_a_panic() {
        let mut m = MemoryStorage::new(vec![1]);
        let handle = m.handle();
        let guard = handle.borrow();
        assert_eq!(m.length().unwrap_err().raw_os_error(), Some(libc::EBUSY));
        drop(guard);
        assert_eq!(m.length().unwrap(), 1);
    }
}
