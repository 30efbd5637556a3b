//! The steps of every verb on images of `c-tests/images`, against `tests/steps.txt`
//! (`QCOW2_BLESS=1` writes it): what docs/crash-safety.md shows in its tables.

#![allow(clippy::unwrap_used)]
use crate::io::memory::MemoryStorage;
use crate::{Image, NewSnapshot, OpenFlags};
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;

/// One for each shape of a plan.
const CASES: &[(&str, &str)] = &[
    ("v3-4k", "the usual one"),
    (
        "resize-512",
        "another disk size: by way of a temporary L1 table",
    ),
    ("l1-growth-goto", "the L1 table grows"),
    ("resize-shrink-reftable", "refcount blocks are dropped"),
    ("refblock-growth-0", "a refcount block is made"),
    (
        "reftable-growth-reuse",
        "the refcount table grows, and its old place is used again",
    ),
    ("vm-state-v3", "VM state"),
    ("refcount-1", "counts of one bit"),
];

fn image(case: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(format!("c-tests/images/{case}/before.qcow2.gz"));
    let packed = std::fs::read(path).unwrap();
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&packed[..])
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

/// The steps of one verb, and the image after it.
fn steps(bytes: &[u8], verb: impl FnOnce(&mut Image) -> crate::Result<()>) -> (String, Vec<u8>) {
    let storage = MemoryStorage::new(bytes.to_vec());
    let handle = storage.handle();
    let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    let steps = match verb(&mut image) {
        Ok(()) => std::mem::take(&mut image.steps),
        Err(e) => format!("refused: {e}\n"),
    };
    image.close().unwrap();
    let after = handle.borrow().clone();
    (steps, after)
}

#[test]
#[cfg_attr(
    qcow2_little_memory,
    ignore = "the steps are the same, their order need not be"
)]
fn the_steps_of_every_verb_are_those_of_the_golden_text() {
    let mut now = String::new();
    for (case, what) in CASES {
        let start = image(case);
        let new = NewSnapshot {
            name: b"golden".to_vec(),
            ..NewSnapshot::default()
        };
        let vm = NewSnapshot {
            vm_state_size: 3 << 12,
            ..new.clone()
        };
        let first = |i: &mut Image| {
            let none = crate::Error::NotFound("no snapshot".into());
            let first = i.snapshot_list()?.first();
            first.map(|s| s.id.clone()).ok_or(none)
        };
        writeln!(now, "=== {case}: {what}").unwrap();
        for nth in 0..4 {
            let (text, _) = steps(&start, |i| {
                let id = i.snapshot_list()?.get(nth).map(|s| s.id.clone());
                i.snapshot_goto(&id.unwrap_or_default())
            });
            if !text.contains("Can't find") {
                writeln!(now, "--- goto snapshot {nth}\n{text}").unwrap();
            }
        }
        let (text, created) = steps(&start, |i| i.snapshot_create(&new).map(drop));
        writeln!(now, "--- create\n{text}").unwrap();
        if case.starts_with("vm-state") {
            let (text, _) = steps(&start, |i| i.snapshot_create(&vm).map(drop));
            writeln!(now, "--- create with VM state\n{text}").unwrap();
        }
        let (text, _) = steps(&created, |i| {
            let id = first(i)?;
            i.snapshot_goto(&id)
        });
        writeln!(now, "--- goto\n{text}").unwrap();
        let (text, _) = steps(&created, |i| {
            let id = first(i)?;
            i.snapshot_delete(Some(&id), None)
        });
        writeln!(now, "--- delete\n{text}").unwrap();
        let (text, _) = steps(&created, Image::write_snapshots);
        writeln!(now, "--- write_snapshots\n{text}").unwrap();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/steps.txt");
    if std::env::var_os("QCOW2_BLESS").is_some() {
        std::fs::write(&path, &now).unwrap();
        return;
    }
    let then = std::fs::read_to_string(&path).unwrap();
    for (n, (now, then)) in now.lines().zip(then.lines()).enumerate() {
        assert_eq!(now, then, "line {} of tests/steps.txt", n + 1);
    }
    assert_eq!(now.lines().count(), then.lines().count());
}
