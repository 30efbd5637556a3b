//! Power cuts and failing disks: nothing is ever lost.
//!
//! Each verb runs on the recorder (`io::trace`). From what it wrote come the images that a power
//! cut could leave, at any point, with any of the writes between two barriers on the disk or not,
//! torn at 512 bytes. Each image is judged ([`judge`]): it means what the image meant before or
//! what it means after the verb, the snapshots' data included, and a guest can harm no snapshot.
//! docs/crash-safety.md says more, and has the numbers.
//!
//! `CRASH_ALL=1` tries everything; without it a sample of every kind is tried. `CRASH_SEED=N` and
//! `CRASH_RANDOM=N` choose the first random image and their number. `CRASH_ONLY=text` runs the
//! chains whose name contains the text. Images that fail are kept in /tmp/qcow2-crash.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::trace::{
    crash_images, prefixes, CrashImage, CrashPlan, Event, FaultPlan, RequestKind, TraceStorage,
};
use qcow2_snapshot::{Fix, Image, OpenFlags, Outcome};

#[path = "crash/cases.rs"]
mod cases;
#[path = "crash/craft.rs"]
mod craft;
#[path = "crash/judge.rs"]
mod judge;
#[path = "crash/qemu.rs"]
mod qemu;

use cases::{Chain, Verb};
use judge::{hash, judge, State, Verdict};
use qemu::Qemu;

fn all() -> bool {
    std::env::var_os("CRASH_ALL").is_some_and(|v| v != "0")
}

/// How many images of each rare shape.
fn seeds() -> u64 {
    if all() {
        4
    } else {
        1
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// What one test has done.
#[derive(Default)]
struct Sums {
    /// By verb: runs, crash images judged.
    verbs: BTreeMap<String, (u64, u64)>,
    faults: u64,
    qemu: u64,
    mixtures_exempt: u64,
    refused: BTreeMap<String, u64>,
    notes: Vec<String>,
    losses: Vec<String>,
    harmless_flags: u64,
    leaking: u64,
}

struct Run {
    sums: Mutex<Sums>,
    qemu: Option<Qemu>,
    /// One image of so many is shown to qemu-img.
    one_of: u64,
}

impl Run {
    fn new(one_of: u64) -> Run {
        let qemu = Qemu::find();
        if qemu.is_none() {
            println!("SKIPPED: no qemu-img and qemu-io here, so only the in-process judge saw the images");
        }
        Run {
            sums: Mutex::default(),
            qemu,
            one_of,
        }
    }

    fn loss(&self, chain: &str, what: &str, why: &str, before: &[u8], image: &[u8]) {
        let dir = PathBuf::from("/tmp/qcow2-crash");
        let mut sums = self.sums.lock().unwrap();
        let n = sums.losses.len();
        if n < 20 {
            if let Some(qemu) = &self.qemu {
                println!("qemu-img check of the image below: {}", qemu.check(image));
            }
            let _ = std::fs::create_dir_all(&dir);
            let file = dir.join(format!("{}-{n}", std::process::id()));
            let _ = std::fs::write(file.with_extension("before.qcow2"), before);
            let _ = std::fs::write(file.with_extension("crash.qcow2"), image);
            println!(
                "LOST [{chain}] {what}\n     {why}\n     kept as {}",
                file.display()
            );
        }
        sums.losses.push(format!("[{chain}] {what}: {why}"));
    }

    /// Run `work` on all chains, on all processors.
    fn over(&self, chains: Vec<Chain>, work: impl Fn(&Run, &Chain) + Sync) {
        let only = std::env::var("CRASH_ONLY").ok();
        let wanted: Vec<Chain> = chains
            .into_iter()
            .filter(|c| only.as_ref().is_none_or(|o| c.name.contains(o.as_str())))
            .collect();
        let next = AtomicUsize::new(0);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|s| {
            for _ in 0..threads {
                s.spawn(|| {
                    while let Some(chain) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                        work(self, chain);
                    }
                });
            }
        });
    }

    fn finish(self, what: &str) {
        let sums = self.sums.into_inner().unwrap();
        println!("{what}:");
        let (mut runs, mut images) = (0, 0);
        for (verb, (n, judged)) in &sums.verbs {
            println!("  {verb}: {n} runs, {judged} images judged");
            (runs, images) = (runs + n, images + judged);
        }
        for note in &sums.notes {
            println!("  {note}");
        }
        for (why, n) in &sums.refused {
            println!("  {n} verbs refused without a byte written: {why}");
        }
        if sums.mixtures_exempt > 0 {
            println!(
                "  {} images of a goto that had no place for a temporary L1 were not asked for old-or-new contents of the active disk",
                sums.mixtures_exempt
            );
        }
        println!(
            "  {} images with leaks, {} with harmless COPIED flags; qemu-img and qemu-io judged {}",
            sums.leaking, sums.harmless_flags, sums.qemu
        );
        if sums.faults > 0 {
            println!("  {} failing requests", sums.faults);
        }
        println!("  each image that was judged was repaired with -r leaks: good then, and the same in meaning");
        println!(
            "{what}: {runs} verbs, {images} images judged, {} losses",
            sums.losses.len()
        );
        assert!(
            sums.losses.is_empty(),
            "{} losses, the first: {}",
            sums.losses.len(),
            sums.losses[0]
        );
        let only = std::env::var_os("CRASH_ONLY").is_some();
        assert!(only || images > 0, "nothing was judged");
    }
}

/// The two states between which a verb switches.
#[derive(Clone)]
struct Sides {
    old: State,
    new: State,
    kind: &'static str,
    /// The active L1 was written in place, for lack of space.
    mixture: bool,
    unknown_autoclear: Option<Vec<u8>>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Side {
    Old,
    New,
    Both,
}

impl Sides {
    /// Which state is this? VM state leaves the active disk in steps after a create.
    fn side(&self, state: &State) -> Result<Side, String> {
        let same = |a: &State, b: &State| {
            (a.size, &a.snaps) == (b.size, &b.snaps)
                && (self.mixture
                    || (a.disk, a.beyond) == (b.disk, b.beyond)
                    || (self.kind == "create with VM state" && a.disk == b.disk))
        };
        match (same(state, &self.old), same(state, &self.new)) {
            (true, true) => Ok(Side::Both),
            (true, false) => Ok(Side::Old),
            (false, true) => Ok(Side::New),
            _ => Err(format!(
                "neither the old nor the new state:\n       old {}\n       new {}\n       is  {}",
                self.old.describe(),
                self.new.describe(),
                state.describe()
            )),
        }
    }
}

fn memory(image: &[u8], flags: OpenFlags) -> Result<Image, String> {
    Image::open_storage(Box::new(MemoryStorage::new(image.to_vec())), flags)
        .map_err(|e| format!("open: {e}"))
}

/// An image on the recorder. Its backing file, if it names one, is longer than its disk.
fn recorder(image: &[u8]) -> TraceStorage {
    TraceStorage::new(image.to_vec()).with_named(16 << 20)
}

/// The library's list says what the judge read.
fn same_list(image: &mut Image, state: &State) -> Result<(), String> {
    let size = image.length();
    if size != state.size {
        return Err(format!(
            "the library sees a disk of {size:#x} bytes, the image says {:#x}",
            state.size
        ));
    }
    let list = image.snapshot_list().map_err(|e| format!("list: {e}"))?;
    let ours: Vec<_> = list
        .iter()
        .map(|s| (&s.id, &s.name, s.l1_table_offset, s.l1_size))
        .collect();
    let theirs: Vec<_> = state
        .snaps
        .iter()
        .map(|s| (&s.id, &s.name, s.l1_offset, s.l1_size))
        .collect();
    if ours != theirs {
        return Err(format!(
            "the library lists {} snapshots otherwise than the image: {}",
            ours.len(),
            state.describe()
        ));
    }
    Ok(())
}

/// All that is asked of one image.
fn assess(image: &[u8], sides: &Sides) -> Result<(Verdict, Side), String> {
    for flags in [OpenFlags::read_only(), OpenFlags::RDWR] {
        memory(image, flags)?
            .close()
            .map_err(|e| format!("close: {e}"))?;
    }
    let verdict = judge(image)?;
    let side = sides.side(&verdict.state)?;
    same_list(&mut memory(image, OpenFlags::read_only())?, &verdict.state)?;
    if let Some(before) = &sides.unknown_autoclear {
        let same = |r: std::ops::Range<usize>| image.get(r.clone()) == before.get(r);
        let untouched = image.len() == before.len() && same(0..88) && same(96..image.len());
        if verdict.unknown_autoclear && !untouched {
            return Err(
                "unknown autoclear bits stand beside changes that did not respect them".into(),
            );
        }
    }
    give_back(image, &verdict)?;
    Ok((verdict, side))
}

/// A repair of leaks alone gives back what the cut has cost, and changes nothing else in meaning.
fn give_back(image: &[u8], verdict: &Verdict) -> Result<(), String> {
    let storage = MemoryStorage::new(image.to_vec());
    let bytes = storage.handle();
    let flags = OpenFlags::RDWR | OpenFlags::CHECK;
    let mut damaged = Image::open_storage(Box::new(storage), flags).map_err(|e| e.to_string())?;
    let mut said = Vec::new();
    let fixed = damaged
        .check(Fix::LEAKS, &mut |line| said.push(line.to_owned()))
        .map_err(|e| format!("check -r leaks: {e}"))?;
    let after = judge(&bytes.borrow()).map_err(|e| format!("after check -r leaks: {e}"))?;
    if after.state != verdict.state {
        return Err("check -r leaks changes what the image holds".into());
    }
    // What an entry of the table lacks, it lacked before: that is no leak.
    said.sort();
    said.dedup();
    let lacking = said.iter().filter(|l| l.ends_with("is incomplete"));
    let corruptions = fixed.corruptions - lacking.count() as u64;
    if corruptions + fixed.leaks + fixed.check_errors + after.leaks + after.odd_flags != 0 {
        said.truncate(6);
        return Err(format!(
            "check -r leaks leaves {fixed:?}: {}",
            said.join("; ")
        ));
    }
    Ok(())
}

/// What a verb did on a disk that works.
struct Clean {
    sides: Sides,
    events: Vec<Event>,
    after: Vec<u8>,
}

/// Run a verb on a disk that works. `None` when it refuses, without a byte written.
fn clean_run(run: &Run, chain: &str, before: &[u8], old: &Verdict, verb: &Verb) -> Option<Clean> {
    let storage = recorder(before);
    let trace = storage.trace();
    let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    if !trace.events().is_empty() {
        run.loss(
            chain,
            "open",
            "opening wrote something",
            before,
            &trace.contents(),
        );
    }
    let result = verb.run(&mut image);
    let events = trace.events();
    if let Err(e) = result {
        if !events.is_empty() || image.last_outcome() != Outcome::Unchanged {
            run.loss(
                chain,
                &format!("{verb:?}"),
                &format!("refused after writing: {e}"),
                before,
                &trace.contents(),
            );
        }
        let mut sums = run.sums.lock().unwrap();
        let why = e.to_string();
        let why = why.split(" 0x").next().unwrap_or_default().to_owned();
        *sums.refused.entry(why).or_default() += 1;
        return None;
    }
    let mixture = image.remark().is_some();
    image.close().unwrap();
    let after = trace.contents();
    let kind = verb.kind();
    let new = match judge(&after) {
        Ok(new) => new,
        Err(e) => {
            run.loss(
                chain,
                &format!("{verb:?}"),
                &format!("after the verb: {e}"),
                before,
                &after,
            );
            return None;
        }
    };
    let mut sides = Sides {
        old: old.state.clone(),
        new: new.state.clone(),
        kind,
        mixture: false,
        unknown_autoclear: old.unknown_autoclear.then(|| before.to_vec()),
    };
    if let Err(e) = sensible(&sides, verb) {
        run.loss(
            chain,
            &format!("{verb:?}"),
            &format!("after the verb: {e}"),
            before,
            &after,
        );
    }
    sides.mixture = mixture;
    Some(Clean {
        sides,
        events,
        after,
    })
}

/// The new state is what the verb is for.
fn sensible(sides: &Sides, verb: &Verb) -> Result<(), String> {
    let (old, new) = (&sides.old, &sides.new);
    let ids = |s: &State| -> Vec<Vec<u8>> { s.snaps.iter().map(|s| s.id.clone()).collect() };
    let contents = |s: &State| -> BTreeMap<Vec<u8>, u64> {
        s.snaps.iter().map(|s| (s.id.clone(), s.content)).collect()
    };
    let (a, b) = (contents(old), contents(new));
    if a.iter()
        .any(|(id, content)| b.get(id).is_some_and(|c| c != content))
    {
        return Err("a snapshot that stays reads otherwise".into());
    }
    let ok = match verb {
        Verb::Create(_) => {
            new.snaps.len() == old.snaps.len() + 1 && old.disk == new.disk && old.size == new.size
        }
        Verb::Delete(_) => {
            new.snaps.len() + 1 == old.snaps.len()
                && (old.disk, old.size, old.beyond) == (new.disk, new.size, new.beyond)
        }
        Verb::DeleteMany(names) => {
            let stays = |s: &&judge::Snap| !names.contains(&s.name);
            let left: Vec<_> = old.snaps.iter().filter(stays).map(|s| &s.id).collect();
            new.snaps.iter().map(|s| &s.id).eq(left)
                && (old.disk, old.size, old.beyond) == (new.disk, new.size, new.beyond)
        }
        Verb::Rename(name, to) => {
            let first = old.snaps.iter().position(|s| s.name == *name);
            let renamed = |i| {
                if first == Some(i) {
                    to
                } else {
                    &old.snaps[i].name
                }
            };
            let as_renamed = |(i, s): (usize, &judge::Snap)| s.name == *renamed(i);
            ids(old) == ids(new)
                && new.snaps.iter().enumerate().all(as_renamed)
                && (old.disk, old.size, old.beyond) == (new.disk, new.size, new.beyond)
        }
        Verb::Write => {
            ids(old) == ids(new)
                && (old.disk, old.size, old.beyond) == (new.disk, new.size, new.beyond)
        }
        Verb::Goto(name) => {
            let target = new
                .snaps
                .iter()
                .find(|s| s.id == *name)
                .or_else(|| new.snaps.iter().find(|s| s.name == *name));
            ids(old) == ids(new)
                && target.is_some_and(|t| t.disk_size.is_none_or(|s| s & !511 == new.size))
        }
    };
    if !ok {
        return Err(format!(
            "not what the verb is for:\n       old {}\n       new {}",
            old.describe(),
            new.describe()
        ));
    }
    Ok(())
}

/// How hard to try.
fn plan(bytes: usize, seed: u64) -> CrashPlan {
    if all() {
        let small = bytes <= 256 << 10;
        CrashPlan {
            exhaustive: if small { 8 } else { 4 },
            singles: if small { usize::MAX } else { 24 },
            random: if small { 128 } else { 16 },
            seed,
            torn: if small { 64 } else { 6 },
        }
    } else {
        let small = bytes <= 160 << 10;
        CrashPlan {
            exhaustive: if small { 3 } else { 2 },
            singles: if small { 12 } else { 3 },
            random: if small { 6 } else { 2 },
            seed,
            torn: if small { 3 } else { 1 },
        }
    }
}

/// Judge the cuts of every verb of a chain.
fn power_cuts(run: &Run, chain: &Chain) {
    let mut before = chain.image.clone();
    for (i, verb) in chain.verbs.iter().enumerate() {
        let old = match judge(&before) {
            Ok(old) => old,
            Err(e) => {
                // Damaged on purpose, or by the verb before (reported there).
                let mut sums = run.sums.lock().unwrap();
                sums.notes.push(format!("not judged: {} ({e})", chain.name));
                return;
            }
        };
        if let Err(e) = memory(&before, OpenFlags::RDWR) {
            run.sums
                .lock()
                .unwrap()
                .notes
                .push(format!("not judged: {} ({e})", chain.name));
            return;
        }
        let name = format!("{}, verb {i} {}", chain.name, verb.kind());
        let Some(clean) = clean_run(run, &name, &before, &old, verb) else {
            continue;
        };
        let plan = plan(before.len(), hash(chain.name.as_bytes(), i as u64));
        let (mut seen, mut judged) = (HashSet::new(), 0);
        let cuts = crash_images(&before, &clean.events, &plan);
        let last = std::iter::once(CrashImage {
            what: "everything".into(),
            stable: clean.events.len(),
            issued: clean.events.len(),
            bytes: clean.after.clone(),
        });
        let in_order: Box<dyn Iterator<Item = _>> = if all() {
            Box::new(prefixes(&before, &clean.events))
        } else {
            Box::new(std::iter::empty())
        };
        let (mut exempt, mut leaking, mut odd, mut shown) = (0, 0, 0, 0);
        for cut in last.chain(in_order).chain(cuts) {
            let fingerprint = hash(&cut.bytes, 3);
            if !seen.insert(fingerprint) {
                continue;
            }
            judged += 1;
            match assess(&cut.bytes, &clean.sides) {
                Err(why) => run.loss(&name, &cut.what, &why, &before, &cut.bytes),
                Ok((verdict, side)) => {
                    if cut.stable == clean.events.len() && side == Side::Old {
                        run.loss(
                            &name,
                            &cut.what,
                            "the old state after the verb returned 0",
                            &before,
                            &cut.bytes,
                        );
                    }
                    exempt += u64::from(clean.sides.mixture);
                    leaking += u64::from(verdict.leaks > 0);
                    odd += u64::from(verdict.odd_flags > 0);
                    if hash(&fingerprint.to_be_bytes(), 9).checked_rem(run.one_of) == Some(0)
                        && !foreign(&before)
                    {
                        if let Some(qemu) = &run.qemu {
                            shown += 1;
                            if let Err(why) = qemu.agrees(&cut.bytes, &verdict) {
                                run.loss(&name, &cut.what, &why, &before, &cut.bytes);
                            }
                        }
                    }
                }
            }
        }
        let mut sums = run.sums.lock().unwrap();
        let of_verb = sums.verbs.entry(verb.kind().into()).or_default();
        *of_verb = (of_verb.0 + 1, of_verb.1 + judged);
        if exempt > 0 {
            sums.notes
                .push(format!("written in place, for lack of space: {name}"));
        }
        sums.mixtures_exempt += exempt;
        sums.leaking += leaking;
        sums.harmless_flags += odd;
        sums.qemu += shown;
        before = clean.after;
    }
}

/// Images that qemu-io cannot open by themselves: a backing file is missing or a key.
fn foreign(image: &[u8]) -> bool {
    judge::be64(image, 8) != 0 || judge::be32(image, 32) != 0
}

#[test]
fn power_cuts_lose_nothing_in_the_reference_images() {
    let run = Run::new(50);
    let (chains, skipped) = cases::reference(if all() { 64 << 20 } else { 6 << 20 });
    if !skipped.is_empty() {
        println!(
            "SKIPPED: images too large without CRASH_ALL=1: {}",
            skipped.join(", ")
        );
    }
    run.over(chains, power_cuts);
    run.finish("power cuts, reference images");
}

#[test]
fn power_cuts_lose_nothing_in_the_rare_shapes() {
    let run = Run::new(50);
    run.over(cases::rare(seeds()), power_cuts);
    run.finish("power cuts, rare shapes");
}

#[test]
fn power_cuts_lose_nothing_in_random_images() {
    let run = Run::new(50);
    let first = number("CRASH_SEED", 1);
    let n = number("CRASH_RANDOM", if all() { 1000 } else { 40 });
    run.over((first..first + n).map(cases::random).collect(), power_cuts);
    run.finish("power cuts, random images");
}

include!("crash/faults.rs");
include!("crash/cancel.rs");
include!("crash/full.rs");
include!("crash/space.rs");
include!("crash/teeth.rs");
