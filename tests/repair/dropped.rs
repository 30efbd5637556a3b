//! A snapshot whose tables cannot be read: while it is there a repair frees nothing; delete drops it, and
//! frees nothing of it; then a repair of leaks gives the space back. At no moment anything else suffers.

use super::*;
use qcow2_snapshot::io::Storage;
use qcow2_snapshot::{NewSnapshot, Outcome};
use std::collections::BTreeSet;

/// How a snapshot is damaged. Of its entry: the L1 table is not aligned, behind the end, too long. Of its
/// first L1 entry: the L2 table is not aligned, behind the end. Its L1 table, an L2 table cannot be read.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Damage {
    L1Unaligned,
    L1Behind,
    L1TooLong,
    L2Unaligned,
    L2Behind,
    L1Unreadable,
    L2Unreadable,
}

const ALL: [Damage; 7] = [
    Damage::L1Unaligned,
    Damage::L1Behind,
    Damage::L1TooLong,
    Damage::L2Unaligned,
    Damage::L2Behind,
    Damage::L1Unreadable,
    Damage::L2Unreadable,
];

/// Memory of which one cluster cannot be read.
struct BadCluster {
    of: TraceStorage,
    bad: std::ops::Range<u64>,
}

impl Storage for BadCluster {
    fn length(&mut self) -> std::io::Result<u64> {
        self.of.length()
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        if offset < self.bad.end && self.bad.start < offset + buf.len() as u64 {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        self.of.read(offset, buf)
    }
    fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.of.write(label, offset, data)
    }
    fn truncate(&mut self, length: u64) -> std::io::Result<()> {
        self.of.truncate(length)
    }
    fn discard(&mut self, offset: u64, bytes: u64) -> std::io::Result<()> {
        self.of.discard(offset, bytes)
    }
    fn barrier(&mut self) -> std::io::Result<()> {
        self.of.barrier()
    }
    fn close(self: Box<Self>) -> std::io::Result<()> {
        Box::new(self.of).close()
    }
}

/// A sound image whose first snapshot holds clusters that nothing else does, with one more snapshot.
struct Case {
    name: String,
    image: Vec<u8>,
    damage: Damage,
    bad: std::ops::Range<u64>,
    /// The snapshot's entry as the judge names it, when it is damaged.
    key: BTreeSet<String>,
}

fn be64(image: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
}

fn put64(image: &mut [u8], at: u64, value: u64) {
    image[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

fn with<T>(image: &mut Vec<u8>, verb: impl FnOnce(&mut Image) -> T) -> T {
    let storage = MemoryStorage::new(image.clone());
    let handle = storage.handle();
    let flags = OpenFlags::RDWR | OpenFlags::NO_LOCK | OpenFlags::NO_BACKING;
    let mut opened = Image::open_storage(Box::new(storage), flags).unwrap();
    let out = verb(&mut opened);
    opened.close().unwrap();
    *image = handle.borrow().clone();
    out
}

fn keys(image: &[u8]) -> BTreeSet<String> {
    Raw(image).l1s().into_iter().map(|(key, ..)| key).collect()
}

/// Reference images, a second snapshot taken, and the first damaged.
fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    let mut folders = BTreeSet::new();
    for (name, mut image) in reference() {
        let folder = name.split('/').next().unwrap_or_default().to_owned();
        let sound = check(image.clone()).is_ok_and(|(r, _)| r.corruptions + r.leaks == 0);
        let open = OpenFlags::RDWR | OpenFlags::NO_LOCK | OpenFlags::NO_BACKING;
        let storage = Box::new(MemoryStorage::new(image.clone()));
        let opens = Image::open_storage(storage, open).is_ok();
        let at = be64(&image, 64);
        let snapshots = Raw(&image).number(60, 4) != 0 && Raw(&image).number(at + 8, 4) != 0;
        if !sound || !opens || !snapshots || !folders.insert(folder) {
            continue;
        }
        let new = NewSnapshot {
            name: b"other".to_vec(),
            ..NewSnapshot::default()
        };
        // With counts of one bit nothing can be shared.
        let _ = with(&mut image, |i| i.snapshot_create(&new).map(drop));
        for damage in ALL {
            let mut image = image.clone();
            let (sound, cs) = (keys(&image), 1 << Raw(&image).number(20, 4));
            let entry = be64(&image, 64);
            let (l1, n) = (be64(&image, entry), Raw(&image).number(entry + 8, 4));
            let named = (0..n).map(|i| l1 + i * 8).find(|at| be64(&image, *at) != 0);
            let Some(named) = named else {
                continue;
            };
            let l2 = be64(&image, named) & 0x00ff_ffff_ffff_fe00;
            let behind = (image.len() as u64).next_multiple_of(cs) + 8 * cs;
            let mut bad = 0..0;
            match damage {
                Damage::L1Unaligned => put64(&mut image, entry, l1 + 256),
                Damage::L1Behind => put64(&mut image, entry, behind),
                Damage::L1TooLong => {
                    let at = entry as usize + 8;
                    image[at..at + 4].copy_from_slice(&0x40_0001u32.to_be_bytes());
                }
                Damage::L2Unaligned if cs > 512 => put64(&mut image, named, l2 + 512),
                Damage::L2Unaligned => continue,
                Damage::L2Behind => put64(&mut image, named, behind),
                Damage::L1Unreadable => bad = l1..l1 + 8,
                Damage::L2Unreadable => bad = l2..l2 + cs,
            }
            // Where another state shares the table, it is lost with it.
            let mut others = Raw(&image).l1s();
            others.swap_remove(1);
            let shared = others.iter().any(|(_, l1, n)| {
                let words = (0..*n).map(|i| be64(&image, l1 + i * 8));
                words.into_iter().any(|w| w & 0x00ff_ffff_ffff_fe00 == l2)
            });
            if damage == Damage::L2Unreadable && shared {
                continue;
            }
            let now = keys(&image);
            let key = match now == sound {
                true => [Raw(&image).l1s().swap_remove(1).0].into(),
                false => now.difference(&sound).cloned().collect(),
            };
            out.push(Case {
                name: name.clone(),
                image,
                damage,
                bad,
                key,
            });
        }
    }
    assert!(out.len() > 100, "{}", out.len());
    for damage in ALL {
        assert!(out.iter().any(|c| c.damage == damage), "{damage:?}");
    }
    out
}

impl Case {
    fn open(&self, image: &[u8], flags: OpenFlags) -> (Image, qcow2_snapshot::io::trace::Trace) {
        let of = TraceStorage::new(image.to_vec());
        let (trace, bad) = (of.trace(), self.bad.clone());
        let flags = flags | OpenFlags::RDWR | OpenFlags::NO_LOCK | OpenFlags::NO_BACKING;
        let image = Image::open_storage(Box::new(BadCluster { of, bad }), flags).unwrap();
        (image, trace)
    }

    /// What all but the damaged snapshot read as, the same before and after; no count has fallen, but of
    /// the `free` clusters; and no shared cluster may be written in place.
    fn keeps(&self, after: &[u8], free: &BTreeSet<u64>) -> Result<(), String> {
        let (b, a) = (Raw(&self.image), Raw(after));
        let odd = b.odd().union(&a.odd()).copied().collect();
        let states = |of: &Raw<'_>| {
            let mut states = of.states(&BTreeSet::new(), &odd);
            states.retain(|key, _| !self.key.contains(key));
            states
        };
        if states(&b) != states(&a) {
            return Err("a state reads otherwise".into());
        }
        let clusters = self.image.len() as u64 / (1 << b.number(20, 4));
        if let Some(c) = (0..=clusters)
            .filter(|c| !free.contains(c))
            .find(|c| a.count(*c) < b.count(*c))
        {
            return Err(format!("the count of cluster {c} has fallen"));
        }
        match a.safety().1.difference(&b.safety().1).next() {
            Some(c) => Err(format!(
                "cluster {c} may be written in place, but is shared"
            )),
            None => Ok(()),
        }
    }

    /// Clusters of the snapshot table.
    fn table(&self) -> BTreeSet<u64> {
        let cs = 1 << Raw(&self.image).number(20, 4);
        let (at, end) = (be64(&self.image, 64), Raw(&self.image).table_end());
        (at / cs..=(end - 1) / cs).collect()
    }
}

#[test]
fn while_a_snapshot_cannot_be_read_a_repair_frees_nothing_and_says_so() {
    for case in cases() {
        let what = format!("{}, {:?}", case.name, case.damage);
        for fix in [all(), Fix::LEAKS] {
            let (mut image, trace) = case.open(&case.image, OpenFlags::CHECK);
            let mut said = Vec::new();
            let result = image.check(fix, &mut |l| said.push(l.to_owned())).unwrap();
            assert!(
                said.iter().any(|l| l.starts_with("Nothing is freed")),
                "{what}: {said:?}"
            );
            assert!(result.corruptions + result.check_errors != 0, "{what}");
            let after = trace.contents();
            case.keeps(&after, &BTreeSet::new())
                .unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    }
}

#[test]
fn a_dirty_image_with_a_snapshot_that_no_file_holds_can_be_changed_after_a_repair() {
    let mut tried = BTreeSet::new();
    for mut case in cases() {
        if Raw(&case.image).number(4, 4) < 3 {
            continue;
        }
        let what = format!("{}, {:?}", case.name, case.damage);
        case.image[79] |= 1;
        let (mut image, trace) = case.open(&case.image, OpenFlags::CHECK);
        image.check(all(), &mut |_| {}).unwrap();
        let after = trace.contents();
        // Not where reading fails, nor where a table may come to be, since a guest allocates it.
        let nowhere = match case.damage {
            Damage::L1Unaligned | Damage::L1TooLong => true,
            // What is read there may name anything.
            Damage::L2Unaligned => Raw(&after).bits() & 1 == 0,
            Damage::L1Behind | Damage::L2Behind => false,
            Damage::L1Unreadable | Damage::L2Unreadable => false,
        };
        assert_eq!(Raw(&after).bits() & 1 == 0, nowhere, "{what}");
        if nowhere {
            let (mut image, _) = case.open(&after, OpenFlags::read_only());
            let id = image.snapshot_list().unwrap()[0].id.clone();
            image.snapshot_delete(Some(&id), None).unwrap();
            tried.insert(format!("{:?}", case.damage));
        }
    }
    assert!(tried.len() >= 2, "{tried:?}");
}

#[test]
fn where_a_read_fails_snapshots_that_would_be_dropped_stay_and_are_told() {
    let mut tried = 0;
    for mut case in cases() {
        if case.damage != Damage::L2Unreadable {
            continue;
        }
        case.image[60..64].copy_from_slice(&70_000u32.to_be_bytes());
        let (mut image, trace) = case.open(&case.image, OpenFlags::CHECK);
        let result = image.check(all(), &mut |_| {});
        let result = result.unwrap_or_else(|e| panic!("{}: {e}", case.name));
        assert!(
            result.corruptions != 0 && result.check_errors != 0,
            "{result:?}"
        );
        assert_eq!(trace.contents(), case.image, "{}", case.name);
        tried += 1;
    }
    assert!(tried > 5, "{tried}");
}

#[test]
fn a_snapshot_that_cannot_be_read_is_dropped_and_a_repair_of_leaks_frees_what_it_held() {
    let mut freed = 0;
    // A sample, with each damage in it; all in a soak.
    let soak = std::env::var_os("CHECK_SECONDS").is_some();
    let all = cases();
    println!(
        "one of {} of {} damaged images",
        if soak { 1 } else { 5 },
        all.len()
    );
    for case in all.iter().step_by(if soak { 1 } else { 5 }) {
        let what = format!("{}, {:?}", case.name, case.damage);
        let bad = |e: String| -> ! { panic!("{what}: {e}") };
        let (mut image, trace) = case.open(&case.image, OpenFlags::read_only());
        let id = image.snapshot_list().unwrap()[0].id.clone();
        image
            .snapshot_delete(Some(&id), None)
            .unwrap_or_else(|e| bad(e.to_string()));
        assert_eq!(image.last_outcome(), Outcome::Done);
        assert!(
            image.remark().is_some_and(|r| r.contains("check -r leaks")),
            "{what}"
        );
        let (events, after) = (trace.events(), trace.contents());
        let keys = keys(&after);
        assert!(
            case.key.iter().all(|k| !keys.contains(k)),
            "{what}: still there"
        );
        case.keeps(&after, &case.table()).unwrap_or_else(|e| bad(e));

        // A cut anywhere.
        let plan = CrashPlan {
            singles: 12,
            random: 6,
            torn: 4,
            ..CrashPlan::default()
        };
        for cut in crash_images(&case.image, &events, &plan) {
            case.keeps(&cut.bytes, &case.table())
                .unwrap_or_else(|e| bad(format!("{}: {e}", cut.what)));
        }

        // And the space comes back. What cannot be read is not needed for it.
        let (mut image, trace) = case.open(&after, OpenFlags::CHECK);
        let result = image.check(Fix::LEAKS, &mut |_| {}).unwrap();
        assert_eq!(
            result.corruptions + result.leaks + result.check_errors,
            0,
            "{what}: {result:?}"
        );
        freed += result.leaks_fixed;
        let end = trace.contents();
        let everything = (0..1 << 20).collect();
        case.keeps(&end, &everything).unwrap_or_else(|e| bad(e));
        let path = tempfile::Builder::new()
            .suffix(".qcow2")
            .tempfile()
            .unwrap();
        std::fs::write(path.path(), &end).unwrap();
        let (code, text) = qemu_img_check(path.path());
        // It asks for keys.
        let opens = !text.contains("Could not open");
        let missing = is_missing(code);
        assert!(missing || code == Some(0) || !opens, "{what}: {text}");
    }
    assert!(freed > 20, "{freed} clusters");
}

#[test]
fn a_read_that_fails_once_drops_no_snapshot() {
    let mut failures = 0;
    let cases = cases();
    let first = |c: &&Case| c.damage == Damage::L1Unaligned;
    for case in cases.iter().filter(first).step_by(4) {
        let mut sound = case.image.clone();
        // The damage of the first is an offset that is off by this.
        let entry = be64(&sound, 64);
        let l1 = be64(&sound, entry);
        put64(&mut sound, entry, l1 - 256);
        for nth in 1..100 {
            let storage = TraceStorage::new(sound.clone());
            let trace = storage.trace();
            let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
            let id = image.snapshot_list().unwrap()[0].id.clone();
            let read = qcow2_snapshot::io::trace::RequestKind::Read;
            trace.set_fault(Some(FaultPlan::nth(nth, libc::EIO).of_kind(read)));
            let deleted = image.snapshot_delete(Some(&id), None);
            if trace.fired() == 0 {
                break;
            }
            failures += 1;
            assert_eq!(
                deleted.map_err(|e| e.errno()),
                Err(libc::EIO),
                "{} {nth}",
                case.name
            );
            if image.last_outcome() == Outcome::Unchanged && trace.events().is_empty() {
                assert!(trace.contents() == sound);
            }
        }
    }
    assert!(failures > 20, "{failures}");
}

#[test]
fn deleting_many_frees_what_the_sound_ones_hold_and_drops_the_others() {
    for case in cases() {
        let what = format!("{}, {:?}", case.name, case.damage);
        let (mut image, trace) = case.open(&case.image, OpenFlags::read_only());
        let ids: Vec<Vec<u8>> = image
            .snapshot_list()
            .unwrap()
            .iter()
            .map(|s| s.id.clone())
            .collect();
        let ids: BTreeSet<&[u8]> = ids.iter().map(Vec::as_slice).collect();
        let ids: Vec<&[u8]> = ids.into_iter().collect();
        if ids.len() + 1 != Raw(&case.image).l1s().len() {
            continue;
        }
        image
            .snapshot_delete_many(&ids)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(image.remark().is_some(), "{what}");
        let after = trace.contents();
        assert_eq!(Raw(&after).l1s().len(), 1, "{what}");
        let (mut image, trace) = case.open(&after, OpenFlags::CHECK);
        let result = image.check(Fix::LEAKS, &mut |_| {}).unwrap();
        assert_eq!(
            result.corruptions + result.leaks + result.check_errors,
            0,
            "{what}: {result:?}"
        );
        let end = trace.contents();
        let odd = Raw(&case.image)
            .odd()
            .union(&Raw(&end).odd())
            .copied()
            .collect();
        let active = |b: &[u8]| Raw(b).states(&BTreeSet::new(), &odd).remove("active");
        assert!(
            active(&case.image).is_some() && active(&case.image) == active(&end),
            "{what}"
        );
    }
}

#[test]
fn a_rebuild_while_references_may_be_missing_takes_no_cluster_for_free() {
    let mut tried = 0;
    for case in cases() {
        if case.damage != Damage::L1Unaligned {
            continue;
        }
        // The refcount block is said to be where none can be.
        for entry in [513u64, 1 << 40] {
            let mut image = case.image.clone();
            let table = be64(&image, 48);
            let block = be64(&image, table);
            put64(
                &mut image,
                table,
                if entry == 513 { block + 512 } else { entry },
            );
            let cs: u64 = 1 << Raw(&image).number(20, 4);
            if cs == 512 && entry == 513 {
                continue;
            }
            let (_, said, after) = repaired(image.clone(), all()).unwrap();
            assert!(
                said.iter().any(|l| l.starts_with("Rebuilding")),
                "{}",
                case.name
            );
            let described = (cs * 8) >> Raw(&image).order();
            for c in 0..described.min((image.len() as u64).div_ceil(cs)) {
                assert_ne!(
                    Raw(&after).count(c),
                    0,
                    "{} {entry}: cluster {c}",
                    case.name
                );
            }
            tried += 1;
        }
    }
    assert!(tried > 5, "{tried}");
}

#[test]
fn a_table_in_the_header_keeps_the_refcount_structures_where_they_are() {
    for (name, image) in reference() {
        // The snapshots' table is said to be the header itself.
        let mut image = image;
        if Raw(&image).number(60, 4) == 0 || !name.starts_with("v3-") {
            continue;
        }
        put64(&mut image, 64, 0);
        let table = be64(&image, 48);
        put64(&mut image, table, 1 << 40);
        let Ok((_, said, after)) = repaired(image.clone(), all()) else {
            continue;
        };
        assert!(
            said.iter().any(|l| l.contains("shares a cluster")),
            "{name}: {said:?}"
        );
        assert_eq!(image.len(), after.len(), "{name}");
    }
}

#[test]
fn a_table_said_to_reach_behind_the_end_of_the_file_takes_nothing_with_it() {
    let mut tried = 0;
    for (name, mut image) in reference() {
        let sound = check(image.clone()).is_ok_and(|(r, _)| r.corruptions + r.leaks == 0);
        let (entry, n) = (be64(&image, 64), Raw(&image).number(60, 4));
        if !sound || n != 1 || Raw(&image).number(4, 4) < 3 {
            continue;
        }
        let at = entry as usize + 36;
        let extra = (image.len() as u64 + 70_000 - entry) as u32;
        image[at..at + 4].copy_from_slice(&extra.to_be_bytes());
        let values = |b: &[u8], odd: &BTreeSet<u64>| -> Vec<u64> {
            let mut v: Vec<u64> = Raw(b).states(&BTreeSet::new(), odd).into_values().collect();
            v.sort_unstable();
            v
        };
        for fix in [all(), Fix::ERRORS] {
            let mut said = Vec::new();
            let (mut opened, handle) = open(image.clone()).unwrap();
            let result = opened.check(fix, &mut |line| said.push(line.to_owned()));
            let result = result.unwrap_or_else(|e| panic!("{name}: {e}: {said:?}"));
            let after = handle.borrow().clone();
            let (b, a) = (Raw(&image), Raw(&after));
            // Neither table is data.
            let odd = b.odd().union(&a.odd()).copied().collect();
            assert!(said.iter().any(|l| l.starts_with("Discarding")), "{name}");
            assert_eq!(
                values(&image, &odd),
                values(&after, &odd),
                "{name}: {said:?}"
            );
            assert_eq!(
                result.corruptions + result.check_errors,
                0,
                "{name}: {result:?}"
            );
            assert_eq!(result.leaks == 0, fix == all(), "{name}: {result:?}");
            tried += 1;
        }
    }
    assert!(tried > 20, "{tried}");
}

#[test]
fn entries_behind_the_end_of_the_file_keep_nothing_that_is_in_it() {
    let mut tried = 0;
    for (name, mut image) in reference() {
        let sound = check(image.clone()).is_ok_and(|(r, _)| r.corruptions + r.leaks == 0);
        if !sound || Raw(&image).number(60, 4) < 2 || Raw(&image).number(4, 4) < 3 {
            continue;
        }
        // The first entry's extra data is said to go far behind the end; the second entry then reads as zeros.
        let at = be64(&image, 64) as usize + 36;
        let extra = image.len() as u32 + 70_000;
        image[at..at + 4].copy_from_slice(&extra.to_be_bytes());
        let (result, said, _) = repaired(image, Fix::ERRORS).unwrap();
        let left = result.corruptions + result.check_errors;
        assert_eq!(left, 0, "{name}: {result:?} {said:?}");
        tried += 1;
    }
    assert!(tried > 20, "{tried}");
}

#[test]
fn the_fixed_part_of_an_entry_at_the_end_of_the_file_is_no_l2_table_alone() {
    let mut tried = 0;
    for (name, mut image) in reference() {
        let (cluster, l1) = (1usize << Raw(&image).number(20, 4), be64(&image, 40));
        let slot = (0..Raw(&image).number(36, 4)).find(|i| be64(&image, l1 + i * 8) == 0);
        let Some(slot) = slot.filter(|_| cluster <= 4096 && Raw(&image).number(4, 4) == 3) else {
            continue;
        };
        // A table of two entries: the first fills a cluster, and 40 bytes of the second end the file.
        let table = image.len().next_multiple_of(cluster);
        let entry = |seconds: u32, extra: u32, id: u16, name: u16| {
            let mut fixed = [0; 40];
            fixed[12..14].copy_from_slice(&id.to_be_bytes());
            fixed[14..16].copy_from_slice(&name.to_be_bytes());
            fixed[16..20].copy_from_slice(&seconds.to_be_bytes());
            fixed[36..40].copy_from_slice(&extra.to_be_bytes());
            fixed
        };
        image.resize(table, 0);
        image.extend(entry(1, 24, 1, (cluster - 65) as u16));
        image.resize(table + cluster, b'n');
        image[table + 40..table + 64].fill(0);
        image.extend(entry(0x8000_0001, 24, 1, 2 * cluster as u16));
        image[60..64].copy_from_slice(&2u32.to_be_bytes());
        put64(&mut image, 64, table as u64);
        put64(
            &mut image,
            l1 + slot * 8,
            (table + cluster) as u64 | 1 << 63,
        );
        let Ok((_, said, after)) = repaired(image.clone(), all()) else {
            continue;
        };
        let at = table + cluster..image.len();
        assert_eq!(after[at.clone()], image[at], "{name}: {said:?}");
        tried += 1;
    }
    assert!(tried > 5, "{tried}");
}
