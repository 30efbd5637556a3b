//! Images that are small and say that they are huge: a verb on them takes seconds and less than
//! 512 MiB, whatever it comes to.

#![allow(missing_docs, clippy::unwrap_used)]

use qcow2_snapshot::{Image, NewSnapshot, OpenFlags};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Refcounts of 64 bits, all of them `COUNT`, in one block for the whole file.
const COUNT: u64 = 1 << 30;
/// The most entries that an L1 table may have. They take seconds, so one test has so many.
const MOST: u64 = 4 << 20;
const MANY: u64 = MOST >> 4;

/// An image in the making. The refcount table is in the second cluster, the one block in the third,
/// the snapshot table from the fourth on, then the L1 tables at places of the caller's choice.
struct Maker {
    dir: tempfile::TempDir,
    file: File,
    cluster: u64,
}

impl Maker {
    fn new(cluster_bits: u32, size: u64, l1: (u64, u64), snapshots: u32) -> Maker {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("image")).unwrap();
        let cluster = 1 << cluster_bits;
        let m = Maker { dir, file, cluster };
        m.put(0, &0x5146_49fb_0000_0003u64.to_be_bytes());
        m.put(20, &cluster_bits.to_be_bytes());
        m.put(24, &size.to_be_bytes());
        m.put(36, &(l1.1 as u32).to_be_bytes());
        m.put(40, &l1.0.to_be_bytes());
        m.put(48, &cluster.to_be_bytes());
        m.put(56, &1u32.to_be_bytes());
        m.put(60, &snapshots.to_be_bytes());
        m.put(64, &(3 * cluster).to_be_bytes());
        m.put(96, &6u32.to_be_bytes());
        m.put(100, &104u32.to_be_bytes());
        m.put(cluster, &(2 * cluster).to_be_bytes());
        m
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    /// Clusters from `first` to before `end` have this count.
    fn counts(&self, first: u64, end: u64, count: u64) {
        let all: Vec<u8> = (first..end).flat_map(|_| count.to_be_bytes()).collect();
        self.put(2 * self.cluster + first * 8, &all);
    }

    /// A longer backing file.
    fn backing(&self) {
        let raw = File::create(self.dir.path().join("raw")).unwrap();
        raw.set_len(1 << 30).unwrap();
        self.put(8, &400u64.to_be_bytes());
        self.put(16, &3u32.to_be_bytes());
        self.put(104, &0xe279_2aca_0000_0003u64.to_be_bytes());
        self.put(112, b"raw");
        self.put(400, b"raw");
    }

    /// Entry `index` of the snapshot table, with an ID of one byte.
    fn snapshot(&self, index: u64, l1: (u64, u64), size: u64) {
        let at = 3 * self.cluster + index * 72;
        self.put(at, &l1.0.to_be_bytes());
        self.put(at + 8, &(l1.1 as u32).to_be_bytes());
        self.put(at + 12, &[0, 1]);
        self.put(at + 36, &24u32.to_be_bytes());
        self.put(at + 48, &size.to_be_bytes());
        self.put(at + 64, b"1");
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }
}

/// The most memory that this process ever had, in bytes.
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

/// Run a verb, alone in this process; say what it came to.
fn bounded(m: &Maker, what: &str, verb: impl FnOnce(&mut Image) -> String) -> String {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let start = Instant::now();
    let mut image = Image::open(&m.path(), OpenFlags::RDWR).unwrap();
    let said = verb(&mut image);
    drop(image);
    let (took, memory) = (start.elapsed(), most_memory());
    println!("{what}: {said}; {took:?}, {} MiB", memory >> 20);
    assert!(took < Duration::from_secs(60), "{what} took {took:?}");
    assert!(memory < 512 << 20, "{what}: {memory} bytes");
    said
}

fn goto(m: &Maker, what: &str) -> String {
    bounded(m, what, |image| format!("{:?}", image.snapshot_goto(b"1")))
}

#[test]
fn a_goto_to_a_huge_disk_over_a_longer_backing_file_makes_tables_in_little_memory() {
    for (bits, entries) in [(9, MANY), (16, MOST), (21, MANY)] {
        let cluster = 1u64 << bits;
        let disk = entries * (cluster / 8) * cluster;
        let at = 16 << 20;
        let m = Maker::new(bits, 512, (at, entries), 1);
        m.backing();
        m.snapshot(0, (8 << 20, 1), disk);
        m.file.set_len(at + entries * 8).unwrap();
        let used = ((at + entries * 8) / cluster).min(cluster / 8);
        m.counts(0, used, 1);
        goto(&m, "larger");
    }
}

#[test]
fn a_goto_to_a_huge_disk_does_not_hold_a_million_copies_of_a_table() {
    let (cluster, at) = (65536, 16 << 20);
    let m = Maker::new(16, 512, (at, MANY), 1);
    m.backing();
    m.snapshot(0, (8 << 20, 1), MANY * (cluster / 8) * cluster);
    let table = 12 << 20;
    m.put(table, &[0, 0, 0, 0, 0, 0, 0, 1]);
    let entries: Vec<u8> = (0..MANY).flat_map(|_| table.to_be_bytes()).collect();
    m.put(at, &entries);
    m.counts(0, (at + MANY * 8) / cluster, COUNT);
    let said = goto(&m, "larger, over copies");
    assert!(said.contains("NoMemory"), "{said}");
}

#[test]
fn a_goto_to_a_small_disk_discards_a_huge_one_in_little_time() {
    for (bits, named) in [(9, 0u64), (16, 0), (21, 0), (16, 12 << 20)] {
        let cluster = 1u64 << bits;
        let at = 16 << 20;
        let m = Maker::new(bits, MANY * (cluster / 8) * cluster, (at, MANY), 1);
        m.snapshot(0, (8 << 20, 1), 512);
        let entries: Vec<u8> = (0..MANY).flat_map(|_| named.to_be_bytes()).collect();
        m.put(at, &entries);
        let used = ((at + MANY * 8) / cluster).min(cluster / 8);
        m.counts(0, used, if named == 0 { 1 } else { COUNT });
        goto(&m, "smaller");
    }
}

#[test]
fn l1_tables_of_snapshots_that_are_said_to_have_gigabytes_cost_nothing() {
    let m = Maker::new(9, 512, (63 * 512, 1), 400);
    for i in 0..400 {
        m.snapshot(i, ((i + 1) << 34, u32::MAX.into()), 512);
    }
    // They are holes of the file: tables behind its end are an error.
    m.file.set_len(8 << 40).unwrap();
    m.counts(0, 64, 1);
    let start = Instant::now();
    let said = bounded(&m, "many snapshots", |image| {
        format!("{:?}", image.snapshot_create(&NewSnapshot::default()))
    });
    assert!(said.starts_with("Ok"), "{said}");
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
}
