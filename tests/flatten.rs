//! Letting go of the backing file: no state of the disk reads otherwise afterwards.
//!
//! Images are made by qemu-img and qemu-io. For each: what every state reads before, by the library and
//! by `qemu-img convert [-l]`, equals what it reads afterwards with the files behind it removed, and
//! `qemu-img check` finds nothing. `FLATTEN_SECONDS=n` runs for n seconds (8 without it), and
//! `FLATTEN_SEED=n` makes one image again.

#![allow(clippy::unwrap_used)]

#[macro_use]
#[path = "reference/pass_on.rs"]
mod pass_on;
#[path = "flatten/crash.rs"]
mod crash;
#[allow(dead_code)]
#[path = "crash/judge.rs"]
mod judge;
#[path = "flatten/limits.rs"]
mod limits;
#[path = "flatten/overlays.rs"]
mod overlays;
#[allow(dead_code)]
#[path = "differential/rng.rs"]
mod rng;

use overlays::{io, scratch, tool, Overlay};
use qcow2_snapshot::{Image, OpenFlags, Outcome};
use std::path::Path;
use std::time::{Duration, Instant};

/// Name and bytes of every state, the disk first, as the library reads them; its VM state behind.
fn states(file: &Path) -> Vec<(String, Vec<u8>)> {
    let mut image = Image::open(file, OpenFlags::FORCE_SHARE).unwrap();
    all_states(&mut image)
}

fn all_states(image: &mut Image) -> Vec<(String, Vec<u8>)> {
    let names: Vec<Vec<u8>> = image
        .snapshot_list()
        .unwrap()
        .iter()
        .map(|s| s.name.clone())
        .collect();
    let read = |image: &mut Image, name: String| {
        let mut bytes = vec![0; image.length() as usize];
        image.read(0, &mut bytes).unwrap();
        let mut vm = vec![0; overlays::vm_bytes(name.as_bytes())];
        image.load_vmstate(0, &mut vm).unwrap();
        bytes.extend(vm);
        (name, bytes)
    };
    let mut all = vec![read(image, "the disk".into())];
    for name in names {
        image.snapshot_load_tmp(None, Some(&name)).unwrap();
        all.push(read(image, String::from_utf8(name).unwrap()));
    }
    all
}

/// The same by qemu-img, which shows as much of a snapshot as the disk has now.
fn by_qemu(dir: &Path, names: &[(String, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut all = vec![];
    for (i, (name, bytes)) in names.iter().enumerate() {
        let state = format!("snapshot.name={name}");
        let mut args = vec!["convert", "-O", "raw", "o.qcow2", "out"];
        if i > 0 {
            args.splice(1..1, ["-l", &state]);
        }
        tool(dir, "qemu-img", &args);
        let mut read = std::fs::read(dir.join("out")).unwrap();
        read.truncate(bytes.len() - overlays::vm_bytes(name.as_bytes()));
        all.push(read);
    }
    std::fs::remove_file(dir.join("out")).unwrap();
    all
}

fn check(dir: &Path) {
    tool(dir, "qemu-img", &["check", "-q", "o.qcow2"]);
}

/// Clusters that leak; nothing else is wrong.
fn leaks(o: &Overlay) -> u64 {
    let out = std::process::Command::new("qemu-img")
        .args(["check", "--output=json", "o.qcow2"])
        .current_dir(o.dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    let sound = matches!(out.status.code(), Some(0 | 3));
    assert!(sound, "{said}\n{}", o.story);
    let number = said.split("\"leaks\": ").nth(1).unwrap_or("0");
    let digits = number.chars().take_while(char::is_ascii_digit);
    digits.collect::<String>().parse().unwrap()
}

/// Flatten, and see that nothing has changed but the backing file's name.
fn flattened(o: &Overlay) -> u64 {
    let dir = o.dir.path();
    let before = states(&o.path());
    let shown = by_qemu(dir, &before);
    let length = std::fs::metadata(o.path()).unwrap().len();
    // QEMU's shrink leaks the clusters of VM state.
    let leaked = leaks(o);
    let mut image = Image::open(&o.path(), OpenFlags::RDWR).unwrap();
    let most = image.flatten_estimate().unwrap();
    let header = || std::fs::read(o.path()).unwrap()[..72].to_vec();
    let layout = image.layout().unwrap();
    let (was, l1, reftable) = (header(), layout.l1.to_vec(), layout.reftable.to_vec());
    if let Err(e) = image.flatten() {
        panic!("{e}\n{}", o.story);
    }
    let (is, layout) = (header(), image.layout().unwrap());
    let differs = |field: std::ops::Range<usize>| was[field.clone()] != is[field];
    let differ = [
        differs(24..32),
        differs(40..48) || l1 != layout.l1,
        differs(48..56) || reftable != layout.reftable,
        differs(64..72),
    ];
    let c = layout.changed;
    let said = [c.size, c.l1, c.reftable, c.snapshots];
    assert_eq!(
        said, differ,
        "size, L1, refcount and snapshot table\n{}",
        o.story
    );
    assert_eq!(image.last_outcome(), Outcome::Done);
    assert_eq!(image.flatten_estimate().unwrap(), 0);
    image.close().unwrap();
    o.without_bases();
    let after = states(&o.path());
    for ((name, was), (_, is)) in before.iter().zip(&after) {
        let differ = was.iter().zip(is).position(|(a, b)| a != b);
        assert!(was == is, "{name} differs at {differ:?}\n{}", o.story);
    }
    assert_eq!(before.len(), after.len());
    let now = by_qemu(dir, &before);
    for (i, (was, is)) in shown.iter().zip(&now).enumerate() {
        let differ = was.iter().zip(is).position(|(a, b)| a != b);
        assert!(
            was == is,
            "qemu-img reads state {i} otherwise at {differ:?}\n{}",
            o.story
        );
    }
    let left = leaks(o);
    assert!(
        left <= leaked,
        "{left} clusters leak, not {leaked}\n{}",
        o.story
    );
    let info = tool(dir, "qemu-img", &["info", "o.qcow2"]);
    assert!(!info.contains("backing file"), "{info}");
    assert!(std::fs::metadata(o.path()).unwrap().len() < length + most + (4 << 20));
    most
}

#[test]
fn every_state_of_random_overlays_reads_as_before_without_the_files_behind() {
    if !toolbox() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    if let Some(seed) = number("FLATTEN_SEED") {
        let o = overlays::random(seed);
        println!("{}", o.story);
        flattened(&o);
        return;
    }
    let time = Duration::from_secs(number("FLATTEN_SECONDS").unwrap_or(8));
    let (start, mut images, mut bytes) = (Instant::now(), 0, 0);
    let mut seed = number("FLATTEN_FIRST").unwrap_or(1);
    while start.elapsed() < time {
        bytes += flattened(&overlays::random(seed));
        images += 1;
        seed += 1;
    }
    println!("{images} overlays flattened, {bytes} bytes at most to copy");
    assert!(images > 0 && bytes > 0);
}

#[test]
fn every_state_of_rare_shapes_reads_as_before_without_the_files_behind() {
    if toolbox() {
        overlays::shaped().iter().map(flattened).for_each(drop);
    }
}

fn toolbox() -> bool {
    let there = |p: &str| {
        std::process::Command::new(p)
            .arg("--version")
            .output()
            .is_ok()
    };
    let both = there("qemu-img") && there("qemu-io");
    if !both {
        println!("SKIPPED: no qemu-img and qemu-io here, so nothing was flattened");
    }
    both
}

/// Ten snapshots with one write between them have ten L2 tables, and lack the same clusters.
#[test]
fn a_cluster_that_many_states_lack_is_copied_once() {
    if !toolbox() {
        return;
    }
    let dir = scratch();
    let d = dir.path();
    tool(d, "qemu-img", &["create", "-q", "-f", "raw", "base", "8M"]);
    tool(
        d,
        "qemu-io",
        &["-f", "raw", "-c", "write -P 7 0 8M", "base"],
    );
    tool(
        d,
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "o.qcow2",
        ],
    );
    for n in 0..10 {
        io(
            d,
            "o.qcow2",
            &[format!("write -P {} {}k 64k", n + 1, n * 128)],
        );
        tool(
            d,
            "qemu-img",
            &["snapshot", "-c", &format!("s{n}"), "o.qcow2"],
        );
    }
    let o = Overlay {
        dir,
        story: String::new(),
    };
    let before = std::fs::metadata(o.path()).unwrap().len();
    // 128 clusters; the first state lacks all but the first.
    assert_eq!(flattened(&o), 127 << 16);
    let after = std::fs::metadata(o.path()).unwrap().len();
    let before = before.next_multiple_of(1 << 16);
    assert!(after <= before + (127 << 16), "{before} {after}");
    check(o.dir.path());
}
