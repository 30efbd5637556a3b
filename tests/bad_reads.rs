//! Images whose guest data is a trap: reading ends with an error, in bounded memory, and no file is
//! opened that was not to be.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "abi/toolbox.rs"]
mod toolbox;

use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::{Image, OpenFlags};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

const CLUSTER: usize = 1 << 16;

/// An image of 1 MiB: header, refcount table, block, L1 table, and an L2 table that says nothing.
fn empty(backing: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 5 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &[0, 0, 0, 4, 0, 0, 0, 104]);
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    put(2 * CLUSTER, &[0, 1].repeat(5));
    put(
        3 * CLUSTER,
        &((1 << 63) | (4 * CLUSTER as u64)).to_be_bytes(),
    );
    if !backing.is_empty() {
        // The extension that says "qcow2", the end of extensions, the name.
        put(104, b"\xe2\x79\x2a\xca\0\0\0\x05qcow2\0\0\0");
        put(8, &1024u64.to_be_bytes());
        put(16, &(backing.len() as u32).to_be_bytes());
        put(1024, backing);
    }
    image
}

/// The first byte of a guest disk, or the errno and the words.
fn first_byte(path: &Path, flags: OpenFlags) -> Result<u8, (i32, String)> {
    let mut byte = [0xee];
    let mut image = Image::open(path, flags).map_err(|e| (e.errno(), e.to_string()))?;
    let (read, status) = (image.read(0, &mut byte), image.block_status(0, 1));
    let errno = |e: Option<qcow2_snapshot::Error>| e.map(|e| e.errno());
    assert_eq!(
        errno(
            read.as_ref()
                .err()
                .map(|_| image.read(0, &mut [0]).unwrap_err())
        ),
        errno(status.err()),
        "read and block_status fail alike"
    );
    read.map(|()| byte[0])
        .map_err(|e| (e.errno(), e.to_string()))
}

fn fails(path: &Path, errno: i32, words: &str) {
    let (got, text) = first_byte(path, OpenFlags::read_only()).unwrap_err();
    assert!(got == errno && text.contains(words), "{got}: {text}");
}

/// Open files below a folder. Other tests run in the same process, in folders of their own.
fn descriptors(below: &Path) -> usize {
    let below = below.canonicalize().unwrap();
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    open.filter_map(|fd| std::fs::read_link(fd.path()).ok())
        .filter(|file| file.starts_with(&below))
        .count()
}

#[test]
fn a_backing_loop_is_an_error_that_leaves_no_descriptor_open() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, backing: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, empty(backing.as_bytes())).unwrap();
        path
    };
    let (a, own) = (file("a", "b"), file("own", "./own"));
    file("b", "c");
    file("c", "../x/b");
    std::fs::create_dir(dir.path().join("x")).unwrap();
    std::os::unix::fs::symlink(dir.path(), dir.path().join("y")).unwrap();
    file("c", "y/b");
    fails(&a, libc::EINVAL, "is a loop");
    fails(&own, libc::EINVAL, "is a loop");
    let mut image = Image::open(&a, OpenFlags::read_only()).unwrap();
    for _ in 0..100 {
        image.read(0, &mut [0]).unwrap_err();
    }
    assert_eq!(descriptors(dir.path()), 1, "the image itself");
}

#[test]
fn a_chain_of_200_files_behind_the_image_is_read_and_one_of_201_refused() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..=201 {
        let backing = if n == 0 {
            String::new()
        } else {
            format!("i{}", n - 1)
        };
        let mut image = empty(backing.as_bytes());
        if n == 0 {
            image.resize(6 * CLUSTER, 0x77);
            image[4 * CLUSTER..][..8]
                .copy_from_slice(&((1u64 << 63) | (5 * CLUSTER as u64)).to_be_bytes());
        }
        std::fs::write(dir.path().join(format!("i{n}")), image).unwrap();
    }
    let read = |n| first_byte(&dir.path().join(format!("i{n}")), OpenFlags::read_only());
    assert_eq!(read(200), Ok(0x77));
    let (errno, text) = read(201).unwrap_err();
    assert_eq!(errno, libc::ENOTSUP);
    assert!(text.contains("longer than 200"), "{text}");
}

#[test]
fn the_tables_of_a_chain_are_limited_together() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..10 {
        let path = dir.path().join(format!("i{n}"));
        let mut image = empty(format!("i{}", n + 1).as_bytes());
        // An L1 table of 32 MiB, all of it a hole but the first entry.
        image[36..40].copy_from_slice(&(4u32 << 20).to_be_bytes());
        std::fs::write(&path, &image).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(40 << 20).unwrap();
        file.write_all_at(&[0; 8], 4 * CLUSTER as u64).unwrap();
    }
    fails(&dir.path().join("i0"), libc::ENOTSUP, "256 MiB");
}

#[test]
fn names_that_are_not_plain_paths_open_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for name in [
        "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
        "nbd:localhost:10809",
        "nbd+unix:///?socket=/tmp/x",
        "https://example.org/x",
        "file:nbd:x",
        "fat:rw:/tmp",
    ] {
        std::fs::write(&path, empty(name.as_bytes())).unwrap();
        fails(&path, libc::ENOTSUP, "not a plain file name");
    }
    std::fs::write(&path, empty(&[b'n'; 1023])).unwrap();
    fails(&path, libc::ENAMETOOLONG, "backing file");
    std::fs::write(&path, empty(&b"n/".repeat(511))).unwrap();
    fails(&path, libc::ENOENT, "backing file");
    // With a protocol a name is relative to the current folder, not to the image's, as in QEMU.
    std::fs::write(&path, empty(b"Cargo.toml")).unwrap();
    fails(&path, libc::ENOENT, "backing file");
    std::fs::write(&path, empty(b"file:Cargo.toml")).unwrap();
    fails(&path, libc::EINVAL, "not in qcow2 format");
    // As in C, a name ends at its NUL.
    std::fs::write(&path, empty(b"a\0b")).unwrap();
    fails(&path, libc::ENOENT, "/a'");
    // What is no regular file: no waiting for the other end of a FIFO.
    std::fs::write(&path, empty(b"pipe")).unwrap();
    let made = Command::new("mkfifo").arg(dir.path().join("pipe")).status();
    assert!(made.unwrap().success());
    fails(&path, libc::EINVAL, "backing file");
    std::fs::write(&path, empty(b".")).unwrap();
    fails(&path, libc::EINVAL, "backing file");
}

#[test]
fn no_backing_and_foreign_storage_open_no_file_that_an_image_names() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("image"), dir.path().join("other"));
    std::fs::write(&other, empty(b"")).unwrap();
    let data_file = {
        let mut image = empty(b"");
        image[79] = 4; // incompatible: external data file
                       // Not relative to the image, as a backing file is.
        let name = other.to_str().unwrap().as_bytes();
        image[104..108].copy_from_slice(b"DATA");
        image[108..112].copy_from_slice(&(name.len() as u32).to_be_bytes());
        image[112..112 + name.len()].copy_from_slice(name);
        // The first cluster is at offset 0 of the data file.
        image[4 * CLUSTER] = 0x80;
        image
    };
    for (bytes, what) in [(empty(b"other"), "backing file"), (data_file, "data file")] {
        std::fs::write(&path, &bytes).unwrap();
        first_byte(&path, OpenFlags::read_only()).unwrap();
        let mut image = Image::open(&path, OpenFlags::NO_BACKING).unwrap();
        let e = image.read(0, &mut [0]).unwrap_err();
        assert_eq!(e.errno(), libc::ENOTSUP);
        let text = e.to_string();
        assert!(text.contains(what) && text.contains("NO_BACKING"), "{text}");

        let storage = Box::new(MemoryStorage::new(bytes));
        let mut image = Image::open_storage(storage, OpenFlags::read_only()).unwrap();
        let e = image.read(0, &mut [0]).unwrap_err();
        assert_eq!(e.errno(), libc::ENOTSUP);
        assert!(e.to_string().contains(what), "{e}");
    }
}

#[test]
fn a_data_file_with_a_relative_name_is_looked_for_in_the_current_folder_as_in_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(dir.path().join("no-such-file-here"), empty(b"")).unwrap();
    let mut image = empty(b"");
    image[79] = 4; // incompatible: external data file
    image[104..112].copy_from_slice(b"DATA\0\0\0\x11");
    image[112..129].copy_from_slice(b"no-such-file-here");
    image[4 * CLUSTER] = 0x80;
    std::fs::write(&path, image).unwrap();
    let mut image = Image::open(&path, OpenFlags::read_only()).unwrap();
    let e = image.read(0, &mut [0]).unwrap_err();
    assert_eq!(e.errno(), libc::ENOENT);
    assert!(e.to_string().contains("'no-such-file-here'"), "{e}");
}

#[test]
fn subcluster_bitmaps_that_lie_are_errors() {
    let mut image = empty(b"");
    image[79] = 0x10; // incompatible: extended L2 entries
    let allocated = (1u64 << 63) | (2 * CLUSTER as u64);
    for (entry, bitmap, good) in [
        (allocated, 1, true),
        (allocated, 1 << 32, true),
        (allocated, 1 | 1 << 32, false),
        (allocated, 1 | 1 << 63 | 1 << 31, false),
        (0, 1 << 31, false),
        (0, 1 << 63, true),
        (0, u64::MAX, false),
        (allocated + 512, 1, false),
        (1 << 62, 0, false), // compressed, of nothing
    ] {
        image[4 * CLUSTER..][..8].copy_from_slice(&entry.to_be_bytes());
        image[4 * CLUSTER + 8..][..8].copy_from_slice(&bitmap.to_be_bytes());
        let storage = Box::new(MemoryStorage::new(image.clone()));
        let mut it = Image::open_storage(storage, OpenFlags::read_only()).unwrap();
        let read = it.read(0, &mut [0; CLUSTER]).map_err(|e| e.errno());
        let want = if good { Ok(()) } else { Err(libc::EIO) };
        assert_eq!(read, want, "{entry:#x} {bitmap:#x}");
        if entry != 1 << 62 {
            let status = it.block_status(0, u64::MAX).map_err(|e| e.errno());
            assert_eq!(status.map(|_| ()), want, "{entry:#x} {bitmap:#x}");
        }
    }
}

#[test]
fn a_compressed_cluster_never_becomes_more_than_a_cluster() {
    // 64 MiB of zeros in 64 KiB, both ways; and a frame that claims a window of a terabyte.
    let zeros = vec![0; 64 << 20];
    let deflate = |bytes: &[u8]| {
        use std::io::Write;
        let mut e = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        e.write_all(bytes).unwrap();
        e.finish().unwrap()
    };
    let (bomb, short) = (deflate(&zeros), deflate(&zeros[..CLUSTER - 1]));
    // Blocks of 128 KiB that repeat one byte: header, then 512 of (type 1, size) and the byte.
    let mut frame = b"\x28\xb5\x2f\xfd\x00\x48".to_vec();
    for last in [0; 512] {
        let block = (128u32 << 10) << 3 | 1 << 1 | last;
        frame.extend_from_slice(&[block as u8, (block >> 8) as u8, (block >> 16) as u8, 0]);
    }
    let window = b"\x28\xb5\x2f\xfd\x00\xf8\x03\x00\x00\x00".to_vec();
    for (zstd, packed, good) in [
        (false, bomb.clone(), true), // QEMU takes what fills the cluster
        (false, short, false),
        (true, frame, false),
        (true, window, false),
        (true, bomb, false),
    ] {
        let mut image = empty(b"");
        if zstd {
            image[79] = 8;
            image[100..112].copy_from_slice(&[0, 0, 0, 112, 1, 0, 0, 0, 0, 0, 0, 0]);
        }
        let sectors = (packed.len() as u64).div_ceil(512).min(255);
        let entry = (1u64 << 62) | ((sectors - 1) << 54) | (5 * CLUSTER as u64);
        image[4 * CLUSTER..][..8].copy_from_slice(&entry.to_be_bytes());
        image.extend(packed);
        let storage = Box::new(MemoryStorage::new(image));
        let mut it = Image::open_storage(storage, OpenFlags::read_only()).unwrap();
        let read = it.read(0, &mut [1; CLUSTER]).map_err(|e| e.errno());
        let want = if good { Ok(()) } else { Err(libc::EIO) };
        assert_eq!(read, want, "zstd {zstd}, {sectors} sectors");
    }
}

/// Flip bytes in compressed clusters: both read the same bytes, or both fail.
#[test]
fn damaged_compressed_clusters_read_as_in_qemu() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return toolbox::skip("damaged compressed clusters compared with qemu-img (not here)");
    }
    let dir = tempfile::tempdir().unwrap();
    let run = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        let out = command.args(args).current_dir(dir.path()).output().unwrap();
        out.status.success()
    };
    let text: Vec<u8> = (0..60_000u32)
        .map(|i| (i / 7 % 251) as u8 ^ (i % 13) as u8)
        .collect();
    std::fs::write(dir.path().join("text"), text).unwrap();
    let (mut same, mut refused) = (0, 0);
    for kind in ["zlib", "zstd"] {
        let options = format!("compression_type={kind}");
        assert!(run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", &options, "good", "64k"]
        ));
        assert!(run("qemu-io", &["-c", "write -c -s text 0 64k", "good"]));
        let good = std::fs::read(dir.path().join("good")).unwrap();
        let start = 5 * CLUSTER;
        let mut random = 12345u64;
        for _ in 0..40 {
            let mut bad = good.clone();
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let at = start + (random >> 33) as usize % (good.len() - start).min(3000);
            bad[at] ^= 1 << (random >> 20 & 7);
            std::fs::write(dir.path().join("bad"), bad).unwrap();
            let theirs = run("qemu-img", &["convert", "-O", "raw", "bad", "raw"]);
            let mut image = Image::open(&dir.path().join("bad"), OpenFlags::read_only()).unwrap();
            let mut bytes = vec![0; CLUSTER];
            let ours = image.read(0, &mut bytes);
            assert_eq!(ours.is_ok(), theirs, "{kind}, byte {at:#x}: {ours:?}");
            if theirs {
                assert!(
                    bytes == std::fs::read(dir.path().join("raw")).unwrap(),
                    "{kind} {at:#x}"
                );
                same += 1;
            } else {
                refused += 1;
            }
        }
    }
    assert!(same > 5 && refused > 5, "{same} read, {refused} refused");
}
