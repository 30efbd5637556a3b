//! A repair leaves nothing worse at any moment, and in the end an image that `qemu-img check` finds good,
//! or a stated reason.
//!
//! Reference images damaged as the fuzzers damage them, from fixed seeds. `CHECK_SECONDS=n` goes on with
//! fresh seeds for so long; `CHECK_SEED=n` runs one; `CHECK_KEEP=folder` keeps the images of a failure.

#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::trace::{crash_images, CrashPlan};
use qcow2_snapshot::io::trace::{FaultPlan, TraceStorage};
use qcow2_snapshot::{CheckResult, Error, Fix, Image, OpenFlags};
use states::{no_worse, Raw};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use targets::mutate::{self, Rng};

#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

mod reference;

#[path = "repair/states.rs"]
mod states;

#[path = "repair/dropped.rs"]
mod dropped;

/// Seeds of the run in `make check`.
const FIXED: u64 = 300;
const CUT: u64 = 60;

fn flags() -> OpenFlags {
    OpenFlags::RDWR | OpenFlags::CHECK | OpenFlags::NO_LOCK
}

fn all() -> Fix {
    Fix::LEAKS | Fix::ERRORS
}

/// The small reference images.
fn reference() -> Vec<(String, Vec<u8>)> {
    reference::for_seeds(reference::images(160 << 10))
}

/// Seeds of soaks that found something, with the reference images of 2026-11-26.
const FOUND: &[u64] = &[
    534_105_872_184_377_572,
    483_790_244_412_391_756,
    // A new snapshot table where an L1 entry points behind the end of the file.
    1_396_303_226_663_339_808,
    // Counts written into a refcount block that lies in a table which the end of the file cuts off.
    1_396_303_226_663_340_590,
    // A second repair could not write the snapshot table, and ended there.
    3_037_846_556_192_538_727,
    // An entry mended in an L2 table that shares its cluster with a snapshot table which the end of the
    // file cuts off.
    3_053_221_671_528_824_884,
    // The same where a table was read once and could not be read again.
    3_053_221_671_528_825_304,
    // Counts raised in a refcount block that is an L2 table of a state whose L1 table could not be read.
    2_882_238_722_827_354_145,
    2_882_238_722_827_354_810,
    // An L2 table in the refcount table's cluster, while the refcount structures need not be made anew otherwise.
    3_937_640_800_250_234_701,
    // A snapshot table that has to be left: a repair ends with that, and no more with EFBIG.
    3_650_081_663_062_376_658,
    // A second repair found more to do: the first ended when its numbers were the same, and what was wrong was not.
    2_348_041_475_213_758_648,
    2_348_041_475_213_764_239,
    // A refcount table that grew was freed, and the new snapshot table was put where the search began anew.
    2_465_361_448_956_594_254,
    // COPIED was set for a cluster behind the end of the file, whose references are not counted and were two.
    1_564_938_103_859_185_536,
    // An L1 entry that leads behind the end of the file, unless the repair makes it longer.
    3_355_805_278_627_955_823,
    // The active L1 table lies in what a damaged snapshot table calls its extra data.
    3_516_349_296_431_600_879,
    // COPIED of the last cluster that the file does not reach, whose count was left as it was.
    893_730_244_156_991_989,
    // Counts written into what a snapshot of 4 billion entries calls its L1 table.
    893_730_244_156_994_396,
    // Extra data of an entry that is dropped as a whole was taken to be counted, and a shared L2 table to be alone.
    614_486_747_769_745_832,
    // A table of names that the file does not hold covers the active L1 table once a cut repair has made the file longer.
    614_486_747_769_758_702,
];

fn seeds(fixed: u64) -> Box<dyn Iterator<Item = u64>> {
    if let Ok(seed) = std::env::var("CHECK_SEED") {
        return Box::new(std::iter::once(seed.parse().unwrap()));
    }
    let Ok(time) = std::env::var("CHECK_SECONDS") else {
        return Box::new((1..=fixed).chain(FOUND.iter().copied()));
    };
    let time = Duration::from_secs(time.parse().unwrap());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let first = u64::from(now.unwrap().subsec_nanos()) << 32;
    let start = Instant::now();
    Box::new((first..).take_while(move |_| start.elapsed() < time))
}

fn damaged(images: &[(String, Vec<u8>)], seed: u64) -> (String, Vec<u8>) {
    let mut rng = Rng::new(seed);
    let (name, image) = &images[rng.below(images.len() as u64) as usize];
    let mut image = image.clone();
    for _ in 0..1 + rng.below(3) * rng.below(3) {
        mutate::image(&mut image, &mut rng);
    }
    (format!("seed {seed}, {name}"), image)
}

/// A file in memory that outlives the handle.
type Kept = std::rc::Rc<std::cell::RefCell<Vec<u8>>>;

fn open(bytes: Vec<u8>) -> Result<(Image, Kept), Error> {
    let storage = MemoryStorage::new(bytes);
    let handle = storage.handle();
    Ok((Image::open_storage(Box::new(storage), flags())?, handle))
}

fn check(bytes: Vec<u8>) -> Result<(CheckResult, Vec<String>), Error> {
    let (mut image, _) = open(bytes)?;
    let mut said = Vec::new();
    let result = image.check(Fix::NONE, &mut |line| said.push(line.to_owned()))?;
    Ok((result, said))
}

/// Repair, and the image afterwards.
fn repaired(bytes: Vec<u8>, fix: Fix) -> Result<(CheckResult, Vec<String>, Vec<u8>), Error> {
    let (mut image, handle) = open(bytes)?;
    let mut said = Vec::new();
    let result = image.check(fix, &mut |line| said.push(line.to_owned()))?;
    image.close()?;
    let after = handle.borrow().clone();
    Ok((result, said, after))
}

/// Everything that a repair does not mend, and why.
const STAYS: &[&str] = &[
    "Nothing is freed",
    // Nobody knows where the data is.
    "not properly aligned; L2 entry corrupted.",
    "Table is not cluster aligned; L1 entry corrupted",
    "counting reference for region exceeding the end of the file",
    "L1 table is not cluster aligned; snapshot table entry corrupted",
    "L1 table is too large; snapshot table entry corrupted",
    "I/O error in check_refcounts",
    // Nobody knows what is meant.
    "with reserved bits set",
    "subcluster allocation",
    "snapshots in image with data file",
    "with data file, entry",
    "itmap",
    "failed to update snapshot table",
    // A table cannot be written without harm to what it shares its cluster with.
    "share a cluster",
    "shares a cluster",
    // The width is too small.
    "ERROR: overflow cluster offset",
];

/// Each kind of line once.
fn few(lines: &[String]) -> String {
    let mut lines = lines.to_vec();
    lines.dedup_by_key(|l| {
        l.chars()
            .filter(|c| !c.is_ascii_hexdigit())
            .collect::<String>()
    });
    lines.truncate(12);
    lines.join("\n")
}

fn keep(name: &str, before: &[u8], after: &[u8]) {
    if let Some(folder) = std::env::var_os("CHECK_KEEP") {
        std::fs::create_dir_all(&folder).unwrap();
        let name = name.replace(['/', ' ', ','], "-");
        std::fs::write(Path::new(&folder).join(format!("{name}.before")), before).unwrap();
        std::fs::write(Path::new(&folder).join(format!("{name}.after")), after).unwrap();
    }
}

fn qemu_img_check(path: &Path) -> (Option<i32>, String) {
    let image = format!(
        "json:{{\"driver\":\"qcow2\",\"backing\":null,\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}",
        path.display()
    );
    let out = Command::new("timeout")
        .args(["-s", "KILL", "20", "qemu-img", "check", &image])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = [out.stdout, out.stderr].concat();
    (
        out.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// timeout(1) found no qemu-img: said once.
fn is_missing(code: Option<i32>) -> bool {
    static ONCE: std::sync::Once = std::sync::Once::new();
    let missing = code == Some(127);
    if missing {
        ONCE.call_once(|| {
            println!("SKIPPED: no qemu-img here: what it says of repaired images was not asked")
        });
    }
    missing
}

/// One damaged image, repaired with `fix`.
fn one(before: &[u8], fix: Fix, tally: &mut BTreeMap<&'static str, u64>) -> Result<(), String> {
    let (result, said, after) = match repaired(before.to_vec(), fix) {
        Ok(done) => done,
        Err(e) => {
            *tally.entry("refused").or_default() += 1;
            let _ = e;
            return Ok(());
        }
    };
    let discarded = said.iter().any(|l| l.starts_with("Discarding"));
    if !discarded {
        no_worse(before, &after).map_err(|e| format!("{e}\n{}", few(&said)))?;
    }
    let failed = said
        .iter()
        .any(|l| l.starts_with("ERROR failed to update snapshot table"));
    let (again, rest) = match check(after.clone()) {
        // It was said that the table is left, and a check does not look past it.
        Err(Error::TooBig(_)) if failed && result.check_errors != 0 => {
            *tally.entry("the snapshot table is left").or_default() += 1;
            return Ok(());
        }
        other => other.map_err(|e| e.to_string())?,
    };
    let numbers = CheckResult {
        corruptions_fixed: 0,
        leaks_fixed: 0,
        ..result
    };
    if again != numbers && !failed {
        return Err(format!("said {numbers:?}\nis   {again:?}"));
    }
    let (third, _, finished) = repaired(after.clone(), fix).map_err(|e| e.to_string())?;
    if third.corruptions_fixed + third.leaks_fixed != 0 || finished.len() != after.len() {
        return Err(format!(
            "a second repair found more to do: {third:?}\n{}",
            few(&rest)
        ));
    }
    let what = if result.corruptions + result.leaks + result.check_errors == 0 {
        if Raw(&after).bits() & 3 != 0 {
            return Err("good, but still marked as dirty or corrupt".into());
        }
        "good afterwards"
    } else if fix == all() {
        let stays = |l: &&String| STAYS.iter().any(|s| l.contains(s));
        if !rest.iter().chain(&said).any(|l| stays(&l)) {
            return Err(format!(
                "no reason for what is left: {result:?}\n{}",
                few(&rest)
            ));
        }
        "not all could be mended"
    } else {
        "not all was to be mended"
    };
    *tally.entry(what).or_default() += 1;
    if what == "good afterwards" {
        let path = tempfile::Builder::new()
            .suffix(".qcow2")
            .tempfile()
            .unwrap();
        std::fs::write(path.path(), &after).unwrap();
        let (code, text) = qemu_img_check(path.path());
        if is_missing(code) {
            return Ok(());
        }
        // timeout(1) has killed it: on a busy machine a file of gigabytes takes it long.
        if code == Some(137) {
            *tally.entry("qemu-img check was not awaited").or_default() += 1;
            return Ok(());
        }
        // Its own conditions for opening are not met by everything.
        if code != Some(0) && !text.contains("Could not open") {
            return Err(format!("qemu-img check: {text}"));
        }
    }
    Ok(())
}

fn run(fix: Fix) {
    let images = reference();
    let (mut tally, mut bad) = (BTreeMap::new(), Vec::new());
    for seed in seeds(FIXED) {
        let (name, image) = damaged(&images, seed);
        if let Err(e) = one(&image, fix, &mut tally) {
            let after = repaired(image.clone(), fix)
                .map(|r| r.2)
                .unwrap_or_default();
            keep(&name, &image, &after);
            bad.push(format!("{name}: {e}"));
        }
    }
    println!("{fix:?}: {tally:?}");
    assert!(bad.is_empty(), "{}", bad.join("\n\n"));
}

#[test]
fn a_repaired_image_is_good_or_says_why_not_and_reads_as_before() {
    run(all());
}

#[test]
fn leaks_alone_are_given_back_where_nothing_else_stands_in_the_way() {
    run(Fix::LEAKS);
}

#[test]
fn errors_alone_are_mended_without_freeing_anything() {
    run(Fix::ERRORS);
}

/// New structures may make the file longer, and what was named behind its end lies in it then; after a cut they may
/// not be needed any more, and it is named behind the end still.
fn stays(before: &[u8], end: &[u8]) -> Result<bool, String> {
    let found = |image: &[u8]| {
        check(image.to_vec())
            .map(|c| c.1)
            .map_err(|e| e.to_string())
    };
    let behind = |l: &String| l.contains("exceeding the end");
    let (before, end) = (found(before)?, found(end)?);
    let mut errors = end.iter().filter(|l| l.starts_with("ERROR"));
    let only = errors.all(|l| behind(l) || l.contains("OFLAG_COPIED"));
    Ok(only && before.iter().any(behind) && end.iter().any(behind))
}

#[test]
fn a_repair_that_is_cut_anywhere_leaves_nothing_worse_and_a_second_one_finishes() {
    let images = reference();
    let (mut cuts, mut large, mut bad) = (0, 0, Vec::new());
    for seed in seeds(CUT) {
        let (name, before) = damaged(&images, seed);
        let storage = TraceStorage::new(before.clone());
        let trace = storage.trace();
        let Ok(mut image) = Image::open_storage(Box::new(storage), flags()) else {
            continue;
        };
        let mut dropped = false;
        let mut say = |line: &str| dropped |= line.starts_with("Discarding");
        let Ok(whole) = image.check(all(), &mut say) else {
            continue;
        };
        // A damaged table may say that it is long: then the new one goes behind all of it.
        if trace.contents().len() > 4 << 20 {
            large += 1;
            continue;
        }
        let plan = CrashPlan {
            singles: 12,
            random: 6,
            torn: 4,
            ..CrashPlan::default()
        };
        let events = trace.events();
        for cut in crash_images(&before, &events, &plan) {
            cuts += 1;
            let judged = || -> Result<(), String> {
                if !dropped {
                    no_worse(&before, &cut.bytes)?;
                }
                let (second, _, end) =
                    repaired(cut.bytes.clone(), all()).map_err(|e| e.to_string())?;
                // What cannot be mended may be counted in other places afterwards (an L1 table that
                // names the header as an L2 table has its fields for entries).
                let left = |r: &CheckResult| r.corruptions + r.leaks + r.check_errors;
                if left(&whole) == 0 && left(&second) != 0 && !stays(&before, &end)? {
                    return Err(format!("left {second:?}, by a whole one {whole:?}"));
                }
                if !dropped {
                    no_worse(&before, &end)?;
                }
                Ok(())
            };
            if let Err(e) = judged() {
                keep(&name, &before, &cut.bytes);
                bad.push(format!("{name}: {}: {e}", cut.what));
                break;
            }
        }
    }
    println!("{cuts} cuts; {large} repairs left out, since the file is above 4 MiB after them");
    assert!(large * 500 < cuts, "too many left out");
    assert!(cuts > 0 && bad.is_empty(), "{}", bad.join("\n\n"));
}

#[test]
fn a_repair_in_which_a_request_fails_leaves_nothing_worse() {
    let images = reference();
    let (mut failures, mut large, mut bad) = (0, 0, Vec::new());
    for seed in seeds(CUT / 2) {
        let (name, before) = damaged(&images, seed);
        for nth in 1..400 {
            let storage = TraceStorage::new(before.clone());
            let trace = storage.trace();
            let Ok(mut image) = Image::open_storage(Box::new(storage), flags()) else {
                break;
            };
            trace.set_fault(Some(FaultPlan::nth(nth, libc::EIO)));
            let mut dropped = false;
            let mut say = |line: &str| dropped |= line.starts_with("Discarding");
            let result = image.check(all(), &mut say);
            if trace.fired() == 0 {
                break;
            }
            failures += 1;
            trace.set_fault(None);
            let after = trace.contents();
            if after.len() > 4 << 20 {
                large += 1;
                break;
            }
            if !dropped {
                if let Err(e) = no_worse(&before, &after) {
                    keep(&name, &before, &after);
                    bad.push(format!("{name}, request {nth}: {e} ({result:?})"));
                    break;
                }
            }
            if result.is_err() && after != before {
                // The handle is not used for another change.
                let again = image.check(all(), &mut |_| {});
                let errno = again.err().map(|e| e.errno());
                if errno != Some(libc::EIO) {
                    bad.push(format!("{name}, request {nth}: then {errno:?}"));
                    break;
                }
            }
        }
    }
    println!(
        "{failures} failing requests; {large} repairs were left when the file was above 4 MiB"
    );
    assert!(large * 100 < failures, "too many left out");
    assert!(failures > 0 && bad.is_empty(), "{}", bad.join("\n\n"));
}

#[test]
fn a_repair_that_is_cancelled_at_any_call_leaves_nothing_worse_and_a_second_one_finishes() {
    let left = |r: &CheckResult| r.corruptions + r.leaks + r.check_errors;
    let images = reference();
    let (mut cancelled, mut bad) = (std::collections::BTreeMap::new(), Vec::new());
    for seed in seeds(CUT / 2) {
        let (name, before) = damaged(&images, seed);
        let Ok((whole, ..)) = repaired(before.clone(), all()) else {
            continue;
        };
        for nth in 1.. {
            let Ok((mut image, handle)) = open(before.clone()) else {
                break;
            };
            let at = std::rc::Rc::new(std::cell::Cell::new((0, None)));
            let told = std::rc::Rc::clone(&at);
            image.set_progress(Some(Box::new(move |stage, _, _| {
                let calls = told.get().0 + 1;
                let ends = calls == nth;
                told.set((calls, told.get().1.or(ends.then_some(stage))));
                match ends {
                    true => std::ops::ControlFlow::Break(()),
                    false => std::ops::ControlFlow::Continue(()),
                }
            })));
            let mut dropped = false;
            let mut say = |line: &str| dropped |= line.starts_with("Discarding");
            let result = image.check(all(), &mut say);
            drop(image);
            let Some(stage) = at.get().1 else {
                break;
            };
            *cancelled.entry(format!("{stage:?}")).or_insert(0) += 1;
            let after = handle.borrow().clone();
            let judged = || -> Result<(), String> {
                let stopped = matches!(result, Err(Error::Cancelled(_)));
                if stopped == (stage == qcow2_snapshot::Stage::Reclaim) {
                    return Err(format!("{result:?}"));
                }
                if stage == qcow2_snapshot::Stage::Check && after != before {
                    return Err("something was written".into());
                }
                if !dropped {
                    no_worse(&before, &after)?;
                }
                let (second, _, end) = repaired(after.clone(), all()).map_err(|e| e.to_string())?;
                if left(&whole) == 0 && left(&second) != 0 && !stays(&before, &end)? {
                    return Err(format!("left {second:?}, by a whole one {whole:?}"));
                }
                Ok(())
            };
            if let Err(e) = judged() {
                keep(&name, &before, &after);
                bad.push(format!("{name}, call {nth} ({stage:?}): {e}"));
                break;
            }
            // It asks nobody any more.
            if stage == qcow2_snapshot::Stage::Reclaim {
                break;
            }
        }
    }
    println!("cancelled repairs: {cancelled:?}");
    assert!(
        cancelled.len() == 3 && bad.is_empty(),
        "{}",
        bad.join("\n\n")
    );
}
