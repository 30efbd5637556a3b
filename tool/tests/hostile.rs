//! `export` of damaged and hostile images: a new file is right, or there is none and a message says why.
//!
//! The images are the reference images with some words changed: to others of the file, to such as make an
//! offset, a length or a count lead astray. Where the raw copy can be made, the qcow2 one, if there is one, is
//! the same disk; whatever is made has nothing that `qemu-img check` finds. `EXPORT_FUZZ_SECONDS=n` runs for n
//! seconds (6 without it), `EXPORT_FUZZ_SEED=n` makes one image again.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[allow(dead_code)]
#[path = "../../tests/differential/rng.rs"]
mod rng;

use common::{cases, prepare, said, unpacked, Said};
use rng::Rng;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

#[derive(Default, Debug)]
struct Counts {
    images: u64,
    raw: u64,
    qcow2: u64,
    compared: u64,
    overlays: u64,
    chains: u64,
    refused: u64,
}

/// An image with some words that are not its own.
fn mutated(rng: &mut Rng, image: &mut [u8]) -> String {
    let words = image.len() as u64 / 8;
    let word = |image: &[u8], n: u64| {
        let at = n as usize * 8;
        u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
    };
    let mut story = String::new();
    for _ in 0..1 + rng.below(4) {
        let full: Vec<u64> = (0..words).filter(|n| word(image, *n) != 0).collect();
        // Few words say anything; those of the header seldom let an image be opened at all.
        let n = match rng.below(8) {
            0 => rng.below(14),
            1 => rng.below(words),
            _ => *rng.pick(&full),
        };
        let was = word(image, n);
        let new = match rng.below(9) {
            0 => word(image, *rng.pick(&full)),
            1 => was ^ 1 << rng.below(64),
            2 => was ^ 1 << 62,
            3 => was & !(1 << 63) | 1 << 62 | rng.below(1 << 16) << 46,
            4 => was.wrapping_add(512 << rng.below(8)),
            5 => was ^ (1 + rng.below(255)) << (8 * rng.below(8)),
            6 => rng.below(image.len() as u64),
            7 => 1 << 63 | rng.below(image.len() as u64) & !511,
            _ => *rng.pick(&[0, 1, u64::MAX, 1 << 62, i64::MAX as u64, 1 << 63]),
        };
        story += &format!("word at {:#x}: {was:#x} -> {new:#x}\n", n * 8);
        image[n as usize * 8..][..8].copy_from_slice(&new.to_be_bytes());
    }
    story
}

/// With a bound for the file's size: a table may name one cluster a million times.
fn export(folder: &Path, words: &str) -> Said {
    let script = format!(
        "ulimit -f 65536; exec timeout 100 {} export {words}",
        common::tool().display()
    );
    said(Command::new("sh").args(["-c", &script]).current_dir(folder))
}

fn names(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = names
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Was it made? If not, there is a message and nothing else.
fn made(folder: &Path, got: &Said, before: &[String]) -> Result<bool, String> {
    match got.code {
        Some(0) if got.out.is_empty() && got.err.is_empty() => Ok(true),
        Some(1) if got.out.is_empty() && got.err.starts_with("qcow2-snapshot: ") => {
            match names(folder) == before {
                true => Ok(false),
                false => Err(format!("left behind: {:?}; {got:?}", names(folder))),
            }
        }
        _ => Err(format!("{got:?}")),
    }
}

fn must(folder: &Path, words: &str) -> Result<(), String> {
    let got = said(
        Command::new("qemu-img")
            .args(words.split(' '))
            .current_dir(folder),
    );
    match got.code {
        Some(0) => Ok(()),
        _ => Err(format!("qemu-img {words}: {got:?}")),
    }
}

fn one(case: &(String, PathBuf), seed: u64, counts: &mut Counts) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let folder = tempfile::Builder::new()
        .prefix("hostile.")
        .tempdir_in("/dev/shm");
    let folder = folder.or_else(|_| tempfile::tempdir()).unwrap();
    let images = prepare(&case.1, folder.path());
    let folder = folder.path();
    let image: &PathBuf = rng.pick(&images);
    let mut image = unpacked(image);
    if image.len() < 1024 {
        return Ok(());
    }
    let story = mutated(&mut rng, &mut image);
    let explained = |e: String| format!("EXPORT_FUZZ_SEED={seed} {}: {e}\n{story}", case.0);
    std::fs::write(folder.join("i"), &image).unwrap();
    counts.images += 1;
    let before = names(folder);
    let mut first = true;
    for id in ["1", "2"] {
        let raw =
            made(folder, &export(folder, &format!("i {id} raw")), &before).map_err(explained)?;
        let mut with = before.clone();
        with.extend(raw.then(|| "raw".to_owned()));
        with.sort();
        let got = export(folder, &format!("-O qcow2 i {id} q"));
        let qcow2 = made(folder, &got, &with).map_err(explained)?;
        counts.raw += u64::from(raw);
        counts.qcow2 += u64::from(qcow2);
        counts.refused += u64::from(!raw) + u64::from(!qcow2);
        if qcow2 {
            must(folder, "check -q q").map_err(explained)?;
        }
        if qcow2 && raw {
            must(folder, "compare -q -f raw -F qcow2 raw q").map_err(explained)?;
            counts.compared += 1;
        }
        if raw && first {
            // Over itself, and the other way round: whatever the tables say, the new file is sound.
            let with = names(folder);
            let got = export(folder, &format!("--since {id} -b raw -F raw i 2 over"));
            if made(folder, &got, &with).map_err(explained)? {
                must(folder, "check -q over").map_err(explained)?;
                counts.overlays += 1;
            }
            first = false;
        }
        for name in ["raw", "q", "over"] {
            let _ = std::fs::remove_file(folder.join(name));
        }
    }
    let got = export(folder, "--all all i");
    if made(folder, &got, &before).map_err(explained)? {
        counts.chains += 1;
        for name in names(&folder.join("all")) {
            if name != "index.json" {
                must(folder, &format!("check -q all/{name}")).map_err(explained)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_hostile_image_is_exported_as_it_reads_or_refused() {
    if common::qemu_img("export of hostile images").is_none() {
        return;
    }
    use std::hash::BuildHasher;
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let fresh = std::collections::hash_map::RandomState::new().hash_one(0);
    let single = number("EXPORT_FUZZ_SEED");
    let first = single.unwrap_or(fresh % 1_000_000_000 * 1000);
    let time = Duration::from_secs(number("EXPORT_FUZZ_SECONDS").unwrap_or(6));
    let all = cases();
    let (start, mut counts, mut failed) = (Instant::now(), Counts::default(), Vec::new());
    for seed in first.. {
        let case = &all[(seed % all.len() as u64) as usize];
        if let Err(e) = one(case, seed, &mut counts) {
            failed.push(e);
        }
        if single.is_some() || start.elapsed() > time || failed.len() > 4 {
            break;
        }
    }
    eprintln!(
        "hostile exports, from seed {first}: {counts:?}; {} failed",
        failed.len()
    );
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
    assert!(single.is_some() || counts.refused > 0 && counts.compared > 0);
}
