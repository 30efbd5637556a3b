//! A nameless file for what does not fit in memory.

use std::fs::{File, OpenOptions};
use std::io::Result;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

/// A file that no folder names: it is gone with the last handle, whatever happens to the process.
#[derive(Debug)]
pub(crate) struct Scratch {
    file: File,
}

impl Scratch {
    /// A file in the folder that `TMPDIR` names, else in `/var/tmp`: where QEMU puts its own
    /// temporary files. Only its owner can read it.
    ///
    /// # Errors
    /// The system's, where there is no such folder or it is on a file system without `O_TMPFILE`.
    pub(crate) fn new() -> Result<Scratch> {
        let folder = std::env::var_os("TMPDIR").filter(|folder| !folder.is_empty());
        let folder = folder.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        options.custom_flags(libc::O_TMPFILE);
        let file = super::lock::open(&options, &folder)?;
        Ok(Scratch { file })
    }

    /// Fill `buf` from `offset`, where as much was written.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// Write `data` at `offset`.
    ///
    /// # Errors
    /// The system's, such as a full disk.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.file.write_all_at(data, offset)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no O_TMPFILE")]
    fn what_was_written_is_read_back() {
        let scratch = Scratch::new().unwrap();
        scratch.write(1 << 30, b"counts").unwrap();
        let mut back = [0; 6];
        scratch.read(1 << 30, &mut back).unwrap();
        assert_eq!(&back, b"counts");
        assert!(scratch.read((1 << 30) + 1, &mut back).is_err());
    }
}
