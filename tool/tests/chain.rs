//! Exports as qcow2, of random images: every snapshot by itself, since another one, and all as a chain.
//!
//! The images are those of the differential test and of the reads (every format variant, resizes, VM state,
//! backing chains, compressed clusters). For each snapshot qemu-img reads the same disk from the new file
//! as from the snapshot, and `qemu-img check` finds nothing, leaked clusters included.
//! `EXPORT_SECONDS=n` runs for n seconds (10 without it), `EXPORT_SEED=n` makes one image again.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[allow(dead_code)]
#[path = "../../tests/differential/files.rs"]
mod files;
#[allow(dead_code)]
#[path = "../../tests/differential/generate.rs"]
mod generate;
#[path = "../../tests/reads/images.rs"]
mod images;
#[allow(dead_code)]
#[path = "../../tests/differential/qemu.rs"]
mod qemu;
#[allow(dead_code)]
#[path = "../../tests/differential/qimg.rs"]
mod qimg;
#[allow(dead_code)]
#[path = "../../tests/differential/rng.rs"]
mod rng;

use common::ours;
use files::R;
use generate::QEMU;
use qcow2_snapshot::{Image, OpenFlags, Snapshot};
use qemu::Tools;
use rng::Rng;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Of larger disks clusters are not counted.
const COUNTED: u64 = 16 << 20;

#[derive(Default, Debug)]
struct Counts {
    images: u64,
    encrypted: u64,
    refused_by_qemu: u64,
    snapshots: u64,
    packed: u64,
    counted: u64,
    overlays: u64,
    over_raw: u64,
    resized: u64,
}

fn export(tools: &mut Tools, args: &[&str]) -> R<()> {
    tools.note(format!("qcow2-snapshot export {}", args.join(" ")));
    let got = ours(&tools.dir, &[&["export"], args].concat());
    match got.code {
        Some(0) if got.out.is_empty() && got.err.is_empty() => Ok(()),
        _ => Err(format!("export {args:?}: {got:?}")),
    }
}

/// What `qemu-img check` says of a file that must be without fault: a number of it.
fn checked(tools: &mut Tools, name: &str) -> R<impl Fn(&str) -> u64> {
    let out = tools
        .must("qemu-img", &["check", "--output=json", name])?
        .stdout;
    let number = move |field: &str| {
        let rest = out.split_once(&format!("\"{field}\": "));
        let digits = rest.map_or("0", |(_, r)| r);
        let end = digits.find(|c: char| !c.is_ascii_digit());
        digits[..end.unwrap_or(digits.len())].parse().unwrap_or(0)
    };
    for fault in ["leaks", "corruptions", "check-errors"] {
        if number(fault) != 0 {
            return Err(format!("{name}: {fault}: {}", number(fault)));
        }
    }
    let length = std::fs::metadata(tools.dir.join(name)).unwrap().len();
    if number("image-end-offset") != length {
        return Err(format!("{name}: the file is {length} bytes long"));
    }
    Ok(number)
}

/// The file holds the disk that is in `raw`, of the same length.
fn holds(tools: &mut Tools, name: &str, raw: &str) -> R<()> {
    let length = std::fs::metadata(tools.dir.join(raw)).unwrap().len();
    let made = Image::open(&tools.dir.join(name), OpenFlags::read_only()).unwrap();
    if made.length() != length {
        return Err(format!("{name}: {} bytes, {raw}: {length}", made.length()));
    }
    drop(made);
    tools
        .must(
            "qemu-img",
            &["compare", "-q", "-f", "raw", "-F", "qcow2", raw, name],
        )
        .map(|_| ())
}

/// The new file has clusters for what is no zeros, and nothing twice.
fn is_thin(tools: &mut Tools, name: &str, raw: &str, counts: &mut Counts) -> R<()> {
    let number = checked(tools, name)?;
    counts.packed += number("compressed-clusters");
    let g = Image::open(&tools.dir.join(name), OpenFlags::read_only())
        .unwrap()
        .geometry();
    let file = files::open(&tools.dir.join(raw))?;
    let length = files::len(&file)?;
    if length > COUNTED {
        return Ok(());
    }
    let mut buffer = vec![0; g.cluster_len()];
    let (mut data, mut tables) = (0, BTreeSet::new());
    for at in (0..length).step_by(g.cluster_len()) {
        files::read_at(&file, at, &mut buffer)?;
        if buffer.iter().any(|b| *b != 0) {
            data += 1;
            tables.insert(g.l1_index(at));
        }
    }
    if data != number("allocated-clusters") {
        let found = number("allocated-clusters");
        return Err(format!("{name}: {found} clusters of data, {data} needed"));
    }
    let l1 = g.clusters_for(g.l1_entries_for(length) * 8);
    let mut most = 1 + data + tables.len() as u64 + l1;
    let blocks = most / (g.refblock_entries() - 1) + 1;
    most += blocks + g.clusters_for(blocks * 8);
    let clusters = number("image-end-offset") / g.cluster_size();
    counts.counted += 1;
    // With a cluster for what rounding the sum above leaves out.
    if clusters > most + 1 {
        return Err(format!("{name}: {clusters} clusters, {most} needed"));
    }
    Ok(())
}

fn one(seed: u64, counts: &mut Counts) -> R<()> {
    let folder = tempfile::Builder::new()
        .prefix("export.")
        .tempdir_in("/dev/shm");
    let folder = folder.or_else(|_| tempfile::tempdir()).unwrap();
    let mut rng = Rng::new(seed);
    let mut tools = Tools::new(folder.path());
    let done =
        images::make(&mut rng, &mut tools).and_then(|()| exports(&mut rng, &mut tools, counts));
    done.map_err(|e| format!("EXPORT_SEED={seed}: {e}\n{}", tools.log.join("\n")))
}

fn exports(rng: &mut Rng, tools: &mut Tools, counts: &mut Counts) -> R<()> {
    counts.images += 1;
    let path = tools.dir.join(QEMU);
    let mut image = Image::open(&path, OpenFlags::read_only()).unwrap();
    let active = image.length();
    let Ok(list) = image.snapshot_list().map(<[Snapshot]>::to_vec) else {
        // The data is in another file, and there can be no snapshots.
        let got = ours(&tools.dir, &["export", "--all", "all", QEMU]);
        let refused = got.code == Some(1) && got.err.contains("external data file");
        return refused.then_some(()).ok_or(format!("{got:?}"));
    };
    image.close().unwrap();
    if tools.luks {
        let got = ours(&tools.dir, &["export", "--all", "all", QEMU]);
        let refused = got.code == Some(1) && got.err.contains("encrypted");
        let anything = list.iter().any(|s| s.disk_size > 0);
        counts.encrypted += 1;
        return match refused || !anything {
            true => Ok(()),
            false => Err(format!("{got:?}")),
        };
    }
    export(tools, &["--all", "all", QEMU])?;
    let id = |s: &Snapshot| String::from_utf8_lossy(&s.id).into_owned();
    for (n, s) in list.iter().enumerate() {
        let (raw, name) = (format!("{n}.raw"), format!("{n}.qcow2"));
        export(tools, &[QEMU, &id(s), &raw])?;
        export(tools, &["-O", "qcow2", QEMU, &id(s), &name])?;
        counts.snapshots += 1;
        is_thin(tools, &name, &raw, counts)?;
        holds(tools, &name, &raw)?;
        let link = format!("all/{:04}.qcow2", n + 1);
        checked(tools, &link).map(|_| ())?;
        holds(tools, &link, &raw)?;
        by_qemu(tools, s, &raw, active, counts)?;
    }
    for _ in 0..list.len() {
        let (from, to) = (rng.below(list.len() as u64), rng.below(list.len() as u64));
        let over_raw = rng.chance(50);
        let format = if over_raw { "raw" } else { "qcow2" };
        let (base, raw) = (format!("{from}.{format}"), format!("{to}.raw"));
        let [since, to] = [from, to].map(|n| id(&list[n as usize]));
        let _ = std::fs::remove_file(tools.dir.join("over.qcow2"));
        let over = ["--since", &since, "-b", &base, "-F", format];
        export(tools, &[&over[..], &[QEMU, &to, "over.qcow2"]].concat())?;
        checked(tools, "over.qcow2").map(|_| ())?;
        holds(tools, "over.qcow2", &raw)?;
        counts.overlays += 1;
        counts.over_raw += u64::from(over_raw);
    }
    Ok(())
}

/// qemu-img reads the same from the snapshot: as far as the active disk goes, beyond which it does not look.
fn by_qemu(tools: &mut Tools, s: &Snapshot, raw: &str, active: u64, counts: &mut Counts) -> R<()> {
    let wanted = format!("snapshot.id={}", String::from_utf8_lossy(&s.id));
    let read = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "-l",
        &wanted,
        QEMU,
        "theirs.raw",
    ];
    let args: Vec<Vec<u8>> = read.iter().map(|a| a.as_bytes().to_vec()).collect();
    if !tools.run("qemu-img", &args)?.ok {
        counts.refused_by_qemu += 1;
        return Ok(());
    }
    let theirs = files::open_rw(&tools.dir.join("theirs.raw"))?;
    let size = s.disk_size & !511;
    let mut mine = raw.to_owned();
    match size.cmp(&active) {
        std::cmp::Ordering::Less => theirs.set_len(size).unwrap(),
        std::cmp::Ordering::Equal => {}
        std::cmp::Ordering::Greater => {
            mine = "prefix.raw".to_owned();
            let copied = common::said(
                std::process::Command::new("cp")
                    .current_dir(&tools.dir)
                    .args(["--sparse=always", raw, &mine]),
            );
            assert_eq!(copied.code, Some(0));
            files::open_rw(&tools.dir.join(&mine))?
                .set_len(active)
                .unwrap();
        }
    }
    counts.resized += u64::from(size != active);
    tools
        .must(
            "qemu-img",
            &[
                "compare",
                "-q",
                "-f",
                "raw",
                "-F",
                "raw",
                &mine,
                "theirs.raw",
            ],
        )
        .map(|_| ())
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn qemu_img_reads_every_snapshot_of_random_images_from_what_was_exported() {
    if common::qemu_img("export of random images").is_none()
        || !common::have("qemu-io", "export of random images")
    {
        return;
    }
    use std::hash::BuildHasher;
    let fresh = std::collections::hash_map::RandomState::new().hash_one(0);
    let first = number("EXPORT_SEED").unwrap_or(fresh % 1_000_000_000 * 1000);
    let time = Duration::from_secs(number("EXPORT_SECONDS").unwrap_or(10));
    let (start, mut counts, mut failed) = (Instant::now(), Counts::default(), Vec::new());
    for seed in first.. {
        if let Err(e) = one(seed, &mut counts) {
            failed.push(e);
        }
        let single = number("EXPORT_SEED").is_some();
        if single || start.elapsed() > time || failed.len() > 4 {
            break;
        }
    }
    eprintln!(
        "export, from seed {first}: {counts:?}; {} failed",
        failed.len()
    );
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}
