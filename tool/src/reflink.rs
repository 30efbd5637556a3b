//! Blocks that the new file shares with the image, where the file system can do that (XFS, btrfs).
//!
//! Elsewhere `copy_file_range` would copy, zeros too, which reading and writing leave out.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use qcow2_snapshot::{BlockStatus, Image};
use rustix::fs::{copy_file_range, ioctl_ficlone};

/// File systems share whole blocks; none of theirs is smaller.
const BLOCK: u64 = 4096;
/// Asked for at once.
const MOST: u64 = 1 << 30;

/// A new file that can share blocks.
pub(crate) struct Reflink<'a> {
    out: &'a File,
    device: u64,
}

impl Reflink<'_> {
    /// Can this file, which is empty, share blocks with others in its folder?
    pub(crate) fn to<'a>(out: &'a File, folder: &Path) -> Option<Reflink<'a>> {
        let empty = tempfile::tempfile_in(folder).ok()?;
        ioctl_ficlone(out, &empty).ok()?;
        Some(Reflink {
            out,
            device: out.metadata().ok()?.dev(),
        })
    }

    /// Share the data of a run, which stands at the same place of the new file, from its start on. Returns how
    /// many bytes that were; what cannot be shared is to be copied.
    pub(crate) fn share(&self, image: &Image, run: &BlockStatus) -> u64 {
        let (true, false, false, Some(host)) = (run.data, run.zero, run.compressed, run.offset)
        else {
            return 0;
        };
        let n = run.length / BLOCK * BLOCK;
        if (host | run.start) & (BLOCK - 1) != 0 || n == 0 {
            return 0;
        }
        let same = |file: &File| file.metadata().is_ok_and(|m| m.dev() == self.device);
        let Some(file) = image.host_file(run.depth).filter(same) else {
            return 0;
        };
        let mut done = 0;
        while done < n {
            let (mut from, mut to) = (host + done, run.start + done);
            let most = (n - done).min(MOST) as usize;
            match copy_file_range(&file, Some(&mut from), self.out, Some(&mut to), most) {
                // Past the end of a backing file, or not here.
                Ok(0) | Err(_) => break,
                Ok(shared) => done += shared as u64,
            }
        }
        done
    }
}
