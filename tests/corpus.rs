//! What the fuzzers have found is run again: the minimised corpus, and every input that once broke
//! a promise (see `fuzz/src`, docs/robustness.md).

#![allow(missing_docs)]

use std::io::Read;
use std::path::{Path, PathBuf};

#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz")
        .join(name)
}

fn unpacked(path: &Path) -> Vec<u8> {
    let packed = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&packed[..])
        .read_to_end(&mut bytes)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    bytes
}

/// Run the inputs of `fuzz/packed/TARGET.gz`: each behind its length, four bytes, big endian.
fn replay(target: &str, run: fn(&[u8])) {
    let all = unpacked(&folder("packed").join(format!("{target}.gz")));
    let mut rest = &all[..];
    let mut count = 0;
    while let Some((len, more)) = rest.split_first_chunk::<4>() {
        let (input, more) = more.split_at(u32::from_be_bytes(*len) as usize);
        run(input);
        (rest, count) = (more, count + 1);
    }
    println!("{target}: {count} inputs");
    assert!(count > 50, "{target}: only {count} inputs");
}

#[test]
fn open_keeps_its_promises_on_the_corpus() {
    replay("open", targets::open);
}

#[test]
fn the_snapshot_table_keeps_its_promises_on_the_corpus() {
    replay("table", targets::table);
}

#[test]
fn verbs_keep_their_promises_on_the_corpus() {
    replay("verbs", targets::verbs);
}

#[test]
fn reads_keep_their_promises_on_the_corpus() {
    replay("reads", targets::reads);
}

#[test]
fn check_and_repair_keep_their_promises_on_the_corpus() {
    replay("check", targets::check);
}

/// Every target runs every input that once failed in one of them, within seconds.
#[test]
fn what_was_found_stays_mended() {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder("findings"))
        .unwrap_or_else(|e| panic!("fuzz/findings: {e}"))
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "gz"))
        .collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        println!("{}", file.display());
        let input = unpacked(&file);
        let start = std::time::Instant::now();
        for run in [
            targets::open,
            targets::table,
            targets::reads,
            targets::verbs,
            targets::check,
        ] {
            run(&input);
        }
        let took = start.elapsed().as_secs();
        assert!(took < 20, "{} took {took} s", file.display());
    }
}
