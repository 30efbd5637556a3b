//! How many requests, bytes and barriers each verb costs on fixed images, compared with the committed
//! table `tests/requests.txt`. A change that costs more must change the table, and say why. `make
//! header`'s way of making golden texts again works here too: `QCOW2_BLESS=1`.

#![allow(clippy::unwrap_used)]

use flate2::read::GzDecoder;
use qcow2_snapshot::io::trace::{Counts, TraceStorage};
use qcow2_snapshot::{Image, NewSnapshot, OpenFlags};
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;

/// Reference images of `c-tests/images` that cover the shapes of verbs, not all formats.
const CASES: &[&str] = &[
    "v3-64k",
    "v3-4k",
    "v3-512",
    "v2-4k",
    "extended-l2",
    "compressed-zlib",
    "refcount-1",
    "resize-512",
    "refblock-growth-0",
    "reftable-growth-reuse",
    "l1-growth-goto",
    "vm-state-v3",
    "table-long",
];

fn image(case: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(format!("c-tests/images/{case}/before.qcow2.gz"));
    let file = std::fs::File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut bytes = Vec::new();
    GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    bytes
}

/// Run one verb on a fresh handle and say what it cost, opening included.
fn cost(
    bytes: Vec<u8>,
    verb: impl FnOnce(&mut Image) -> Result<(), qcow2_snapshot::Error>,
) -> (String, Vec<u8>) {
    let storage = TraceStorage::new(bytes);
    let trace = storage.trace();
    let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    let result = verb(&mut image);
    image.close().unwrap();
    let c: Counts = trace.counts();
    let text = match result {
        Ok(()) => format!(
            "reads {} ({} bytes) writes {} ({} bytes) truncates {} discards {} barriers {}",
            c.reads, c.bytes_read, c.writes, c.bytes_written, c.truncates, c.discards, c.barriers
        ),
        Err(e) => format!("errno {}", e.errno()),
    };
    (text, trace.contents())
}

fn measured() -> String {
    let mut out = String::new();
    for case in CASES {
        let start = image(case);
        let new = NewSnapshot {
            name: b"requests".to_vec(),
            date_sec: 1,
            ..NewSnapshot::default()
        };
        let (text, created) = cost(start.clone(), |i| i.snapshot_create(&new).map(|_| ()));
        writeln!(out, "{case} create: {text}").unwrap();
        let first = |i: &mut Image| {
            i.snapshot_list()
                .map(|l| l.first().map(|s| s.id.clone()).unwrap_or_default())
        };
        let (text, _) = cost(created.clone(), |i| {
            let id = first(i)?;
            i.snapshot_goto(&id)
        });
        writeln!(out, "{case} goto first: {text}").unwrap();
        let (text, _) = cost(created.clone(), |i| {
            let id = first(i)?;
            i.snapshot_delete(Some(&id), None)
        });
        writeln!(out, "{case} delete first: {text}").unwrap();
        let (text, _) = cost(created.clone(), |i| {
            i.snapshot_delete(None, Some(b"requests"))
        });
        writeln!(out, "{case} delete last: {text}").unwrap();
        let (text, _) = cost(created.clone(), |i| {
            let id = first(i)?;
            i.snapshot_delete_many(&[&id, b"requests"])
        });
        writeln!(out, "{case} delete both: {text}").unwrap();
        let (text, _) = cost(created.clone(), |i| {
            i.snapshot_rename(b"requests", b"renamed")
        });
        writeln!(out, "{case} rename: {text}").unwrap();
        let (text, _) = cost(created.clone(), |i| {
            let id = first(i)?;
            let both = [Some(&id[..]), Some(b"requests")];
            i.snapshot_usage(&both).map(drop)
        });
        writeln!(out, "{case} usage of both: {text}").unwrap();
        let (text, _) = cost(created, |i| {
            let id = first(i)?;
            let mut changes = i.snapshot_changes(Some(&id), None, false);
            changes.try_for_each(|change| change.map(drop))
        });
        writeln!(out, "{case} changes since first: {text}").unwrap();
    }
    out
}

#[test]
#[cfg_attr(qcow2_little_memory, ignore = "more passes, more requests")]
fn each_verb_costs_what_the_table_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/requests.txt");
    let now = measured();
    if std::env::var_os("QCOW2_BLESS").is_some() {
        std::fs::write(&path, &now).unwrap();
        return;
    }
    let table = std::fs::read_to_string(&path).unwrap();
    for (n, (now, then)) in now.lines().zip(table.lines()).enumerate() {
        assert_eq!(now, then, "line {} of tests/requests.txt", n + 1);
    }
    assert_eq!(now.lines().count(), table.lines().count());
}

/// What snapshots share is read and written as if one had it; each has an L1 table to be read, and a
/// count of its own.
#[test]
#[cfg_attr(qcow2_little_memory, ignore = "more passes, more requests")]
fn nineteen_snapshots_go_for_the_price_of_one() {
    let mut image = image("v3-64k");
    for i in 0..20 {
        let new = NewSnapshot {
            name: format!("n{i}").into_bytes(),
            ..NewSnapshot::default()
        };
        image = cost(image, |i| i.snapshot_create(&new).map(|_| ())).1;
    }
    let names: Vec<String> = (0..19).map(|i| format!("n{i}")).collect();
    let names: Vec<&[u8]> = names.iter().map(String::as_bytes).collect();
    let counts = |n: usize| {
        let storage = TraceStorage::new(image.clone());
        let trace = storage.trace();
        let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
        image.snapshot_delete_many(&names[..n]).unwrap();
        trace.counts()
    };
    let (one, many) = (counts(1), counts(19));
    assert_eq!((one.barriers, many.barriers), (3, 3));
    // The L1 tables; tables of all of them are read once.
    assert_eq!(many.reads, one.reads + 18);
    assert!(many.bytes_read <= one.bytes_read + 18 * (64 << 10));
    // The flags of tables that were shared by two, and are not any more.
    assert!(many.writes <= one.writes + 2, "{one:?} {many:?}");
    let usage = |n: usize| {
        let storage = TraceStorage::new(image.clone());
        let trace = storage.trace();
        let mut image = Image::open_storage(Box::new(storage), OpenFlags::read_only()).unwrap();
        let states: Vec<Option<&[u8]>> = names[..n].iter().copied().map(Some).collect();
        image.snapshot_usage(&states).unwrap();
        (trace.counts().reads, trace.events().len())
    };
    assert_eq!(usage(19), (usage(1).0 + 18, 0));
}

#[test]
fn the_usual_verb_needs_three_barriers() {
    let start = image("v3-64k");
    let new = NewSnapshot {
        name: b"n".to_vec(),
        ..NewSnapshot::default()
    };
    let (text, created) = cost(start, |i| i.snapshot_create(&new).map(|_| ()));
    assert!(text.ends_with("barriers 3"), "create: {text}");
    let (text, _) = cost(created, |i| i.snapshot_delete(None, Some(b"n")));
    assert!(text.ends_with("barriers 3"), "delete: {text}");
}
