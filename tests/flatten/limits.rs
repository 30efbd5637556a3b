//! What is refused before anything is written, and what changes beside: narrow counts, short L1 tables, files
//! behind that change their length, autoclear bits, bitmaps, a refcount table that grows.

use super::overlays::{self, io, scratch, tool, Overlay};
use super::{flattened, states, toolbox};
use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::Storage;
use qcow2_snapshot::{Image, OpenFlags, Outcome};
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

/// 512-byte clusters of a file full of bytes.
pub fn overlay(options: &str, base: u64, size: u64) -> Overlay {
    let dir = scratch();
    let d = dir.path();
    std::fs::write(d.join("base"), vec![9; base as usize]).unwrap();
    let size = size.to_string();
    let args = [
        "create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw", "o.qcow2", &size,
    ];
    tool(d, "qemu-img", &args);
    let story = format!("{options}, {size} over {base}\n");
    Overlay { dir, story }
}

pub fn snapshot(o: &Overlay, name: &str) {
    let args = ["snapshot", "-c", name, "o.qcow2"];
    tool(o.dir.path(), "qemu-img", &args);
}

fn patch(o: &Overlay, at: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(o.path()).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn open(o: &Overlay) -> Image {
    Image::open(&o.path(), OpenFlags::RDWR).unwrap()
}

/// Estimate (if it looks at this) and flatten fail so, and the file is as it was.
fn refused(o: &Overlay, errno: i32, estimate: bool) {
    let before = std::fs::read(o.path()).unwrap();
    let mut image = open(o);
    if estimate {
        let e = image.flatten_estimate().unwrap_err();
        assert_eq!(e.errno(), errno, "{e}\n{}", o.story);
    }
    let e = image.flatten().unwrap_err();
    assert_eq!(e.errno(), errno, "{e}\n{}", o.story);
    assert_eq!(image.last_outcome(), Outcome::Unchanged);
    image.close().unwrap();
    assert!(std::fs::read(o.path()).unwrap() == before, "{}", o.story);
}

/// The most states that lack one guest cluster and would have the same bytes there.
fn most_alike(o: &Overlay) -> usize {
    let mut image = Image::open(&o.path(), OpenFlags::read_only()).unwrap();
    let size = image.geometry().cluster_len();
    let ids = image.snapshot_list().unwrap().iter();
    let ids: Vec<Vec<u8>> = ids.map(|s| s.id.clone()).collect();
    let mut lacking = std::collections::HashMap::new();
    for n in 0..=ids.len() {
        if let Some(id) = n.checked_sub(1) {
            image.snapshot_load_tmp(Some(&ids[id]), None).unwrap();
        }
        for at in (0..image.length()).step_by(size) {
            let status = image.block_status(at, size as u64).unwrap();
            let mut bytes = vec![0; size.min((image.length() - at) as usize)];
            image.read(at, &mut bytes).unwrap();
            let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |n| n + 1);
            bytes.truncate(used);
            if status.depth > 0 && used > 0 {
                *lacking.entry((at, bytes)).or_insert(0) += 1;
            }
        }
    }
    lacking.into_values().max().unwrap_or(0)
}

#[test]
fn counts_that_would_not_fit_are_an_error_before_anything_is_written() {
    if !toolbox() {
        return;
    }
    let (mut fits, mut overflows) = ([0, 0], [0, 0]);
    for seed in 1..=60 {
        let o = overlays::narrow(seed);
        let bits = 1 + seed % 2;
        if most_alike(&o) < 1 << bits {
            flattened(&o);
            fits[bits as usize - 1] += 1;
            continue;
        }
        overflows[bits as usize - 1] += 1;
        let before = states(&o.path());
        refused(&o, libc::EINVAL, false);
        assert!(states(&o.path()) == before);
    }
    // What would fit, and behind zeros what would not: nothing of the first is written either.
    for bits in [1, 2] {
        let o = overlay(
            &format!("cluster_size=512,refcount_bits={bits}"),
            48 << 10,
            48 << 10,
        );
        let base = o.dir.path().join("base");
        let mut bytes = std::fs::read(&base).unwrap();
        bytes[16 << 10..32 << 10].fill(0);
        std::fs::write(&base, bytes).unwrap();
        for n in 1..1 << bits {
            snapshot(&o, &format!("s{n}"));
        }
        io(o.dir.path(), "o.qcow2", &["write -P 1 0 16k".into()]);
        refused(&o, libc::EINVAL, false);
        io(o.dir.path(), "o.qcow2", &["write -P 1 32k 16k".into()]);
        assert!(flattened(&o) > 0);
    }
    println!("{fits:?} of 1 and 2 bits flattened, {overflows:?} refused");
    assert!(fits.iter().chain(&overflows).all(|n| *n > 3));
}

#[test]
fn a_snapshot_whose_l1_table_is_shorter_than_its_disk_is_refused() {
    if !toolbox() {
        return;
    }
    // An L2 table of 64 entries maps 32 KiB.
    let o = overlay("cluster_size=512", 100 << 10, 100 << 10);
    io(o.dir.path(), "o.qcow2", &["write -P 1 40k 1k".into()]);
    snapshot(&o, "a");
    let image = std::fs::read(o.path()).unwrap();
    let entry = u64::from_be_bytes(image[64..72].try_into().unwrap());
    let l1_size = |n: u32| patch(&o, entry + 8, &n.to_be_bytes());
    for n in [3, 1, 0] {
        l1_size(n);
        refused(&o, libc::ENOTSUP, true);
    }
    // A longer disk than the table maps is the same.
    l1_size(4);
    patch(&o, entry + 48, &(129u64 << 10).to_be_bytes());
    refused(&o, libc::ENOTSUP, true);
    patch(&o, entry + 48, &(128u64 << 10).to_be_bytes());
    assert!(flattened(&o) > 0);
}

#[test]
fn files_behind_may_change_their_length_before_but_not_meanwhile() {
    if !toolbox() {
        return;
    }
    let full = |o: &Overlay, bytes: usize| {
        std::fs::write(o.dir.path().join("base"), vec![7; bytes]).unwrap();
    };
    for (first, then) in [
        (40usize << 10, 90usize << 10),
        (90 << 10, 33 << 10),
        (0, 200 << 10),
    ] {
        let o = overlay("cluster_size=512", first as u64, 100 << 10);
        io(o.dir.path(), "o.qcow2", &["write -P 1 8k 20k".into()]);
        snapshot(&o, "a");
        io(o.dir.path(), "o.qcow2", &["write -P 2 20k 1k".into()]);
        // Between the estimate and the call, on one handle.
        let mut image = open(&o);
        image.flatten_estimate().unwrap();
        full(&o, then);
        let shown = states(&o.path());
        assert!(shown[0].1[8 << 10..][..1 << 10] == [1; 1 << 10]);
        image.flatten().unwrap();
        image.close().unwrap();
        o.without_bases();
        assert!(states(&o.path()) == shown, "{first} {then}");
        tool(o.dir.path(), "qemu-img", &["check", "-q", "o.qcow2"]);
        // Between an estimate by one handle and the call by another, qemu-img reading too.
        let o = overlay("cluster_size=512", first as u64, 100 << 10);
        snapshot(&o, "a");
        open(&o).flatten_estimate().unwrap();
        full(&o, then);
        assert!(flattened(&o) > 0);
    }
    // Meanwhile: what was copied may be what the file no longer shows.
    for then in [50usize << 10, 200 << 10] {
        let o = overlay("cluster_size=512", 90 << 10, 100 << 10);
        snapshot(&o, "a");
        let base = o.dir.path().join("base");
        let mut image = open(&o);
        image.set_progress(Some(Box::new(move |_, done, _| {
            let file = std::fs::File::options().write(true).open(&base).unwrap();
            if done > 40 << 10 {
                file.set_len(then as u64).unwrap();
            }
            ControlFlow::Continue(())
        })));
        let e = image.flatten_in(16 << 10).unwrap_err();
        assert_eq!(e.errno(), libc::EINVAL, "{e}");
        assert_eq!(image.last_outcome(), Outcome::Unchanged);
        image.set_progress(None);
        image.close().unwrap();
        let info = tool(o.dir.path(), "qemu-img", &["info", "o.qcow2"]);
        assert!(info.contains("backing file: base"), "{info}");
        assert!(flattened(&o) > 0 || then < 90 << 10);
    }
}

#[test]
fn autoclear_bits_that_nobody_knows_go_and_bitmaps_stay() {
    if !toolbox() {
        return;
    }
    let o = overlay("cluster_size=4k", 100 << 10, 100 << 10);
    let d = o.dir.path();
    snapshot(&o, "a");
    tool(d, "qemu-img", &["bitmap", "--add", "o.qcow2", "b"]);
    io(d, "o.qcow2", &["write -P 1 8k 20k".into()]);
    let bits = |o: &Overlay| {
        let image = std::fs::read(o.path()).unwrap();
        u64::from_be_bytes(image[88..96].try_into().unwrap())
    };
    assert_eq!(bits(&o), 1, "bitmaps are consistent");
    patch(&o, 88, &(1u64 << 40 | 1).to_be_bytes());
    let bitmap = |o: &Overlay| {
        let info = tool(o.dir.path(), "qemu-img", &["info", "o.qcow2"]);
        let at = info.find("bitmaps:").expect("a bitmap");
        info[at..].lines().take(6).collect::<Vec<_>>().join("\n")
    };
    assert!(flattened(&o) > 0);
    assert_eq!(bits(&o), 1);
    let found = bitmap(&o);
    assert!(
        found.contains("name: b") && !found.contains("in-use"),
        "{found}"
    );
}

#[test]
fn the_refcount_table_grows_on_the_way() {
    if !toolbox() {
        return;
    }
    // A block of 64-bit counts covers 32 KiB, a cluster of the table 64 blocks: 2 MiB.
    let o = overlay("cluster_size=512,refcount_bits=64", 5 << 20, 5 << 20);
    snapshot(&o, "a");
    io(o.dir.path(), "o.qcow2", &["write -P 1 1M 512".into()]);
    let clusters = |o: &Overlay| {
        let image = std::fs::read(o.path()).unwrap();
        u32::from_be_bytes(image[56..60].try_into().unwrap())
    };
    let before = clusters(&o);
    assert!(flattened(&o) >= 5 << 20);
    assert!(clusters(&o) > before.max(2), "{before} {}", clusters(&o));
}

/// A file that notes what is written to it, and what it is told that will be flushed.
struct Noted {
    memory: MemoryStorage,
    notes: Rc<RefCell<Vec<&'static str>>>,
}

impl Storage for Noted {
    pass_on!(length read truncate discard barrier close);
    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.notes.borrow_mut().push(label);
        self.memory.write(label, offset, data)
    }
    fn open_named(&mut self, _: &[u8], _: &[u8]) -> Option<std::io::Result<Box<dyn Storage>>> {
        Some(Ok(Box::new(MemoryStorage::new(vec![9; 1 << 20]))))
    }
    fn will_flush(&mut self, _: u64, _: u64) {
        self.notes.borrow_mut().push("will flush");
    }
}

/// Data is written as it is read, and need not be held; but nothing is written while bits are set that nobody knows.
#[test]
fn data_goes_out_at_once_but_never_before_unknown_autoclear_bits() {
    if !toolbox() {
        return;
    }
    for (version, autoclear) in [(3, 0u64), (3, 1), (3, 1 << 40), (3, 1 << 40 | 1), (2, 0)] {
        let compat = ["0.10", "1.1"][version - 2];
        let o = overlay(&format!("compat={compat}"), 1 << 20, 1 << 20);
        io(o.dir.path(), "o.qcow2", &["write -P 1 64k 64k".into()]);
        if version == 3 {
            patch(&o, 88, &autoclear.to_be_bytes());
        }
        let notes = Rc::new(RefCell::new(vec![]));
        let storage = Noted {
            memory: MemoryStorage::new(std::fs::read(o.path()).unwrap()),
            notes: Rc::clone(&notes),
        };
        let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
        let disk = |image: &mut Image| {
            let mut bytes = vec![0; 1 << 20];
            image.read(0, &mut bytes).unwrap();
            bytes
        };
        let was = disk(&mut image);
        assert!(was[..1 << 16] == [9; 1 << 16] && was[1 << 16..1 << 17] == [1; 1 << 16]);
        image.flatten().unwrap();
        // The same handle knows what is in the tables now.
        assert!(disk(&mut image) == was);
        let notes = notes.borrow();
        let first = |label| notes.iter().position(|l| *l == label);
        let data = first("guest data").unwrap();
        let unknown = autoclear & !1 != 0;
        assert_eq!(
            first("will flush"),
            (!unknown).then_some(data + 1),
            "{notes:?}"
        );
        assert_eq!(data == 0, !unknown, "{notes:?}");
    }
}
