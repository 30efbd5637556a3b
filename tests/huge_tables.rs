//! Small files whose tables name a million things that are not there: what is behind the end of the
//! file is known without looking, and what must be looked at can be cancelled. Counted in requests.

#![allow(missing_docs, clippy::unwrap_used)]

use qcow2_snapshot::io::Storage;
use qcow2_snapshot::{Error, Image, OpenFlags, Outcome};
use std::cell::Cell;
use std::io::Result;
use std::ops::ControlFlow;
use std::rc::Rc;

const CLUSTER: u64 = 1 << 16;
/// The refcount table has the most that QEMU accepts, 8 MiB, from the second cluster on.
const TABLE: u64 = CLUSTER;
const ENTRIES: u64 = 1 << 20;
const BLOCK: u64 = 129 * CLUSTER;
const LIST: u64 = 130 * CLUSTER;
const L1: u64 = 131 * CLUSTER;
const SNAPSHOT_L1: u64 = 132 * CLUSTER;
const END: u64 = 134 * CLUSTER;

/// Requests of all kinds that a handle has made.
#[derive(Clone, Default)]
struct Requests(Rc<Cell<u64>>);

impl Requests {
    fn add(&self) {
        self.0.set(self.0.get() + 1);
    }
}

/// A file with holes behind its bytes.
struct Holes {
    bytes: Vec<u8>,
    length: u64,
    requests: Requests,
}

impl Storage for Holes {
    fn length(&mut self) -> Result<u64> {
        self.requests.add();
        Ok(self.length)
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.requests.add();
        buf.fill(0);
        let there = self.bytes.get(offset as usize..).unwrap_or_default();
        let n = there.len().min(buf.len());
        buf[..n].copy_from_slice(&there[..n]);
        Ok(())
    }
    fn write(&mut self, _: &'static str, offset: u64, data: &[u8]) -> Result<()> {
        self.requests.add();
        let end = offset + data.len() as u64;
        if self.bytes.len() < end as usize {
            self.bytes.resize(end as usize, 0);
        }
        self.bytes[offset as usize..end as usize].copy_from_slice(data);
        self.length = self.length.max(end);
        Ok(())
    }
    fn truncate(&mut self, length: u64) -> Result<()> {
        self.requests.add();
        self.length = length;
        Ok(())
    }
    fn discard(&mut self, _: u64, _: u64) -> Result<()> {
        self.requests.add();
        Ok(())
    }
    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }
    fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

fn put(file: &mut [u8], at: u64, bytes: &[u8]) {
    file[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
}

/// A disk of `size` bytes with L1 entries `l1`, and a snapshot `1` of half a GiB. `blocks`: offsets
/// of refcount blocks besides the first one, which counts what is there, and `counted` clusters.
fn image(size: u64, l1: &[u64], blocks: impl Iterator<Item = u64>, counted: &[u64]) -> Vec<u8> {
    let mut file = vec![0; END as usize];
    let f = &mut file;
    put(f, 0, b"QFI\xfb\0\0\0\x03");
    put(f, 20, &16u32.to_be_bytes());
    put(f, 24, &size.to_be_bytes());
    put(f, 36, &(l1.len() as u32).to_be_bytes());
    put(f, 40, &L1.to_be_bytes());
    put(f, 48, &TABLE.to_be_bytes());
    put(f, 56, &[0, 0, 0, 128, 0, 0, 0, 1]);
    put(f, 64, &LIST.to_be_bytes());
    put(f, 96, &[0, 0, 0, 4, 0, 0, 0, 104]);
    put(f, TABLE, &BLOCK.to_be_bytes());
    for (i, offset) in (1..ENTRIES).zip(blocks) {
        put(f, TABLE + i * 8, &offset.to_be_bytes());
    }
    for c in (0..END / CLUSTER).chain(counted.iter().copied()) {
        put(f, BLOCK + c * 2, &[0, 1]);
    }
    put(f, LIST, &SNAPSHOT_L1.to_be_bytes());
    put(f, LIST + 8, &[0, 0, 0, 1, 0, 1]);
    put(f, LIST + 36, &24u32.to_be_bytes());
    put(f, LIST + 48, &(512u64 << 20).to_be_bytes());
    put(f, LIST + 64, b"1");
    for (i, entry) in (0..).zip(l1) {
        put(f, L1 + i * 8, &entry.to_be_bytes());
    }
    file
}

fn open(file: Vec<u8>, length: u64) -> (Image, Requests) {
    let requests = Requests::default();
    let storage = Holes {
        length: length.max(file.len() as u64),
        bytes: file,
        requests: requests.clone(),
    };
    let image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    (image, requests)
}

#[test]
fn a_shrinking_goto_does_not_look_at_a_million_absent_refcount_blocks() {
    let absent = (1..ENTRIES).map(|i| (1 << 40) + i * CLUSTER);
    let (mut image, requests) = open(image(1 << 30, &[0, 0], absent, &[]), 0);
    let e = image.snapshot_goto(b"1").unwrap_err();
    assert!(e.to_string().contains("Invalid refcount"), "{e}");
    assert_eq!(
        (e.errno(), image.last_outcome()),
        (libc::EIO, Outcome::Unchanged)
    );
    assert!(requests.0.get() < 100, "{} requests", requests.0.get());
}

#[test]
fn absent_refcount_blocks_that_are_counted_are_dropped_without_a_look() {
    let clusters: Vec<u64> = (1000..30_000).collect();
    let absent = clusters.iter().map(|c| c * CLUSTER);
    let (mut image, requests) = open(image(1 << 30, &[0, 0], absent, &clusters), 0);
    image.snapshot_goto(b"1").unwrap();
    // A write for the entry of each, which are none of the usual case.
    let n = clusters.len() as u64;
    assert!(requests.0.get() < n + 200, "{} requests", requests.0.get());
}

#[test]
fn looking_at_refcount_blocks_that_are_holes_can_be_cancelled() {
    // The last block is one that QEMU refuses to drop, so that all of them are looked at first.
    let clusters: Vec<u64> = (1000..30_000).collect();
    let holes = clusters.iter().map(|c| c * CLUSTER);
    let (mut image, requests) = open(image(1 << 30, &[0, 0], holes, &clusters), 1 << 31);
    let seen = requests.clone();
    image.set_progress(Some(Box::new(move |_, _, _| match seen.0.get() {
        0..200 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    })));
    let e = image.snapshot_goto(b"1").unwrap_err();
    assert!(matches!(e, Error::Cancelled(_)), "{e}");
    assert_eq!(image.last_outcome(), Outcome::Unchanged);
    assert!(requests.0.get() < 250, "{} requests", requests.0.get());
}
