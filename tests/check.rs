//! `Image::check` counts and says what `qemu-img check` counts and says.
//!
//! On the reference images, on images of the differential test's generator, and on all of these
//! damaged as the fuzzers damage them (`fuzz/src/mutate.rs`). `CHECK_SECONDS=n` goes on with fresh
//! seeds for so long; `CHECK_SEED=n` runs one and says what was found; `CHECK_KEEP=folder` keeps the
//! image of a difference.

#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

use qcow2_snapshot::{CheckResult, Fix, Image, OpenFlags};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use targets::mutate::{self, Rng};

#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

mod reference;

#[allow(dead_code)]
#[path = "differential"]
mod differential {
    pub mod files;
    pub mod generate;
    pub mod qemu;
    pub mod qimg;
    pub mod rng;
}

/// Seeds of the run in `make check`.
const FIXED: u64 = 400;
const GENERATED: u64 = 24;

struct Scratch(PathBuf);

impl Scratch {
    fn new(what: &str) -> Scratch {
        let base = ["/dev/shm", "/tmp"]
            .into_iter()
            .find(|d| Path::new(d).is_dir());
        let name = format!("check-{what}-{}", std::process::id());
        let dir = Path::new(base.unwrap_or(".")).join(name);
        std::fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        Scratch(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a check came to: the numbers, and how often each thing was said.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Done(CheckResult, BTreeMap<String, u64>),
    /// It could not be ended; the errno's text.
    Failed(String),
    /// The image was refused.
    Refused(String),
    /// qemu-img took too long, or an assertion in it failed.
    None,
}

fn said(lines: impl Iterator<Item = String>) -> BTreeMap<String, u64> {
    let mut said = BTreeMap::new();
    for line in lines {
        *said.entry(line).or_default() += 1;
    }
    said
}

fn theirs(path: &Path) -> Answer {
    let mut head = [0; 36];
    let mut file = std::fs::File::open(path).unwrap();
    let _ = file.read(&mut head).unwrap();
    let name = path.display();
    let secret = if head[35] == 2 {
        ",\"encrypt\":{\"format\":\"luks\",\"key-secret\":\"s\"}"
    } else if head[35] == 1 {
        ",\"encrypt\":{\"format\":\"aes\",\"key-secret\":\"s\"}"
    } else {
        ""
    };
    let image = format!(
        "json:{{\"driver\":\"qcow2\",\"backing\":null,\"file\":{{\"driver\":\"file\",\"filename\":\"{name}\"}}{secret}}}"
    );
    let out = Command::new("timeout")
        .args(["-s", "KILL", "20", "qemu-img", "check", "--output=json"])
        .args(["--object", "secret,id=s,data=abc", &image])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("qemu-img: {e}"));
    if !matches!(out.status.code(), Some(0..=63)) {
        return Answer::None;
    }
    let text = String::from_utf8_lossy(&out.stdout);
    let stderr = String::from_utf8_lossy(&out.stderr);
    if !text.contains("\"check-errors\"") {
        let last = stderr.trim().lines().last().unwrap_or_default();
        return match last.strip_prefix("qemu-img: Check failed: ") {
            Some(why) => Answer::Failed(why.to_owned()),
            None => Answer::Refused(last.to_owned()),
        };
    }
    let field = |name: &str| {
        let value = text.split(&format!("\"{name}\": ")).nth(1).unwrap_or("0");
        let digits: String = value.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().unwrap_or(0)
    };
    let result = CheckResult {
        corruptions: field("corruptions"),
        leaks: field("leaks"),
        check_errors: field("check-errors"),
        corruptions_fixed: 0,
        leaks_fixed: 0,
        image_end_offset: field("image-end-offset"),
        total_clusters: field("total-clusters"),
        allocated_clusters: field("allocated-clusters"),
        fragmented_clusters: field("fragmented-clusters"),
        compressed_clusters: field("compressed-clusters"),
    };
    // What it says about opening the image, and a hint that follows another line.
    let aside = [
        "Use qemu-img amend to increase",
        "qemu-img: ",
        "Some clusters may be leaked, run",
        "Could not",
    ];
    let lines = stderr
        .lines()
        .filter(|l| !aside.iter().any(|a| l.starts_with(a)) && !l.is_empty());
    Answer::Done(result, said(lines.map(str::to_owned)))
}

fn ours(path: &Path, memory: Option<u64>) -> Answer {
    let flags = OpenFlags::CHECK | OpenFlags::NO_LOCK;
    let mut image = match Image::open(path, flags) {
        Ok(image) => image,
        Err(e) => return Answer::Refused(e.to_string()),
    };
    if let Some(memory) = memory {
        image.limit_refcount_memory(memory);
    }
    let mut lines = Vec::new();
    match image.check(Fix::NONE, &mut |line| lines.push(line.to_owned())) {
        Ok(result) => Answer::Done(result, said(lines.into_iter())),
        Err(e) => {
            let text = std::io::Error::from_raw_os_error(e.errno()).to_string();
            Answer::Failed(text.split(" (os error").next().unwrap().to_owned())
        }
    }
}

#[derive(Debug, Default)]
struct Tally {
    equal: u64,
    equal_and_clean: u64,
    failed_both: u64,
    refused_both: u64,
    refused_there: u64,
    ended_there: u64,
    crashed_there: u64,
}

/// Both look at the image.
fn compare(path: &Path, tally: &mut Tally) -> Result<(), String> {
    let mine = ours(path, None);
    // In a little memory there are many windows: the answer is the same.
    let little = ours(path, Some(64));
    if mine != little {
        return Err(format!("with little memory:\n{little:?}\nours:\n{mine:?}"));
    }
    let qemu = theirs(path);
    let slot = match (&mine, &qemu) {
        (_, Answer::None) => &mut tally.crashed_there,
        (Answer::Done(a, _), Answer::Done(..)) if mine == qemu => {
            if a.corruptions + a.leaks + a.check_errors == 0 {
                tally.equal_and_clean += 1;
            }
            &mut tally.equal
        }
        (Answer::Refused(_), Answer::Refused(_)) => &mut tally.refused_both,
        (Answer::Failed(a), Answer::Failed(b)) if a == b => &mut tally.failed_both,
        // It gives up where we go on and say so.
        (Answer::Done(a, _), Answer::Failed(_)) if a.check_errors != 0 => &mut tally.ended_there,
        // Its bitmaps, its key, its data file.
        (Answer::Done(..) | Answer::Failed(_), Answer::Refused(_)) => &mut tally.refused_there,
        _ => return Err(differ(&mine, &qemu)),
    };
    *slot += 1;
    Ok(())
}

fn differ(mine: &Answer, qemu: &Answer) -> String {
    let (Answer::Done(a, x), Answer::Done(b, y)) = (mine, qemu) else {
        return format!("ours: {mine:?}\nqemu-img: {qemu:?}");
    };
    let mut text = String::new();
    if a != b {
        text += &format!("ours: {a:?}\nqemu: {b:?}\n");
    }
    let only = |of: &BTreeMap<String, u64>, not: &BTreeMap<String, u64>| {
        let lines = of.iter().filter(|(l, n)| not.get(*l) != Some(n));
        let lines: Vec<_> = lines
            .map(|(l, n)| format!("  {n} x {l}"))
            .take(20)
            .collect();
        lines.join("\n")
    };
    text + &format!("only ours:\n{}\nonly qemu:\n{}", only(x, y), only(y, x))
}

fn keep(path: &Path, what: &str) {
    if let Some(folder) = std::env::var_os("CHECK_KEEP") {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::copy(path, Path::new(&folder).join(what)).unwrap();
    }
}

fn seconds() -> Option<Duration> {
    let text = std::env::var("CHECK_SECONDS").ok()?;
    Some(Duration::from_secs(
        text.parse().expect("CHECK_SECONDS is a number"),
    ))
}

fn one_seed() -> Option<u64> {
    let text = std::env::var("CHECK_SEED").ok()?;
    Some(text.parse().expect("CHECK_SEED is a number"))
}

/// The seeds of this run: the fixed ones, one that was asked for, or fresh ones for a while.
fn seeds(fixed: u64) -> Box<dyn Iterator<Item = u64>> {
    if let Some(seed) = one_seed() {
        return Box::new(std::iter::once(seed));
    }
    let Some(time) = seconds() else {
        return Box::new(1..=fixed);
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let first = u64::from(now.unwrap().subsec_nanos()) << 32;
    let start = Instant::now();
    Box::new((first..).take_while(move |_| start.elapsed() < time))
}

#[test]
fn reference_images_are_judged_as_by_qemu_img() {
    let scratch = Scratch::new("reference");
    let (mut tally, mut bad) = (Tally::default(), Vec::new());
    for (name, image) in reference::images(64 << 20) {
        let path = scratch.0.join("image.qcow2");
        std::fs::write(&path, &image).unwrap();
        if let Err(e) = compare(&path, &mut tally) {
            keep(&path, &name.replace('/', "-"));
            bad.push(format!("{name}:\n{e}"));
        }
    }
    println!("reference images: {tally:?}");
    assert!(bad.is_empty(), "{}", bad.join("\n\n"));
}

/// QEMU asks for the count of an L2 table first, and judges no entry of it where that cannot be read.
#[test]
fn flags_are_judged_as_by_qemu_img_where_refcount_blocks_cannot_be_read() {
    let scratch = Scratch::new("blocks");
    let (mut tally, mut bad, mut tried) = (Tally::default(), Vec::new(), 0);
    let number = |b: &[u8], at: usize| u64::from_be_bytes(b[at..at + 8].try_into().unwrap());
    let word = |b: &[u8], at: usize| u32::from_be_bytes(b[at..at + 4].try_into().unwrap()) as usize;
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    for (name, image) in reference::images(1 << 20) {
        let (cluster, reftable) = (1 << word(&image, 20), number(&image, 48) as usize);
        let entries = (cluster * word(&image, 56) / 8).min((image.len() - reftable) / 8);
        let blocks: Vec<usize> = (0..entries)
            .filter(|i| number(&image, reftable + i * 8) != 0)
            .collect();
        if blocks.len() < 2 || number(&image, 72) & 16 != 0 {
            continue;
        }
        let mut flipped = image.clone();
        let l1 = number(&image, 40) as usize;
        for i in 0..word(&image, 36) {
            let table = (number(&image, l1 + i * 8) & OFFSET) as usize;
            let end = (table + cluster).min(image.len());
            for at in (table..end).step_by(8).filter(|_| table != 0) {
                let entry = number(&image, at);
                if entry & OFFSET != 0 && entry >> 62 & 1 == 0 {
                    flipped[at] ^= 0x80;
                }
            }
        }
        for block in blocks.into_iter().take(6) {
            let mut image = flipped.clone();
            let at = reftable + block * 8;
            image[at..at + 8].copy_from_slice(&(u64::MAX - 511).to_be_bytes());
            let path = scratch.0.join("image.qcow2");
            std::fs::write(&path, &image).unwrap();
            tried += 1;
            if let Err(e) = compare(&path, &mut tally) {
                bad.push(format!("{name}, block {block}:\n{e}"));
            }
        }
    }
    println!("without a refcount block: {tally:?}");
    assert!(tried > 10, "{tried}");
    assert!(bad.is_empty(), "{}", bad.join("\n\n"));
}

#[test]
fn damaged_images_are_judged_as_by_qemu_img() {
    let scratch = Scratch::new("damaged");
    let images = reference::for_seeds(reference::images(160 << 10));
    let (mut tally, mut bad) = (Tally::default(), Vec::new());
    for seed in seeds(FIXED) {
        let mut rng = Rng::new(seed);
        let (name, image) = &images[rng.below(images.len() as u64) as usize];
        let mut image = image.clone();
        for _ in 0..1 + rng.below(3) * rng.below(3) {
            mutate::image(&mut image, &mut rng);
        }
        let path = scratch.0.join("image.qcow2");
        std::fs::write(&path, &image).unwrap();
        if one_seed().is_some() {
            println!("{name}: {:?}\n{:?}", ours(&path, None), theirs(&path));
        }
        if let Err(e) = compare(&path, &mut tally) {
            keep(&path, &format!("damaged-{seed}.qcow2"));
            bad.push(format!("seed {seed}, {name}:\n{e}"));
        }
    }
    println!("damaged images: {tally:?}");
    assert!(bad.is_empty(), "{}", bad.join("\n\n"));
}

#[test]
fn generated_images_are_judged_as_by_qemu_img() {
    use differential::{generate, qemu::Tools, rng};
    let (mut tally, mut bad) = (Tally::default(), Vec::new());
    for seed in seeds(GENERATED) {
        let scratch = Scratch::new("generated");
        let mut tools = Tools::new(&scratch.0);
        let mut rng = rng::Rng::new(seed);
        let mut spec = generate::Spec::new(&mut rng);
        let path = scratch.0.join(generate::QEMU);
        let made = (|| {
            spec.build(&mut rng, &mut tools)?;
            for round in 0..rng.range(1, 4) {
                spec.guest(&mut rng, &mut tools)?;
                let name = format!("s{round}");
                let _ = tools.snapshot("-c", name.as_bytes(), generate::QEMU)?;
            }
            spec.guest(&mut rng, &mut tools)
        })();
        if let Err(e) = made {
            println!("seed {seed}: {e}");
            continue;
        }
        let mut ways = vec![compare(&path, &mut tally)];
        if std::fs::metadata(&path).unwrap().len() < 4 << 20 {
            let whole = std::fs::read(&path).unwrap();
            for n in 0..4 {
                let mut image = whole.clone();
                mutate::image(&mut image, &mut Rng::new(seed << 3 | n));
                std::fs::write(&path, &image).unwrap();
                ways.push(compare(&path, &mut tally));
            }
        }
        for e in ways.into_iter().filter_map(Result::err) {
            keep(&path, &format!("generated-{seed}.qcow2"));
            bad.push(format!("seed {seed}:\n{e}"));
        }
    }
    println!("generated images: {tally:?}");
    assert!(bad.is_empty(), "{}", bad.join("\n\n"));
}
