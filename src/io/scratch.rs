//! A nameless file for what does not fit in memory.

use std::fs::{File, OpenOptions};
use std::io::Result;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use super::lock;

/// A file that no folder names: it is gone with the last handle, whatever happens to the process.
#[derive(Debug)]
pub(crate) struct Scratch {
    file: File,
}

impl Scratch {
    /// A file in the folder that `TMPDIR` names (but in a set-uid program), else in `/var/tmp`: where
    /// QEMU puts its own temporary files. Only its owner can read it.
    ///
    /// # Errors
    /// The system's, where there is no such folder or it is on a file system without `O_TMPFILE`.
    pub(crate) fn new() -> Result<Scratch> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        options.custom_flags(libc::O_TMPFILE);
        let file = super::lock::open(&options, &folder())?;
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
        lock::without_sigxfsz(|| self.file.write_all_at(data, offset))
    }
}

/// Where the file goes. Whoever starts a set-uid program must not choose that.
fn folder() -> PathBuf {
    let named = (!lock::has_foreign_rights())
        .then(|| std::env::var_os("TMPDIR"))
        .flatten();
    named
        .filter(|folder| !folder.is_empty())
        .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
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

    const SAYS_WHERE: &str = "io::scratch::tests::says_where_the_file_goes";

    fn is_root() -> bool {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
    }

    /// Not a test: what the test below runs as another program.
    #[test]
    #[ignore = "a part of the next test"]
    fn says_where_the_file_goes() {
        // Not by its caller: glibc has taken TMPDIR from a set-uid program already; others have not.
        std::env::set_var("TMPDIR", "/chosen/by/the/user");
        println!("root: {}, folder: {}", is_root(), folder().display());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri starts no programs")]
    fn tmpdir_is_followed_but_in_a_set_uid_program() {
        use std::io::Write;
        use std::os::unix::fs::PermissionsExt;
        use std::os::unix::process::CommandExt;

        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        let said = |mode, uid: Option<u32>| {
            for path in [dir.path(), &program] {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
            }
            let mut command = std::process::Command::new(&program);
            command.args([SAYS_WHERE, "--exact", "--ignored", "--nocapture"]);
            command
                .env("TMPDIR", "/chosen/by/the/user")
                .current_dir("/");
            uid.map(|uid| command.uid(uid));
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        };
        let plain = said(0o755, None);
        assert!(plain.contains("folder: /chosen/by/the/user"), "{plain}");
        let skipped = |why| {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: TMPDIR in a set-uid program ({why})"
            );
        };
        if !is_root() {
            return skipped("only root can make one that helps here");
        }
        let set_uid = said(0o4755, Some(65534));
        if set_uid.contains("root: false") {
            return skipped("the temporary folder is mounted nosuid");
        }
        assert!(
            set_uid.contains("root: true, folder: /var/tmp"),
            "{set_uid}"
        );
    }
}
