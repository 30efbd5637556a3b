//! Counts that are wrong where a table of several clusters is: no verb writes over a part of it, or frees one.
#![allow(clippy::unwrap_used)]

#[path = "goto/craft.rs"]
mod craft;

use craft::{empty, put};
use qcow2_snapshot::io::trace::{Event, FaultPlan, RequestKind, TraceStorage};
use qcow2_snapshot::{Fix, Image, NewSnapshot, OpenFlags, Outcome, Result};
use std::ops::Range;

const CLUSTER: usize = 512;
const COPIED: u64 = 1 << 63;

/// An image in clusters of 512 bytes, each of whose tables has two, and a free one behind it. Its snapshots are "a" and "b"; "a" or the active
/// disk has an L2 table that names a cluster. Everything is counted once.
struct Made {
    bytes: Vec<u8>,
    tables: Vec<(&'static str, Range<usize>)>,
    l2: usize,
    data: usize,
}

const REFTABLE: usize = 1;
const REFBLOCK: usize = 4;

fn made(gap: usize, active: bool) -> Made {
    let l1 = 6 + gap;
    let [a, b, table, l2, data] = [l1 + 3, l1 + 6, l1 + 9, l1 + 12, l1 + 13];
    let mut bytes = empty(9, 4 << 20, data + 1, l1);
    // The builder has a table of one cluster, and a block behind it.
    bytes.copy_within(2 * CLUSTER..3 * CLUSTER, REFBLOCK * CLUSTER);
    bytes[2 * CLUSTER..3 * CLUSTER].fill(0);
    bytes[59] = 2;
    put(&mut bytes, REFTABLE * CLUSTER, (REFBLOCK * CLUSTER) as u64);
    let free = (6..l1).chain([3, 5, a - 1, b - 1, table - 1, l2 - 1]);
    free.for_each(|free| count(&mut bytes, free, 0));
    let mut entry = table * CLUSTER;
    for (name, at, length) in [(b'a', a, 400), (b'b', b, 300)] {
        put(&mut bytes, entry, (at * CLUSTER) as u64);
        let lengths = [0, 0, 0, 128, 0, 1, (length >> 8) as u8, length as u8];
        bytes[entry + 8..entry + 16].copy_from_slice(&lengths);
        bytes[entry + 36..entry + 40].copy_from_slice(&24u32.to_be_bytes());
        put(&mut bytes, entry + 48, 4 << 20);
        put(&mut bytes, entry + 56, u64::MAX);
        bytes[entry + 64..entry + 65 + length].fill(name);
        entry = (entry + 65 + length).next_multiple_of(8);
    }
    assert_eq!(entry.div_ceil(CLUSTER), table + 2);
    bytes[60..64].copy_from_slice(&2u32.to_be_bytes());
    put(&mut bytes, 64, (table * CLUSTER) as u64);
    let holder = if active { l1 } else { a } * CLUSTER + 70 * 8;
    put(&mut bytes, holder, COPIED | (l2 * CLUSTER) as u64);
    put(&mut bytes, l2 * CLUSTER, COPIED | (data * CLUSTER) as u64);
    Made {
        bytes,
        tables: vec![
            ("the refcount table", REFTABLE..REFTABLE + 2),
            ("a refcount block", REFBLOCK..REFBLOCK + 1),
            ("the active L1 table", l1..l1 + 2),
            ("the L1 table of \"b\"", b..b + 2),
            ("the snapshot table", table..table + 2),
        ],
        l2,
        data,
    }
}

fn count(bytes: &mut [u8], cluster: usize, count: u8) {
    bytes[REFBLOCK * CLUSTER + 2 * cluster + 1] = count;
}

/// Is it refused, with nothing written?
fn run(bytes: &[u8], verb: impl Fn(&mut Image) -> Result<()>) -> Result<()> {
    let storage = TraceStorage::new(bytes.to_vec());
    let trace = storage.trace();
    let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    let done = verb(&mut image);
    if done.is_err() {
        assert!(trace.events().is_empty());
        assert_eq!(image.last_outcome(), Outcome::Unchanged);
    }
    done
}

fn create(image: &mut Image) -> Result<()> {
    let new = NewSnapshot {
        name: b"new".into(),
        ..NewSnapshot::default()
    };
    image.snapshot_create(&new).map(drop)
}

fn delete(image: &mut Image) -> Result<()> {
    image.snapshot_delete(Some(b"a"), None)
}

fn goto(image: &mut Image) -> Result<()> {
    image.snapshot_goto(b"b")
}

#[test]
fn no_part_of_a_table_is_free_for_a_verb() {
    let good = made(0, false);
    run(&good.bytes, create).unwrap();
    let around = made(40, false);
    for (table, clusters) in &good.tables {
        // Its last cluster, and all of it, where a table of two clusters fits.
        for free in [clusters.end - 1..clusters.end, clusters.clone()] {
            let mut bytes = good.bytes.clone();
            free.clone().for_each(|n| count(&mut bytes, n, 0));
            let e = run(&bytes, create).unwrap_err();
            assert_eq!(e.errno(), libc::EIO, "{table}, {free:?}: {e}");
            // Where another place is free first, nothing is in danger.
            let mut bytes = around.bytes.clone();
            let moved = if free.end > 6 { 40 } else { 0 };
            free.clone().for_each(|n| count(&mut bytes, n + moved, 0));
            let done = run(&bytes, create);
            assert_eq!(done.is_err(), moved == 0, "{table}, {free:?}: {done:?}");
        }
    }
}

#[test]
fn no_part_of_a_table_is_freed_as_data() {
    type Verb = fn(&mut Image) -> Result<()>;
    let verbs: [(bool, &str, Verb); 2] = [(false, "delete", delete), (true, "goto", goto)];
    for (active, name, verb) in verbs {
        for gap in [0, 40] {
            let good = made(gap, active);
            run(&good.bytes, verb).unwrap();
            for (table, clusters) in &good.tables {
                for cluster in clusters.clone() {
                    let mut bytes = good.bytes.clone();
                    let entry = COPIED | (cluster * CLUSTER) as u64;
                    put(&mut bytes, good.l2 * CLUSTER, entry);
                    count(&mut bytes, good.data, 0);
                    let done = run(&bytes, verb);
                    assert!(done.is_err(), "{name}, {gap}: {table}, {cluster}");
                    // With another count for it nothing is lost.
                    count(&mut bytes, cluster, 2);
                    run(&bytes, verb).unwrap();
                }
            }
        }
    }
}

/// A create clears flags in the active L1 table, in place.
#[test]
fn an_active_l1_table_that_is_a_snapshots_too_is_not_written() {
    for (active, written) in [(true, true), (false, false)] {
        let mut bytes = made(0, active).bytes;
        let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
        let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap());
        put(&mut bytes, (table + 65 + 400).next_multiple_of(8), l1);
        let done = run(&bytes, create);
        assert_eq!(done.is_err(), written, "{done:?}");
        let said = done.map_err(|e| e.to_string()).err().unwrap_or_default();
        assert_eq!(said.contains("inactive L1 table"), written, "{said}");
    }
}

/// Where a new refcount block is entered, nothing else may be.
#[test]
fn an_l1_table_in_the_refcount_table_is_not_written_over() {
    let mut bytes = made(0, false).bytes;
    let in_use = [0, 1].repeat(256);
    bytes.resize(64 * 256 * CLUSTER, 0);
    bytes[REFBLOCK * CLUSTER..(REFBLOCK + 1) * CLUSTER].copy_from_slice(&in_use);
    for n in 1..64 {
        let at = n * 256 * CLUSTER;
        put(&mut bytes, REFTABLE * CLUSTER + n * 8, at as u64);
        bytes[at..at + CLUSTER].copy_from_slice(&in_use);
    }
    // The next block is the first one in the second cluster of the table.
    run(&bytes, create).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    let b = (table + 65 + 400).next_multiple_of(8);
    put(&mut bytes, b, ((REFTABLE + 1) * CLUSTER) as u64);
    bytes[b + 11] = 64;
    let e = run(&bytes, create).unwrap_err();
    assert_eq!(e.errno(), libc::EIO, "{e}");
    assert!(e.to_string().contains("inactive L1 table"), "{e}");
}

/// An image of 4 MiB in clusters of 4 KiB with the snapshot "b" of 2 MiB, whose disk has a data cluster at the end, by
/// way of the entry `index` of its second L2 table.
fn in_4k(index: usize) -> (Vec<u8>, usize) {
    const CLUSTER: usize = 4096;
    let [l1, b, table, l2, data] = [3, 4, 5, 6, 7];
    let mut bytes = empty(12, 4 << 20, data + 3, l1);
    put(&mut bytes, l1 * CLUSTER + 8, COPIED | (l2 * CLUSTER) as u64);
    let entry = COPIED | (data * CLUSTER) as u64;
    put(&mut bytes, l2 * CLUSTER + index * 8, entry);
    let snapshot = table * CLUSTER;
    put(&mut bytes, snapshot, (b * CLUSTER) as u64);
    bytes[snapshot + 8..snapshot + 16].copy_from_slice(&[0, 0, 0, 1, 0, 1, 0, 1]);
    bytes[snapshot + 36..snapshot + 40].copy_from_slice(&24u32.to_be_bytes());
    put(&mut bytes, snapshot + 48, 2 << 20);
    put(&mut bytes, snapshot + 56, u64::MAX);
    bytes[snapshot + 64..snapshot + 66].fill(b'b');
    bytes[60..64].copy_from_slice(&1u32.to_be_bytes());
    put(&mut bytes, 64, snapshot as u64);
    (bytes, l2 * CLUSTER + index * 8)
}

#[test]
fn an_entry_that_is_not_aligned_is_named_with_its_table() {
    for index in [0, 1, 5, 511] {
        let (mut bytes, entry) = in_4k(index);
        run(&bytes, create).unwrap();
        bytes[entry + 6] |= 2;
        let e = run(&bytes, create).unwrap_err().to_string();
        let place = "offset 0x7200 unaligned (L2 offset: 0x6000, L2 index: ";
        assert!(e.contains(&format!("{place}{index:#x})")), "{e}");

        // Cut off with the end of the disk it frees nothing, as in QEMU.
        let storage = TraceStorage::new(bytes);
        let trace = storage.trace();
        let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
        goto(&mut image).unwrap();
        let counts = &trace.contents()[2 * 4096..][..20];
        assert_eq!(counts.iter().sum::<u8>(), 9, "{counts:?}");
        assert_eq!(counts[13], 0, "the L2 table's");
    }
}

#[test]
fn what_an_l2_table_names_behind_the_end_of_the_disk_is_not_cut_off_with_it() {
    for (index, freed) in [(255, true), (256, false), (300, false), (511, false)] {
        let (mut bytes, _) = in_4k(index);
        put(&mut bytes, 24, 3 << 20);
        let storage = TraceStorage::new(bytes);
        let trace = storage.trace();
        let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
        goto(&mut image).unwrap();
        let counts = &trace.contents()[2 * 4096..][..20];
        assert_eq!(counts[15], u8::from(!freed), "{index}: {counts:?}");
    }
}

/// What is true of an image is not known only where the header is being switched.
#[test]
fn a_repair_that_fails_says_whether_the_header_was_being_switched() {
    let mut rebuild = made(0, false).bytes;
    // The block is named behind all of the file.
    put(&mut rebuild, REFTABLE * CLUSTER, 1 << 40);
    let mut cut_list = made(0, false).bytes;
    // The second entry is said to be longer than the table could be.
    let table = u64::from_be_bytes(cut_list[64..72].try_into().unwrap()) as usize;
    let second = (table + 65 + 400).next_multiple_of(8);
    cut_list[second + 36..second + 40].copy_from_slice(&u32::MAX.to_be_bytes());
    let fix = Fix::LEAKS | Fix::ERRORS;
    for (bytes, switch) in [
        (rebuild, "header: refcount table"),
        (cut_list, "header: snapshots"),
    ] {
        let open = || {
            let storage = TraceStorage::new(bytes.clone());
            let trace = storage.trace();
            let flags = OpenFlags::RDWR | OpenFlags::CHECK;
            let image = Image::open_storage(Box::new(storage), flags).unwrap();
            (image, trace)
        };
        let (mut image, trace) = open();
        image.check(fix, &mut |_| {}).unwrap();
        assert_eq!(image.last_outcome(), Outcome::Done);
        let labels: Vec<_> = trace
            .events()
            .iter()
            .filter_map(|e| match e {
                Event::Write { label, .. } => Some(*label),
                _ => None,
            })
            .collect();
        assert!(labels.contains(&switch), "{labels:?}");
        for (nth, label) in (1..).zip(&labels) {
            let (mut image, trace) = open();
            let plan = FaultPlan::nth(nth, libc::EIO).of_kind(RequestKind::Write);
            trace.set_fault(Some(plan));
            image.check(fix, &mut |_| {}).unwrap_err();
            let wanted = match label.starts_with("header: ") {
                true => Outcome::Unknown,
                false => Outcome::Unchanged,
            };
            assert_eq!(image.last_outcome(), wanted, "{label}, write {nth}");
        }
    }
}

/// A refcount block at the end of the file is written whole, as by QEMU.
#[test]
fn a_refcount_block_that_is_cut_off_where_it_has_zeros_is_made_whole() {
    let mut bytes = made(0, true).bytes;
    let at = bytes.len();
    let block = at / CLUSTER;
    count(&mut bytes, REFBLOCK, 0);
    count(&mut bytes, block, 1);
    bytes.extend_from_within(REFBLOCK * CLUSTER..(REFBLOCK + 1) * CLUSTER);
    put(&mut bytes, REFTABLE * CLUSTER, at as u64);
    for left in [100, 256, 511, 512] {
        let storage = TraceStorage::new(bytes[..at + left].to_vec());
        let trace = storage.trace();
        let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
        goto(&mut image).unwrap();
        assert_eq!(trace.contents().len(), at + CLUSTER, "{left} bytes of it");
    }
}

/// Where the snapshot table is when it has been repaired.
fn table_after_repair(bytes: Vec<u8>) -> usize {
    let storage = TraceStorage::new(bytes);
    let trace = storage.trace();
    let flags = OpenFlags::RDWR | OpenFlags::CHECK;
    let mut image = Image::open_storage(Box::new(storage), flags).unwrap();
    let fix = Fix::ERRORS | Fix::TABLE_ONLY;
    image.check(fix, &mut |_| {}).unwrap();
    let now = trace.contents();
    u64::from_be_bytes(now[64..72].try_into().unwrap()) as usize
}

/// Until the header names the new one, the old snapshot table is read as far as it is said to reach: were the new one
/// written there, an old entry would end in it.
#[test]
fn a_new_snapshot_table_stands_behind_all_that_the_old_one_is_said_to_be() {
    let mut bytes = made(0, false).bytes;
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    let second = (table + 65 + 400).next_multiple_of(8);
    let (extra, name) = (1100, 1500);
    bytes[second + 36..second + 40].copy_from_slice(&(extra as u32).to_be_bytes());
    bytes[second + 14..second + 16].copy_from_slice(&(name as u16).to_be_bytes());
    let end = second + 40 + extra + 1 + name;
    assert!(end > bytes.len() && bytes.len() > table);
    let at = table_after_repair(bytes);
    assert_eq!(at, end.next_multiple_of(CLUSTER));
}

/// Of a table that begins behind the end of the file nothing can be lost.
#[test]
fn a_new_snapshot_table_takes_the_first_place_where_the_old_one_is_not_in_the_file() {
    let good = made(0, false).bytes;
    for behind in [0, 4] {
        let mut bytes = good.clone();
        put(&mut bytes, 64, (good.len() + behind * CLUSTER) as u64);
        let at = table_after_repair(bytes);
        assert_eq!(at, (REFTABLE + 2) * CLUSTER, "{behind}");
    }
}

/// An image whose active disk has a cluster of data and one of VM state.
struct WithState {
    bytes: Vec<u8>,
    l1: usize,
    /// The L2 tables of the disk and of the VM state.
    disk: usize,
    vm: usize,
    state: usize,
}

/// What the verb allocates has room before the cluster in use that is counted 0.
fn with_state(counted_0: fn(disk: usize, data: usize) -> usize) -> WithState {
    let [l1, disk, vm, data, state] = [3, 7, 8, 9, 10];
    let mut bytes = empty(9, 32 << 10, 11, l1);
    bytes[36..40].copy_from_slice(&2u32.to_be_bytes());
    for (at, names) in [
        (l1 * CLUSTER, disk),
        (l1 * CLUSTER + 8, vm),
        (disk * CLUSTER, data),
        (vm * CLUSTER, state),
    ] {
        put(&mut bytes, at, COPIED | (names * CLUSTER) as u64);
    }
    for free in [4, 5, 6, counted_0(disk, data)] {
        bytes[2 * CLUSTER + 2 * free + 1] = 0;
    }
    WithState {
        bytes,
        l1,
        disk,
        vm,
        state,
    }
}

impl WithState {
    /// Create a snapshot with the VM state. `look` sees the image after each event.
    fn create(&mut self, mut look: impl FnMut(&WithState)) {
        let storage = TraceStorage::new(self.bytes.clone());
        let trace = storage.trace();
        let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
        let new = NewSnapshot {
            name: b"new".into(),
            vm_state_size: 512,
            ..NewSnapshot::default()
        };
        image.snapshot_create(&new).unwrap();
        for event in trace.events() {
            if let Event::Write { offset, data, .. } = event {
                let at = offset as usize;
                self.bytes.resize(self.bytes.len().max(at + data.len()), 0);
                self.bytes[at..at + data.len()].copy_from_slice(&data);
            }
            look(self);
        }
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }
}

/// A create that gives the VM state to the snapshot alone counts it twice for a while: flags go before, wherever a wrong
/// count makes flags worth a look.
#[test]
fn flags_of_vm_state_go_before_it_is_counted_twice() {
    let mut twice = 0;
    with_state(|_, data| data).create(|now| {
        if now.word(64) != 0 && now.bytes[2 * CLUSTER + 2 * now.state + 1] == 2 {
            twice += 1;
            assert_eq!(now.word(now.vm * CLUSTER) & COPIED, 0);
        }
    });
    assert!(twice > 0);
}

/// The active L1 table has let go of the VM state when a flag in it, which a wrong count had kept away, is set.
#[test]
fn a_flag_that_is_set_late_does_not_bring_vm_state_back() {
    let mut image = with_state(|disk, _| disk);
    let (at, vm) = (image.l1 * CLUSTER, image.vm);
    let word = (image.disk * CLUSTER) as u64;
    put(&mut image.bytes, at, word);
    let mut gone = false;
    image.create(|now| {
        let names_it = now.word(at + 8) & !COPIED == (vm * CLUSTER) as u64;
        assert!(!(gone && names_it));
        gone |= !names_it;
    });
    assert!(gone);
    assert_eq!(image.word(at), word | COPIED);
}
