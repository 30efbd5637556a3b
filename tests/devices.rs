//! Images on block devices: their length stays, and what would be behind it is found first.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "devices/loop_device.rs"]
mod loop_device;

use loop_device::{have, have_devices, LoopDevice};
use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::Storage;
use qcow2_snapshot::{Error, Image, NewSnapshot, OpenFlags, Outcome, Result, Snapshot};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

fn run(program: &str, args: &[&str]) -> std::result::Result<String, String> {
    let out = Command::new(program).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match out.status.success() {
        true => Ok(text(&out.stdout)),
        false => Err(text(&out.stderr)),
    }
}

fn must(program: &str, args: &[&str]) -> String {
    run(program, args).unwrap_or_else(|e| panic!("{program} {args:?}: {e}"))
}

/// An image made by qemu-img, with two snapshots of different contents and data on top of them.
fn image(options: &str, size: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    must(
        "qemu-img",
        &["create", "-qf", "qcow2", "-o", options, name, size],
    );
    write(name, "0x11", "0");
    must("qemu-img", &["snapshot", "-c", "one", name]);
    write(name, "0x22", "128k");
    must("qemu-img", &["snapshot", "-c", "two", name]);
    write(name, "0x33", "256k");
    std::fs::read(&path).unwrap()
}

/// A reference image of the C tests.
fn reference(case: &str) -> Vec<u8> {
    use std::io::Read;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("c-tests/images");
    let packed = std::fs::read(root.join(case).join("before.qcow2.gz")).unwrap();
    let mut bytes = Vec::new();
    let mut unpack = flate2::read::GzDecoder::new(&packed[..]);
    unpack.read_to_end(&mut bytes).unwrap();
    bytes
}

fn write(name: &str, pattern: &str, at: &str) {
    let command = format!("write -P {pattern} {at} 300k");
    must("qemu-io", &["-f", "qcow2", "-c", &command, name]);
}

fn list(path: &Path) -> Vec<Snapshot> {
    let mut image = Image::open(path, OpenFlags::read_only()).unwrap();
    let list = image.snapshot_list().unwrap().to_vec();
    image.close().unwrap();
    list
}

/// What QEMU wrote down of its last snapshot.
fn as_qemu_made(path: &Path) -> NewSnapshot {
    let s = list(path).pop().unwrap();
    NewSnapshot {
        name: s.name,
        date_sec: s.date_sec,
        date_nsec: s.date_nsec,
        icount: s.icount,
        ..NewSnapshot::default()
    }
}

fn word(bytes: &[u8], at: u64, n: usize) -> u64 {
    let at = at as usize;
    bytes[at..at + n]
        .iter()
        .fold(0, |v, b| v << 8 | u64::from(*b))
}

/// The clusters with a count above 0, as far as the bytes go.
fn counted(bytes: &[u8]) -> BTreeMap<u64, &[u8]> {
    let cluster = 1u64 << word(bytes, 20, 4);
    let bits = match word(bytes, 4, 4) {
        2 => 16,
        _ => 1 << word(bytes, 96, 4),
    };
    let (table, clusters) = (word(bytes, 48, 8), word(bytes, 56, 4));
    let mut all = BTreeMap::new();
    for index in 0..clusters * cluster / 8 {
        let block = word(bytes, table + index * 8, 8);
        for i in 0..(cluster * 8 / bits) * u64::from(block != 0) {
            let n = index * (cluster * 8 / bits) + i;
            let start = (n * cluster).min(bytes.len() as u64) as usize;
            let end = (start + cluster as usize).min(bytes.len());
            let bit = block * 8 + i * bits;
            let count = match bits {
                8.. => word(bytes, bit / 8, bits as usize / 8),
                _ => word(bytes, bit / 8, 1) >> (bit % 8) & ((1 << bits) - 1),
            };
            if count != 0 {
                all.insert(n, &bytes[start..end]);
            }
        }
    }
    assert!(all.len() > 5, "{} clusters", all.len());
    all
}

fn assert_same(theirs: &[u8], ours: &[u8], what: &str) {
    assert_eq!(theirs.len(), ours.len(), "{what}");
    let (theirs, ours) = (counted(theirs), counted(ours));
    assert!(
        theirs.keys().eq(ours.keys()),
        "{what}: other clusters are counted"
    );
    for (n, bytes) in &theirs {
        assert!(ours[n] == *bytes, "{what}: cluster {n:#x} differs");
    }
}

enum Verb {
    Create(&'static str),
    Goto(&'static str),
    Delete(&'static str),
    Resize(&'static str),
    Write(&'static str, &'static str),
}
use Verb::{Create, Delete, Goto, Resize, Write};

impl Verb {
    fn by_qemu(&self, name: &str) -> std::result::Result<String, String> {
        match self {
            Create(tag) => run("qemu-img", &["snapshot", "-c", tag, name]),
            Goto(tag) => run("qemu-img", &["snapshot", "-a", tag, name]),
            Delete(tag) => run("qemu-img", &["snapshot", "-d", tag, name]),
            Resize(size) => run(
                "qemu-img",
                &["resize", "-q", "-f", "qcow2", "--shrink", name, size],
            ),
            Write(pattern, at) => {
                write(name, pattern, at);
                Ok(String::new())
            }
        }
    }

    /// `model`: where QEMU has done the same.
    fn by_us(&self, image: &mut Image, model: &Path) -> Result<()> {
        match self {
            Create(_) => image.snapshot_create(&as_qemu_made(model)).map(|_| ()),
            Goto(tag) => image.snapshot_goto(tag.as_bytes()),
            Delete(tag) => image.snapshot_delete(None, Some(tag.as_bytes())),
            Resize(_) | Write(..) => unreachable!("QEMU's"),
        }
    }

    fn is_ours(&self) -> bool {
        !matches!(self, Resize(_) | Write(..))
    }
}

/// Two devices: QEMU on the one, we on the other.
#[test]
fn every_counted_cluster_equals_qemus_after_each_verb() {
    let what = "the bytes of an image on a block device";
    if !have("qemu-img", what) || !have("qemu-io", what) || !have_devices(what) {
        return;
    }
    let discards = LoopDevice::new(&[], 1 << 16).discards();
    if !discards {
        println!("SKIPPED: loop devices do not discard here: that freed clusters are discarded was not tested");
    }
    for options in [
        "cluster_size=64k",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=4k,refcount_bits=4",
        "cluster_size=512",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=4k,compat=0.10",
    ] {
        // A length that is no multiple of a cluster.
        let (start, length) = (image(options, "6M"), (12 << 20) + 512);
        let (theirs, ours) = (
            LoopDevice::new(&start, length),
            LoopDevice::new(&start, length),
        );
        let mut verbs = vec![
            Create("three"),
            Goto("one"),
            Write("0x44", "64k"),
            Create("four"),
            Delete("two"),
            Goto("three"),
            Delete("one"),
            Write("0x55", "1M"),
            Goto("four"),
        ];
        if !options.contains("0.10") {
            verbs.extend([
                Resize("9M"),
                Write("0x66", "8M"),
                Create("large"),
                Goto("three"),
                Create("five"),
                Goto("large"),
                Delete("large"),
                Goto("five"),
            ]);
        }
        for (i, verb) in verbs.iter().enumerate() {
            let step = format!("{options}, step {i}");
            verb.by_qemu(theirs.name())
                .unwrap_or_else(|e| panic!("{step}: {e}"));
            if verb.is_ours() {
                let mut image = match i % 2 {
                    0 => Image::open(&ours.path, OpenFlags::RDWR).unwrap(),
                    _ => {
                        let file = std::fs::File::options()
                            .read(true)
                            .write(true)
                            .open(&ours.path);
                        Image::open_fd(file.unwrap().as_raw_fd(), OpenFlags::RDWR).unwrap()
                    }
                };
                let done = verb.by_us(&mut image, &theirs.path);
                done.unwrap_or_else(|e| panic!("{step}: {e}"));
                image.close().unwrap();
            } else {
                verb.by_qemu(ours.name()).unwrap();
            }
            let (a, b) = (theirs.bytes(), ours.bytes());
            assert_same(&a, &b, &step);
            // What was discarded reads as zeros on these.
            assert!(a == b || !discards, "{step}: other clusters differ");
            assert_eq!(list(&theirs.path), list(&ours.path), "{step}");
        }
        must("qemu-img", &["check", "-q", ours.name()]);
    }
}

/// Tables that grow and shrink, at places that depend on where the image ends.
#[test]
fn reference_images_on_devices_come_out_as_qemus() {
    let what = "reference images on block devices";
    if !have("qemu-img", what) || !have_devices(what) {
        return;
    }
    for case in [
        "l1-growth-goto-512",
        "l1-growth-shrink",
        "l1-growth-shrink-data",
        "l1-growth-shrink-table",
        "refblock-growth-1",
        "refblock-growth-delete",
        "reftable-growth-1",
        "reftable-growth-goto",
        "resize-4k",
        "resize-512",
        "resize-odd",
        "resize-shrink-reftable",
        "resize-slices",
        "vm-state-512",
    ] {
        let start = reference(case);
        let length = (start.len() as u64).next_multiple_of(512) + (256 << 10) + 512;
        let new = || LoopDevice::new(&start, length);
        let ids: Vec<String> = list(&new().path)
            .into_iter()
            .map(|s| String::from_utf8(s.id).unwrap())
            .collect();
        for verb in ["-c", "-a", "-d"] {
            for id in ids.iter().take(if verb == "-c" { 1 } else { 4 }) {
                let step = format!("{case} {verb} {id}");
                let (theirs, ours) = (new(), new());
                let by_qemu = run("qemu-img", &["snapshot", verb, id, theirs.name()]);
                let mut image = Image::open(&ours.path, OpenFlags::RDWR).unwrap();
                let by_us = match verb {
                    "-c" => image
                        .snapshot_create(&as_qemu_made(&theirs.path))
                        .map(|_| ()),
                    "-a" => image.snapshot_goto(id.as_bytes()),
                    _ => image.snapshot_delete(Some(id.as_bytes()), None),
                };
                drop(image);
                if verb == "-d" && by_qemu.is_err() {
                    continue; // qemu-img deletes by name
                }
                // What is refused here and not there is in docs/design.md.
                if !matches!(by_us, Err(Error::Unsupported(_))) {
                    let both = format!("{step}: {by_us:?} {by_qemu:?}");
                    assert_eq!(by_us.is_ok(), by_qemu.is_ok(), "{both}");
                }
                match by_us {
                    Ok(()) => assert_same(&theirs.bytes(), &ours.bytes(), &step),
                    Err(_) => assert!(ours.bytes() == new().bytes(), "{step}"),
                }
            }
        }
    }
}

/// What a verb needs fits exactly where QEMU's fits, and else not a byte is written.
#[test]
fn a_device_that_is_too_small_is_found_before_anything_is_written() {
    let what = "a block device that is too small";
    if !have("qemu-img", what) || !have("qemu-io", what) || !have_devices(what) {
        return;
    }
    let (mut did, mut did_not) = (0, 0);
    for options in ["cluster_size=4k", "cluster_size=512,refcount_bits=64"] {
        let start = image(options, "6M");
        // Each verb is given room from none to more than it needs.
        for verb in [Create("three"), Delete("one"), Goto("one")] {
            for more in (0..=14).chain([24, 40]) {
                let length = (start.len() as u64).next_multiple_of(512) + more * 512;
                let step = format!("{options}, {more} sectors");
                let (theirs, ours) = (
                    LoopDevice::new(&start, length),
                    LoopDevice::new(&start, length),
                );
                let by_qemu = verb.by_qemu(theirs.name());
                let before = ours.bytes();
                let mut image = Image::open(&ours.path, OpenFlags::RDWR).unwrap();
                let by_us = verb.by_us(&mut image, &theirs.path);
                let outcome = image.last_outcome();
                assert_eq!(
                    by_us.is_ok(),
                    by_qemu.is_ok(),
                    "{step}: {by_us:?} {by_qemu:?}"
                );
                match by_us {
                    Ok(()) => {
                        did += 1;
                        let (a, b) = (theirs.bytes(), ours.bytes());
                        assert_same(&a, &b, &step);
                        // These devices discard, and then read as zeros.
                        assert!(a == b, "{step}: other clusters differ");
                    }
                    Err(e) => {
                        did_not += 1;
                        assert!(by_qemu.unwrap_err().contains("No space left on device"));
                        assert_eq!(
                            (e.errno(), outcome),
                            (libc::ENOSPC, Outcome::Unchanged),
                            "{e}"
                        );
                        assert!(ours.bytes() == before, "{step}: something was written");
                        // The handle is as good as new.
                        image.snapshot_goto(b"two").unwrap();
                    }
                }
            }
        }
    }
    assert!(
        did > 20 && did_not > 10,
        "{did} verbs fitted, {did_not} did not"
    );
}

/// Memory that does not grow, if `fixed`: what needs no root.
struct Fixed {
    memory: MemoryStorage,
    fixed: bool,
    reads: Rc<Cell<usize>>,
}

impl Storage for Fixed {
    fn length(&mut self) -> std::io::Result<u64> {
        self.memory.length()
    }
    fn fixed_length(&self) -> bool {
        self.fixed
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.reads.set(self.reads.get() + 1);
        self.memory.read(offset, buf)
    }
    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> std::io::Result<()> {
        let end = offset + data.len() as u64;
        let fits = end <= self.memory.length()?;
        assert!(fits || !self.fixed, "{label} is written behind the end");
        self.memory.write(label, offset, data)
    }
    fn truncate(&mut self, length: u64) -> std::io::Result<()> {
        if !self.fixed {
            return self.memory.truncate(length);
        }
        assert!(length <= self.memory.length()?);
        Ok(())
    }
    fn discard(&mut self, offset: u64, bytes: u64) -> std::io::Result<()> {
        assert!(offset + bytes <= self.memory.length()?);
        // A device may leave anything there.
        let other = vec![0xdd; bytes as usize];
        self.memory.write("discarded", offset, &other)
    }
    fn barrier(&mut self) -> std::io::Result<()> {
        self.memory.barrier()
    }
    fn close(self: Box<Self>) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn storage_that_does_not_grow_is_never_written_behind_its_end() {
    let (mut did, mut did_not) = (0, 0);
    for case in [
        "v3-4k",
        "v3-512",
        "resize-4k",
        "resize-512",
        "resize-shrink-reftable",
        "l1-growth-goto-512",
        "l1-growth-shrink",
        "refblock-growth-delete",
        "reftable-growth-1",
        "vm-state-512",
        "write-snapshots",
    ] {
        let start = reference(case);
        let on = |storage: Box<dyn Storage>| Image::open_storage(storage, OpenFlags::RDWR).unwrap();
        let mut image = on(Box::new(MemoryStorage::new(start.clone())));
        let ids: Vec<Vec<u8>> = image
            .snapshot_list()
            .unwrap()
            .iter()
            .map(|s| s.id.clone())
            .collect();
        type Change<'a> = Box<dyn Fn(&mut Image) -> Result<()> + 'a>;
        let mut changes: Vec<Change> = vec![Box::new(|i| {
            i.snapshot_create(&NewSnapshot::default()).map(|_| ())
        })];
        for id in &ids {
            changes.push(Box::new(|i| i.snapshot_goto(id)));
            changes.push(Box::new(|i| i.snapshot_delete(Some(id), None)));
        }
        for (more, (n, change)) in (0..24)
            .chain([64, 640])
            .flat_map(|more| changes.iter().enumerate().map(move |c| (more, c)))
        {
            let step = format!("{case}, {more} sectors, change {n}");
            let mut bytes = start.clone();
            bytes.resize(start.len().next_multiple_of(512) + more * 512, 0xa5);
            let storage = MemoryStorage::new(bytes.clone());
            let now = storage.handle();
            let mut image = on(Box::new(Fixed {
                memory: storage,
                fixed: true,
                reads: Rc::default(),
            }));
            match change(&mut image) {
                Ok(()) => {
                    did += 1;
                    let storage = MemoryStorage::new(bytes.clone());
                    let expected = storage.handle();
                    change(&mut on(Box::new(storage))).unwrap();
                    let (now, mut expected) = (now.borrow(), expected.borrow().clone());
                    // Shrinking cuts a file.
                    expected.resize(expected.len().max(now.len()), 0);
                    assert_same(&expected[..now.len()], &now, &step);
                }
                Err(e) => {
                    did_not += 1;
                    assert_eq!(e.errno(), libc::ENOSPC, "{step}: {e}");
                    assert_eq!(image.last_outcome(), Outcome::Unchanged);
                    assert!(*now.borrow() == bytes, "{step}: something was written");
                }
            }
            assert_eq!(now.borrow().len(), bytes.len());
        }
    }
    assert!(
        did > 200 && did_not > 50,
        "{did} verbs fitted, {did_not} did not"
    );
}

/// No place for the temporary L1 table is tried that cannot be one.
#[test]
fn a_goto_on_storage_that_does_not_grow_looks_once() {
    let mut bytes = reference("resize-4k");
    bytes.resize(bytes.len() + (1 << 20), 0);
    let [plain, fixed] = [false, true].map(|fixed| {
        let reads = Rc::new(Cell::new(0));
        let storage = Fixed {
            memory: MemoryStorage::new(bytes.clone()),
            fixed,
            reads: reads.clone(),
        };
        let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
        let id = image.snapshot_list().unwrap()[0].id.clone();
        reads.set(0);
        image.snapshot_goto(&id).unwrap();
        reads.get()
    });
    // What is in a temporary table's place inside the storage is kept.
    assert!(fixed <= plain + 2, "{fixed} reads, {plain} otherwise");
}

#[test]
fn a_write_protected_device_is_only_read() {
    if !have("qemu-img", "a write-protected device") || !have_devices("a write-protected device") {
        return;
    }
    let start = image("cluster_size=64k", "6M");
    let device = LoopDevice::with(&start, 4 << 20, &["--read-only"]);
    let e = Image::open(&device.path, OpenFlags::RDWR).err().unwrap();
    assert_eq!(e.errno(), libc::EACCES);
    let words = "The device is not writable: Permission denied";
    assert!(e.to_string().ends_with(words), "{e}");
    let by_qemu = run("qemu-img", &["snapshot", "-c", "x", device.name()]).unwrap_err();
    assert!(by_qemu.trim_end().ends_with(words), "{by_qemu}");
    assert_eq!(list(&device.path).len(), 2);
    let file = std::fs::File::open(&device.path).unwrap();
    let mut image = Image::open_fd(file.as_raw_fd(), OpenFlags::FORCE_SHARE).unwrap();
    image.snapshot_load_tmp(None, Some(b"one")).unwrap();
    let mut buffer = [0; 4];
    image.read(0, &mut buffer).unwrap();
    assert_eq!(buffer, [0x11; 4]);
    assert!(image.snapshot_create(&NewSnapshot::default()).is_err());
}

/// The bytes of this device's node that anybody has locked. The kernel's list is no snapshot: others lock files
/// meanwhile, and it may show a lock twice.
fn locks(device: &LoopDevice) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{}", std::fs::metadata(&device.path).unwrap().ino());
    let all = std::fs::read_to_string("/proc/locks").unwrap();
    let mut found: Vec<String> = all
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let ours = words[1] == "OFDLCK" && words[5].ends_with(&inode);
            ours.then(|| format!("{} {} {}", words[3], words[6], words[7]))
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

#[test]
fn locks_on_a_device_are_qemus() {
    let what = "locks on a block device";
    if !have("qemu-img", what) || !have("qemu-nbd", what) || !have_devices(what) {
        return;
    }
    let device = LoopDevice::new(&image("cluster_size=64k", "6M"), 4 << 20);
    let refused = |args: &[&str]| {
        let e = run("qemu-img", args).unwrap_err();
        assert!(e.contains("Is another process using the image"), "{e}");
    };
    // Theirs while ours is open.
    let held = Image::open(&device.path, OpenFlags::RDWR).unwrap();
    let ours = locks(&device);
    refused(&["snapshot", "-l", device.name()]);
    refused(&["snapshot", "-c", "x", device.name()]);
    held.close().unwrap();
    assert_eq!(locks(&device), Vec::<String>::new());
    let held = Image::open(&device.path, OpenFlags::read_only()).unwrap();
    let ours_reading = locks(&device);
    refused(&["snapshot", "-c", "x", device.name()]);
    must("qemu-img", &["snapshot", "-l", device.name()]);
    held.close().unwrap();

    // Ours while theirs is.
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd");
    let pid_file = folder.path().join("pid");
    for (read_only, expected) in [(false, &ours), (true, &ours_reading)] {
        let mut command = Command::new("qemu-nbd");
        command
            .args(["-f", "qcow2", "--persistent", "-k"])
            .arg(&socket);
        command.arg("--pid-file").arg(&pid_file);
        command.args(read_only.then_some("-r")).arg(&device.path);
        let mut server = command.spawn().unwrap();
        wait_for(&pid_file);
        let theirs = locks(&device);
        let write = Image::open(&device.path, OpenFlags::RDWR).err();
        let read = Image::open(&device.path, OpenFlags::read_only()).is_ok();
        let share = Image::open(&device.path, OpenFlags::FORCE_SHARE).is_ok();
        server.kill().unwrap();
        server.wait().unwrap();
        let _ = (
            std::fs::remove_file(&pid_file),
            std::fs::remove_file(&socket),
        );
        assert_eq!(&theirs, expected);
        let e = write.unwrap();
        assert_eq!(e.errno(), libc::EAGAIN, "{e}");
        assert_eq!((read, share), (read_only, true));
    }
    storage_daemon(&device, &ours);
}

/// A server writes its pid when everything is set up.
fn wait_for(pid_file: &Path) {
    for _ in 0..500 {
        if pid_file.exists() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("no {}", pid_file.display());
}

fn storage_daemon(device: &LoopDevice, ours: &[String]) {
    if !have("qemu-storage-daemon", "its locks on a block device") {
        return;
    }
    let node = format!(
        "driver=qcow2,node-name=q,file.driver=host_device,file.filename={}",
        device.name()
    );
    let folder = tempfile::tempdir().unwrap();
    let nbd = format!(
        "addr.type=unix,addr.path={}",
        folder.path().join("nbd").display()
    );
    let pid_file = folder.path().join("pid");
    let mut daemon = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &node, "--nbd-server", &nbd])
        .args(["--export", "nbd,id=e,node-name=q,writable=on"])
        .arg("--pidfile")
        .arg(&pid_file)
        .spawn()
        .unwrap();
    wait_for(&pid_file);
    let theirs = locks(device);
    let e = Image::open(&device.path, OpenFlags::read_only()).err();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert_eq!(theirs, ours);
    assert_eq!(e.unwrap().errno(), libc::EAGAIN);
}

#[test]
fn backing_files_may_be_block_devices() {
    let what = "backing files on block devices";
    if !have("qemu-img", what) || !have("qemu-io", what) || !have_devices(what) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let qcow2 = LoopDevice::new(&image("cluster_size=64k", "6M"), 4 << 20);
    let raw = LoopDevice::new(b"raw", 3 << 20);
    let long = format!("host_device:{}", raw.name());
    for (backing, format) in [
        (qcow2.name(), "qcow2"),
        (raw.name(), "raw"),
        (raw.name(), "host_device"),
        (&long, "raw"),
    ] {
        let (path, out) = (folder.path().join("overlay"), folder.path().join("out"));
        let (name, out) = (path.to_str().unwrap(), out.to_str().unwrap());
        let _ = std::fs::remove_file(&path);
        must(
            "qemu-img",
            &[
                "create", "-qf", "qcow2", "-b", backing, "-F", format, name, "2M",
            ],
        );
        must("qemu-img", &["snapshot", "-c", "small", name]);
        must("qemu-img", &["resize", "-q", name, "6M"]);
        must("qemu-io", &["-c", "write -P 7 5M 64k", name]);
        must("qemu-img", &["snapshot", "-c", "large", name]);
        // A goto to a larger disk needs the length of the backing file.
        must("qemu-img", &["snapshot", "-a", "small", name]);
        let copy = folder.path().join("copy");
        std::fs::copy(&path, &copy).unwrap();
        must("qemu-img", &["snapshot", "-a", "large", name]);
        let mut ours = Image::open(&copy, OpenFlags::RDWR).unwrap();
        ours.snapshot_goto(b"large").unwrap();
        assert!(
            std::fs::read(&path).unwrap() == std::fs::read(&copy).unwrap(),
            "{backing}"
        );
        must("qemu-img", &["convert", "-O", "raw", name, out]);
        let mut bytes = vec![0; 6 << 20];
        ours.read(0, &mut bytes).unwrap();
        assert!(bytes == std::fs::read(out).unwrap(), "{backing} {format}");
        assert!(bytes[..3] != [0; 3]);
    }
}
