//! The recorder for crash and fault tests: a test tool, which the library itself never uses
//! (the linker leaves it out of the shared library).
//!
//! Long, since a recorder is one idea; a fifth of it is tests.
//!
//! [`TraceStorage`] is an image in memory that keeps a log of everything that changes it, counts
//! requests and can fail them ([`FaultPlan`]). From the log, [`crash_images`] makes the images
//! that a power cut could leave:
//!
//! ```text
//!   event   0  1  2  B  4  5  6  7  B  9 10
//!           '--.--'     '----.---'     '-.-'
//!           stable      the group         not yet issued
//! ```
//!
//! Everything before the last barrier that returned is on the disk, nothing after the cut is,
//! and of the group between them any subset may be. A write may land in part: each 512-byte
//! sector (by absolute position) lands whole or not at all. Two writes of one group to the same
//! place keep their order, as they do in a page cache.

use std::cell::RefCell;
use std::fmt;
use std::io::{Error, Result};
use std::rc::Rc;

use super::memory::{read_bytes, resize_bytes, write_bytes, zero_bytes, MemoryStorage};
use super::{Run, Storage};

mod crash;

pub use crash::{
    crash_images, digest, groups, image_after, prefixes, random_subset, Apply, CrashImage,
    CrashPlan, SplitMix64,
};

/// What a disk writes whole or not at all, in bytes.
pub const SECTOR: u64 = 512;

/// One logged change, or the point where all earlier ones became stable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A write.
    Write {
        /// What was written, in the writer's words.
        label: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// A new length.
    Truncate {
        /// In bytes.
        length: u64,
    },
    /// A hole.
    Discard {
        /// Where, in bytes.
        offset: u64,
        /// How long.
        bytes: u64,
    },
    /// A barrier that returned successfully.
    Barrier,
}

impl Event {
    /// The label of a write; the kind of anything else.
    pub fn label(&self) -> &'static str {
        match self {
            Event::Write { label, .. } => label,
            Event::Truncate { .. } => "truncate",
            Event::Discard { .. } => "discard",
            Event::Barrier => "barrier",
        }
    }

    /// The number of sectors that this event touches; 0 when it cannot land in part.
    fn sectors(&self) -> usize {
        let (offset, bytes) = match self {
            Event::Write { offset, data, .. } => (*offset, data.len() as u64),
            // Bounded: a mask of sectors is made of it.
            Event::Discard { offset, bytes } => (*offset, (*bytes).min(32 << 20)),
            Event::Truncate { .. } | Event::Barrier => return 0,
        };
        if bytes == 0 {
            return 0;
        }
        let last = offset.saturating_add(bytes - 1) / SECTOR;
        usize::try_from(last - offset / SECTOR + 1).unwrap_or(usize::MAX)
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Write {
                label,
                offset,
                data,
            } => {
                write!(f, "write of {label} at {offset:#x}+{:#x}", data.len())
            }
            Event::Truncate { length } => write!(f, "truncate to {length:#x}"),
            Event::Discard { offset, bytes } => write!(f, "discard at {offset:#x}+{bytes:#x}"),
            Event::Barrier => write!(f, "barrier"),
        }
    }
}

/// The functions of [`Storage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum RequestKind {
    Length,
    Read,
    Write,
    Truncate,
    Discard,
    Barrier,
    Close,
}

/// How many requests there were, failed ones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Counts {
    pub lengths: u64,
    pub reads: u64,
    pub writes: u64,
    pub truncates: u64,
    pub discards: u64,
    pub barriers: u64,
    pub closes: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub bytes_discarded: u64,
}

impl Counts {
    /// Requests of one kind.
    pub fn of(&self, kind: RequestKind) -> u64 {
        match kind {
            RequestKind::Length => self.lengths,
            RequestKind::Read => self.reads,
            RequestKind::Write => self.writes,
            RequestKind::Truncate => self.truncates,
            RequestKind::Discard => self.discards,
            RequestKind::Barrier => self.barriers,
            RequestKind::Close => self.closes,
        }
    }

    /// Requests of all kinds.
    pub fn total(&self) -> u64 {
        self.lengths
            + self.reads
            + self.writes
            + self.truncates
            + self.discards
            + self.barriers
            + self.closes
    }

    fn add(&mut self, kind: RequestKind, bytes: u64) {
        match kind {
            RequestKind::Length => self.lengths += 1,
            RequestKind::Read => {
                self.reads += 1;
                self.bytes_read += bytes;
            }
            RequestKind::Write => {
                self.writes += 1;
                self.bytes_written += bytes;
            }
            RequestKind::Truncate => self.truncates += 1,
            RequestKind::Discard => {
                self.discards += 1;
                self.bytes_discarded += bytes;
            }
            RequestKind::Barrier => self.barriers += 1,
            RequestKind::Close => self.closes += 1,
        }
    }
}

/// Which request fails, and how.
///
/// The usual test fails the first, second, third ... request until [`Trace::fired`] stays 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultPlan {
    /// The request that fails: 1 is the first one (of `kind`) after the plan was set.
    pub nth: u64,
    /// Count and fail only requests of this kind; `None`: of every kind.
    pub kind: Option<RequestKind>,
    /// The error, as a positive errno.
    pub errno: i32,
    /// Fail everything that counts from then on, too.
    pub persistent: bool,
    /// How many bytes of a failing write land all the same. Rounded down to the end of a sector;
    /// at or above the length of the write, all of it lands and only the answer is an error.
    pub torn: usize,
}

impl FaultPlan {
    /// Fail the `nth` request of any kind once; nothing of it lands.
    pub fn nth(nth: u64, errno: i32) -> FaultPlan {
        FaultPlan {
            nth,
            kind: None,
            errno,
            persistent: false,
            torn: 0,
        }
    }

    /// Count and fail only requests of this kind.
    #[must_use]
    pub fn of_kind(self, kind: RequestKind) -> FaultPlan {
        FaultPlan {
            kind: Some(kind),
            ..self
        }
    }

    /// Fail later requests, too.
    #[must_use]
    pub fn persistent(self) -> FaultPlan {
        FaultPlan {
            persistent: true,
            ..self
        }
    }

    /// Let that many bytes of a failing write land.
    #[must_use]
    pub fn torn(self, bytes: usize) -> FaultPlan {
        FaultPlan {
            torn: bytes,
            ..self
        }
    }
}

#[derive(Debug, Default)]
struct Recorded {
    initial: Vec<u8>,
    bytes: Vec<u8>,
    events: Vec<Event>,
    counts: Counts,
    fault: Option<FaultPlan>,
    /// Requests that counted for `fault`.
    seen: u64,
    /// Requests that `fault` failed.
    fired: u64,
    /// Which blocks of a full disk the file has.
    full: Option<FullDisk>,
}

/// A file system without a free block, but for those that the file gives back.
#[derive(Debug)]
struct FullDisk {
    block: u64,
    has: Vec<bool>,
    free: u64,
}

impl FullDisk {
    fn has(&self, block: u64) -> bool {
        usize::try_from(block)
            .ok()
            .and_then(|i| self.has.get(i))
            .is_some_and(|has| *has)
    }

    fn set(&mut self, blocks: std::ops::Range<u64>, has: bool) {
        for i in blocks {
            let Ok(i) = usize::try_from(i) else { return };
            if i >= self.has.len() {
                if !has {
                    return;
                }
                self.has.resize(i + 1, false);
            }
            if let Some(slot) = self.has.get_mut(i).filter(|slot| **slot != has) {
                *slot = has;
                self.free = if has {
                    self.free.saturating_sub(1)
                } else {
                    self.free + 1
                };
            }
        }
    }

    /// Take blocks for these bytes.
    fn take(&mut self, offset: u64, bytes: u64) -> Result<()> {
        let blocks = offset / self.block..offset.saturating_add(bytes).div_ceil(self.block);
        if blocks.clone().filter(|i| !self.has(*i)).count() as u64 > self.free {
            return Err(Error::from_raw_os_error(libc::ENOSPC));
        }
        self.set(blocks, true);
        Ok(())
    }
}

impl Recorded {
    /// Count a request; the plan, when it has to fail.
    fn request(&mut self, kind: RequestKind, bytes: u64) -> Option<FaultPlan> {
        self.counts.add(kind, bytes);
        let plan = self.fault?;
        if plan.kind.is_some_and(|k| k != kind) {
            return None;
        }
        self.seen += 1;
        let hit = self.seen == plan.nth || (plan.persistent && self.seen > plan.nth);
        hit.then(|| {
            self.fired += 1;
            plan
        })
    }

    /// As [`Recorded::request`], for requests that fail without a trace.
    fn admit(&mut self, kind: RequestKind, bytes: u64) -> Result<()> {
        match self.request(kind, bytes) {
            Some(plan) => Err(Error::from_raw_os_error(plan.errno)),
            None => Ok(()),
        }
    }

    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> Result<()> {
        if let Some(full) = &mut self.full {
            full.take(offset, data.len() as u64)?;
        }
        write_bytes(&mut self.bytes, offset, data)?;
        self.events.push(Event::Write {
            label,
            offset,
            data: data.to_vec(),
        });
        Ok(())
    }
}

/// An image in memory that records what is done to it.
#[derive(Debug)]
pub struct TraceStorage {
    state: Rc<RefCell<Recorded>>,
    /// Length of the files that names open.
    named: Option<u64>,
}

/// The test's end of a [`TraceStorage`]; good after the storage has been closed.
#[derive(Clone, Debug)]
pub struct Trace {
    state: Rc<RefCell<Recorded>>,
}

impl TraceStorage {
    /// An image with these contents, an empty log and no fault.
    pub fn new(initial: Vec<u8>) -> TraceStorage {
        let state = Recorded {
            bytes: initial.clone(),
            initial,
            ..Recorded::default()
        };
        TraceStorage {
            state: Rc::new(RefCell::new(state)),
            named: None,
        }
    }

    /// Names in the image open files of zeros, of this length.
    #[must_use]
    pub fn with_named(self, length: u64) -> TraceStorage {
        TraceStorage {
            named: Some(length),
            ..self
        }
    }

    /// The handle for the test.
    pub fn trace(&self) -> Trace {
        Trace {
            state: Rc::clone(&self.state),
        }
    }
}

impl Trace {
    /// Another storage over the same bytes and the same log, to open the image again.
    pub fn storage(&self) -> TraceStorage {
        TraceStorage {
            state: Rc::clone(&self.state),
            named: None,
        }
    }

    /// Begin anew with the present contents: an empty log, counts of 0, no fault.
    pub fn restart(&self) {
        let mut state = self.state.borrow_mut();
        let bytes = std::mem::take(&mut state.bytes);
        *state = Recorded {
            initial: bytes.clone(),
            bytes,
            ..Recorded::default()
        };
    }

    /// The contents when the log was empty.
    pub fn initial(&self) -> Vec<u8> {
        self.state.borrow().initial.clone()
    }

    /// The contents now: `initial` with all of `events` applied.
    pub fn contents(&self) -> Vec<u8> {
        self.state.borrow().bytes.clone()
    }

    /// The log.
    pub fn events(&self) -> Vec<Event> {
        self.state.borrow().events.clone()
    }

    /// The requests so far.
    pub fn counts(&self) -> Counts {
        self.state.borrow().counts
    }

    /// Fail requests from now on as planned; counting begins here. `None`: no more failures.
    pub fn set_fault(&self, plan: Option<FaultPlan>) {
        let mut state = self.state.borrow_mut();
        state.fault = plan;
        state.seen = 0;
        state.fired = 0;
    }

    /// From now on the disk is full. The file has the blocks, of so many bytes each, that are not
    /// all zeros: it has been copied by `cp --sparse=always`.
    pub fn fill_disk(&self, block: u64) {
        let mut state = self.state.borrow_mut();
        let blocks = state.bytes.chunks(usize::try_from(block).unwrap_or(1));
        let has = blocks.map(|b| b.iter().any(|b| *b != 0)).collect();
        let free = 0;
        state.full = Some(FullDisk { block, has, free });
    }

    /// How many requests failed since [`Trace::set_fault`].
    pub fn fired(&self) -> u64 {
        self.state.borrow().fired
    }
}

impl Storage for TraceStorage {
    fn length(&mut self) -> Result<u64> {
        let mut state = self.state.borrow_mut();
        state.admit(RequestKind::Length, 0)?;
        Ok(state.bytes.len() as u64)
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut state = self.state.borrow_mut();
        state.admit(RequestKind::Read, buf.len() as u64)?;
        read_bytes(&state.bytes, offset, buf);
        Ok(())
    }

    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> Result<()> {
        let mut state = self.state.borrow_mut();
        let Some(plan) = state.request(RequestKind::Write, data.len() as u64) else {
            return state.write(label, offset, data);
        };
        // What lands is logged, so that the log always explains the contents.
        let lands = landing(offset, data.len(), plan.torn);
        if let Some(part) = data.get(..lands).filter(|part| !part.is_empty()) {
            state.write(label, offset, part)?;
        }
        Err(Error::from_raw_os_error(plan.errno))
    }

    fn truncate(&mut self, length: u64) -> Result<()> {
        let mut state = self.state.borrow_mut();
        state.admit(RequestKind::Truncate, 0)?;
        resize_bytes(&mut state.bytes, length)?;
        if let Some(full) = &mut state.full {
            full.set(length.div_ceil(full.block)..u64::MAX, false);
        }
        state.events.push(Event::Truncate { length });
        Ok(())
    }

    fn discard(&mut self, offset: u64, bytes: u64) -> Result<()> {
        let mut state = self.state.borrow_mut();
        state.admit(RequestKind::Discard, bytes)?;
        zero_bytes(&mut state.bytes, offset, bytes);
        if let Some(full) = &mut state.full {
            let end = offset.saturating_add(bytes) / full.block;
            full.set(offset.div_ceil(full.block)..end, false);
        }
        state.events.push(Event::Discard { offset, bytes });
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        let mut state = self.state.borrow_mut();
        // A barrier that fails promises nothing, so it does not end a group of the log.
        state.admit(RequestKind::Barrier, 0)?;
        state.events.push(Event::Barrier);
        Ok(())
    }

    fn run(&mut self, offset: u64) -> Option<Run> {
        let state = self.state.borrow();
        let full = state.full.as_ref()?;
        let first = offset / full.block;
        let has = full.has(first);
        let blocks = full.has.len() as u64;
        match (first..blocks).find(|i| full.has(*i) != has) {
            Some(end) if has => Some(Run::Data(end * full.block - offset)),
            Some(end) => Some(Run::Hole(Some(end * full.block - offset))),
            None if has => Some(Run::Data((blocks * full.block).saturating_sub(offset))),
            None => Some(Run::Hole(None)),
        }
    }

    fn open_named(&mut self, _name: &[u8], _format: &[u8]) -> Option<Result<Box<dyn Storage>>> {
        let length = usize::try_from(self.named?).ok()?;
        Some(Ok(Box::new(MemoryStorage::new(vec![0; length]))))
    }

    fn close(self: Box<Self>) -> Result<()> {
        self.state.borrow_mut().admit(RequestKind::Close, 0)
    }
}

/// How many of the first `torn` bytes of a write land, given that a sector lands whole.
fn landing(offset: u64, length: usize, torn: usize) -> usize {
    if torn >= length {
        return length;
    }
    let end = offset.saturating_add(torn as u64);
    usize::try_from((end - end % SECTOR).saturating_sub(offset)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn errno(result: Result<()>) -> Option<i32> {
        result.err().map(|e| e.raw_os_error().unwrap())
    }

    #[test]
    fn the_log_explains_the_contents_and_requests_are_counted() {
        let mut s = TraceStorage::new(vec![1; 1000]);
        let trace = s.trace();
        s.write("head", 10, &[2; 20]).unwrap();
        s.barrier().unwrap();
        s.discard(5, 10).unwrap();
        s.truncate(500).unwrap();
        s.write("tail", 600, &[3; 4]).unwrap();
        let mut buf = [9; 4];
        s.read(602, &mut buf).unwrap();
        assert_eq!(buf, [3, 3, 0, 0]);
        assert_eq!(s.length().unwrap(), 604);
        Box::new(s).close().unwrap();
        assert_eq!(
            trace.events(),
            [
                Event::Write {
                    label: "head",
                    offset: 10,
                    data: vec![2; 20]
                },
                Event::Barrier,
                Event::Discard {
                    offset: 5,
                    bytes: 10
                },
                Event::Truncate { length: 500 },
                Event::Write {
                    label: "tail",
                    offset: 600,
                    data: vec![3; 4]
                },
            ]
        );
        let replayed = image_after(&trace.initial(), &trace.events(), |_| Apply::Full);
        assert_eq!(replayed, trace.contents());
        assert_eq!(trace.initial(), vec![1; 1000]);
        let counts = trace.counts();
        assert_eq!(
            counts,
            Counts {
                lengths: 1,
                reads: 1,
                writes: 2,
                truncates: 1,
                discards: 1,
                barriers: 1,
                closes: 1,
                bytes_read: 4,
                bytes_written: 24,
                bytes_discarded: 10,
            }
        );
        assert_eq!(counts.total(), 8);
        assert_eq!(counts.of(RequestKind::Write), 2);
    }

    #[test]
    fn restart_and_storage_go_on_from_the_present_contents() {
        let mut s = TraceStorage::new(vec![0; 4]);
        let trace = s.trace();
        s.write("x", 0, &[5]).unwrap();
        trace.restart();
        assert_eq!(
            (trace.initial(), trace.events().len()),
            (vec![5, 0, 0, 0], 0)
        );
        assert_eq!(trace.counts().total(), 0);
        trace.storage().write("x", 1, &[6]).unwrap();
        assert_eq!(trace.contents(), [5, 6, 0, 0]);
        assert_eq!(trace.events().len(), 1);
    }

    #[test]
    fn the_nth_request_fails_once_or_for_good() {
        let run = |plan: FaultPlan| {
            let mut s = TraceStorage::new(vec![0; 4]);
            let trace = s.trace();
            s.write("before the plan", 0, &[1]).unwrap();
            trace.set_fault(Some(plan));
            let failed = [
                s.write("a", 0, &[1]),
                s.barrier(),
                s.truncate(8),
                s.write("b", 1, &[1]),
                s.discard(0, 1),
                s.read(0, &mut [0]),
                s.length().map(|_| ()),
                Box::new(s).close(),
            ]
            .map(|result| match errno(result) {
                None => '.',
                Some(libc::ENOSPC) => 'x',
                Some(other) => panic!("{other}"),
            });
            let failed: String = failed.into_iter().collect();
            assert_eq!(trace.fired() as usize, failed.matches('x').count());
            let replayed = image_after(&trace.initial(), &trace.events(), |_| Apply::Full);
            assert_eq!(replayed, trace.contents());
            failed
        };
        let nth = |n| FaultPlan::nth(n, libc::ENOSPC);
        assert_eq!(run(nth(1)), "x.......");
        assert_eq!(run(nth(3)), "..x.....");
        assert_eq!(run(nth(8)), ".......x");
        assert_eq!(run(nth(9)), "........");
        assert_eq!(run(nth(4).persistent()), "...xxxxx");
        assert_eq!(run(nth(2).of_kind(RequestKind::Write)), "...x....");
        assert_eq!(
            run(nth(1).of_kind(RequestKind::Write).persistent()),
            "x..x...."
        );
        assert_eq!(run(nth(1).of_kind(RequestKind::Read)), ".....x..");
    }

    #[test]
    fn a_failed_write_lands_by_whole_sectors() {
        for (offset, torn, lands) in [
            (0, 0, 0),
            (0, 512, 512),
            (0, 1023, 512),
            (0, 1024, 1024),
            (100, 411, 0),
            (100, 412, 412),
            (100, 512, 412),
            (0, 2000, 2000),
            (0, 9999, 2000),
        ] {
            let mut s = TraceStorage::new(vec![]);
            let trace = s.trace();
            trace.set_fault(Some(FaultPlan::nth(1, libc::EIO).torn(torn)));
            assert_eq!(errno(s.write("x", offset, &[1; 2000])), Some(libc::EIO));
            let ones = trace.contents().iter().filter(|&&b| b == 1).count();
            assert_eq!(ones, lands, "{offset} {torn}");
            assert_eq!(trace.events().len(), usize::from(lands > 0));
        }
    }
}
