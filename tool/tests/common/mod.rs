//! What the tests of the tool share: scratch folders, programs and the reference images.
#![allow(dead_code, clippy::unwrap_used)]

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub const NAME: &str = "qcow2-snapshot";

pub fn tool() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_qcow2-snapshot"))
}

/// The qemu-img of this machine; says so loudly where there is none.
pub fn qemu_img(what: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|p| p.join("qemu-img"))
        .find(|p| p.is_file());
    if found.is_none() {
        println!("SKIPPED: no qemu-img here: {what} was not tested");
    }
    found
}

/// Everything that a program said.
#[derive(Debug, PartialEq, Eq)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

fn escaped(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|b| match b {
            b'\n' => "\n".to_owned(),
            b' '..=b'~' => char::from(*b).to_string(),
            b => format!("\\x{b:02x}"),
        })
        .collect()
}

impl From<Output> for Said {
    fn from(o: Output) -> Said {
        Said {
            code: o.status.code(),
            out: escaped(&o.stdout),
            err: escaped(&o.stderr),
        }
    }
}

pub fn said(command: &mut Command) -> Said {
    command.output().unwrap().into()
}

/// `qcow2-snapshot ARGS` in a folder.
pub fn ours<S: AsRef<OsStr>>(folder: &Path, args: &[S]) -> Said {
    said(Command::new(tool()).current_dir(folder).args(args))
}

/// `qemu-img snapshot ARGS` in a folder, with its messages as ours should be.
pub fn theirs<S: AsRef<OsStr>>(qemu: &Path, folder: &Path, args: &[S]) -> Said {
    let mut said = said(
        Command::new(qemu)
            .current_dir(folder)
            .arg("snapshot")
            .args(args),
    );
    said.err = as_today(&said.err, qemu);
    said
}

/// Agreed: "Could not open 'NAME': " is said once.
fn once(line: &str) -> String {
    let open = "Could not open '";
    match line.split_once("': ") {
        Some((first, rest)) if first.starts_with(open) && rest.starts_with(open) => {
            let (_, rest) = rest.split_once("': ").unwrap();
            format!("{first}': {rest}")
        }
        _ => line.to_owned(),
    }
}

/// Is it what qemu-img says? Agreed: before the last line of a failure there may be more, behind the
/// program's name, of what the library knows.
pub fn assert_says(got: &Said, expected: &Said, prefix: &str, what: &dyn std::fmt::Debug) {
    let all = format!("{what:?}\ngot {got:#?}\nexpected {expected:#?}");
    assert_eq!(
        (got.code, &got.out),
        (expected.code, &expected.out),
        "{all}"
    );
    let mut wanted = expected.err.lines().peekable();
    for line in got.err.lines() {
        if wanted.next_if_eq(&line).is_none() {
            assert!(line.starts_with(prefix) && wanted.peek().is_some(), "{all}");
        }
    }
    assert_eq!(wanted.next(), None, "{all}");
}

/// Messages of qemu-img 10.0 in the words of today's, under our name.
pub fn as_today(err: &str, qemu: &Path) -> String {
    let qemu = qemu.display().to_string();
    err.lines()
        .map(|line| {
            let line = line
                .replace(&format!("{qemu} snapshot"), NAME)
                .replace("qemu-img snapshot", NAME);
            let line = match line.strip_suffix(" for more info") {
                Some(start) => format!("{start} for more information"),
                None => line,
            };
            match line.strip_prefix("qemu-img: ") {
                Some(rest) => format!("{NAME}: {}\n", once(rest)),
                None => line + "\n",
            }
        })
        .collect()
}

pub fn unpacked(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap())
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

/// The folders of reference images, by name.
pub fn cases() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../c-tests/images");
    let mut cases: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap())
        .filter(|e| e.path().is_dir())
        .map(|e| (e.file_name().into_string().unwrap(), e.path()))
        .collect();
    cases.sort();
    cases
}

/// Unpack what stands beside the images of a case (backing and data files), and name the images.
pub fn prepare(case: &Path, folder: &Path) -> Vec<PathBuf> {
    let mut images = Vec::new();
    for entry in std::fs::read_dir(case).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let Some(plain) = name.strip_suffix(".gz") else {
            continue;
        };
        if name.starts_with("before") || name.starts_with("after") {
            images.push(path);
        } else {
            std::fs::write(folder.join(plain), unpacked(&path)).unwrap();
        }
    }
    images.sort();
    images
}

/// One reference image, with what stands beside it, as `image.qcow2` in a new folder.
pub fn image(case: &str, state: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (_, path) = cases().into_iter().find(|(n, _)| n == case).unwrap();
    prepare(&path, folder.path());
    let bytes = unpacked(&path.join(format!("{state}.qcow2.gz")));
    std::fs::write(folder.path().join("image.qcow2"), bytes).unwrap();
    folder
}

/// A link named qemu-img to the tool, in a folder of its own.
pub fn link() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(tool(), folder.path().join("qemu-img")).unwrap();
    folder
}

/// Is there such a program? Says so loudly where not.
pub fn have(program: &str, what: &str) -> bool {
    let found = said(Command::new("sh").args(["-c", "command -v \"$0\"", program])).code == Some(0);
    if !found {
        println!("SKIPPED: no {program} here: {what} was not tested");
    }
    found
}
