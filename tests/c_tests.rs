//! The C tests as one Rust test, for tools/mutants: `make check` runs them by themselves.

use std::path::Path;
use std::process::Command;

#[test]
#[ignore = "make check runs the C tests by themselves; this is for tools/mutants"]
fn the_c_tests_pass_with_the_library_that_cargo_made() {
    // deps/c_tests-... is beside the library of the same build.
    let program = std::env::current_exe().unwrap();
    let folder = program.parent().and_then(Path::parent).unwrap();
    assert!(folder.join("libqcow2_snapshot.so").exists(), "{folder:?}");
    let status = Command::new("make")
        .args(["--no-print-directory", "-C", "c-tests", "check"])
        .arg(format!("LIBDIR={}", folder.display()))
        .arg(format!("INCDIR={}/include", env!("CARGO_MANIFEST_DIR")))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(status.success());
}
