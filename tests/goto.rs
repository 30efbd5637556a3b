//! What a goto leaves: the file's length, and the sizes in the list.
#![allow(clippy::unwrap_used)]

#[macro_use]
#[path = "reference/pass_on.rs"]
mod pass_on;

#[path = "goto/craft.rs"]
mod craft;

use craft::{empty, put};
use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::trace::{Event, TraceStorage};
use qcow2_snapshot::io::Storage;
use qcow2_snapshot::{Image, NewSnapshot, OpenFlags, Stage};
use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;
use std::rc::Rc;

const CLUSTER: usize = 4096;
const SECTOR: usize = 512;

/// Memory as a file that is told in whole sectors, as QEMU tells it, on a full disk, or as a block device.
struct Shaped {
    memory: MemoryStorage,
    shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    File,
    InSectors,
    /// It has no room for more bytes than these.
    Full(u64),
    Device,
}

impl Shaped {
    fn room_for(&mut self, end: u64) -> std::io::Result<()> {
        match self.shape {
            Shape::Full(most) if end > most => Err(std::io::Error::from_raw_os_error(libc::ENOSPC)),
            Shape::Device => {
                assert!(end <= self.memory.length()?);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Storage for Shaped {
    pass_on!(read discard barrier close);
    fn length(&mut self) -> std::io::Result<u64> {
        let length = self.memory.length()?;
        Ok(match self.shape {
            Shape::InSectors => length.next_multiple_of(SECTOR as u64),
            _ => length,
        })
    }
    fn length_in_sectors(&self) -> bool {
        self.shape == Shape::InSectors
    }
    fn fixed_length(&self) -> bool {
        self.shape == Shape::Device
    }
    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> std::io::Result<()> {
        let room = self.room_for(offset + data.len() as u64);
        if let (Err(_), Shape::Full(most)) = (&room, self.shape) {
            // What fits is written.
            let fits = most.saturating_sub(offset).min(data.len() as u64) as usize;
            self.memory.write(label, offset, &data[..fits])?;
        }
        room?;
        self.memory.write(label, offset, data)
    }
    fn truncate(&mut self, length: u64) -> std::io::Result<()> {
        self.room_for(length)?;
        self.memory.truncate(length)
    }
}

/// What is in the file after `verb`.
fn after(bytes: Vec<u8>, shape: Shape, verb: impl FnOnce(&mut Image)) -> Vec<u8> {
    let memory = MemoryStorage::new(bytes);
    let contents: Rc<RefCell<Vec<u8>>> = memory.handle();
    let storage = Box::new(Shaped { memory, shape });
    let mut image = Image::open_storage(storage, OpenFlags::RDWR).unwrap();
    verb(&mut image);
    image.close().unwrap();
    contents.take()
}

/// An image of 256 MiB in clusters of 4 KiB: the L1 table has two sectors. Its snapshot "empty" has nothing; the disk
/// now has a cluster by way of either sector. The file ends in the snapshot table, `last` bytes after the begin of
/// a cluster.
fn ends_in_the_snapshot_table(last: usize) -> Vec<u8> {
    let image = empty(12, 256 << 20, 4, 3);
    let named = |name: &[u8]| NewSnapshot {
        name: name.into(),
        ..NewSnapshot::default()
    };
    let mut image = after(image, Shape::File, |i| {
        i.snapshot_create(&named(b"empty")).unwrap();
    });
    image.resize(image.len().next_multiple_of(CLUSTER), 0);
    for l1_entry in [0, 127] {
        let at = image.len();
        put(&mut image, 3 * CLUSTER + l1_entry * 8, 1 << 63 | at as u64);
        image.resize(at + 2 * CLUSTER, 0x5a);
        image[at..at + CLUSTER].fill(0);
        put(&mut image, at, 1 << 63 | (at + CLUSTER) as u64);
    }
    for n in 0..image.len() / CLUSTER {
        // The first snapshot table has the last cluster of the first image.
        image[2 * CLUSTER + 2 * n + 1] = 1;
    }
    (1..CLUSTER)
        .map(|length| {
            after(image.clone(), Shape::File, |i| {
                i.snapshot_create(&named(&vec![b'n'; length])).unwrap();
            })
        })
        .find(|made| made.len() % CLUSTER == last)
        .unwrap()
}

/// `image`, a snapshot of which is there, with another snapshot table: copies of that one, each with a name, a disk
/// size and so many bytes of extra data.
fn listed(mut image: Vec<u8>, entries: &[(u8, u64, u32)]) -> Vec<u8> {
    let at = u64::from_be_bytes(image[64..72].try_into().unwrap()) as usize;
    let l1: [u8; 12] = image[at..at + 12].try_into().unwrap();
    let mut table = vec![];
    for (name, size, extra) in entries {
        table.extend(l1);
        // ID and name of one byte; date, clock, VM state.
        table.extend([0, 1, 0, 1]);
        table.extend([0; 20]);
        table.extend(extra.to_be_bytes());
        table.extend(
            [0; 8]
                .iter()
                .chain(&size.to_be_bytes())
                .take(*extra as usize),
        );
        table.extend([*name; 2]);
        table.resize(table.len().next_multiple_of(8), 0);
    }
    assert!(table.len() <= CLUSTER && at + CLUSTER <= image.len().next_multiple_of(CLUSTER));
    image.resize(image.len().max(at + table.len()), 0);
    image[at..at + table.len()].copy_from_slice(&table);
    image[60..64].copy_from_slice(&(entries.len() as u32).to_be_bytes());
    image
}

#[test]
fn snapshots_that_store_no_disk_size_follow_the_disk() {
    let image = ends_in_the_snapshot_table(1000);
    let sizes = [(b'a', 128 << 20, 16), (b'b', 64 << 20, 16), (b'c', 0, 0)];
    let mut bytes = listed(image, &sizes);
    // They share an L1 table, which no image of QEMU's has: each is given its own.
    let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    let l1 = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let length = bytes.len().next_multiple_of(CLUSTER);
    bytes.resize(length + 2 * CLUSTER, 0);
    for (n, entry) in [at + 56 + 8, at + 2 * (56 + 8)].into_iter().enumerate() {
        let own = length + n * CLUSTER;
        bytes.copy_within(l1..l1 + 1024, own);
        put(&mut bytes, entry, own as u64);
        bytes[2 * CLUSTER + 2 * (own / CLUSTER) + 1] = 1;
    }
    let sizes = |i: &mut Image| {
        let list = i.snapshot_list().unwrap();
        list.iter().map(|s| s.disk_size >> 20).collect::<Vec<_>>()
    };
    for (verb, wanted) in [(b"b", [128, 64, 64]), (b"a", [128, 64, 128])] {
        let most = Rc::new(Cell::new(0));
        let now = after(bytes.clone(), Shape::File, |i| {
            assert_eq!(sizes(i), [128, 64, 256]);
            let told = Rc::clone(&most);
            i.set_progress(Some(Box::new(move |stage, _, total| {
                told.set(
                    told.get()
                        .max(if stage == Stage::Check { total } else { 0 }),
                );
                ControlFlow::Continue(())
            })));
            i.snapshot_goto(verb).unwrap();
            assert_eq!(sizes(i), wanted);
        });
        // 2 MiB of the disk for each L2 table that is cut off, and a few more that are looked at.
        let cut = (256 - wanted[2]) / 2 * CLUSTER as u64;
        assert!(
            (cut..cut + 10 * CLUSTER as u64).contains(&most.get()),
            "{most:?}"
        );
        after(now, Shape::File, |i| assert_eq!(sizes(i), wanted));
    }
}

#[test]
fn tables_side_by_side_do_not_overlap() {
    let clusters_of_512 = |n: u64| n * 512;
    let mut image = empty(9, 2 << 20, 7, 4);
    for (n, name, at) in [(0, b'a', 5), (1, b'b', 3)] {
        let entry = 6 * 512 + n * 64;
        put(&mut image, entry, clusters_of_512(at));
        image[entry + 8..entry + 16].copy_from_slice(&[0, 0, 0, 64, 0, 1, 0, 1]);
        image[entry + 36..entry + 40].copy_from_slice(&16u32.to_be_bytes());
        put(&mut image, entry + 48, 2 << 20);
        image[entry + 56..entry + 58].copy_from_slice(&[name; 2]);
    }
    image[60..64].copy_from_slice(&2u32.to_be_bytes());
    put(&mut image, 64, clusters_of_512(6));
    for name in [b"a", b"b"] {
        after(image.clone(), Shape::File, |i| {
            i.snapshot_goto(name).unwrap()
        });
        after(image.clone(), Shape::File, |i| {
            i.snapshot_delete(Some(name), None).unwrap();
            assert!(i.remark().is_none());
        });
    }
}

#[test]
fn a_goto_leaves_a_file_as_long_as_it_was_but_for_zeros_that_make_its_last_sector_whole() {
    let sparse = [0; 3 * SECTOR];
    for (last, behind, in_sectors, kept) in [
        // The file ends in the table: what was told is up to 511 bytes more.
        (1000, &[][..], true, 0),
        (1000, &[], false, 0),
        // It may as well be whole sectors long, as a file that tells its bytes says.
        (1000, &sparse[..24], true, 0),
        (1000, &sparse[..24], false, 24),
        (
            1000,
            b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01",
            true,
            24,
        ),
        (
            1000,
            b"\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            true,
            24,
        ),
        // No rounding adds a whole sector, or makes clusters whole.
        (1000, &sparse[..24 + SECTOR], true, 24 + SECTOR),
        (1024, &sparse[..SECTOR], true, SECTOR),
        (1024, &sparse[..0], true, 0),
        (4000, &sparse[..96], true, 96),
    ] {
        let mut bytes = ends_in_the_snapshot_table(last);
        let end = bytes.len();
        bytes.extend(behind);
        let shape = if in_sectors {
            Shape::InSectors
        } else {
            Shape::File
        };
        let got = after(bytes.clone(), shape, |i| {
            i.snapshot_goto(b"empty").unwrap();
            assert!(i.remark().is_none(), "the table was written in place");
        });
        let case = format!(
            "{last} and {} bytes, in sectors: {in_sectors}",
            behind.len()
        );
        assert_eq!(got.len(), end + kept, "{case}");
        assert!(got[end..] == behind[..kept], "{case}");
    }
}

#[test]
fn a_full_disk_costs_atomicity_only_where_the_file_has_no_free_cluster_either() {
    let mut full = ends_in_the_snapshot_table(1000);
    // Where the first snapshot table was.
    for n in 0..full.len().div_ceil(CLUSTER) {
        full[2 * CLUSTER + 2 * n + 1] = full[2 * CLUSTER + 2 * n + 1].max(1);
    }
    let whole = |mut bytes: Vec<u8>| {
        bytes.resize(bytes.len().next_multiple_of(CLUSTER), 0);
        bytes
    };
    // One more cluster, which is free, or in use.
    let mut spare = whole(full.clone());
    spare.resize(spare.len() + CLUSTER, 0);
    let mut used = spare.clone();
    used[2 * CLUSTER + 2 * (spare.len() / CLUSTER - 1) + 1] = 1;
    // A free one in the middle.
    let mut middle = used.clone();
    middle.resize(middle.len() + CLUSTER, 0);
    middle[2 * CLUSTER + 2 * (used.len() / CLUSTER - 1) + 1] = 0;
    middle[2 * CLUSTER + 2 * (used.len() / CLUSTER) + 1] = 1;
    let mut wanted = None;
    for (bytes, atomic) in [
        (whole(full), false),
        (spare, true),
        (used, false),
        (middle, true),
    ] {
        let length = bytes.len() as u64;
        for (shape, atomic) in [
            (Shape::File, true),
            (Shape::Full(length), atomic),
            // The table has 128 entries.
            (Shape::Full(length + 1023), atomic),
            (Shape::Full(length + 1024), true),
            (Shape::Device, atomic),
        ] {
            let got = after(bytes.clone(), shape, |i| {
                i.snapshot_goto(b"empty").unwrap();
                assert_eq!(i.remark().is_none(), atomic, "{shape:?} of {length}");
            });
            assert_eq!(got.len(), bytes.len());
            // The header and the active L1 table.
            let wanted = wanted.get_or_insert(got[..CLUSTER].to_vec());
            assert!(got[..CLUSTER] == wanted[..]);
            assert!(got[3 * CLUSTER..4 * CLUSTER].iter().all(|b| *b == 0));
        }
    }
}

/// A temporary L1 table of two clusters has both of them while the header names it.
#[test]
fn every_cluster_of_a_table_that_the_header_names_is_counted() {
    let named = NewSnapshot {
        name: b"empty".into(),
        ..NewSnapshot::default()
    };
    let image = empty(9, 4 << 20, 5, 3);
    let mut image = after(image, Shape::File, |i| {
        drop(i.snapshot_create(&named).unwrap())
    });
    image.resize(image.len().next_multiple_of(512), 0);
    let l1 = 3 * 512;
    for entry in [0, 127] {
        let at = image.len();
        put(&mut image, l1 + entry * 8, 1 << 63 | at as u64);
        image.resize(at + 512, 0);
        image[2 * 512 + 2 * (at / 512) + 1] = 1;
    }
    let storage = TraceStorage::new(image.clone());
    let trace = storage.trace();
    let mut handle = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    handle.snapshot_goto(b"empty").unwrap();
    assert!(handle.remark().is_none());
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let mut elsewhere = 0;
    for event in trace.events() {
        match event {
            Event::Write { offset, data, .. } => {
                let (at, end) = (offset as usize, offset as usize + data.len());
                image.resize(image.len().max(end), 0);
                image[at..end].copy_from_slice(&data);
            }
            Event::Truncate { length } => image.resize(length as usize, 0),
            Event::Discard { offset, bytes } => {
                let end = ((offset + bytes) as usize).min(image.len());
                image[offset as usize..end].fill(0);
            }
            _ => {}
        }
        let table = word(&image, 40) as usize / 512;
        elsewhere += usize::from(table != 3);
        for cluster in [table, table + 1] {
            assert_ne!(image[2 * 512 + 2 * cluster + 1], 0, "cluster {cluster}");
        }
    }
    assert!(elsewhere > 0);
}
