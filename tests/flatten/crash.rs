//! Power cuts, failing disks, full disks and a second thought: every state reads as before.

use super::judge::judge;
use super::overlays::{self, io, Overlay};
use super::{all_states, states};
use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::trace::{
    crash_images, CrashPlan, FaultPlan, RequestKind, Trace, TraceStorage,
};
use qcow2_snapshot::io::{Run, Storage};
use qcow2_snapshot::{Image, OpenFlags, Outcome};
use std::cell::Cell;
use std::collections::HashMap;
use std::io::Result;
use std::ops::ControlFlow;
use std::rc::Rc;

/// What a cut may leak, and what a generation is here.
const GENERATION: u64 = 32 << 10;

/// Files by name, for images that name them.
type Files = Rc<HashMap<Vec<u8>, Vec<u8>>>;

/// An image and the files behind it. The N-th read of one of those may fail.
struct Over<S> {
    image: S,
    files: Files,
    reads: Rc<Cell<u64>>,
    behind: bool,
}

impl<S: Storage> Storage for Over<S> {
    fn length(&mut self) -> Result<u64> {
        self.image.length()
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        if self.behind && self.reads.get() > 0 {
            self.reads.set(self.reads.get() - 1);
            if self.reads.get() == 0 {
                return Err(std::io::Error::from_raw_os_error(libc::EIO));
            }
        }
        self.image.read(offset, buf)
    }
    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> Result<()> {
        self.image.write(label, offset, data)
    }
    fn truncate(&mut self, length: u64) -> Result<()> {
        self.image.truncate(length)
    }
    fn discard(&mut self, offset: u64, bytes: u64) -> Result<()> {
        self.image.discard(offset, bytes)
    }
    fn barrier(&mut self) -> Result<()> {
        self.image.barrier()
    }
    fn run(&mut self, offset: u64) -> Option<Run> {
        self.image.run(offset)
    }
    fn open_named(&mut self, name: &[u8], _: &[u8]) -> Option<Result<Box<dyn Storage>>> {
        let Some(bytes) = self.files.get(name) else {
            return Some(Err(std::io::Error::from_raw_os_error(libc::ENOENT)));
        };
        Some(Ok(Box::new(Over {
            image: MemoryStorage::new(bytes.clone()),
            files: Rc::clone(&self.files),
            reads: Rc::clone(&self.reads),
            behind: true,
        })))
    }
    fn close(self: Box<Self>) -> Result<()> {
        Box::new(self.image).close()
    }
}

type States = Vec<(String, Vec<u8>)>;

/// An overlay in memory.
struct Case {
    image: Vec<u8>,
    files: Files,
    want: States,
    story: String,
}

impl Case {
    fn of(o: &Overlay) -> Case {
        let read = |name: &str| std::fs::read(o.dir.path().join(name)).ok();
        let names = ["base", "middle.qcow2"];
        let files = names
            .iter()
            .filter_map(|n| Some((n.as_bytes().to_vec(), read(n)?)));
        Case {
            image: read("o.qcow2").unwrap(),
            files: Rc::new(files.collect()),
            want: states(&o.path()),
            story: o.story.clone(),
        }
    }

    fn over<S: Storage + 'static>(&self, image: S, reads: u64) -> Box<dyn Storage> {
        Box::new(Over {
            image,
            files: Rc::clone(&self.files),
            reads: Rc::new(Cell::new(reads)),
            behind: false,
        })
    }

    /// Every state reads as before, and no count is too low.
    fn right(&self, image: &[u8], what: &str) -> u64 {
        let storage = self.over(MemoryStorage::new(image.to_vec()), 0);
        let opened = Image::open_storage(storage, OpenFlags::read_only());
        let mut opened = opened.unwrap_or_else(|e| panic!("{what}: {e}\n{}", self.story));
        let is = all_states(&mut opened);
        for ((name, was), (_, is)) in self.want.iter().zip(&is) {
            let differ = was.iter().zip(is).position(|(a, b)| a != b);
            self.assert(
                was == is,
                &format!("{what}: {name} differs at {differ:?}"),
                image,
            );
        }
        assert_eq!(self.want.len(), is.len());
        match judge(image) {
            Ok(verdict) => verdict.leaks << verdict.cluster_bits,
            Err(why) => {
                self.assert(false, &format!("{what}: {why}"), image);
                0
            }
        }
    }

    fn assert(&self, good: bool, what: &str, image: &[u8]) {
        if !good {
            let _ = std::fs::write("/tmp/qcow2-flatten.qcow2", image);
            panic!("{what}; kept as /tmp/qcow2-flatten.qcow2\n{}", self.story);
        }
    }

    /// Another call ends what was begun.
    fn goes_on(&self, image: &[u8], what: &str) {
        let storage = MemoryStorage::new(image.to_vec());
        let bytes = storage.handle();
        let mut again = Image::open_storage(self.over(storage, 0), OpenFlags::RDWR).unwrap();
        again
            .flatten()
            .unwrap_or_else(|e| panic!("{what}, again: {e}\n{}", self.story));
        again.close().unwrap();
        self.right(&bytes.borrow(), &format!("{what}, again"));
    }

    fn recorder(&self, reads: u64) -> (Image, Trace) {
        let storage = TraceStorage::new(self.image.clone());
        let trace = storage.trace();
        (
            Image::open_storage(self.over(storage, reads), OpenFlags::RDWR).unwrap(),
            trace,
        )
    }
}

/// Small overlays, and some of a shape that must be there.
fn cases(n: u64) -> impl Iterator<Item = Case> {
    let first = std::env::var("FLATTEN_CRASH")
        .ok()
        .and_then(|v| v.parse().ok());
    let all = std::env::var_os("CRASH_ALL").is_some_and(|v| v != "0");
    let n = if all { n * 20 } else { n };
    let seeds = first.unwrap_or(1000u64)..;
    let random = seeds.map(overlays::random).map(|o| Case::of(&o));
    let shaped = overlays::shaped().into_iter().map(|o| Case::of(&o));
    shaped.chain(random.filter(|c| c.image.len() < 300_000).take(n as usize))
}

/// Every cut of one flatten. Returns how many images and generations that were.
fn cut(case: &Case, plan: &CrashPlan) -> (u64, u64) {
    let (mut image, trace) = case.recorder(0);
    image
        .flatten_in(GENERATION)
        .unwrap_or_else(|e| panic!("{e}\n{}", case.story));
    image.close().unwrap();
    let before = judge(&case.image).unwrap();
    let cluster = 1 << before.cluster_bits;
    // A generation; one cluster, and a table, for each state is the least there is to one. With it new refcount
    // blocks, or a table.
    let states = case.want.len() as u64;
    let generation = GENERATION.max(2 * states * cluster);
    let most = (before.leaks << before.cluster_bits) + generation + 4 * cluster;
    let mut judged = 0;
    for cut in crash_images(&trace.initial(), &trace.events(), plan) {
        let leaked = case.right(&cut.bytes, &cut.what);
        case.assert(
            leaked <= most,
            &format!("{}: {leaked} leaked of {most}", cut.what),
            &cut.bytes,
        );
        // Bits that say of something else that it fits the data go before anything changes.
        let old = judge(&cut.bytes).is_ok_and(|v| v.unknown_autoclear);
        case.assert(
            !old || cut.bytes == case.image,
            &format!("{}: autoclear bits are still set", cut.what),
            &cut.bytes,
        );
        if judged % 16 == 0 {
            case.goes_on(&cut.bytes, &cut.what);
        }
        judged += 1;
    }
    case.right(&trace.contents(), "afterwards");
    (judged, trace.counts().barriers / 2)
}

#[test]
fn a_power_cut_at_any_moment_leaves_every_state_as_it_was() {
    if !super::toolbox() {
        return;
    }
    let plan = CrashPlan {
        exhaustive: 4,
        singles: 10,
        random: 8,
        torn: 2,
        ..CrashPlan::default()
    };
    let (mut judged, mut generations) = (0, 0);
    for (n, mut case) in cases(6).enumerate() {
        if n % 3 == 0 && case.image[7] > 2 {
            // A bit that nobody knows.
            case.image[88 + 2] |= 1;
        }
        let (images, parts) = cut(&case, &plan);
        (judged, generations) = (judged + images, generations + parts);
    }
    println!("{judged} images judged, {generations} generations");
    assert!(judged > 500 && generations > 20);
}

/// Blocks of 64-bit counts for 32 KiB each, of which a cluster of the table names 64: it grows at 2 MiB. The
/// generation is cut into epochs then. Every other cluster behind is zeros, so that each new one stands by
/// itself, and one takes the place of the old table.
#[test]
fn a_power_cut_while_the_refcount_table_grows_leaves_every_state_as_it_was() {
    if !super::toolbox() {
        return;
    }
    let size = 2300 << 10;
    let o = super::limits::overlay("cluster_size=512,refcount_bits=64", size, size);
    let every_other: Vec<u8> = (0..size).map(|n| (n / 512 % 2 * 9) as u8).collect();
    std::fs::write(o.dir.path().join("base"), every_other).unwrap();
    io(o.dir.path(), "o.qcow2", &["write -P 1 0 1900k".into()]);
    super::limits::snapshot(&o, "a");
    io(o.dir.path(), "o.qcow2", &["write -P 2 1800k 4k".into()]);
    let case = Case::of(&o);
    let plan = CrashPlan {
        exhaustive: 2,
        singles: 4,
        random: 3,
        torn: 1,
        ..CrashPlan::default()
    };
    let (mut image, trace) = case.recorder(0);
    image.flatten_in(GENERATION).unwrap();
    image.close().unwrap();
    let clusters = |image: &[u8]| u32::from_be_bytes(image[56..60].try_into().unwrap());
    let (was, is) = (clusters(&case.image), clusters(&trace.contents()));
    assert!(is > was, "{was} {is}");
    let (judged, generations) = cut(&case, &plan);
    println!("{judged} images judged, {generations} generations");
    assert!(judged > 50 && generations > 5);
}

#[test]
fn a_disk_that_fails_or_is_full_leaves_every_state_as_it_was() {
    if !super::toolbox() {
        return;
    }
    let mut failed = 0;
    for case in cases(2) {
        for (errno, kind) in [(libc::EIO, None), (libc::ENOSPC, Some(RequestKind::Write))] {
            for n in 1.. {
                let (mut image, trace) = case.recorder(0);
                let plan = FaultPlan::nth(n, errno);
                let plan = match kind {
                    Some(kind) => plan.of_kind(kind),
                    None => plan,
                };
                trace.set_fault(Some(plan.persistent()));
                let result = image.flatten_in(GENERATION);
                trace.set_fault(None);
                let what = format!("request {n} fails with {errno}");
                let Err(e) = result else {
                    // Holes that cannot be punched cost space only.
                    if trace.fired() == 0 {
                        break;
                    }
                    continue;
                };
                assert_eq!(e.errno(), errno, "{what}: {e}");
                let outcome = image.last_outcome();
                let published = trace.contents()[8..20] == [0; 12];
                case.assert(
                    outcome != Outcome::Done || published,
                    &what,
                    &trace.contents(),
                );
                case.assert(
                    outcome != Outcome::Unchanged || !published,
                    &what,
                    &trace.contents(),
                );
                if outcome == Outcome::Unchanged {
                    let mut disk = vec![0; image.length() as usize];
                    image.read(0, &mut disk).unwrap();
                    assert!(disk == case.want[0].1, "{what}\n{}", case.story);
                }
                image.close().unwrap();
                case.right(&trace.contents(), &what);
                if n % 7 == 0 {
                    case.goes_on(&trace.contents(), &what);
                }
                failed += 1;
            }
        }
    }
    println!("{failed} failing requests");
    assert!(failed > 100);
}

#[test]
fn a_file_behind_that_cannot_be_read_leaves_every_state_as_it_was() {
    if !super::toolbox() {
        return;
    }
    let mut failed = 0;
    for case in cases(2) {
        for n in 1.. {
            let (mut image, trace) = case.recorder(n);
            let Err(e) = image.flatten_in(GENERATION) else {
                break;
            };
            assert_eq!(e.errno(), libc::EIO);
            assert_eq!(image.last_outcome(), Outcome::Unchanged);
            let leaked = case.right(&trace.contents(), &format!("read {n} behind fails"));
            let before = judge(&case.image).unwrap();
            assert_eq!(
                leaked,
                before.leaks << before.cluster_bits,
                "no generation was begun"
            );
            // The handle has written nothing by halves.
            image.flatten().unwrap();
            image.close().unwrap();
            case.right(&trace.contents(), "again");
            failed += 1;
        }
    }
    assert!(failed > 10);
}

#[test]
fn cancelled_at_any_call_every_state_is_as_it_was_and_the_handle_goes_on() {
    if !super::toolbox() {
        return;
    }
    let mut cancelled = 0;
    for case in cases(3) {
        for n in 1.. {
            let (mut image, trace) = case.recorder(0);
            let calls = Rc::new(Cell::new(0));
            let seen = Rc::clone(&calls);
            let last = Rc::new(Cell::new((0, 0, 0)));
            image.set_progress(Some(Box::new(move |stage, done, total| {
                seen.set(seen.get() + 1);
                let (was, of, so_far) = last.replace((stage as i32, total, done));
                assert!(
                    was < stage as i32 || of == total && so_far <= done,
                    "{stage:?} {done} {total}"
                );
                assert!(done <= total && total > 0);
                if seen.get() == n {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })));
            let result = image.flatten_in(GENERATION);
            image.set_progress(None);
            let Err(e) = result else {
                assert!(calls.get() < n + 1);
                break;
            };
            assert_eq!(e.errno(), libc::ECANCELED);
            assert_eq!(image.last_outcome(), Outcome::Unchanged);
            let leaked = case.right(&trace.contents(), &format!("cancelled at call {n}"));
            let before = judge(&case.image).unwrap();
            assert_eq!(leaked, before.leaks << before.cluster_bits);
            image.flatten().unwrap();
            image.close().unwrap();
            case.right(&trace.contents(), "after another call");
            cancelled += 1;
        }
    }
    println!("cancelled {cancelled} times");
    assert!(cancelled > 50);
}
