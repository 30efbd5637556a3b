//! Every small image, every sequence of verbs, every cut, and a model that judges.
//!
//! Random images leave luck in it. Here every image up to a bound is made (`exhaustive/images.rs`), every
//! sequence of up to three verbs runs on it, and from each verb's log come the images of: a cut after every
//! write, hole and length; each of these with any single earlier write of the group lost; each write and
//! hole torn at every sector. `model/` says what may be read: the state before or after the verb, whole,
//! with counts and flags sound. Every request that changes the file fails too, once with nothing of it on the
//! disk and once with all, and the outcome that the handle reports is held against those images.
//!
//! An image that was reached before with as many verbs left is not tried again.
//!
//! | environment | |
//! |---|---|
//! | (none) | the bound of `make check`, about a minute on two processors |
//! | `EXHAUSTIVE=hour` | the bound of `make exhaustive` |
//! | `EXHAUSTIVE='2 2 1 1 3 1 1'` | the fields of [`Bound`], in order |
//! | `EXHAUSTIVE_COUNT=1` | how many images the bound has, and nothing else |
//! | `EXHAUSTIVE_PART=i/n` | one image in n, from the i-th |
//!
//! Images that fail are kept in /tmp/qcow2-exhaustive.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;

use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::trace::{image_after, Apply, Event, FaultPlan, RequestKind, TraceStorage};
use qcow2_snapshot::io::Storage;
use qcow2_snapshot::{Fix, Image, NewSnapshot, OpenFlags, Outcome};

#[path = "exhaustive/images.rs"]
mod images;
mod model;
#[path = "exhaustive/planted.rs"]
mod planted;

use images::{Bound, Chooser, Deviation, Spec};
use model::read::{digest, read, read_damaged, Damage, Reading};
use model::{Side, Verb};

const CLUSTER: u64 = 512;

/// `wants clusters slots snapshots verbs verbs-on-a-deviating-image deviations`
const fn bound(b: [usize; 7]) -> Bound {
    Bound {
        wants: b[0],
        clusters: b[1],
        slots: b[2],
        snapshots: b[3],
        verbs: (b[4], b[5]),
        deviations: b[6],
    }
}

/// A minute: one snapshot, all deviations; two snapshots.
const CHECK: &[Bound] = &[bound([2, 2, 1, 1, 2, 1, 1]), bound([2, 1, 1, 2, 2, 0, 0])];

/// 40 minutes: two snapshots and all deviations; three tables; four clusters in use; the last entries of
/// tables too; two deviations at once; two snapshots that share data under tables of their own.
const HOUR: &[Bound] = &[
    bound([2, 2, 1, 2, 2, 1, 1]),
    bound([2, 1, 1, 2, 3, 1, 1]),
    bound([3, 3, 1, 1, 3, 1, 1]),
    bound([2, 4, 1, 1, 2, 1, 1]),
    bound([2, 2, 2, 1, 3, 1, 1]),
    bound([2, 2, 1, 1, 3, 1, 2]),
    bound([2, 3, 1, 2, 1, 0, 0]),
];

/// What was done.
#[derive(Clone, Debug, Default)]
struct Sums {
    images: u64,
    reached: u64,
    verbs: u64,
    cuts: u64,
    faults: u64,
    /// Verbs that wrote the L1 table in place, for lack of space: the active disk is not asked for.
    in_place: u64,
    refused: HashMap<String, u64>,
    losses: Vec<String>,
}

impl Sums {
    fn add(&mut self, other: &Sums) {
        self.images += other.images;
        self.reached += other.reached;
        self.verbs += other.verbs;
        self.cuts += other.cuts;
        self.faults += other.faults;
        self.in_place += other.in_place;
        for (why, n) in &other.refused {
            *self.refused.entry(why.clone()).or_default() += n;
        }
        self.losses.extend(other.losses.iter().cloned());
    }
}

/// A verb, run on the recorder.
struct Attempt {
    result: Result<(), String>,
    outcome: Outcome,
    in_place: bool,
    events: Vec<Event>,
    after: Vec<u8>,
}

/// The recorder, and the backing file that some images name.
struct Over(TraceStorage);

impl Storage for Over {
    fn length(&mut self) -> io::Result<u64> {
        self.0.length()
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, buf)
    }
    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(label, offset, data)
    }
    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.0.truncate(length)
    }
    fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        self.0.discard(offset, bytes)
    }
    fn barrier(&mut self) -> io::Result<()> {
        self.0.barrier()
    }
    fn open_named(&mut self, _: &[u8], _: &[u8]) -> Option<io::Result<Box<dyn Storage>>> {
        Some(Ok(Box::new(MemoryStorage::new(model::read::backing()))))
    }
    fn close(self: Box<Self>) -> io::Result<()> {
        Box::new(self.0).close()
    }
}

fn id(image: &model::Image, snapshot: usize) -> &[u8] {
    &image.snapshots[snapshot].id
}

fn run(before: &[u8], old: &model::Image, verb: Verb, fault: Option<FaultPlan>) -> Attempt {
    let storage = Over(TraceStorage::new(before.to_vec()));
    let trace = storage.0.trace();
    let flags = match verb {
        Verb::Repair => OpenFlags::RDWR | OpenFlags::CHECK,
        _ => OpenFlags::RDWR,
    };
    let mut image = Image::open_storage(Box::new(storage), flags).unwrap();
    trace.set_fault(fault);
    let result = match verb {
        Verb::Create { vm_state_size } => image
            .snapshot_create(&NewSnapshot {
                name: model::NAME.into(),
                date_sec: model::DATE.0,
                date_nsec: model::DATE.1,
                vm_clock_nsec: model::CLOCK,
                icount: model::ICOUNT,
                vm_state_size,
                ..NewSnapshot::default()
            })
            .map(|_| ()),
        Verb::Goto(i) => image.snapshot_goto(id(old, i)),
        Verb::Delete(i) => image.snapshot_delete(Some(id(old, i)), None),
        Verb::DeleteAllBut(kept) => {
            let all = (0..old.snapshots.len()).filter(|i| Some(*i) != kept);
            image.snapshot_delete_many(&all.map(|i| id(old, i)).collect::<Vec<_>>())
        }
        Verb::Rename(i) => image.snapshot_rename(id(old, i), model::RENAMED),
        Verb::WriteSnapshots => image.write_snapshots(),
        Verb::Repair => image
            .check(Fix::LEAKS | Fix::ERRORS, &mut |_| ())
            .map(|_| ()),
        Verb::Flatten => image.flatten(),
    };
    let attempt = Attempt {
        result: result.map_err(|e| e.to_string()),
        outcome: image.last_outcome(),
        in_place: image.remark().is_some(),
        events: trace.events(),
        after: trace.contents(),
    };
    let _ = image.close();
    attempt
}

/// What the images of a verb are held against.
struct Judge<'a> {
    verb: Verb,
    old: &'a Reading,
    new: &'a model::Image,
    in_place: bool,
    /// A count that is too low, and the states that hang on its cluster: QEMU loses them, and nothing else may suffer.
    damage: Option<Damage<'a>>,
}

impl Judge<'_> {
    /// Which state is this? An error is a loss.
    fn side(&self, bytes: &[u8]) -> Result<Side, String> {
        let storage = Box::new(MemoryStorage::new(bytes.to_vec()));
        Image::open_storage(storage, OpenFlags::RDWR)
            .map_err(|e| format!("it does not open: {e}"))?;
        let (now, old, new) = match self.damage {
            None => (read(bytes)?.image, &self.old.image, self.new),
            Some(damage) => (
                self.asked_for(&read_damaged(bytes, damage)?.image),
                &self.asked_for(&self.old.image),
                &self.asked_for(self.new),
            ),
        };
        match self.verb.side(&now, old, new) {
            Side::Neither if self.in_place && now.snapshots == new.snapshots => Ok(Side::Both),
            Side::Neither => Err(format!(
                "neither the old nor the new state:\n  old {old:?}\n  new {new:?}\n  is  {now:?}"
            )),
            side => Ok(side),
        }
    }

    /// An image without what hangs on a cluster whose count is too low.
    fn asked_for(&self, image: &model::Image) -> model::Image {
        let (mut image, skip) = (image.clone(), self.damage.map_or(&[][..], |d| d.skip));
        image.snapshots.retain(|s| !skip.contains(&s.id));
        if skip.contains(&vec![]) {
            image.active.size = 0;
            image.active.clusters.clear();
        }
        image
    }

    /// After return 0.
    fn done(&self, bytes: &[u8]) -> Result<(), String> {
        if self.damage.is_some() && self.verb != Verb::Repair {
            return match self.side(bytes)? {
                Side::New | Side::Both => Ok(()),
                _ => Err("not what the verb is for".into()),
            };
        }
        let now = read(bytes).map_err(|e| format!("after the verb: {e}"))?;
        if now.image != *self.new {
            return Err(format!(
                "not what the verb is for:\n  want {:?}\n  is   {:?}",
                self.new, now.image
            ));
        }
        // QEMU's shrink frees the L2 tables of VM state, and leaks the clusters that they name. The bytes
        // are to be QEMU's.
        let shrinks = self.new.active.size < self.old.image.active.size;
        let dropped = if shrinks { self.old.vm_state } else { 0 };
        let leaks = match self.verb {
            // What is counted behind the end of the file is not looked at, as in QEMU.
            Verb::Repair => now.leaks_behind..=now.leaks_behind.min(self.old.leaks_behind),
            _ => self.old.leaks..=self.old.leaks + dropped,
        };
        if !leaks.contains(&now.leaks) {
            return Err(format!(
                "leaks: {} before, {} after",
                self.old.leaks, now.leaks
            ));
        }
        // Who does not go over the active disk leaves its flags.
        let odd = match self.verb {
            Verb::WriteSnapshots | Verb::Rename(_) => self.old.odd_flags..=self.old.odd_flags,
            Verb::Flatten => 0..=self.old.odd_flags,
            _ => 0..=0,
        };
        match odd.contains(&now.odd_flags) {
            true => Ok(()),
            false => Err(format!("{} COPIED flags are not as counted", now.odd_flags)),
        }
    }
}

/// An image that a power cut leaves: the log up to `stable` is on the disk, of what lies between that and
/// `end` some, and nothing else.
struct Cut {
    stable: usize,
    end: usize,
    side: Side,
}

/// All cuts of a log, judged.
fn cuts(before: &[u8], log: &[Event], judge: &Judge) -> Result<(Vec<Cut>, u64), String> {
    let mut known: HashMap<u64, Side> = HashMap::new();
    let mut out = vec![];
    let mut see = |bytes: &[u8], stable, end, what: &dyn Fn() -> String| -> Result<(), String> {
        let side = match known.entry(digest(bytes)) {
            std::collections::hash_map::Entry::Occupied(known) => *known.get(),
            std::collections::hash_map::Entry::Vacant(free) => {
                let side = judge.side(bytes).map_err(|e| format!("{}: {e}", what()))?;
                *free.insert(side)
            }
        };
        out.push(Cut { stable, end, side });
        Ok(())
    };
    let mut base = before.to_vec();
    let mut done = 0;
    for group in groups(log) {
        base = image_after(&base, &log[done..group.start], |_| Apply::Full);
        done = group.start;
        let events = &log[group.clone()];
        let start = group.start;
        see(&base, start, start, &|| format!("cut before event {start}"))?;
        for lost in std::iter::once(None).chain((0..events.len()).map(Some)) {
            let mut image = base.clone();
            for (i, event) in events.iter().enumerate() {
                if lost == Some(i) {
                    continue;
                }
                image = image_after(&image, std::slice::from_ref(event), |_| Apply::Full);
                if lost.is_none_or(|lost| i > lost) {
                    see(&image, start, start + i + 1, &|| {
                        let lost = lost.map(|l| format!(", without {}", events[l]));
                        format!("cut after {event}{}", lost.unwrap_or_default())
                    })?;
                }
            }
        }
        for (i, event) in events.iter().enumerate() {
            let n = sectors(event);
            for at in 1..n {
                for (first, others) in [(true, true), (true, false), (false, true), (false, false)]
                {
                    let lands: Vec<bool> = (0..n).map(|s| (s < at) == first).collect();
                    let torn = image_after(&base, events, |e| match e {
                        e if e == i => Apply::Torn(lands.clone()),
                        e if e < i || others => Apply::Full,
                        _ => Apply::Skip,
                    });
                    let end = if others { group.end } else { start + i + 1 };
                    see(&torn, start, end, &|| {
                        format!("{event} torn at sector {at} of {n}")
                    })?;
                }
            }
        }
    }
    // Once the new state is stable, the old one never comes back.
    let mut new_from = None;
    for cut in &out {
        match cut.side {
            Side::New if cut.end == cut.stable => new_from = new_from.or(Some(cut.stable)),
            Side::Old if new_from.is_some_and(|from| cut.stable >= from) => {
                return Err("the old state after the new one was stable".into())
            }
            _ => {}
        }
    }
    Ok((out, known.len() as u64))
}

fn sectors(event: &Event) -> usize {
    let (at, bytes) = match event {
        Event::Write { offset, data, .. } => (*offset, data.len() as u64),
        Event::Discard { offset, bytes } => (*offset, *bytes),
        _ => return 0,
    };
    ((at + bytes).div_ceil(512) - at / 512) as usize
}

/// Is the outcome true, when the log ends before event `end` with an error? `landed`: the request that
/// failed may be on the disk.
fn outcome_is_true(cuts: &[Cut], end: usize, landed: bool, outcome: Outcome) -> Result<(), String> {
    let stable = cuts.iter().map(|c| c.stable).filter(|s| *s <= end).max();
    let possible = |side: Side| {
        let end = end + usize::from(landed);
        let of_group = |c: &&Cut| Some(c.stable) == stable && c.end <= end;
        cuts.iter().filter(of_group).any(|c| c.side == side)
    };
    let (old, new, both) = (
        possible(Side::Old),
        possible(Side::New),
        possible(Side::Both),
    );
    match outcome {
        Outcome::Unchanged if !new => Ok(()),
        Outcome::Done if !old => Ok(()),
        Outcome::Unknown if both || (old && new) => Ok(()),
        _ => Err(format!(
            "an error at event {end} and the outcome {outcome:?}; old possible: {old}, new: {new}"
        )),
    }
}

/// A verb that succeeded: its log is held against the model.
fn judge_log(before: &[u8], log: &[Event], judge: &Judge) -> Result<(Vec<Cut>, u64), String> {
    judge.done(&image_after(before, log, |_| Apply::Full))?;
    if log.last().is_some_and(|e| *e != Event::Barrier) {
        return Err("it returned before everything was stable".into());
    }
    cuts(before, log, judge)
}

/// Every request that changes the file fails, once with nothing and once with all of it on the disk.
fn fail_each(before: &[u8], judge: &Judge, clean: &[Event], cuts: &[Cut]) -> Result<u64, String> {
    let mut faults = 0;
    let kinds = [
        RequestKind::Write,
        RequestKind::Truncate,
        RequestKind::Barrier,
    ];
    for (kind, landed) in kinds
        .map(|k| (k, 0))
        .into_iter()
        .chain([(RequestKind::Write, usize::MAX)])
    {
        for nth in 1.. {
            let plan = FaultPlan::nth(nth, libc::EIO).of_kind(kind).torn(landed);
            let failed = run(before, &judge.old.image, judge.verb, Some(plan));
            if failed.events == clean && failed.result.is_ok() {
                break;
            }
            faults += 1;
            let n = failed.events.len();
            if failed.result.is_ok() {
                // A length that could not be set at the end costs nothing.
                if kind != RequestKind::Truncate || failed.outcome != Outcome::Done {
                    return Err(format!("{kind:?} {nth} failed, and the verb did not"));
                }
                judge.side(&failed.after)?;
                continue;
            }
            if failed.events != clean[..n] {
                return Err(format!(
                    "{kind:?} {nth} failed, and something else was written"
                ));
            }
            let in_part = kind == RequestKind::Write && landed == 0;
            // A publishing write is under way, even one that leaves the meaning: it names new places only.
            let tail = clean[..(n + usize::from(in_part)).min(clean.len())]
                .iter()
                .rev();
            let header = |e: &Event| matches!(e, Event::Write { offset, .. } if *offset < CLUSTER);
            let publishes = tail.take_while(|e| **e != Event::Barrier).any(header);
            if failed.outcome == Outcome::Unknown && (publishes || judge.in_place) {
                continue;
            }
            outcome_is_true(cuts, n, in_part, failed.outcome)
                .map_err(|e| format!("{kind:?} {nth} failed: {e}\n{}", told(clean)))?;
        }
    }
    Ok(faults)
}

/// The events between barriers; nothing between two of them is a group, too.
fn groups(log: &[Event]) -> Vec<std::ops::Range<usize>> {
    let barriers = (0..log.len()).filter(|i| log[*i] == Event::Barrier);
    let ends: Vec<usize> = barriers.chain([log.len()]).collect();
    let start_of = |i: usize| i.checked_sub(1).map_or(0, |before| ends[before] + 1);
    (0..ends.len()).map(|i| start_of(i)..ends[i]).collect()
}

/// A log, for a message.
fn told(log: &[Event]) -> String {
    let lines = log
        .iter()
        .enumerate()
        .map(|(i, e)| format!("    {i} {e}\n"));
    lines.collect()
}

/// The verbs that can be asked of an image.
fn verbs(bytes: &[u8], image: &model::Image) -> Vec<Verb> {
    let l1_size = u64::from(u32::from_be_bytes(bytes[36..40].try_into().unwrap()));
    let by_table = CLUSTER * (CLUSTER / 8);
    let beyond = (l1_size * by_table).saturating_sub(image.active.size.next_multiple_of(by_table));
    let mut all = vec![Verb::Create { vm_state_size: 0 }, Verb::WriteSnapshots];
    if beyond > 0 {
        all.push(Verb::Create {
            vm_state_size: beyond,
        });
    }
    let snapshots = 0..image.snapshots.len();
    all.extend(
        snapshots
            .clone()
            .flat_map(|i| [Verb::Goto(i), Verb::Delete(i), Verb::Rename(i)]),
    );
    if snapshots.len() > 1 {
        all.push(Verb::DeleteAllBut(None));
    }
    if snapshots.len() > 2 {
        all.extend(snapshots.map(|i| Verb::DeleteAllBut(Some(i))));
    }
    all.push(Verb::Repair);
    if bytes[8..16] != [0; 8] {
        all.push(Verb::Flatten);
    }
    all
}

/// One verb on an image, which is sound but for a cluster that may be counted too low. The image after it.
fn one(
    sums: &mut Sums,
    before: &[u8],
    old: &Reading,
    verb: Verb,
    low: Option<u64>,
) -> Result<Option<Vec<u8>>, String> {
    let new = verb.on(&old.image, CLUSTER);
    let clean = run(before, &old.image, verb, None);
    sums.verbs += 1;
    if let Err(why) = clean.result {
        if !clean.events.is_empty() || clean.outcome != Outcome::Unchanged {
            return Err(format!("refused after it had written: {why}"));
        }
        *sums.refused.entry(kind_of(&why)).or_default() += 1;
        return Ok(None);
    }
    // A repair saves what hangs on the cluster.
    let skip = match verb {
        Verb::Repair => vec![],
        _ => hanging(old, verb, &new),
    };
    let judge = Judge {
        verb,
        old,
        new: &new,
        in_place: clean.in_place,
        damage: low.map(|cluster| Damage {
            cluster,
            skip: &skip,
        }),
    };
    let (cuts, judged) = judge_log(before, &clean.events, &judge)?;
    if clean.outcome != Outcome::Done {
        return Err(format!(
            "it returned 0, and the outcome is {:?}",
            clean.outcome
        ));
    }
    sums.cuts += judged;
    sums.in_place += u64::from(clean.in_place);
    if clean.in_place {
        // A shrink, or a growth over a backing file, makes a table for each L1 entry for a while, as in QEMU: they take
        // room that is free before and after.
        let tables = |image: &model::Image| image.active.size.div_ceil(CLUSTER * CLUSTER / 8);
        let (was, is) = (tables(&old.image), tables(&new));
        let backing = before[8..16].iter().any(|b| *b != 0);
        let made = match is > was && !backing {
            true => 0,
            false => is.abs_diff(was),
        };
        if free_clusters(before, &clean.after) as u64 > made {
            return Err("the L1 table was written in place, and there was room".into());
        }
    }
    sums.faults += fail_each(before, &judge, &clean.events, &cuts)?;
    Ok(Some(clean.after))
}

/// How many clusters do both images count 0, in the same refcount block? An L1 table here has one cluster. The header is
/// there even where its count is too low.
fn free_clusters(before: &[u8], after: &[u8]) -> usize {
    let word = |image: &[u8], at: usize| {
        let word = image.get(at..at + 8);
        word.map_or(0, |w| u64::from_be_bytes(w.try_into().unwrap()))
    };
    let bits = match before[7] {
        2 => 16,
        _ => 1usize << before[99],
    };
    let block = |image: &[u8], i: usize| word(image, word(image, 48) as usize + 8 * i) as usize;
    let tables = CLUSTER as usize / 8 * usize::from(before[59].min(after[59]));
    let kept = (0..tables).filter(|i| {
        let old = block(before, *i);
        old != 0 && old == block(after, *i)
    });
    kept.map(|i| {
        let clusters = usize::from(i == 0)..CLUSTER as usize * 8 / bits;
        let is_free = |image: &[u8], n: usize| {
            (n * bits..(n + 1) * bits).all(|bit| {
                image
                    .get(block(before, i) + bit / 8)
                    .is_none_or(|byte| byte >> (bit % 8) & 1 == 0)
            })
        };
        let free = clusters.filter(|n| is_free(before, *n) && is_free(after, *n));
        free.count()
    })
    .sum()
}

/// A message without its numbers.
fn kind_of(why: &str) -> String {
    let words = why.split_whitespace();
    let words: Vec<&str> = words
        .filter(|w| !w.chars().any(|c| c.is_ascii_digit()))
        .collect();
    words.join(" ")
}

/// The states, before the verb or after it, that reach a cluster whose count is too low: IDs, and nothing for the active
/// disk.
fn hanging(old: &Reading, verb: Verb, new: &model::Image) -> Vec<Vec<u8>> {
    let n = old.image.snapshots.len();
    let hang = |i: &usize| old.hang.get(*i) == Some(&true);
    let mut all: Vec<Vec<u8>> = (0..n)
        .filter(hang)
        .map(|i| id(&old.image, i).into())
        .collect();
    if hang(&n) || matches!(verb, Verb::Goto(i) if hang(&i)) {
        all.push(vec![]);
    }
    if let (true, Verb::Create { .. }) = (hang(&n), verb) {
        all.push(id(new, n).into());
    }
    all
}

/// Images that were tried, and with how many verbs.
type Known = Mutex<HashMap<u64, usize>>;

/// All verbs on an image, and all on what they leave.
fn explore(sums: &mut Sums, known: &Known, bytes: &[u8], left: usize, path: &mut Vec<Verb>) {
    {
        let mut known = known.lock().unwrap();
        let best = known.entry(digest(bytes)).or_default();
        if *best >= left {
            return;
        }
        *best = left;
    }
    sums.reached += 1;
    let old = match read(bytes) {
        Ok(old) => old,
        Err(why) => {
            return lose(
                sums,
                bytes,
                &format!("the image itself, after {path:?}: {why}"),
            )
        }
    };
    for verb in verbs(bytes, &old.image) {
        path.push(verb);
        match one(sums, bytes, &old, verb, None) {
            Err(why) => lose(sums, bytes, &format!("{path:?}: {why}")),
            Ok(Some(after)) if left > 1 => explore(sums, known, &after, left - 1, path),
            Ok(_) => {}
        }
        path.pop();
    }
}

fn lose(sums: &mut Sums, before: &[u8], why: &str) {
    if sums.losses.len() < 5 {
        let dir = std::path::Path::new("/tmp/qcow2-exhaustive");
        let _ = std::fs::create_dir_all(dir);
        let file = dir.join(format!("{:016x}.qcow2", digest(before)));
        let _ = std::fs::write(&file, before);
        println!(
            "LOST {why}\n  the image before the last verb: {}",
            file.display()
        );
    }
    sums.losses.push(why.to_owned());
}

/// Each image of a bound, with the deviation sets that it is tried with.
fn each_image(bound: &Bound, mut see: impl FnMut(&Spec, &[Deviation]) -> bool) {
    let mut chooser = Chooser::default();
    loop {
        let spec = Spec::choose(&mut chooser, bound);
        let single = spec.deviations();
        let mut go_on = see(&spec, &[]);
        let singles = single.iter().enumerate().filter(|_| bound.deviations > 0);
        for (i, a) in singles {
            go_on = go_on && see(&spec, &[*a]);
            if bound.deviations > 1 {
                go_on = go_on && single[i + 1..].iter().all(|b| see(&spec, &[*a, *b]));
            }
        }
        if !go_on || !chooser.next() {
            return;
        }
    }
}

/// One in `n` images of a bound, from the `i`-th, on all processors.
fn try_all(bound: &Bound, (part, parts): (u64, u64)) -> Sums {
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let total = Mutex::new(Sums::default());
    let known = Known::default();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for thread in 0..threads {
            let (total, known, stop) = (&total, &known, &stop);
            s.spawn(move || {
                let (mut sums, mut n) = (Sums::default(), 0);
                each_image(bound, |spec, deviations| {
                    n += 1;
                    if n % (parts * threads) != (part * threads + thread) % (parts * threads) {
                        return true;
                    }
                    let Some((bytes, low)) = spec.bytes(deviations) else {
                        return true;
                    };
                    sums.images += 1;
                    match low {
                        Some(low) => all_damaged(&mut sums, &bytes, low),
                        None => {
                            let left = match deviations {
                                [] => bound.verbs.0,
                                _ => bound.verbs.1,
                            };
                            explore(&mut sums, known, &bytes, left, &mut vec![]);
                        }
                    }
                    stop.fetch_or(sums.losses.len() > 20, Ordering::Relaxed);
                    !stop.load(Ordering::Relaxed)
                });
                total.lock().unwrap().add(&sums);
            });
        }
    });
    total.into_inner().unwrap()
}

fn all_damaged(sums: &mut Sums, bytes: &[u8], low: u64) {
    let old = match read_damaged(
        bytes,
        Damage {
            cluster: low,
            skip: &[],
        },
    ) {
        Ok(old) => old,
        Err(why) => return lose(sums, bytes, &why),
    };
    if Image::open_storage(
        Box::new(MemoryStorage::new(bytes.to_vec())),
        OpenFlags::RDWR,
    )
    .is_err()
    {
        *sums.refused.entry("open".into()).or_default() += 1;
        return;
    }
    for verb in verbs(bytes, &old.image) {
        if let Err(why) = one(sums, bytes, &old, verb, Some(low)) {
            lose(
                sums,
                bytes,
                &format!("{verb:?}, cluster {low} counted too low: {why}"),
            );
        }
    }
}

#[test]
fn every_small_image_survives_every_cut() {
    let which = std::env::var("EXHAUSTIVE").unwrap_or_default();
    let numbers: Vec<usize> = which.split(' ').filter_map(|n| n.parse().ok()).collect();
    let own: Option<[usize; 7]> = numbers.try_into().ok();
    let own = own.map(|b| [bound(b)]);
    let bounds = match (&own, which.as_str()) {
        (Some(own), _) => own,
        (_, "hour") => HOUR,
        _ => CHECK,
    };
    if std::env::var_os("EXHAUSTIVE_COUNT").is_some() {
        for bound in bounds {
            let (mut clean, mut all) = (0u64, 0u64);
            each_image(bound, |_, deviations| {
                clean += u64::from(deviations.is_empty());
                all += 1;
                true
            });
            println!("{clean} clean images, at most {all} with deviations: {bound:?}");
        }
        return;
    }
    let part = std::env::var("EXHAUSTIVE_PART").ok();
    let part = part.as_ref().and_then(|p| p.split_once('/'));
    let part = part.map_or((0, 1), |(i, n)| (i.parse().unwrap(), n.parse().unwrap()));
    for bound in bounds {
        let start = std::time::Instant::now();
        let sums = try_all(bound, part);
        println!(
            "every image up to {bound:?}, part {} of {}:",
            part.0, part.1
        );
        for (why, n) in &sums.refused {
            println!("  {n} verbs refused without a byte written: {why}");
        }
        println!(
            "  {} goto wrote the L1 table in place, for lack of space",
            sums.in_place
        );
        println!(
            "  {} images, {} with those that verbs left, {} verbs, {} cuts, {} failing requests, {} losses ({} s)",
            sums.images,
            sums.reached,
            sums.verbs,
            sums.cuts,
            sums.faults,
            sums.losses.len(),
            start.elapsed().as_secs()
        );
        let first = sums.losses.first();
        assert!(
            first.is_none(),
            "{} losses, the first: {}",
            sums.losses.len(),
            sums.losses[0]
        );
        assert!(sums.images > 0 && sums.cuts > 0, "nothing was judged");
    }
}
