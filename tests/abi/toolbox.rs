//! What the tests of the header and of the binary interface share: a C compiler, other
//! programs, golden texts, and skipping aloud.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The top of the source tree.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Say aloud that something is not tested. Not with `eprintln!`: the test harness would
/// keep that to itself for a test that passes. `make check` collects these lines.
pub fn skip(what: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what}");
}

/// Run a program; None, aloud, if there is no such program.
pub fn run(command: &mut Command, untested: &str) -> Option<Output> {
    match command.output() {
        Ok(output) => Some(output),
        Err(e) => {
            skip(&format!(
                "{untested} ({}: {e})",
                command.get_program().to_string_lossy()
            ));
            None
        }
    }
}

/// The C or C++ compiler that the cc crate finds for this machine.
pub fn compiler(cpp: bool) -> Option<Command> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let tool = cc::Build::new()
        .target(&target)
        .host(&target)
        .opt_level(0)
        .cargo_metadata(false)
        .no_default_flags(true)
        .cpp(cpp)
        .try_get_compiler();
    match tool {
        Ok(tool) => Some(tool.to_command()),
        Err(e) => {
            skip(&format!(
                "whatever needs a {} compiler ({e})",
                if cpp { "C++" } else { "C" }
            ));
            None
        }
    }
}

/// Compile `source` into a program in `dir` and run it; None, aloud, without a compiler.
#[allow(dead_code)] // not every test program needs it
pub fn compile_and_run<S: AsRef<OsStr>>(
    dir: &Path,
    source: &str,
    flags: &[&str],
    arguments: &[S],
) -> Option<String> {
    let (from, to) = (dir.join("program.c"), dir.join("program"));
    std::fs::write(&from, source).expect("the scratch folder is writable");
    let mut command = compiler(false)?;
    command.args([
        "-std=c99",
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
    ]);
    command.arg("-I").arg(root().join("include")).args(flags);
    command.arg("-o").arg(&to).arg(&from).arg("-ldl");
    let output = run(&mut command, "a C program of the interface tests")?;
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let output = Command::new(&to)
        .args(arguments)
        .output()
        .expect("the program was just made");
    assert!(
        output.status.success(),
        "{} {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The shared library that Cargo made together with this test.
#[allow(dead_code)]
pub fn shared_library() -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    test.with_file_name("libqcow2_snapshot.so")
}

/// Compare with a committed file, or replace it if `QCOW2_BLESS` is set.
pub fn compare_with_golden(path: &str, text: &str) {
    let file = root().join(path);
    if std::env::var_os("QCOW2_BLESS").is_some() {
        std::fs::write(&file, text).expect("the source tree is writable");
        return;
    }
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    if let Some((n, (want, got))) = committed
        .lines()
        .map(Some)
        .chain(std::iter::repeat(None))
        .zip(text.lines().map(Some).chain(std::iter::repeat(None)))
        .take(committed.lines().count().max(text.lines().count()))
        .enumerate()
        .find(|(_, (want, got))| want != got)
    {
        panic!(
            "{path} is out of date from line {} on:\n  committed: {}\n  now:       {}\n\
             If the change is meant, run \"make header\" and commit the result.",
            n + 1,
            want.unwrap_or("(ends)"),
            got.unwrap_or("(ends)")
        );
    }
}
