//! Loop devices for tests. One goes away with the last descriptor for it, whatever ends the test.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A block device whose bytes are in a file that has no name any more.
pub struct LoopDevice {
    pub path: PathBuf,
    /// The device is detached already: it lives as long as it is open.
    _open: File,
}

fn losetup(args: &[&str], path: &Path) -> Option<String> {
    let out = Command::new("losetup").args(args).arg(path).output().ok()?;
    let text = String::from_utf8(out.stdout).unwrap();
    out.status.success().then(|| text.trim().to_owned())
}

impl LoopDevice {
    /// A device of `length` bytes that begins with `contents`; what is behind them is not zero.
    pub fn new(contents: &[u8], length: u64) -> LoopDevice {
        LoopDevice::with(contents, length, &[])
    }

    pub fn with(contents: &[u8], length: u64, options: &[&str]) -> LoopDevice {
        let length = usize::try_from(length).unwrap();
        assert!(contents.len() <= length && length % 512 == 0);
        let mut bytes = vec![0xa5; length];
        bytes[..contents.len()].copy_from_slice(contents);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let args = [options, &["--find", "--show"]].concat();
        let path = PathBuf::from(losetup(&args, file.path()).unwrap());
        let open = File::open(&path);
        losetup(&["--detach"], &path).unwrap();
        LoopDevice {
            path,
            _open: open.unwrap(),
        }
    }

    /// Does it discard? Not where the file system of the file makes no holes.
    pub fn discards(&self) -> bool {
        let name = self.path.file_name().unwrap().to_str().unwrap();
        let file = format!("/sys/block/{name}/queue/discard_max_bytes");
        std::fs::read_to_string(file).is_ok_and(|text| text.trim() != "0")
    }

    pub fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

/// Can loop devices be had here? Says so loudly where not.
pub fn have_devices(what: &str) -> bool {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 16).unwrap();
    let made = losetup(&["--find", "--show"], file.path());
    let found = made.is_some_and(|path| losetup(&["--detach"], Path::new(&path)).is_some());
    if !found {
        println!(
            "SKIPPED: no loop devices here (they need root and losetup): {what} was not tested"
        );
    }
    found
}

/// Is there such a program? Says so loudly where not.
pub fn have(program: &str, what: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        println!("SKIPPED: no {program} here: {what} was not tested");
    }
    found
}
