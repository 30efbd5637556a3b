//! Damaged images: a verb fails and leaves every byte, or leaves no more damage than qemu-img does
//! on the same image.
//!
//! Reference images are damaged as the fuzzers damage them (`fuzz/src/mutate.rs`), from fixed seeds.
//! qemu-img runs a verb on one copy and the library on another, and `qemu-img check` counts the
//! corruptions of both. `HOSTILE_SECONDS=n` goes on with fresh seeds for so long; `HOSTILE_SEED=n`
//! runs one and says what happens; `HOSTILE_KEEP=folder` keeps the images of a failure.

#![allow(missing_docs)]

use qcow2_snapshot::{Error, Image, NewSnapshot, OpenFlags, Outcome};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use targets::mutate::{self, Rng};

#[allow(dead_code, clippy::unwrap_used)]
mod reference;

#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

/// Seeds of the run in `make check`: about 20 seconds.
const FIXED: u64 = 250;

/// What `qemu-img check` says: corruptions and errors, or that it cannot open the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Damage {
    Corruptions(u64),
    NotAnImage,
}

#[derive(Clone, Copy, Debug)]
enum Verb {
    Create,
    Goto,
    Delete,
}

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        let name = format!("hostile-{}", std::process::id());
        let dir = Path::new("/dev/shm").join(&name);
        if std::fs::create_dir_all(&dir).is_ok() {
            return Scratch(dir);
        }
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        Scratch(dir)
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The reference images that are small, each once.
fn seeds() -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("c-tests/images");
    let mut out = Vec::new();
    let folders = std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    for entry in folders.flatten() {
        for file in ["before.qcow2.gz", "after-4.qcow2.gz"] {
            let Ok(packed) = std::fs::read(entry.path().join(file)) else {
                continue;
            };
            let mut image = Vec::new();
            let read = flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut image);
            if read.is_ok() && image.len() <= 160 << 10 && image.starts_with(b"QFI\xfb") {
                out.push((
                    format!("{}/{file}", entry.file_name().to_string_lossy()),
                    image,
                ));
            }
        }
    }
    out.sort();
    reference::for_seeds(out)
}

/// Run qemu-img. `None`: it was killed, by a signal of its own or because it took too long.
fn qemu_img(args: &[&str]) -> Option<(bool, String)> {
    let out = Command::new("timeout")
        .args(["-s", "KILL", "20", "qemu-img"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("qemu-img: {e}"));
    match out.status.code() {
        None | Some(124 | 134 | 137 | 139) => None,
        Some(code) => Some((code == 0, String::from_utf8_lossy(&out.stdout).into_owned())),
    }
}

fn check(path: &str) -> Option<Damage> {
    let (_, text) = qemu_img(&["check", "-f", "qcow2", "--output=json", path])?;
    if !text.contains("\"check-errors\"") {
        return Some(Damage::NotAnImage);
    }
    let field = |name: &str| {
        let value = text.split(&format!("\"{name}\": ")).nth(1).unwrap_or("0");
        let digits: String = value.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().unwrap_or(0)
    };
    Some(Damage::Corruptions(
        field("corruptions") + field("check-errors"),
    ))
}

/// The start of a file; damage can make it very long.
fn head(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.take(16 << 20).read_to_end(&mut bytes);
    }
    bytes
}

/// Is every cluster in which the files differ a hole in `theirs`, and in `ours` what it was before
/// but for COPIED? Then qemu-img has punched something that we have kept, and nothing else differs.
fn only_kept(before: &[u8], ours: &[u8], theirs: &[u8]) -> bool {
    let cluster = 1
        << targets::oracle::Raw::new(before)
            .cluster_bits()
            .clamp(9, 21);
    let but_for_copied = |(i, (o, b)): (usize, (&u8, &u8))| match i % 8 {
        0 => o & 0x7f == b & 0x7f,
        _ => o == b,
    };
    let kept = |at: usize, o: &[u8]| {
        let was = before.get(at..at + o.len());
        was.is_some_and(|b| o.iter().zip(b).enumerate().all(but_for_copied))
    };
    ours.len() == theirs.len()
        && ours
            .chunks(cluster)
            .zip(theirs.chunks(cluster))
            .enumerate()
            .all(|(i, (o, t))| o == t || t.iter().all(|b| *b == 0) && kept(i * cluster, o))
}

/// Date of the last snapshot in an image, so that ours gets the same.
fn last_date(path: &Path) -> (u32, u32) {
    let file = head(path);
    let raw = targets::oracle::Raw::new(&file);
    let read = |at: u64, n: usize| targets::oracle::be(&file, at, n);
    let table = targets::oracle::entries(&read, raw.snapshots_offset(), raw.nb_snapshots());
    let at = table.last().map_or(u64::MAX, |e| e.at);
    let field = |by: u64| read(at.saturating_add(by), 4) as u32;
    (field(16), field(20))
}

/// IDs and names of the snapshots, where they can stand on a command line.
fn names(file: &[u8]) -> Vec<String> {
    let raw = targets::oracle::Raw::new(file);
    let read = |at: u64, n: usize| targets::oracle::be(file, at, n);
    let mut out = Vec::new();
    for e in targets::oracle::entries(&read, raw.snapshots_offset(), raw.nb_snapshots().min(64)) {
        let id =
            e.at.saturating_add(40 + read(e.at.saturating_add(36), 4).min(1024));
        let name = id.saturating_add(read(e.at.saturating_add(12), 2));
        for (from, to) in [(id, name), (name, e.end)] {
            let bytes = file.get(from as usize..to as usize).unwrap_or_default();
            let plain = bytes.len() < 200 && bytes.iter().all(u8::is_ascii_alphanumeric);
            if plain && !bytes.is_empty() {
                out.push(String::from_utf8_lossy(bytes).into_owned());
            }
        }
    }
    out
}

fn ours(path: &Path, verb: Verb, name: &[u8], date: (u32, u32)) -> (Result<(), Error>, Outcome) {
    let flags = OpenFlags::RDWR | OpenFlags::NO_BACKING;
    let mut image = match Image::open(path, flags) {
        Ok(image) => image,
        Err(e) => return (Err(e), Outcome::Unchanged),
    };
    let result = match verb {
        Verb::Create => image
            .snapshot_create(&NewSnapshot {
                name: name.to_vec(),
                date_sec: date.0,
                date_nsec: date.1,
                ..NewSnapshot::default()
            })
            .map(drop),
        Verb::Goto => image.snapshot_goto(name),
        // As qemu-img, which takes no ID here.
        Verb::Delete => image.snapshot_delete(None, Some(name)),
    };
    let outcome = image.last_outcome();
    let _ = image.close();
    (result, outcome)
}

#[derive(Default, Debug)]
struct Tally {
    cases: u64,
    both_fail: u64,
    only_ours_fails: u64,
    only_qemu_fails: u64,
    both_succeed: u64,
    qemu_killed: u64,
    same_bytes: u64,
    less_damage: u64,
    kept_what_qemu_punched: u64,
    /// Of these, where `qemu-img check` counts more in ours.
    excused: u64,
}

fn one(seeds: &[(String, Vec<u8>)], seed: u64, scratch: &Scratch, tally: &mut Tally, say: bool) {
    let mut rng = Rng::new(seed);
    let (from, image) = &seeds[rng.below(seeds.len() as u64) as usize];
    let mut image = image.clone();
    for _ in 0..1 + rng.below(3) {
        mutate::image(&mut image, &mut rng);
    }
    let raw = targets::oracle::Raw::new(&image);
    if raw.l1_size() > 1 << 16 || raw.nb_snapshots() > 4096 {
        return;
    }
    let verb = rng.pick(&[
        Verb::Create,
        Verb::Goto,
        Verb::Goto,
        Verb::Delete,
        Verb::Delete,
    ]);
    let ids = names(&image);
    let name = match verb {
        Verb::Create => "new".to_owned(),
        _ if ids.is_empty() => return,
        _ => ids[rng.below(ids.len() as u64) as usize].clone(),
    };
    let name = name.as_str();
    let (theirs, own) = (scratch.path("qemu.qcow2"), scratch.path("ours.qcow2"));
    for path in [&theirs, &own] {
        std::fs::write(path, &image).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    tally.cases += 1;
    let text = |p: &Path| p.display().to_string();
    let option = match verb {
        Verb::Create => "-c",
        Verb::Goto => "-a",
        Verb::Delete => "-d",
    };
    let before = check(&text(&theirs));
    let qemu = qemu_img(&["snapshot", option, name, &text(&theirs)]);
    let start = Instant::now();
    let (result, outcome) = ours(&own, verb, name.as_bytes(), last_date(&theirs));
    let took = start.elapsed();
    assert!(took < Duration::from_secs(10), "seed {seed}: {took:?}");
    let (Some(before), Some((qemu_ok, _))) = (before, qemu) else {
        tally.qemu_killed += 1;
        return check_unchanged(&own, &image, &result, outcome, seed);
    };
    let (Some(they), Some(we)) = (check(&text(&theirs)), check(&text(&own))) else {
        tally.qemu_killed += 1;
        return;
    };
    if say {
        println!("{from}: {verb:?} {name}: before {before:?}, qemu-img {qemu_ok} {they:?}, ours {result:?} {we:?}");
    }
    match (qemu_ok, result.is_ok()) {
        (true, true) => tally.both_succeed += 1,
        (true, false) => tally.only_ours_fails += 1,
        (false, true) => tally.only_qemu_fails += 1,
        (false, false) => tally.both_fail += 1,
    }
    let (we_wrote, they_wrote) = (head(&own), head(&theirs));
    let same = we_wrote == they_wrote;
    tally.same_bytes += u64::from(qemu_ok && result.is_ok() && same);
    tally.less_damage += u64::from(we < they);
    check_unchanged(&own, &image, &result, outcome, seed);
    let allowed = if qemu_ok { they } else { they.max(before) };
    // A table that qemu-img has punched away holds no reference that could be wrong. What is wrong
    // in it was so before.
    let kept = qemu_ok && we <= before && only_kept(&image, &we_wrote, &they_wrote);
    tally.kept_what_qemu_punched += u64::from(result.is_ok() && kept && !same);
    if result.is_ok() && we > allowed && kept {
        tally.excused += 1;
        if say || std::env::var_os("HOSTILE_SAY").is_some() {
            println!("excused: seed {seed} ({from}, {verb:?} {name}): {we:?}, {they:?}, before {before:?}");
        }
    } else if result.is_ok() && we > allowed {
        if let Some(keep) = std::env::var_os("HOSTILE_KEEP") {
            let keep = Path::new(&keep);
            let _ = std::fs::create_dir_all(keep);
            let _ = std::fs::write(keep.join(format!("{seed}-before.qcow2")), &image);
            let _ = std::fs::copy(&own, keep.join(format!("{seed}-ours.qcow2")));
            let _ = std::fs::copy(&theirs, keep.join(format!("{seed}-qemu.qcow2")));
        }
        panic!(
            "seed {seed} ({from}, {verb:?} {name}): {we:?} where qemu-img leaves {they:?} (before: {before:?}, qemu-img succeeds: {qemu_ok})"
        );
    }
}

/// A verb that fails has not changed a byte.
fn check_unchanged(
    own: &Path,
    image: &[u8],
    result: &Result<(), Error>,
    outcome: Outcome,
    seed: u64,
) {
    let io = matches!(result, Err(Error::Io { .. } | Error::Os { .. }));
    if result.is_err() && !io {
        assert_eq!(outcome, Outcome::Unchanged, "seed {seed}: {result:?}");
        let now = head(own);
        assert!(now == image, "seed {seed}: {result:?} leaves changes");
    }
}

#[test]
fn a_verb_on_a_damaged_image_fails_or_does_no_more_damage_than_qemu_img() {
    if Command::new("qemu-img")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        println!("SKIPPED: no qemu-img here: verbs on damaged images were not compared with it");
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    let (seeds, scratch, mut tally) = (seeds(), Scratch::new(), Tally::default());
    if let Some(seed) = number("HOSTILE_SEED") {
        one(&seeds, seed, &scratch, &mut tally, true);
    } else if let Some(seconds) = number("HOSTILE_SECONDS") {
        let start = Instant::now();
        let mut seed = 1_000_000 * u64::from(std::process::id());
        while start.elapsed() < Duration::from_secs(seconds) {
            one(&seeds, seed, &scratch, &mut tally, false);
            seed += 1;
        }
    } else {
        for seed in 1..=FIXED {
            one(&seeds, seed, &scratch, &mut tally, false);
        }
    }
    println!("{tally:?}");
}
