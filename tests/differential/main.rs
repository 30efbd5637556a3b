//! The differential test: every byte as qemu-img leaves it.
//!
//! A seeded generator makes an image with qemu-img, lets qemu-io play the guest, and runs random
//! chains of create, delete and goto: qemu-img on one copy, the C API on another, and the two files
//! are compared (length and bytes) after every verb. A difference prints the seed, the verb and the
//! structure each byte belongs to, and keeps the files.
//!
//! | environment | |
//! |---|---|
//! | (none) | the fixed cases, fixed seeds for about 1,000 verbs, and a few fresh seeds |
//! | `DIFF_SEED=n` | this seed only |
//! | `DIFF_SECONDS=n` | a soak: fresh seeds for n seconds, then a line of counts for docs/interop.md |
//! | `DIFF_SETS=n` | after each round of verbs n sets of snapshots are deleted at once (else mostly one) |
//! | `DIFF_SELF=1` | qemu-img on both sides: the driver tests itself |
//! | `DIFF_LIB=path` | the shared library to load (default: the one cargo built with this test) |
//! | `DIFF_ALL=1` | the fixed cases in full (65,536 snapshots: some minutes of qemu-img) |
//! | `DIFF_KEEP=dir` | where files of a difference go (default: qcow2-diff in the temporary folder) |
//! | `DIFF_JOBS=n` | seeds at a time (default 2) |
//!
//! An argument selects fixed cases by part of their name; `random` selects the seeds.

mod cases;
mod chain;
mod craft;
mod files;
mod generate;
mod ours;
mod qemu;
mod qimg;
mod rng;
mod run;

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use run::{Ctx, Stats};

/// The default run's fixed seeds: 1 to this one, about 1,000 verbs.
const FIXED_SEEDS: u64 = 64;
const FRESH_SEEDS: u64 = 8;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    match text.parse() {
        Ok(n) => Some(n),
        Err(_) => {
            eprintln!("{name}={text} is not a number");
            std::process::exit(2);
        }
    }
}

fn fresh_seed() -> u64 {
    let t = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64);
    // Short enough to type; far from the fixed seeds, which start at 1.
    1_000_000_000 + rng::Rng::new(t ^ u64::from(std::process::id())).next() % 1_000_000_000 * 1_000
}

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    stats: Stats,
}

impl Tally {
    fn add(&mut self, t: &Tally) {
        self.passed += t.passed;
        self.failed += t.failed;
        self.skipped += t.skipped;
        self.stats.add(&t.stats);
    }
}

fn one_case(ctx: &Ctx, name: &str, case: cases::Case) -> Tally {
    let at = Instant::now();
    let (stats, r) = cases::run(ctx, name, case);
    let mut t = Tally {
        stats,
        ..Default::default()
    };
    match r {
        Ok(None) => {
            t.passed = 1;
            println!(
                "ok      {name} ({} verbs, {:.1} s)",
                t.stats.verbs(),
                at.elapsed().as_secs_f64()
            );
        }
        Ok(Some(why)) => {
            t.skipped = 1;
            println!("SKIPPED {name}: {why}");
        }
        Err(e) => {
            t.failed = 1;
            println!("FAILED  {name}: {e}");
        }
    }
    t
}

/// Run seeds `first..` on some threads until `stop` says so (given how many were begun).
fn seeds(ctx: &Ctx, first: u64, jobs: u64, stop: impl Fn(u64) -> bool + Sync) -> (Tally, u64) {
    let next = AtomicU64::new(first);
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|s| {
        for _ in 0..jobs {
            s.spawn(|| loop {
                let seed = next.load(Ordering::SeqCst);
                if stop(seed - first) {
                    break;
                }
                if next.compare_exchange(seed, seed + 1, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                    continue;
                }
                let (stats, r) = chain::run_seed(ctx, seed);
                let Ok(mut t) = tally.lock() else { break };
                t.stats.add(&stats);
                match r {
                    Ok(()) => t.passed += 1,
                    Err(e) => {
                        t.failed += 1;
                        println!("FAILED {e}  run again: DIFF_SEED={seed} cargo test --test differential\n");
                    }
                }
            });
        }
    });
    let last = next.load(Ordering::SeqCst);
    (
        tally.into_inner().unwrap_or_default(),
        last.max(first + 1) - 1,
    )
}

fn print_stats(s: &Stats) {
    let errors: Vec<String> = s
        .same_errors
        .iter()
        .map(|(e, n)| format!("{n} x {}", std::io::Error::from_raw_os_error(*e)))
        .collect();
    println!(
        "{} verbs: {} create, {} goto, {} delete; {} of them on a handle kept open; {} guest rounds",
        s.verbs(),
        s.creates,
        s.gotos,
        s.deletes,
        s.on_kept_handle,
        s.guest
    );
    println!(
        "  {} sets of {} snapshots deleted at once, by qemu-img one by one",
        s.sets.0, s.sets.1
    );
    println!(
        "  failed alike on both sides: {}",
        if errors.is_empty() {
            "none".into()
        } else {
            errors.join(", ")
        }
    );
    let crafts: Vec<String> = s.crafts.iter().map(|(k, n)| format!("{n} x {k}")).collect();
    println!(
        "  crafted: {}",
        if crafts.is_empty() {
            "none".into()
        } else {
            crafts.join(", ")
        }
    );
    for (why, n) in &s.not_compared {
        println!("  NOT COMPARED: {n} x {why}");
    }
}

fn text_of(command: &str, args: &[&str]) -> Option<String> {
    let o = Command::new(command).args(args).output().ok()?;
    o.status.success().then(|| {
        String::from_utf8_lossy(&o.stdout)
            .lines()
            .next()
            .unwrap_or("")
            .to_string()
    })
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|a| a == "--list") {
        return;
    }
    let filter: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| filter.is_empty() || filter.iter().any(|f| name.contains(f.as_str()));

    let Some(version) = text_of("qemu-img", &["--version"]) else {
        println!("SKIPPED: there is no qemu-img here, so NOTHING was compared with QEMU (Debian: apt-get install qemu-utils)");
        println!("0 passed, 0 failed, 1 skipped");
        return;
    };
    let lib = if std::env::var_os("DIFF_SELF").is_some() {
        println!("qemu-img against itself: this tests the driver, not the library");
        None
    } else {
        match ours::Lib::find().and_then(|p| ours::Lib::load(&p).map(|l| (p, l))) {
            Ok((p, l)) => {
                println!("library: {}", p.display());
                Some(l)
            }
            Err(e) => {
                println!("FAILED to load the library: {e}\n0 passed, 1 failed, 0 skipped");
                std::process::exit(1);
            }
        }
    };
    println!("against: {version}");
    let shm = PathBuf::from("/dev/shm");
    let base = if shm.is_dir() && std::fs::write(shm.join(".qcow2-diff"), b"").is_ok() {
        shm
    } else {
        std::env::temp_dir()
    };
    let ctx = Ctx {
        lib,
        scratch: base.join(format!("qcow2-diff-{}", std::process::id())),
        keep: std::env::var_os("DIFF_KEEP")
            .map_or_else(|| std::env::temp_dir().join("qcow2-diff"), PathBuf::from),
    };
    let jobs = number("DIFF_JOBS").unwrap_or(2).clamp(1, 16);
    let start = Instant::now();
    let mut all = Tally::default();

    if let Some(seed) = number("DIFF_SEED") {
        all.add(&seeds(&ctx, seed, 1, |n| n >= 1).0);
    } else if let Some(seconds) = number("DIFF_SECONDS") {
        let first = number("DIFF_START").unwrap_or_else(fresh_seed);
        println!("soak of {seconds} s from seed {first}");
        let end = start + Duration::from_secs(seconds);
        let (t, last) = seeds(&ctx, first, jobs, |_| Instant::now() >= end);
        let commit =
            text_of("git", &["rev-parse", "--short=12", "HEAD"]).unwrap_or("unknown".into());
        let dirty =
            text_of("git", &["status", "--porcelain", "-uno"]).is_some_and(|s| !s.is_empty());
        println!(
            "soak: {} verbs on {} images, {} differences, {} not compared, seeds {first}..={last}, {} s, commit {commit}{}, {version}",
            t.stats.verbs(),
            t.passed + t.failed,
            t.failed,
            t.stats.not_compared.values().sum::<u64>(),
            start.elapsed().as_secs(),
            if dirty { " with changes" } else { "" },
        );
        all.add(&t);
    } else {
        let cases: Vec<_> = cases::ALL.iter().filter(|c| wanted(c.0)).collect();
        let next = AtomicU64::new(0);
        let tally = Mutex::new(Tally::default());
        std::thread::scope(|s| {
            for _ in 0..jobs {
                s.spawn(|| {
                    while let Some((name, case)) =
                        cases.get(next.fetch_add(1, Ordering::SeqCst) as usize)
                    {
                        let t = one_case(&ctx, name, *case);
                        let Ok(mut all) = tally.lock() else { break };
                        all.add(&t);
                    }
                });
            }
        });
        all.add(&tally.into_inner().unwrap_or_default());
        if wanted("random") {
            let (t, last) = seeds(&ctx, 1, jobs, |n| n >= FIXED_SEEDS);
            println!(
                "fixed seeds 1..={last}: {} verbs, {} images failed",
                t.stats.verbs(),
                t.failed
            );
            all.add(&t);
            let first = fresh_seed();
            println!("fresh seeds {first}..={}", first + FRESH_SEEDS - 1);
            all.add(&seeds(&ctx, first, jobs, |n| n >= FRESH_SEEDS).0);
        }
    }
    let _ = std::fs::remove_dir_all(&ctx.scratch);
    print_stats(&all.stats);
    println!("{:.1} s", start.elapsed().as_secs_f64());
    println!(
        "{} passed, {} failed, {} skipped",
        all.passed, all.failed, all.skipped
    );
    if all.failed > 0 {
        std::process::exit(1);
    }
}
