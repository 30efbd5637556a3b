//! `snapshot_usage`, `snapshot_delete_many` and `snapshot_rename` on tables that lie, and on very long lists.

#![allow(clippy::unwrap_used)]

#[macro_use]
#[path = "reference/pass_on.rs"]
mod pass_on;

use flate2::read::GzDecoder;
use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::trace::TraceStorage;
use qcow2_snapshot::io::{Run, Storage};
use qcow2_snapshot::{Error, Fix, Image, NewSnapshot, OpenFlags, Outcome, Snapshot, Stage, Usage};
use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;

/// An image with clusters of 4 KiB and snapshots "first" and "second" of the same disk at the end of its list.
fn image() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("c-tests/images/v3-4k/before.qcow2.gz");
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).unwrap();
    GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    let storage = TraceStorage::new(bytes);
    let trace = storage.trace();
    let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    for name in ["first", "second"] {
        let new = NewSnapshot {
            name: name.into(),
            ..NewSnapshot::default()
        };
        image.snapshot_create(&new).unwrap();
    }
    image.close().unwrap();
    trace.contents()
}

fn word(b: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(b[at as usize..at as usize + 8].try_into().unwrap())
}

fn put(b: &mut [u8], at: u64, value: u64) {
    b[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

/// Where the entries of the last two snapshots stand.
fn entries(b: &[u8]) -> [u64; 2] {
    let (mut at, mut all) = (word(b, 64), Vec::new());
    for _ in 0..word(b, 60) >> 32 {
        at = at.next_multiple_of(8);
        all.push(at);
        let lengths = word(b, at + 12);
        at += 40 + (word(b, at + 36) >> 32) + (lengths >> 48) + (lengths >> 32 & 0xffff);
    }
    [all[all.len() - 2], all[all.len() - 1]]
}

fn open(bytes: &[u8]) -> (Image, qcow2_snapshot::io::trace::Trace) {
    let storage = TraceStorage::new(bytes.to_vec());
    let trace = storage.trace();
    let image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    (image, trace)
}

/// Usage and delete of the set end with the same errno, and nothing is written.
fn refused(bytes: &[u8], set: &[&[u8]], errno: i32) {
    let (mut image, trace) = open(bytes);
    let states: Vec<Option<&[u8]>> = set.iter().copied().map(Some).collect();
    let by_usage = image.snapshot_usage(&states).unwrap_err();
    let by_delete = image.snapshot_delete_many(set).unwrap_err();
    assert_eq!(
        (by_usage.errno(), by_delete.errno()),
        (errno, errno),
        "{by_usage} {by_delete}"
    );
    assert_eq!(image.last_outcome(), Outcome::Unchanged);
    assert!(trace.events().is_empty());
}

/// Usage of the set is refused. A delete drops what cannot be followed, and nothing that others use suffers.
fn dropped(bytes: &[u8], set: &[&[u8]]) {
    let (mut image, trace) = open(bytes);
    let states: Vec<Option<&[u8]>> = set.iter().copied().map(Some).collect();
    let by_usage = image.snapshot_usage(&states).unwrap_err();
    assert_eq!((by_usage.errno(), trace.events().len()), (libc::EIO, 0));
    let before = image.snapshot_list().unwrap().len();
    image.snapshot_delete_many(set).unwrap();
    assert!(image
        .remark()
        .is_some_and(|r| r.contains("nothing of it was freed")));
    assert_eq!(image.snapshot_list().unwrap().len(), before - set.len());
    let found = image.check(Fix::NONE, &mut |_| ()).unwrap();
    assert_eq!((found.corruptions, found.check_errors), (0, 0));
}

#[test]
fn tables_that_lie_are_errors_and_nothing_underflows() {
    let good = image();
    let [one, two] = entries(&good);
    let mut active = good.clone();
    put(&mut active, one, word(&good, 40));
    dropped(&active, &[b"first"]);
    dropped(&active, &[b"second", b"first"]);
    let mut same = good.clone();
    put(&mut same, two, word(&good, one));
    refused(&same, &[b"first", b"second"], libc::EIO);
    // All counts of data and L2 tables are 1, where three name them.
    let mut low = good.clone();
    let block = word(&good, word(&good, 48));
    for i in 0..2048 {
        let at = (block + 2 * i) as usize;
        if low[at..at + 2] != [0, 0] {
            low[at..at + 2].copy_from_slice(&[0, 1]);
        }
    }
    refused(&low, &[b"first", b"second"], libc::EINVAL);
    // And 0, where the two snapshots and the disk name them.
    let mut none = good.clone();
    for i in 0..2048 {
        let at = (block + 2 * i) as usize;
        if good[at..at + 2] == [0, 3] {
            none[at + 1] = 0;
        }
    }
    refused(&none, &[b"first"], libc::EINVAL);
    let disk = open(&none).0.snapshot_usage(&[None]);
    assert_eq!(disk.map_err(|e| e.errno()), Err(libc::EINVAL));
    // Of one alone they say that nobody else has it; the figures keep their order.
    let u = open(&low).0.snapshot_usage(&[Some(b"first")]).unwrap();
    assert!(u.exclusive == u.referenced && u.tables <= u.exclusive && u.allocated == u.referenced);
    // An L1 table that names one L2 table again and again.
    let mut again = good.clone();
    let (l1, n) = (word(&good, one), word(&good, one + 8) >> 32);
    for i in 0..n {
        put(&mut again, l1 + 8 * i, word(&good, l1));
    }
    let (mut image, trace) = open(&again);
    let usage = image.snapshot_usage(&[Some(b"first"), Some(b"second"), None]);
    assert!(n < 2 || usage.is_err_and(|e| e.errno() == libc::EINVAL));
    assert!(trace.events().is_empty());
}

/// Memory some clusters of which are holes of a file.
struct Holed {
    memory: MemoryStorage,
    bits: u32,
    hole: fn(u64) -> bool,
}

impl Storage for Holed {
    pass_on!(length read write truncate discard barrier close);
    fn run(&mut self, offset: u64) -> Option<Run> {
        let cluster = 1 << self.bits;
        let first = offset / cluster;
        let end = (self.memory.length().unwrap().div_ceil(cluster)).max(first + 1);
        let same = |n: &u64| (self.hole)(*n) == (self.hole)(first);
        let behind = (first..end).find(|n| !same(n)).unwrap_or(end);
        let bytes = behind * cluster - offset;
        Some(match (self.hole)(first) {
            true => Run::Hole((behind < end).then_some(bytes)),
            false => Run::Data(bytes),
        })
    }
}

/// Clusters that a state's tables name, and whether each is a table, and whether a part of the disk (not VM state).
type Named = BTreeMap<u64, (bool, bool)>;

/// How often a set of states names a cluster, and the same two.
type Counted = (u64, bool, bool);

/// What an L1 table of `n` entries at `l1` names for a disk of `size` bytes; clusters of `1 << bits` bytes.
fn named(b: &[u8], bits: u32, (l1, n, size): (u64, u64, u64)) -> Named {
    let (mut found, cluster) = (Named::new(), 1u64 << bits);
    let place = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
    for i in l1 >> bits..(l1 + n * 8).div_ceil(cluster) {
        found.insert(i, (true, true));
    }
    for i in 0..n {
        let l2 = place(word(b, l1 + i * 8));
        if l2 == 0 {
            continue;
        }
        // A table of both is the disk's.
        let of_disk = i * cluster / 8 * cluster < size;
        found.insert(l2 >> bits, (true, of_disk));
        for j in 0..cluster / 8 {
            let entry = word(b, l2 + j * 8);
            assert_eq!(entry & 1 << 62, 0, "a compressed cluster");
            if place(entry) != 0 {
                let of_disk = (i * cluster / 8 + j) * cluster < size;
                let known = found
                    .entry(place(entry) >> bits)
                    .or_insert((false, of_disk));
                known.1 |= of_disk;
            }
        }
    }
    found
}

#[test]
fn usage_is_what_the_tables_and_the_counts_say() {
    let reference = |case: &str| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("c-tests/images");
        let file = std::fs::File::open(root.join(case).join("before.qcow2.gz")).unwrap();
        let mut bytes = Vec::new();
        GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
        bytes
    };
    let holes: [fn(u64) -> bool; 6] = [
        |_| false,
        |_| true,
        |n| n % 2 == 0,
        |n| n % 2 == 1,
        |n| n * 7 % 5 < 2,
        |n| n / 8 % 2 == 1,
    ];
    let (mut vm_states, mut tables, mut sets) = (0, 0, 0);
    for bytes in [
        image(),
        reference("v3-512"),
        reference("vm-state-512"),
        reference("vm-state-v3"),
        reference("l1-growth-goto-512"),
        reference("resize-512"),
    ] {
        let bits = word(&bytes, 16) as u32;
        let list = {
            let (mut image, _) = open(&bytes);
            image.snapshot_list().unwrap().to_vec()
        };
        let mut states = vec![None];
        states.extend(list.iter().map(Some));
        let place = |s: &Option<&Snapshot>| match s {
            Some(s) => (s.l1_table_offset, s.l1_size.into(), s.disk_size),
            None => (
                word(&bytes, 40),
                word(&bytes, 32) & 0xffff_ffff,
                word(&bytes, 24),
            ),
        };
        // 16 bits each, all in the first refcount block or few.
        let count = |n: u64| {
            let per_block = 1 << (bits - 1);
            let block = word(&bytes, word(&bytes, 48) + n / per_block * 8);
            word(&bytes, (block + n % per_block * 2) & !7) >> (48 - n % 4 * 16) & 0xffff
        };
        for set in 1u32..1 << states.len().min(4) {
            let set: Vec<_> = (0..states.len()).filter(|i| set >> i & 1 == 1).collect();
            let mut all: BTreeMap<u64, Counted> = BTreeMap::new();
            for state in &set {
                for (n, (table, of_disk)) in named(&bytes, bits, place(&states[*state])) {
                    let known = all.entry(n).or_insert((0, table, false));
                    (known.0, known.2) = (known.0 + 1, known.2 | of_disk);
                }
            }
            let sum = |wanted: &dyn Fn(u64, &Counted) -> bool| {
                (all.iter().filter(|(n, s)| wanted(**n, s)).count() as u64) << bits
            };
            let ids: Vec<_> = set.iter().map(|i| states[*i].map(|s| &s.id[..])).collect();
            for hole in holes {
                let memory = MemoryStorage::new(bytes.clone());
                let storage = Box::new(Holed { memory, bits, hole });
                let mut image = Image::open_storage(storage, OpenFlags::read_only()).unwrap();
                let expected = Usage {
                    referenced: sum(&|_, _| true),
                    exclusive: sum(&|n, s| count(n) == s.0),
                    tables: sum(&|n, s| count(n) == s.0 && s.1),
                    vm_state: sum(&|_, s| !s.2),
                    allocated: sum(&|n, _| !hole(n)),
                };
                assert_eq!(image.snapshot_usage(&ids).unwrap(), expected, "{ids:?}");
                vm_states += u32::from(expected.vm_state != 0);
                tables += u32::from(expected.tables != 0);
                sets += 1;
            }
        }
    }
    assert!(
        vm_states > 20 && tables > 100,
        "{vm_states} with VM state, {tables} with tables, of {sets}"
    );
}

/// Nothing is written, and the handle is as good as before.
#[test]
fn usage_can_be_cancelled_and_asked_again() {
    use std::cell::Cell;
    use std::ops::ControlFlow;
    use std::rc::Rc;
    let (mut image, trace) = open(&image());
    let (calls, stop_at) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(usize::MAX)));
    let (seen, stop) = (Rc::clone(&calls), Rc::clone(&stop_at));
    image.set_progress(Some(Box::new(move |stage, done, total| {
        assert!(stage == Stage::Check && done <= total);
        seen.set(seen.get() + 1);
        match seen.get() == stop.get() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    })));
    let set = [Some(&b"first"[..]), None];
    let usage = image.snapshot_usage(&set).unwrap();
    let all = calls.get();
    assert!(all > 1);
    for nth in 1..=all {
        calls.set(0);
        stop_at.set(nth);
        let e = image.snapshot_usage(&set).unwrap_err();
        assert_eq!(e.errno(), libc::ECANCELED);
    }
    stop_at.set(usize::MAX);
    assert_eq!(image.snapshot_usage(&set).unwrap(), usage);
    assert!(trace.events().is_empty() && image.last_outcome() == Outcome::None);
}

/// With a longer name the table would pass 64 MiB.
#[test]
fn a_name_for_which_the_table_has_no_room_is_efbig_with_the_way_out() {
    let mut bytes = image();
    let table = bytes.len().next_multiple_of(4096);
    bytes.resize(table, 0);
    let mut entries = 0u32;
    let mut add = |name: usize| {
        let id = format!("{entries:08}");
        let lengths = [8u16.to_be_bytes(), (name as u16).to_be_bytes()].concat();
        bytes.extend([&[0u8; 12][..], &lengths, &[0; 20]].concat());
        bytes.extend([&24u32.to_be_bytes()[..], &[0; 24], id.as_bytes()].concat());
        bytes.resize(
            bytes.len().next_multiple_of(8) + name.next_multiple_of(8),
            b'n',
        );
        entries += 1;
    };
    // 40 bytes, 24 of extra data, the ID, the name.
    add(0);
    (0..65_027).for_each(|_| add(960));
    add(848);
    assert_eq!((64 << 20) - (bytes.len() - table), 8);
    put(&mut bytes, 64, table as u64);
    bytes[60..64].copy_from_slice(&entries.to_be_bytes());
    // Its clusters are counted, in new blocks where there is none.
    let (first, reftable) = (table / 4096, word(&bytes, 48));
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    let blocks = bytes.len() / 4096;
    let end = blocks + blocks / 2048;
    bytes.resize(end * 4096, 0);
    for n in 1..=end / 2048 {
        let at = (blocks + n - 1) * 4096;
        put(&mut bytes, reftable + 8 * n as u64, at as u64);
    }
    for n in first..end {
        let block = word(&bytes, reftable + (n / 2048 * 8) as u64) as usize;
        bytes[block + n % 2048 * 2 + 1] = 1;
    }
    let (mut image, trace) = open(&bytes);
    let e = image
        .snapshot_rename(b"00000000", &[b'x'; 255])
        .unwrap_err();
    assert_eq!(e.errno(), libc::EFBIG);
    assert!(e.to_string().contains("64 MiB; delete"), "{e}");
    assert!(trace.events().is_empty() && image.last_outcome() == Outcome::Unchanged);

    // To its last byte it is used.
    image.snapshot_rename(b"00000000", b"8 bytes.").unwrap();
    let (mut image, trace) = open(&trace.contents());
    assert_eq!(image.snapshot_list().unwrap()[0].name, b"8 bytes.");
    let e = image
        .snapshot_rename(b"00000000", b"9 bytes..")
        .unwrap_err();
    assert_eq!((e.errno(), trace.events().len()), (libc::EFBIG, 0));
}

#[test]
fn names_that_are_not_there_are_named() {
    let (mut image, trace) = open(&image());
    for e in [
        image
            .snapshot_delete_many(&[b"first", b"th\xffee\n"])
            .unwrap_err(),
        image
            .snapshot_usage(&[None, Some(b"th\xffee\n")])
            .unwrap_err(),
        image.snapshot_rename(b"th\xffee\n", b"x").unwrap_err(),
    ] {
        assert!(matches!(e, Error::NotFound(_)));
        assert_eq!(e.to_string(), r"Can't find the snapshot 'th\xffee\n'");
    }
    assert!(trace.events().is_empty());
}

#[test]
fn any_state_can_be_asked_for_whatever_is_shown() {
    let storage = TraceStorage::new(image());
    let mut image = Image::open_storage(Box::new(storage), OpenFlags::read_only()).unwrap();
    let before = image.snapshot_usage(&[]).unwrap();
    image.snapshot_load_tmp(None, Some(b"first")).unwrap();
    assert_eq!(image.snapshot_usage(&[None]).unwrap(), before);
    image.free_snapshots();
    assert_eq!(
        image
            .snapshot_usage(&[Some(b"first"), Some(b"first")])
            .unwrap()
            .vm_state,
        0
    );
}

#[test]
fn a_list_of_65536_goes_at_once_and_one_of_it_gets_a_name() {
    let mut bytes = image();
    let table = bytes.len().next_multiple_of(4096);
    bytes.resize(table, 0);
    for i in 0..65536u32 {
        let id = format!("{i:08}");
        // An L1 table without entries.
        bytes.extend(
            [
                &[0u8; 12][..],
                &8u16.to_be_bytes(),
                &0u16.to_be_bytes(),
                &[0; 20],
            ]
            .concat(),
        );
        bytes.extend([&24u32.to_be_bytes()[..], &[0; 24], id.as_bytes()].concat());
    }
    let block = word(&bytes, word(&bytes, 48)) as usize;
    let clusters = table / 4096..bytes.len().div_ceil(4096);
    assert!(clusters.end <= 2048, "the block counts them all");
    for c in clusters {
        bytes[block + 2 * c + 1] = 1;
    }
    put(&mut bytes, 64, table as u64);
    bytes[60..64].copy_from_slice(&65536u32.to_be_bytes());
    let (mut image, _) = open(&bytes);
    let list = image.snapshot_list().unwrap().to_vec();
    let mut ids: Vec<&[u8]> = list.iter().map(|s| s.id.as_slice()).collect();
    ids.reverse();
    image.snapshot_rename(ids[7], b"seven").unwrap();
    assert_eq!(image.snapshot_list().unwrap()[65528].name, b"seven");
    let states: Vec<Option<&[u8]>> = ids.iter().copied().map(Some).collect();
    assert_eq!(image.snapshot_usage(&states).unwrap().referenced, 0);
    image.snapshot_delete_many(&ids[..65535]).unwrap();
    assert_eq!(image.snapshot_list().unwrap().len(), 1);
    assert_eq!(image.snapshot_list().unwrap()[0].id, b"00000000");
}

#[test]
fn ids_and_names_are_refused_one_byte_behind_their_bounds_and_where_they_hold_a_nul() {
    let (mut image, trace) = open(&image());
    let new = |id: &[u8], name: &[u8]| NewSnapshot {
        id: id.to_vec(),
        name: name.to_vec(),
        ..NewSnapshot::default()
    };
    let (most, more) = (vec![b'n'; 65535], vec![b'n'; 65536]);
    for bad in [
        new(&more, b"a"),
        new(b"a", &more),
        new(b"a\0", b"a"),
        new(b"a", b"\0a"),
    ] {
        let error = image.snapshot_create(&bad).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{error}");
    }
    let taken = image.snapshot_list().unwrap()[0].id.clone();
    let error = image.snapshot_create(&new(&taken, b"a")).unwrap_err();
    assert_eq!(error.errno(), libc::EEXIST);
    for (name, good) in [(255, true), (256, false)] {
        let renamed = image.snapshot_rename(b"second", &most[..name]);
        assert_eq!(renamed.is_ok(), good, "{name}");
        if good {
            image.snapshot_rename(&most[..name], b"second").unwrap();
        }
    }
    assert!(image.snapshot_rename(b"second", b"a\0").is_err());
    let before = trace.events().len();
    image.snapshot_create(&new(&most, &most)).unwrap();
    assert!(trace.events().len() > before);
    let last = image.snapshot_list().unwrap().last().unwrap();
    assert_eq!((last.id.len(), last.name.len()), (65535, 65535));
    assert_eq!(image.remark(), None);
}

#[test]
fn a_verb_with_nothing_to_do_is_done() {
    let (mut image, trace) = open(&image());
    assert_eq!(image.last_outcome(), Outcome::None);
    image.snapshot_delete_many(&[]).unwrap();
    assert_eq!(image.last_outcome(), Outcome::Done);
    assert!(trace.events().is_empty());
}
