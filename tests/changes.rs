//! What it costs to ask which bytes changed, and what damage does to the answer. That the answers are
//! right is the business of `tests/reads.rs`, which compares them with whole disks.

#![allow(clippy::unwrap_used)]

use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::Storage;
use qcow2_snapshot::{Change, Image, Mapping, NewSnapshot, OpenFlags};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{Error, Result};
use std::rc::Rc;

const CLUSTER: u64 = 64 << 10;
const PER_TABLE: u64 = CLUSTER / 8;
const COPIED: u64 = 1 << 63;
/// 1 TiB in clusters of 64 KiB.
const CLUSTERS: u64 = 1 << 24;
const TABLES: u64 = CLUSTERS / PER_TABLE;

/// Where things are in the file of [`Big`].
const OLD_L1: u64 = CLUSTER;
const NEW_L1: u64 = 2 * CLUSTER;
const SNAPSHOTS: u64 = 3 * CLUSTER;
const REFTABLE: u64 = 4 * CLUSTER;
const OLD_TABLES: u64 = 1 << 30;
const NEW_TABLES: u64 = 2 << 30;
const OLD_DATA: u64 = 1 << 41;
const NEW_DATA: u64 = 1 << 42;
const END: u64 = 1 << 43;

/// What was asked of a storage.
#[derive(Default)]
struct Asked {
    requests: u64,
    bytes: u64,
    /// Requests for an L2 table, by its place.
    tables: BTreeMap<u64, u64>,
    data_requests: u64,
}

/// An image of 1 TiB, mapped throughout, in the snapshot "old" and as it is now: computed when it is
/// read. Clusters for which `changed` says so were written since; their tables were copied then.
struct Big {
    changed: fn(u64) -> bool,
    /// In what order the tables were copied: which of them stands at a place.
    place: fn(u64) -> u64,
    copied: Vec<bool>,
    /// Which table stands at a place.
    at_place: Vec<u64>,
    asked: Rc<RefCell<Asked>>,
}

impl Big {
    fn new(changed: fn(u64) -> bool, place: fn(u64) -> u64) -> Big {
        let copied = (0..TABLES)
            .map(|t| (t * PER_TABLE..(t + 1) * PER_TABLE).any(changed))
            .collect();
        let mut at_place = vec![0; TABLES as usize];
        for table in 0..TABLES {
            at_place[place(table) as usize] = table;
        }
        Big {
            changed,
            place,
            copied,
            at_place,
            asked: Rc::default(),
        }
    }

    fn new_table(&self, index: u64) -> u64 {
        // Data stood between them: no two are neighbours.
        NEW_TABLES + (self.place)(index) * 2 * CLUSTER
    }

    /// The 8 bytes at `at`.
    fn word(&self, at: u64) -> u64 {
        let entry = |table: u64, index: u64, new: bool| {
            let cluster = table * PER_TABLE + index;
            match new && (self.changed)(cluster) {
                true => (NEW_DATA + cluster * CLUSTER) | COPIED,
                false => OLD_DATA + cluster * CLUSTER,
            }
        };
        match at {
            0 => 0x5146_49fb_0000_0003,
            16 => 16,
            24 => CLUSTERS * CLUSTER,
            32 => TABLES,
            40 => NEW_L1,
            48 => REFTABLE,
            56 => (1 << 32) | 1,
            64 => SNAPSHOTS,
            96 => (4 << 32) | 104,
            OLD_L1..NEW_L1 if at < OLD_L1 + TABLES * 8 => OLD_TABLES + (at - OLD_L1) / 8 * CLUSTER,
            NEW_L1..SNAPSHOTS if at < NEW_L1 + TABLES * 8 => {
                let table = (at - NEW_L1) / 8;
                match self.copied[table as usize] {
                    true => self.new_table(table) | COPIED,
                    false => OLD_TABLES + table * CLUSTER,
                }
            }
            SNAPSHOTS.. if at < SNAPSHOTS + 80 => match at - SNAPSHOTS {
                0 => OLD_L1,
                8 => (TABLES << 32) | (1 << 16) | 3,
                32 => 24,
                48 => CLUSTERS * CLUSTER,
                64 => u64::from_be_bytes(*b"1old\0\0\0\0"),
                _ => 0,
            },
            OLD_TABLES.. if at < OLD_TABLES + TABLES * CLUSTER => {
                let at = at - OLD_TABLES;
                entry(at / CLUSTER, at % CLUSTER / 8, false)
            }
            NEW_TABLES.. if at < NEW_TABLES + 2 * TABLES * CLUSTER => {
                let at = at - NEW_TABLES;
                let table = self.at_place[(at / (2 * CLUSTER)) as usize];
                entry(table, at % CLUSTER / 8, true)
            }
            _ => 0,
        }
    }
}

impl Storage for Big {
    fn length(&mut self) -> Result<u64> {
        Ok(END)
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut asked = self.asked.borrow_mut();
        asked.requests += 1;
        asked.bytes += buf.len() as u64;
        let tables = OLD_TABLES..NEW_TABLES + 2 * TABLES * CLUSTER;
        if tables.contains(&offset) {
            for at in (offset..offset + buf.len() as u64).step_by(CLUSTER as usize) {
                *asked.tables.entry(at).or_default() += 1;
            }
        }
        if offset >= OLD_DATA {
            asked.data_requests += 1;
            // The last sector of each new cluster is what differs.
            for (i, byte) in buf.iter_mut().enumerate() {
                let at = offset + i as u64;
                *byte = u8::from(at >= NEW_DATA && at % CLUSTER >= CLUSTER - 512);
            }
            return Ok(());
        }
        // What is asked for may begin and end within a word.
        let before = (offset % 8) as usize;
        let mut words = vec![0; (before + buf.len()).next_multiple_of(8)];
        for (at, word) in (offset - offset % 8..)
            .step_by(8)
            .zip(words.chunks_exact_mut(8))
        {
            word.copy_from_slice(&self.word(at).to_be_bytes());
        }
        buf.copy_from_slice(&words[before..before + buf.len()]);
        Ok(())
    }
    fn write(&mut self, _: &'static str, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::from_raw_os_error(libc::EROFS))
    }
    fn truncate(&mut self, _: u64) -> Result<()> {
        Err(Error::from_raw_os_error(libc::EROFS))
    }
    fn discard(&mut self, _: u64, _: u64) -> Result<()> {
        Err(Error::from_raw_os_error(libc::EROFS))
    }
    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }
    fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

/// All changes since "old", each by a call of its own, and what was asked of the storage for them.
fn changes(big: Big, range: (u64, u64), compare: bool) -> (Vec<Change>, Asked) {
    let asked = Rc::clone(&big.asked);
    let mut image = Image::open_storage(Box::new(big), OpenFlags::read_only()).unwrap();
    let opened = std::mem::take(&mut *asked.borrow_mut());
    assert!(opened.tables.is_empty() && opened.requests < 10);
    let (mut all, mut at) = (Vec::new(), range.0);
    while let Some(c) = image
        .snapshot_next_change(Some(b"old"), None, at, range.1 - at, compare)
        .unwrap()
    {
        at = c.start + c.length;
        all.push(c);
    }
    let asked = std::mem::take(&mut *asked.borrow_mut());
    (all, asked)
}

/// 1% of 1 TiB.
const PERCENT: u64 = CLUSTERS / 100;
const WHOLE: (u64, u64) = (0, u64::MAX);

#[test]
fn a_stretch_of_one_percent_costs_a_twentieth_of_the_tables_at_most() {
    const FIRST: u64 = 5_000_000;
    let in_stretch = |c| (FIRST..FIRST + PERCENT).contains(&c);
    let (all, asked) = changes(Big::new(in_stretch, |t| t), WHOLE, false);
    let stretch = Change {
        start: FIRST * CLUSTER,
        length: PERCENT * CLUSTER,
        from: Mapping::Data,
        to: Mapping::Data,
    };
    assert_eq!(all, [stretch]);
    let pairs = (FIRST + PERCENT - 1) / PER_TABLE - FIRST / PER_TABLE + 1;
    assert_eq!(asked.tables.len() as u64, 2 * pairs);
    assert!(asked.tables.values().all(|n| *n == 1));
    // The snapshot's L1 table besides.
    assert_eq!(asked.bytes, 2 * pairs * CLUSTER + TABLES * 8);
    assert!(asked.bytes * 20 < 2 * TABLES * CLUSTER);
    // The old tables are neighbours and read together.
    assert_eq!((pairs, asked.requests), (21, 1 + 1 + 21));
}

#[test]
fn scattered_changes_cost_each_table_once_and_old_ones_in_large_requests() {
    // About one in a hundred, in every table; the tables were copied in another order.
    let scattered = |c: u64| c.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57 == 0;
    let (all, asked) = changes(Big::new(scattered, |t| t * 1237 % TABLES), WHOLE, false);
    let changed = (0..CLUSTERS).filter(|c| scattered(*c)).count() as u64;
    assert_eq!(all.iter().map(|c| c.length / CLUSTER).sum::<u64>(), changed);
    assert!(all.len() > 100_000);
    assert_eq!(asked.tables.len() as u64, 2 * TABLES);
    assert!(asked.tables.values().all(|n| *n == 1));
    assert_eq!(asked.bytes, 2 * TABLES * CLUSTER + TABLES * 8);
    // 4 MiB of tables at a time: 32 old ones in one request, and 32 new ones, none a neighbour.
    assert_eq!(asked.requests, 1 + TABLES / 32 * (1 + 32));
}

#[test]
fn comparing_reads_the_data_of_both_states_once_in_large_requests() {
    const FIRST: u64 = 5_000_000;
    let in_stretch = |c| (FIRST..FIRST + PERCENT).contains(&c);
    let bytes = 32 << 20;
    let range = (FIRST * CLUSTER - 512, FIRST * CLUSTER + bytes);
    let (all, asked) = changes(Big::new(in_stretch, |t| t), range, true);
    let wanted: Vec<u64> = (1..=bytes / CLUSTER)
        .map(|n| (FIRST + n) * CLUSTER - 512)
        .collect();
    assert_eq!(all.iter().map(|c| c.start).collect::<Vec<_>>(), wanted);
    assert!(all.iter().all(|c| c.length == 512));
    assert!(asked.tables.len() <= 4 && asked.tables.values().all(|n| *n == 1));
    assert_eq!(asked.data_requests, 2 * bytes / (1 << 20));
    let tables = asked.tables.len() as u64 * CLUSTER;
    assert_eq!(asked.bytes, 2 * bytes + tables + TABLES * 8);
}

#[test]
fn a_state_and_itself_are_compared_without_a_table() {
    let big = Big::new(|_| true, |t| t);
    let asked = Rc::clone(&big.asked);
    let mut image = Image::open_storage(Box::new(big), OpenFlags::read_only()).unwrap();
    for state in [None, Some(&b"old"[..]), Some(b"1")] {
        for compare in [false, true] {
            let found = image.snapshot_next_change(state, state, 0, u64::MAX, compare);
            assert_eq!(found.unwrap(), None);
        }
    }
    assert!(asked.borrow().tables.is_empty());
}

/// A small image in memory, built by hand: header, refcount table and snapshot table in its first
/// three clusters, whatever else at clusters that the caller chooses.
struct Small {
    bits: u32,
    bytes: Vec<u8>,
}

const S: Option<&[u8]> = Some(b"s");

impl Small {
    /// A disk of so many L2 tables, with its L1 table at cluster `l1`, and a snapshot "s" with the L1
    /// table at cluster `snapshot_l1`.
    fn new(bits: u32, tables: u32, l1: usize, snapshot_l1: usize) -> Small {
        let mut small = Small {
            bits,
            bytes: vec![0; 64 << bits],
        };
        let size = u64::from(tables) * small.span();
        small.put(0, &0x5146_49fb_0000_0003u64.to_be_bytes());
        small.put(20, &bits.to_be_bytes());
        small.put(24, &size.to_be_bytes());
        small.put(36, &tables.to_be_bytes());
        small.put(40, &((l1 as u64) << bits).to_be_bytes());
        small.put(48, &(1u64 << bits).to_be_bytes());
        small.put(56, &[0, 0, 0, 1, 0, 0, 0, 1]);
        small.put(64, &(2u64 << bits).to_be_bytes());
        small.put(96, &[0, 0, 0, 4, 0, 0, 0, 104]);
        small.entry(2, 0, (snapshot_l1 as u64) << bits);
        small.put((2 << bits) + 12, &[0, 1, 0, 1]);
        small.put((2 << bits) + 39, &[24]);
        small.put((2 << bits) + 64, b"1s");
        small.of_snapshot(tables, size);
        small
    }

    /// Size of the snapshot's L1 table, and of its disk.
    fn of_snapshot(&mut self, tables: u32, size: u64) {
        self.put((2 << self.bits) + 8, &tables.to_be_bytes());
        self.entry(2, 6, size);
    }

    /// Bytes that an L2 table maps.
    fn span(&self) -> u64 {
        1 << (2 * self.bits - 3)
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// An entry of the table at a cluster.
    fn entry(&mut self, cluster: usize, index: usize, value: u64) {
        self.put((cluster << self.bits) + index * 8, &value.to_be_bytes());
    }

    fn open(self) -> Image {
        let storage = Box::new(MemoryStorage::new(self.bytes));
        Image::open_storage(storage, OpenFlags::read_only()).unwrap()
    }
}

fn all(image: &mut Image, from: Option<&[u8]>, to: Option<&[u8]>) -> Vec<(u64, u64)> {
    image
        .snapshot_changes(from, to, false)
        .map(|c| c.map(|c| (c.start, c.length)).unwrap())
        .collect()
}

#[test]
fn an_unaligned_table_is_eio_where_it_is_come_to_and_the_handle_goes_on() {
    let mut small = Small::new(12, 4, 3, 4);
    let span = small.span();
    small.entry(3, 0, 5 << 12);
    small.entry(5, 0, 8 << 12);
    small.entry(3, 2, (5 << 12) + 512);
    let mut image = small.open();
    let next = |image: &mut Image, at| image.snapshot_next_change(S, None, at, u64::MAX, false);
    for _ in 0..2 {
        let first = next(&mut image, 0).unwrap().unwrap();
        assert_eq!((first.start, first.length), (0, 4096));
        let damaged = next(&mut image, 4096);
        assert_eq!(damaged.map_err(|e| e.errno()), Err(libc::EIO));
        assert_eq!(next(&mut image, 3 * span).unwrap(), None);
    }
}

#[test]
fn an_unaligned_cluster_is_eio() {
    let mut small = Small::new(12, 4, 3, 4);
    small.entry(3, 0, 5 << 12);
    small.entry(5, 1, (8 << 12) + 512);
    let mut image = small.open();
    let found = image.snapshot_next_change(S, None, 0, u64::MAX, false);
    assert_eq!(found.map_err(|e| e.errno()), Err(libc::EIO));
}

#[test]
fn tables_behind_the_end_of_the_file_are_zeros() {
    let mut small = Small::new(9, 4, 3, 4);
    small.entry(3, 0, 5 << 9);
    small.entry(5, 0, 8 << 9);
    small.entry(4, 0, 1 << 40);
    small.entry(4, 1, 1 << 41);
    let mut image = small.open();
    assert_eq!(all(&mut image, S, None), [(0, 512)]);
    assert_eq!(all(&mut image, None, S), [(0, 512)]);
}

#[test]
fn a_snapshot_said_to_be_exabytes_long_is_answered_at_once() {
    let mut small = Small::new(9, 4, 3, 4);
    let (span, size) = (small.span(), (1u64 << 62) - 512);
    small.of_snapshot(2, size + 511);
    small.entry(4, 1, 5 << 9);
    small.entry(5, 0, 8 << 9);
    small.entry(5, 1, 9 << 9);
    let mut image = small.open();
    let changes: Vec<Change> = image
        .snapshot_changes(None, S, false)
        .collect::<qcow2_snapshot::Result<_>>()
        .unwrap();
    let places: Vec<(u64, u64, Mapping, Mapping)> = changes
        .iter()
        .map(|c| (c.start, c.length, c.from, c.to))
        .collect();
    let behind = (
        4 * span,
        size - 4 * span,
        Mapping::Beyond,
        Mapping::Unallocated,
    );
    assert_eq!(
        places,
        [(span, 1024, Mapping::Unallocated, Mapping::Data), behind]
    );
    // And the other way round nothing is behind the end of the disk.
    assert_eq!(all(&mut image, S, None), [(span, 1024)]);
}

#[test]
fn an_l1_that_is_the_active_l1_has_no_changes() {
    let mut small = Small::new(9, 4, 3, 3);
    small.entry(3, 0, 5 << 9);
    small.entry(5, 0, 8 << 9);
    let mut image = small.open();
    assert_eq!(all(&mut image, S, None), []);
}

/// Else a file of 100 MiB would keep the library busy for minutes.
#[test]
fn an_l1_that_names_a_table_millions_of_times_is_refused() {
    let entries = 4u32 << 20;
    let mut small = Small::new(16, entries, 3, 3 + 512);
    small.bytes.resize((3 + 2 * 512 + 4) << 16, 0);
    for i in 0..entries as usize {
        let table = 3 + 2 * 512 + (i as u64 & 1);
        small.entry(3, i, table << 16);
        small.entry(3 + 512, i, (table + 2) << 16);
    }
    let mut image = small.open();
    let found = image.snapshot_next_change(S, None, 0, u64::MAX, false);
    assert_eq!(found.map_err(|e| e.errno()), Err(libc::EIO));
}

#[test]
fn offsets_behind_any_end_have_no_change() {
    let mut small = Small::new(9, 4, 3, 4);
    let span = small.span();
    small.of_snapshot(2, 2 * span);
    small.entry(3, 0, 5 << 9);
    small.entry(5, 0, 8 << 9);
    let mut image = small.open();
    for (from, to, size) in [(S, None, 4 * span), (None, S, 2 * span)] {
        for offset in [size, size + 1, 1 << 62, u64::MAX] {
            for compare in [false, true] {
                let found = image.snapshot_next_change(from, to, offset, u64::MAX, compare);
                assert_eq!(found.unwrap(), None);
            }
        }
        let none = image.snapshot_next_change(from, to, 0, 0, false);
        assert_eq!(none.unwrap(), None);
    }
}

/// The data is not the guest's, but which clusters were written can be told.
#[test]
fn encrypted_images_are_compared_by_their_tables_only() {
    let mut small = Small::new(9, 4, 3, 4);
    small.put(35, &[1]); // AES
    small.entry(3, 0, 5 << 9);
    small.entry(5, 0, 8 << 9);
    let mut image = small.open();
    assert_eq!(all(&mut image, S, None), [(0, 512)]);
    for state in [S, None] {
        let found = image.snapshot_next_change(state, None, 0, u64::MAX, true);
        assert_eq!(found.map_err(|e| e.errno()), Err(libc::ENOTSUP));
    }
}

#[test]
fn a_state_that_is_not_there_is_named() {
    let mut image = Small::new(9, 4, 3, 4).open();
    for (from, to) in [(Some(&b"gone"[..]), None), (None, Some(&b"gone"[..]))] {
        let e = image
            .snapshot_next_change(from, to, 0, u64::MAX, false)
            .unwrap_err();
        assert_eq!(e.errno(), libc::ENOENT);
        assert!(e.to_string().contains("'gone'"), "{e}");
    }
}

/// What is kept of a pair is dropped by every verb: the same names then mean something else.
#[test]
fn a_verb_in_between_is_seen_by_the_next_call() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/c-tests/images/v3-4k/before.qcow2.gz"
    );
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).unwrap();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(file), &mut bytes).unwrap();
    let storage = Box::new(MemoryStorage::new(bytes));
    let mut image = Image::open_storage(storage, OpenFlags::RDWR).unwrap();
    let name = image.snapshot_list().unwrap()[0].id.clone();
    let first = Some(&name[..]);
    let since = all(&mut image, first, None);
    assert!(!since.is_empty());
    image
        .snapshot_create(&NewSnapshot {
            name: b"now".to_vec(),
            ..NewSnapshot::default()
        })
        .unwrap();
    assert_eq!(all(&mut image, first, None), since);
    assert_eq!(all(&mut image, first, Some(b"now")), since);
    assert_eq!(all(&mut image, Some(b"now"), None), []);
    image.snapshot_goto(&name).unwrap();
    assert_eq!(all(&mut image, first, None), []);
    assert_eq!(all(&mut image, Some(b"now"), None), since);
    image.snapshot_goto(b"now").unwrap();
    assert_eq!(all(&mut image, first, None), since);
    image.snapshot_delete(Some(&name), None).unwrap();
    let gone = image.snapshot_next_change(first, None, 0, 1, false);
    assert_eq!(gone.map_err(|e| e.errno()), Err(libc::ENOENT));
}
