//! The C tests and tools/instructions as Rust tests, for tools/mutants: `make check` runs them by themselves.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

/// What takes long, and what Rust tests do as well.
const LEFT_OUT: [&str; 7] = [
    "cases",
    "harness",
    "little_memory",
    "replay",
    "replay_chain",
    "flatten_errors",
    "force_share_fresh",
];

#[test]
#[ignore = "make check runs the C tests by themselves; this is for tools/mutants"]
fn the_c_tests_pass_with_the_library_that_cargo_made() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The library of the same build is beside this program.
    let program = std::env::current_exe().unwrap();
    let folder = program.parent().unwrap();
    assert!(folder.join("libqcow2_snapshot.so").exists(), "{folder:?}");
    let mut tests = vec![];
    for file in std::fs::read_dir(root.join("c-tests")).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        tests.extend(name.strip_suffix(".c").map(str::to_owned));
    }
    tests.retain(|test| !LEFT_OUT.contains(&test.as_str()));
    assert!(tests.len() > 100);
    let status = Command::new("make")
        .args(["--no-print-directory", "-C", "c-tests", "check"])
        .arg(format!("LIBDIR={}", folder.display()))
        .arg(format!("BUILD={}/../c-tests", folder.display()))
        .arg(format!("INCDIR={}/include", root.display()))
        .arg(format!("TESTS={}", tests.join(" ")))
        .current_dir(root)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
#[ignore = "make check runs tools/instructions by itself; this is for tools/mutants"]
fn verbs_take_no_more_instructions_than_they_may() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let make = Command::new("make")
        .arg("library")
        .current_dir(root)
        .status();
    assert!(make.unwrap().success());
    let counted = Command::new("tools/instructions")
        .current_dir(root)
        .output();
    let counted = counted.unwrap();
    let said = String::from_utf8_lossy(&counted.stdout);
    assert!(
        counted.status.success() && said.contains("6 passed"),
        "{said}"
    );
}
