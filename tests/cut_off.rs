//! Files that lost their end: what a verb or a reader needs from behind it is an error, never zeros.

#![allow(missing_docs, clippy::unwrap_used)]

#[macro_use]
#[path = "reference/pass_on.rs"]
mod pass_on;

use flate2::read::GzDecoder;
use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::Storage;
use qcow2_snapshot::{Error, Image, NewSnapshot, OpenFlags, Outcome, Snapshot};
use std::io::Read;
use std::path::Path;

/// Run `with` on a handle; what it came to, and the file afterwards.
fn on<T>(
    file: &[u8],
    flags: OpenFlags,
    with: impl FnOnce(&mut Image) -> Result<T, Error>,
) -> (Result<T, Error>, Vec<u8>) {
    let storage = MemoryStorage::new(file.to_vec());
    let handle = storage.handle();
    let result = Image::open_storage(Box::new(storage), flags).and_then(|mut i| with(&mut i));
    let after = handle.borrow().clone();
    (result, after)
}

/// A reference image with snapshots `one` and `two` on top of its own.
fn image(case: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("c-tests/images");
    let packed = std::fs::read(root.join(case).join("before.qcow2.gz")).unwrap();
    let mut file = Vec::new();
    GzDecoder::new(&packed[..]).read_to_end(&mut file).unwrap();
    for name in [b"cut one", b"cut two"] {
        let new = NewSnapshot {
            name: name.to_vec(),
            ..NewSnapshot::default()
        };
        let (done, after) = on(&file, OpenFlags::RDWR, |i| i.snapshot_create(&new));
        done.unwrap();
        file = after;
    }
    file
}

fn snapshots(file: &[u8]) -> Vec<Snapshot> {
    let read = |i: &mut Image| i.snapshot_list().map(<[_]>::to_vec);
    on(file, OpenFlags::read_only(), read).0.unwrap()
}

/// Put a copy of `bytes` at `at` behind everything, and say so in the 8 bytes at `pointer`.
fn moved(file: &[u8], at: u64, bytes: u64, pointer: u64) -> (Vec<u8>, u64) {
    let mut file = file.to_vec();
    let table = file[at as usize..(at + bytes) as usize].to_vec();
    let cluster = 1 << u32::from_be_bytes(file[20..24].try_into().unwrap());
    let end = file.len().next_multiple_of(cluster);
    file.resize(end, 0);
    file.extend(table);
    file[pointer as usize..pointer as usize + 8].copy_from_slice(&(end as u64).to_be_bytes());
    (file, end as u64)
}

fn word(file: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(file[at..at + 8].try_into().unwrap())
}

fn cut_off<T: std::fmt::Debug>(result: Result<T, Error>, what: &str) {
    let e = result.unwrap_err();
    let text = e.to_string();
    assert!(
        e.errno() == libc::EIO && text.contains("is cut off: the file ends at"),
        "{what}: {text}"
    );
    assert!(text.contains("Copy the image again"), "{what}: {text}");
}

#[test]
fn a_snapshots_l1_table_behind_the_end_is_an_error_for_every_verb_and_reader() {
    for case in ["v3-64k", "v3-512", "v2-4k"] {
        let file = image(case);
        let list = snapshots(&file);
        let two = list.last().unwrap();
        let bytes = u64::from(two.l1_size) * 8;
        // Its entry begins with the offset.
        let table = word(&file, 64) as usize;
        let pointer = (table..file.len() - 8).find(|at| word(&file, *at) == two.l1_table_offset);
        let (whole, at) = moved(&file, two.l1_table_offset, bytes, pointer.unwrap() as u64);
        let show = |i: &mut Image| i.snapshot_load_tmp(None, Some(b"cut two"));
        on(&whole, OpenFlags::read_only(), show).0.unwrap();
        on(&whole, OpenFlags::RDWR, |i| i.write_snapshots())
            .0
            .unwrap();
        for left in [0, 1, bytes - 8, bytes - 1] {
            let cut = &whole[..(at + left) as usize];
            let what = format!("{case}, {left} of {bytes} bytes");
            cut_off(on(cut, OpenFlags::read_only(), show).0, &what);
            // Whichever snapshot they are about: all of them may make the file longer.
            type Verb<'a> = &'a dyn Fn(&mut Image) -> Result<(), Error>;
            let verbs: [(&str, Verb<'_>); 5] = [
                ("goto two", &|i| i.snapshot_goto(b"cut two")),
                ("goto one", &|i| i.snapshot_goto(b"cut one")),
                ("delete one", &|i| i.snapshot_delete(None, Some(b"cut one"))),
                ("create", &|i| {
                    i.snapshot_create(&NewSnapshot::default()).map(drop)
                }),
                ("write", &|i| i.write_snapshots()),
            ];
            for (name, verb) in verbs {
                let verb = |i: &mut Image| {
                    let result = verb(i);
                    assert_eq!(i.last_outcome(), Outcome::Unchanged, "{what}: {name}");
                    result
                };
                let (result, after) = on(cut, OpenFlags::RDWR, verb);
                let text = result.as_ref().unwrap_err().to_string();
                let way_out = text.contains("delete that snapshot too, in the same call");
                assert_eq!(way_out, name == "delete one", "{name}: {text}");
                cut_off(result, &format!("{what}: {name}"));
                assert!(after == cut, "{what}: {name}: bytes have changed");
            }
            // It can be deleted: nothing of it is followed.
            let gone = |i: &mut Image| {
                let result = i.snapshot_delete(None, Some(b"cut two"));
                assert!(i.remark().is_some(), "{what}");
                result
            };
            let (result, after) = on(cut, OpenFlags::RDWR, gone);
            result.unwrap();
            assert_eq!(snapshots(&after), list[..list.len() - 1], "{what}");
            // What is whole can still be read.
            let other = |i: &mut Image| i.snapshot_load_tmp(None, Some(b"cut one"));
            on(cut, OpenFlags::read_only(), other).0.unwrap();
        }
    }
}

#[test]
fn a_snapshot_table_that_is_cut_off_is_an_error_at_open() {
    let file = image("v3-64k");
    let list = snapshots(&file);
    let n = list.len();
    // Longer than what is left of the file in each case.
    let start = word(&file, 64);
    let last = file.windows(7).rposition(|w| w == b"cut two").unwrap() as u64 + 7;
    let (whole, at) = moved(&file, start, last - start, 64);
    assert_eq!(snapshots(&whole), list);
    for left in 0..last - start {
        let cut = &whole[..(at + left) as usize];
        for flags in [OpenFlags::read_only(), OpenFlags::RDWR] {
            let (result, after) = on(cut, flags, |_| Ok(()));
            let text = result.as_ref().unwrap_err().to_string();
            assert!(
                text.contains(&format!("of {n} of the snapshot table")),
                "{text}"
            );
            cut_off(result, &format!("{left} bytes"));
            assert!(after == cut);
        }
    }
    // The same for a list that is read again.
    let storage = MemoryStorage::new(whole.clone());
    let handle = storage.handle();
    let mut i = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    handle.borrow_mut().truncate(at as usize + 10);
    cut_off(i.read_snapshots(), "read again");
    assert_eq!(i.snapshot_list().unwrap(), list);
}

/// Memory some bytes of which cannot be read, as often as `left` says.
struct Bad {
    memory: MemoryStorage,
    bytes: std::ops::Range<u64>,
    left: usize,
}

impl Storage for Bad {
    pass_on!(length write truncate discard barrier close);
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let end = offset + buf.len() as u64;
        if self.left > 0 && offset < self.bytes.end && self.bytes.start < end {
            self.left -= 1;
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        self.memory.read(offset, buf)
    }
}

#[test]
fn what_cannot_be_read_behind_a_snapshot_table_is_not_missed() {
    let mut file = image("v3-4k");
    let long = NewSnapshot {
        name: vec![b'l'; 9000],
        ..NewSnapshot::default()
    };
    let (done, after) = on(&file, OpenFlags::RDWR, |i| i.snapshot_create(&long));
    done.unwrap();
    file = after;
    let list = snapshots(&file);
    let start = word(&file, 64);
    // The table is the last thing in the file; its last entry is by far the longest.
    let end = file.len() as u64;
    let last = end - (9000 + 64 + list.last().unwrap().id.len() as u64);
    file.resize((end as usize + 5000).next_multiple_of(512), 0);
    let read = |bytes: std::ops::Range<u64>, left: usize| {
        let memory = MemoryStorage::new(file.clone());
        let storage = Box::new(Bad {
            memory,
            bytes,
            left,
        });
        let mut image = Image::open_storage(storage, OpenFlags::read_only())?;
        image.snapshot_list().map(<[_]>::to_vec)
    };
    let sector = |n: u64| n.next_multiple_of(512)..n.next_multiple_of(512) + 512;
    // Behind it, to the sector.
    for bad in [sector(end), sector(end + 1000), sector(end + 4000)] {
        assert!(read(bad, usize::MAX).unwrap() == list);
    }
    // In it: in the first entry, at the begin of the last, in its fixed part, in its middle, at its end.
    for at in [start, last, last + 40, last + 4096, last + 8000, end - 1] {
        let e = read(at..at + 1, usize::MAX).err().unwrap();
        assert_eq!(e.errno(), libc::EIO, "{at:#x}: {e}");
        assert!(e.to_string().contains("read the snapshot table"), "{e}");
    }
    // The same behind a table that takes more than one request.
    let mut many = image("v3-4k");
    for n in 0..20 {
        let long = NewSnapshot {
            name: vec![b'a' + n; 60_000],
            ..NewSnapshot::default()
        };
        let (done, after) = on(&many, OpenFlags::RDWR, |i| i.snapshot_create(&long));
        done.unwrap();
        many = after;
    }
    let (names, behind) = (word(&many, 64) + 20 * 60_000, many.len() as u64);
    assert!((names..names + 10_000).contains(&behind));
    many.resize(many.len().next_multiple_of(512) + 4096, 0);
    let memory = MemoryStorage::new(many.clone());
    let storage = Box::new(Bad {
        memory,
        bytes: sector(behind),
        left: usize::MAX,
    });
    let mut image = Image::open_storage(storage, OpenFlags::read_only()).unwrap();
    assert!(image.snapshot_list().unwrap() == snapshots(&many));

    // What fails once is no place of which it is known that nothing of the table is there.
    let e = read(sector(end), 1).err().unwrap();
    assert_eq!(e.errno(), libc::EIO, "{e}");
}

#[test]
fn a_long_entry_that_is_cut_off_is_an_error() {
    let file = image("v3-4k");
    let long = NewSnapshot {
        name: vec![b'l'; 60_000],
        ..NewSnapshot::default()
    };
    let (done, behind) = on(&file, OpenFlags::RDWR, |i| i.snapshot_create(&long));
    done.unwrap();
    // The only one: nothing has been read before it.
    let ids: Vec<Vec<u8>> = snapshots(&file).into_iter().map(|s| s.id).collect();
    let (done, alone) = on(&file, OpenFlags::RDWR, |i| {
        let ids: Vec<&[u8]> = ids.iter().map(|id| &id[..]).collect();
        i.snapshot_delete_many(&ids)?;
        i.write_snapshots()?;
        i.snapshot_create(&long)
    });
    done.unwrap();
    for whole in [behind, alone] {
        let table = word(&whole, 64) as usize;
        let name = whole.windows(9).rposition(|w| w == b"lllllllll").unwrap() + 9;
        assert!(name > table + 60_000);
        for left in [60_000 - 100, 50_000, 10_000, 5000, 4096, 4000, 1] {
            let cut = &whole[..name - 60_000 + left];
            let read = |i: &mut Image| i.snapshot_list().map(<[_]>::to_vec);
            let what = format!("{left} bytes");
            cut_off(on(cut, OpenFlags::read_only(), read).0, &what);
        }
    }
}
