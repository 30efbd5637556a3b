//! Reads, maps and VM state of random images, compared with qemu-img and qemu-io.
//!
//! Each image is made by qemu alone: by the generator of the differential test (every format
//! variant, resizes, VM state, preallocation) or by the one here (backing chains of mixed formats
//! and sizes, external data files, compressed clusters). Then, for the disk and every snapshot:
//!
//! * all bytes equal those of `qemu-img convert [-l snapshot.name=NAME]`, read in random pieces (of
//!   large disks: all that either side does not call a hole);
//! * `block_status` gives the entries of `qemu-img map --output=json`; for a snapshot those of a
//!   copy on which `qemu-img snapshot -a` went back to it, and data and zeros are those that
//!   `qemu-nbd -l` serves of the snapshot in this very file;
//! * VM state equals what `qemu-io read -b` shows there.
//!
//! `READS_SECONDS=n` runs for n seconds (25 without it) and `READS_SEED=n` makes one image again;
//! with `READS_CHANGES=1` only what changed between states is compared; the last lines count what was.

#![allow(clippy::unwrap_used)]

#[path = "reads/changes.rs"]
mod changes;
#[path = "reads/compare.rs"]
mod compare;
#[allow(dead_code)]
#[path = "differential/files.rs"]
mod files;
#[allow(dead_code)]
#[path = "differential/generate.rs"]
mod generate;
#[path = "reads/images.rs"]
mod images;
#[allow(dead_code)]
#[path = "differential/qemu.rs"]
mod qemu;
#[allow(dead_code)]
#[path = "differential/qimg.rs"]
mod qimg;
#[allow(dead_code)]
#[path = "differential/rng.rs"]
mod rng;
#[allow(dead_code)]
#[path = "abi/toolbox.rs"]
mod toolbox;

use compare::Counts;
use files::R;
use qcow2_snapshot::{Image, OpenFlags};
use rng::Rng;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// A scratch folder, in memory where there is such a place.
fn scratch() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    match tempfile::Builder::new().prefix("reads.").tempdir_in(shm) {
        Ok(dir) if std::env::var_os("TMPDIR").is_none() => dir,
        _ => tempfile::tempdir().unwrap(),
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn one(seed: u64, counts: &mut Counts) -> R<()> {
    let dir = scratch();
    let mut rng = Rng::new(seed);
    let mut tools = qemu::Tools::new(dir.path());
    let made = images::make(&mut rng, &mut tools);
    let compare = match number("READS_CHANGES") {
        None => compare::image,
        Some(_) => compare::changes_only,
    };
    let done = made.and_then(|()| compare(&mut rng, &mut tools, counts));
    done.map_err(|e| format!("READS_SEED={seed}: {e}\n{}", tools.log.join("\n")))
}

#[test]
fn disks_snapshots_maps_and_vm_state_are_what_qemu_reads() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return toolbox::skip("reads compared with qemu-img (there is no qemu-img here)");
    }
    let mut counts = Counts::default();
    let (mut failed, mut images) = (Vec::new(), 0);
    let start = Instant::now();
    let time = Duration::from_secs(number("READS_SECONDS").unwrap_or(25));
    let fresh = std::collections::hash_map::RandomState::new;
    let first = number("READS_SEED").unwrap_or_else(|| {
        use std::hash::BuildHasher;
        fresh().hash_one(0) % 1_000_000_000 * 1000
    });
    for seed in first.. {
        if let Err(e) = one(seed, &mut counts) {
            failed.push(e);
        }
        images += 1;
        if number("READS_SEED").is_some() || start.elapsed() > time || failed.len() > 4 {
            break;
        }
    }
    let _ = writeln!(
        std::io::stderr(),
        "reads: {images} images (seeds {first}..={}): {counts}; {} differences",
        first + images - 1,
        failed.len()
    );
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

fn unpack(packed: &Path, to: &Path) {
    let mut from = flate2::read::GzDecoder::new(std::fs::File::open(packed).unwrap());
    let mut file = std::fs::File::create(to).unwrap();
    std::io::copy(&mut from, &mut file).unwrap();
}

#[test]
fn the_vm_state_that_a_real_qemu_saved_is_what_qemu_reads() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return toolbox::skip("VM state compared with qemu-io (there is no qemu-img here)");
    }
    let dir = scratch();
    let (image, copy) = (
        dir.path().join("image.qcow2"),
        dir.path().join("copy.qcow2"),
    );
    let packed = "tests/images/savevm/image.qcow2.gz";
    unpack(&toolbox::root().join(packed), &image);
    let mut tools = qemu::Tools::new(dir.path());
    let snapshots = qimg::Qcow::open(&image).unwrap().snaps;
    assert_eq!(snapshots.len(), 2);
    for s in snapshots {
        let n = s.vm_size() as usize;
        std::fs::copy(&image, &copy).unwrap();
        tools
            .snapshot("-a", &s.name, "copy.qcow2")
            .unwrap()
            .unwrap();
        let whole = n.next_multiple_of(512);
        let command = format!("read -b -v 0 {whole}");
        let out = tools
            .must("qemu-io", &["-r", "-c", &command, "copy.qcow2"])
            .unwrap();
        let theirs = compare::dumped(&out.stdout, whole).unwrap();
        // What migration streams begin with, and an end that is not padding.
        assert!(n > 30_000 && theirs.starts_with(b"QEVM"));

        // Shown by load_tmp, made current by qemu-img, made current by us.
        let read = |image: &mut Image| {
            let mut mine = vec![0xee; whole];
            for (i, part) in mine.chunks_mut(10_007).enumerate() {
                image.load_vmstate(i as u64 * 10_007, part).unwrap();
            }
            mine
        };
        let mut shown = Image::open(&image, OpenFlags::read_only()).unwrap();
        shown.snapshot_load_tmp(None, Some(&s.name)).unwrap();
        assert!(read(&mut shown) == theirs, "shown by load_tmp");
        let mut by_qemu = Image::open(&copy, OpenFlags::read_only()).unwrap();
        assert!(read(&mut by_qemu) == theirs, "made current by qemu-img");
        drop(by_qemu);
        std::fs::copy(&image, &copy).unwrap();
        drop(shown);
        let mut by_us = Image::open(&copy, OpenFlags::RDWR).unwrap();
        by_us.snapshot_goto(&s.name).unwrap();
        assert!(read(&mut by_us) == theirs, "made current by us");
    }
}

/// Long enough to be unpacked on several threads, in and out of order in the file, and damaged.
#[test]
fn runs_of_compressed_clusters_read_as_in_qemu() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return toolbox::skip("runs of compressed clusters (there is no qemu-img here)");
    }
    for (kind, cluster) in [("zlib", 1 << 16), ("zstd", 1 << 16), ("zlib", 4096)] {
        let dir = scratch();
        let mut tools = qemu::Tools::new(dir.path());
        // Not the same anywhere, and no whole number of clusters.
        let mut plain = Rng::new(7).bytes((10 << 20) + 512);
        plain.iter_mut().for_each(|byte| *byte &= 15);
        let path = dir.path().join("i.qcow2");
        std::fs::write(dir.path().join("plain"), &plain).unwrap();
        let options = format!("compression_type={kind},cluster_size={cluster}");
        let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
        let args = [&convert[..], &["plain", "i.qcow2"]].concat();
        tools.must("qemu-img", &args).unwrap();
        // One cluster plain, one zero, and two packed elsewhere than their neighbours.
        let (plain_at, zero_at) = (20 * cluster, 30 * cluster);
        let mut commands = vec![
            format!("write -P 1 {plain_at} {cluster}"),
            format!("write -z {zero_at} {cluster}"),
        ];
        for n in [50, 40] {
            commands.push(format!("discard {} {cluster}", n * cluster));
            commands.push(format!("write -c -P {n} {} {cluster}", n * cluster));
        }
        assert!(tools.io("i.qcow2", true, &commands).unwrap().ok);
        let back = ["convert", "-O", "raw", "i.qcow2", "back"];
        tools.must("qemu-img", &back).unwrap();
        let theirs = std::fs::read(dir.path().join("back")).unwrap();
        assert!(theirs[40 * cluster] == 40 && theirs[plain_at] == 1 && theirs[zero_at] == 0);
        for (from, piece) in [(0, theirs.len()), (0, 3 << 20), (777, 1 << 20), (0, 5000)] {
            let mut image = Image::open(&path, OpenFlags::read_only()).unwrap();
            let mut mine = vec![0xee; theirs.len() - from];
            for (i, part) in mine.chunks_mut(piece).enumerate() {
                image.read((from + i * piece) as u64, part).unwrap();
            }
            let differs = mine.iter().zip(&theirs[from..]).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{kind} {cluster}, {piece} from {from}");
        }

        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        // Somewhere in there a stream begins, and none begins like this.
        bytes[middle..middle + 3 * cluster].fill(0xff);
        std::fs::write(&path, &bytes).unwrap();
        let refused = tools.must("qemu-img", &back).is_err();
        assert!(refused, "{kind} {cluster}: damaged");
        let mut image = Image::open(&path, OpenFlags::read_only()).unwrap();
        let read = image.read(0, &mut vec![0; theirs.len()]);
        assert_eq!(read.map_err(|e| e.errno()), Err(libc::EIO));
        // The handle is good, and so is what is not damaged.
        let mut first = vec![0; 1 << 20];
        image.read(0, &mut first).unwrap();
        assert!(theirs.starts_with(&first));
    }
}

/// All that the reference images hold: of each case the image before the verbs.
#[test]
fn the_reference_images_read_as_in_qemu() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return toolbox::skip(
            "reference images compared with qemu-img (there is no qemu-img here)",
        );
    }
    let (mut counts, mut cases, mut failed) = (Counts::default(), 0, Vec::new());
    let mut refused = Vec::new();
    for case in std::fs::read_dir(toolbox::root().join("c-tests/images")).unwrap() {
        let case = case.unwrap().path();
        if !case.is_dir() {
            continue;
        }
        let dir = scratch();
        for packed in std::fs::read_dir(&case).unwrap() {
            let packed = packed.unwrap().path();
            let name = packed.file_name().unwrap().to_str().unwrap();
            let Some(name) = name.strip_suffix(".gz").filter(|n| !n.starts_with("after")) else {
                continue;
            };
            let to = match name {
                "before.qcow2" => generate::QEMU,
                other => other,
            };
            unpack(&packed, &dir.path().join(to));
        }
        let mut tools = qemu::Tools::new(dir.path());
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        // Its relative name would be taken from the current folder, which is not the image's here.
        let data_file = dir.path().join("image.data");
        if data_file.exists() {
            let name = format!("data_file={}", data_file.display());
            let amended = tools.must(
                "qemu-img",
                &["amend", "-f", "qcow2", "-o", &name, generate::QEMU],
            );
            assert!(amended.is_ok());
        }
        let args = [&b"convert"[..], b"-O", b"raw"];
        let readable = tools.on("qemu-img", &args, generate::QEMU, &[b"x.raw"]);
        if !readable.unwrap().ok {
            // Damaged or encrypted: then ours must not be read either.
            let image = Image::open(&dir.path().join(generate::QEMU), OpenFlags::read_only());
            let read = image.and_then(|mut i| {
                let mut whole = vec![0; i.length() as usize];
                i.read(0, &mut whole)
            });
            assert!(read.is_err(), "{name}: read, though qemu-img refuses");
            refused.push(name);
            continue;
        }
        if name == "damaged-table-past-end" {
            // QEMU reads the table as zeros.
            let image = Image::open(&dir.path().join(generate::QEMU), OpenFlags::read_only());
            assert_eq!(image.err().map(|e| e.errno()), Some(libc::EIO), "{name}");
            continue;
        }
        cases += 1;
        if let Err(e) = compare::image(&mut Rng::new(1), &mut tools, &mut counts) {
            failed.push(format!("{name}: {e}"));
        }
    }
    let _ = writeln!(
        std::io::stderr(),
        "reads: {cases} reference images: {counts}; refused by both: {refused:?}"
    );
    assert!(cases > 50 && failed.is_empty(), "{}", failed.join("\n\n"));
}
