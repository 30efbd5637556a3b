//! A disk in memory that is sparse, small, copied in no time, and remembers where it was written.

use qcow2_snapshot::io::Storage;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{Error, Result};
use std::rc::Rc;

/// Bytes below this are in one vector.
const DENSE: u64 = 256 << 10;
/// Pages behind it.
const PAGE: u64 = 4096;
/// So many pages, and the disk is full.
const MAX_PAGES: usize = 2048;
/// As ext4: 16 TiB.
const MAX_LENGTH: u64 = 16 << 40;

type Page = [u8; PAGE as usize];

/// What is on the disk, and what was asked of it. A copy shares the bytes until one is written.
#[derive(Clone, Default)]
pub struct State {
    dense: Rc<Vec<u8>>,
    pages: Rc<BTreeMap<u64, Rc<Page>>>,
    /// Length in bytes.
    pub length: u64,
    /// Writes: label, offset, bytes.
    pub writes: Vec<(&'static str, u64, u64)>,
    /// Holes: offset, bytes.
    pub holes: Vec<(u64, u64)>,
    /// Writes, truncates and holes.
    pub requests: u64,
    /// A request failed, because the disk is full.
    pub failed: bool,
    /// No file may be longer; 0: [`MAX_LENGTH`].
    pub most: u64,
}

impl State {
    /// Same bytes and length?
    pub fn same_bytes(&self, other: &State) -> bool {
        self.length == other.length
            && (Rc::ptr_eq(&self.dense, &other.dense) || self.dense == other.dense)
            && (Rc::ptr_eq(&self.pages, &other.pages) || self.pages == other.pages)
    }

    /// Fill `buf` from `offset`.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        let end = offset.saturating_add(buf.len() as u64);
        let part = self.dense.get(offset.min(DENSE) as usize..);
        let part = part.unwrap_or_default();
        let n = part.len().min(buf.len());
        buf[..n].copy_from_slice(&part[..n]);
        buf[n..].fill(0);
        if end <= DENSE {
            return;
        }
        for (number, page) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = number * PAGE;
            let (from, to) = (start.max(offset), (start + PAGE).min(end));
            buf[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&page[(from - start) as usize..(to - start) as usize]);
        }
    }

    /// `n` bytes at `offset`, zeros behind the end.
    pub fn bytes(&self, offset: u64, n: u64) -> Vec<u8> {
        let mut buf = vec![0; n as usize];
        self.read(offset, &mut buf);
        buf
    }

    /// The big-endian number of `n` bytes, at most 8, at `offset`.
    pub fn number(&self, offset: u64, n: usize) -> u64 {
        let mut buf = [0; 8];
        self.read(offset, &mut buf[8 - n..]);
        u64::from_be_bytes(buf)
    }

    fn grow(&mut self, end: u64) -> Result<()> {
        let most = if self.most == 0 {
            MAX_LENGTH
        } else {
            self.most
        };
        if end > most {
            return Err(self.fail(27)); // EFBIG
        }
        self.length = self.length.max(end);
        let dense = self.length.min(DENSE) as usize;
        if self.dense.len() < dense {
            Rc::make_mut(&mut self.dense).resize(dense, 0);
        }
        Ok(())
    }

    fn fail(&mut self, errno: i32) -> Error {
        self.failed = true;
        Error::from_raw_os_error(errno)
    }

    fn put(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let dense = (DENSE.saturating_sub(offset) as usize).min(data.len());
        let (low, high) = data.split_at(dense);
        if !low.is_empty() {
            let bytes = Rc::make_mut(&mut self.dense);
            bytes[offset as usize..][..low.len()].copy_from_slice(low);
        }
        let mut at = offset + dense as u64;
        let mut rest = high;
        while !rest.is_empty() {
            let in_page = (at % PAGE) as usize;
            let n = (PAGE as usize - in_page).min(rest.len());
            if self.pages.len() >= MAX_PAGES && !self.pages.contains_key(&(at / PAGE)) {
                return Err(self.fail(28)); // ENOSPC
            }
            let page = Rc::make_mut(&mut self.pages)
                .entry(at / PAGE)
                .or_insert_with(|| Rc::new([0; PAGE as usize]));
            Rc::make_mut(page)[in_page..in_page + n].copy_from_slice(&rest[..n]);
            at += n as u64;
            rest = &rest[n..];
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes).min(self.length);
        if offset < self.dense.len() as u64 {
            let to = end.min(self.dense.len() as u64) as usize;
            Rc::make_mut(&mut self.dense)[offset as usize..to].fill(0);
        }
        let numbers = offset / PAGE..end.div_ceil(PAGE).max(offset / PAGE);
        if self.pages.range(numbers.clone()).next().is_none() {
            return;
        }
        let pages = Rc::make_mut(&mut self.pages);
        for (number, page) in pages.range_mut(numbers) {
            let start = number * PAGE;
            let (from, to) = (start.max(offset), (start + PAGE).min(end));
            if from < to {
                Rc::make_mut(page)[(from - start) as usize..(to - start) as usize].fill(0);
            }
        }
        pages.retain(|_, page| page.iter().any(|b| *b != 0));
    }
}

/// The storage; its state is shared with [`Disk::handle`].
pub struct Disk(Rc<RefCell<State>>);

impl Disk {
    /// A disk with this file on it.
    pub fn new(file: &[u8]) -> Disk {
        assert!(file.len() as u64 <= DENSE);
        Disk::of(State {
            dense: Rc::new(file.to_vec()),
            length: file.len() as u64,
            ..State::default()
        })
    }

    /// A disk in this state, with an empty memory of requests.
    pub fn of(mut state: State) -> Disk {
        state.writes.clear();
        state.holes.clear();
        (state.requests, state.failed) = (0, false);
        Disk(Rc::new(RefCell::new(state)))
    }

    /// What is on the disk, to look at while the image has the disk.
    pub fn handle(&self) -> Rc<RefCell<State>> {
        Rc::clone(&self.0)
    }
}

impl Storage for Disk {
    fn length(&mut self) -> Result<u64> {
        Ok(self.0.borrow().length)
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.0.borrow().read(offset, buf);
        Ok(())
    }

    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> Result<()> {
        let mut s = self.0.borrow_mut();
        s.requests += 1;
        s.writes.push((label, offset, data.len() as u64));
        let Some(end) = offset.checked_add(data.len() as u64) else {
            return Err(s.fail(27));
        };
        s.grow(end)?;
        s.put(offset, data)
    }

    fn truncate(&mut self, length: u64) -> Result<()> {
        let mut s = self.0.borrow_mut();
        s.requests += 1;
        if length < s.length {
            let end = s.length;
            s.zero(length, end - length);
            s.length = length;
            let dense = length.min(DENSE) as usize;
            Rc::make_mut(&mut s.dense).truncate(dense);
        }
        s.grow(length)
    }

    fn discard(&mut self, offset: u64, bytes: u64) -> Result<()> {
        let mut s = self.0.borrow_mut();
        s.requests += 1;
        s.holes.push((offset, bytes));
        s.zero(offset, bytes);
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }

    fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}
