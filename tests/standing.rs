//! What a handle knows of its image after something has happened: to the file by others, to a request, by a verb.
#![allow(clippy::unwrap_used)]

#[path = "reference/ops.rs"]
mod ops;

use ops::{name, new_snapshot, unpacked};
use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::trace::{FaultPlan, RequestKind, TraceStorage};
use qcow2_snapshot::{Image, NewSnapshot, OpenFlags, Outcome};
use std::path::{Path, PathBuf};

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("c-tests/images")
        .join(case)
}

fn reference(case: &str) -> Vec<u8> {
    unpacked(&folder(case).join("before.qcow2.gz"))
}

fn named(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: name.into(),
        ..NewSnapshot::default()
    }
}

#[test]
fn who_shares_an_image_sees_what_others_make_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("i.qcow2");
    std::fs::write(&at, reference("v3-64k")).unwrap();
    let open = |flags| Image::open(&at, flags).unwrap();
    let (mut reader, mut other) = (open(OpenFlags::FORCE_SHARE), open(OpenFlags::FORCE_SHARE));
    let mut writer = open(OpenFlags::RDWR);
    let there = reader.snapshot_list().unwrap().len();
    other.free_snapshots();
    writer.snapshot_create(&named("one")).unwrap();
    assert_eq!(reader.snapshot_list().unwrap().len(), there + 1);
    assert!(other.snapshot_list().unwrap().is_empty());

    // What is shown of a snapshot stays as long as that is there, whatever comes and goes beside it.
    let mut bytes = [0; 512];
    reader.snapshot_load_tmp(None, Some(b"one")).unwrap();
    writer.snapshot_create(&named("two")).unwrap();
    reader.read(0, &mut bytes).unwrap();
    assert_eq!(reader.snapshot_list().unwrap().len(), there + 2);
    writer.snapshot_delete(None, Some(b"one")).unwrap();
    let gone = reader.read(0, &mut bytes).unwrap_err();
    assert_eq!(gone.errno(), libc::ENOENT, "{gone}");
    // Another one that has its ID now, and perhaps its place, is not it.
    writer.snapshot_delete(None, Some(b"two")).unwrap();
    writer.snapshot_create(&named("one")).unwrap();
    assert!(reader.read(0, &mut bytes).is_err());
}

#[test]
fn after_a_failed_write_a_handle_reads_and_changes_nothing() {
    for nth in 1..4 {
        let storage = TraceStorage::new(reference("v3-64k"));
        let trace = storage.trace();
        let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
        let there = image.snapshot_list().unwrap().len();
        let plan = FaultPlan::nth(nth, libc::EIO).of_kind(RequestKind::Write);
        trace.set_fault(Some(plan));
        let failed = image.snapshot_create(&named("one")).unwrap_err();
        assert_eq!(failed.errno(), libc::EIO);
        assert_eq!(image.last_outcome(), Outcome::Unchanged);
        trace.set_fault(None);
        assert_eq!(image.snapshot_list().unwrap().len(), there);
        let events = trace.events().len();
        assert!(image.snapshot_create(&named("one")).is_err(), "write {nth}");
        assert_eq!(trace.events().len(), events);
        assert_eq!(image.last_outcome(), Outcome::Unchanged);
    }
}

#[test]
fn what_a_verb_has_changed_is_what_is_different() {
    let root = folder("");
    let mut verbs = 0;
    for case in std::fs::read_dir(root).unwrap().flatten() {
        let at = case.path();
        let (before, ops) = (at.join("before.qcow2.gz"), at.join("ops"));
        if !before.exists() || unpacked(&before).len() > 3 << 20 {
            continue;
        }
        let storage = TraceStorage::new(unpacked(&before));
        let trace = storage.trace();
        let Ok(mut image) = Image::open_storage(Box::new(storage), OpenFlags::RDWR) else {
            continue;
        };
        for line in std::fs::read_to_string(ops).unwrap().lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let was = trace.contents();
            let layout = image.layout().unwrap();
            let (l1, reftable) = (layout.l1.to_vec(), layout.reftable.to_vec());
            let done = match words[0] {
                "create" => image.snapshot_create(&new_snapshot(&words[1..])).map(drop),
                "goto" => image.snapshot_goto(&name(words[1])),
                "delete" => image.snapshot_delete(None, Some(&name(words[1]))),
                _ => continue,
            };
            if done.is_err() {
                break;
            }
            verbs += 1;
            let now = trace.contents();
            let differs = |field: std::ops::Range<usize>| was[field.clone()] != now[field];
            let layout = image.layout().unwrap();
            let (changed, case) = (layout.changed, format!("{}: {line}", at.display()));
            assert_eq!(changed.size, differs(24..32), "{case}");
            assert_eq!(changed.l1, differs(40..48) || layout.l1 != l1, "{case}");
            assert_eq!(
                changed.reftable,
                differs(48..56) || layout.reftable != reftable,
                "{case}"
            );
            assert_eq!(changed.snapshots, differs(64..72), "{case}");
            // The list is the one that another handle reads.
            let again = Box::new(MemoryStorage::new(now));
            let mut again = Image::open_storage(again, OpenFlags::read_only()).unwrap();
            let read = again.snapshot_list().unwrap();
            assert_eq!(image.snapshot_list().unwrap(), read, "{case}");
        }
    }
    assert!(verbs > 150, "{verbs} verbs");
}

#[test]
fn a_handle_reads_what_the_verb_has_made_of_the_disk() {
    let open = |bytes, flags| {
        let storage = Box::new(MemoryStorage::new(bytes));
        Image::open_storage(storage, flags).unwrap()
    };
    let disk = |image: &mut Image| {
        let mut bytes = vec![0; image.length() as usize];
        image.read(0, &mut bytes).unwrap();
        bytes
    };
    let mut different = 0;
    for case in ["v3-4k", "v3-512", "v2-64k", "compressed-64k"] {
        let mut image = open(reference(case), OpenFlags::RDWR);
        let ids: Vec<_> = image
            .snapshot_list()
            .unwrap()
            .iter()
            .map(|s| s.id.clone())
            .collect();
        for id in ids {
            let mut fresh = open(reference(case), OpenFlags::read_only());
            fresh.snapshot_load_tmp(Some(&id), None).unwrap();
            let was = disk(&mut image);
            image.snapshot_goto(&id).unwrap();
            let is = disk(&mut image);
            assert!(is == disk(&mut fresh), "{case}");
            different += usize::from(is != was);
        }
    }
    assert!(different > 3, "{different}");
}

#[test]
fn a_poisoned_handle_knows_nothing_and_does_nothing() {
    let open = || {
        let storage = MemoryStorage::new(reference("v3-64k"));
        Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap()
    };
    for (mut image, outcome) in [(open(), Outcome::None), (open(), Outcome::Unknown)] {
        if outcome == Outcome::Unknown {
            image.snapshot_create(&named("one")).unwrap();
        }
        image.poison();
        assert_eq!(image.last_outcome(), outcome);
        assert!(image.snapshot_list().is_err());
        assert!(image.snapshot_create(&named("two")).is_err());
        assert!(image.read(0, &mut [0]).is_err());
    }
}
