//! The chains of `c-tests/images` by the Rust API: after each verb the file equals the one that qemu-img left, byte
//! for byte, with a handle for each verb and with one for all. `c-tests/replay.c` and `replay_chain.c` do the same
//! through the C API; this answers within seconds, without a C compiler.
#![allow(clippy::unwrap_used)]

#[path = "reference/ops.rs"]
mod ops;

use ops::{name, new_snapshot, unpacked};
use qcow2_snapshot::{Error, Image, OpenFlags};
use std::path::Path;

/// Larger ones are left to the C tests.
const MOST: usize = 3 << 20;

fn errno(word: &str) -> i32 {
    match word {
        "EINVAL" => libc::EINVAL,
        "EFBIG" => libc::EFBIG,
        "ENOTSUP" => libc::ENOTSUP,
        "EBUSY" => libc::EBUSY,
        "EACCES" => libc::EACCES,
        "EIO" => libc::EIO,
        "ENOENT" => libc::ENOENT,
        word => panic!("an unknown errno: {word}"),
    }
}

/// A handle on the image, opened when it is needed.
struct Run<'a> {
    at: &'a Path,
    image: Option<Image>,
    one_handle: bool,
}

impl Run<'_> {
    fn open(&mut self, flags: OpenFlags) -> Result<(), Error> {
        if let Some(image) = self.image.take() {
            image.close()?;
        }
        self.image = Some(Image::open(self.at, flags)?);
        Ok(())
    }

    fn perform(&mut self, words: &[&str]) -> Result<(), Error> {
        match words[0] {
            "open-rw" => return self.open(OpenFlags::RDWR),
            "open-ro" => return self.open(OpenFlags::default()),
            "list" if self.image.is_none() && !self.one_handle => self.open(OpenFlags::default())?,
            _ if self.image.is_none() => self.open(OpenFlags::RDWR)?,
            _ => {}
        }
        let image = self.image.as_mut().unwrap();
        match words[0] {
            "create" => image.snapshot_create(&new_snapshot(&words[1..])).map(drop),
            "goto" => image.snapshot_goto(&name(words[1])),
            "delete" => image.snapshot_delete(None, Some(&name(words[1]))),
            "write-snapshots" => image.write_snapshots(),
            "list" => {
                let list = image.snapshot_list()?;
                assert_eq!(list.len(), words[1].parse::<usize>().unwrap());
                Ok(())
            }
            word => panic!("an unknown operation: {word}"),
        }
    }
}

fn equal(case: &str, have: &[u8], want: &[u8]) {
    assert!(
        have == want,
        "{case}: {} bytes, not {}; the first that differs: {:?}",
        have.len(),
        want.len(),
        have.iter().zip(want).position(|(a, b)| a != b)
    );
}

/// Returns how many verbs succeeded.
fn replay(folder: &Path, one_handle: bool) -> usize {
    let ops = std::fs::read_to_string(folder.join("ops")).unwrap();
    let there = tempfile::tempdir().unwrap();
    // Backing and data files, too.
    for file in std::fs::read_dir(folder).unwrap().flatten() {
        let packed = file.file_name().to_string_lossy().into_owned();
        match packed.strip_suffix(".gz") {
            Some(plain) if !plain.starts_with("after-") && !plain.starts_with("before.") => {
                std::fs::write(there.path().join(plain), unpacked(&file.path())).unwrap();
            }
            _ => {}
        }
    }
    let at = there.path().join("image.qcow2");
    let mut now = unpacked(&folder.join("before.qcow2.gz"));
    std::fs::write(&at, &now).unwrap();
    let mut run = Run {
        at: &at,
        image: None,
        one_handle,
    };
    let (mut lines, mut steps) = (ops.lines().peekable(), 0);
    while let Some(line) = lines.next() {
        let case = format!("{}: {line}", folder.display());
        let mut words: Vec<&str> = line.split(' ').collect();
        let wanted = match words[0] {
            "fails" | "later" => Some((words[0], errno(words[1]))),
            _ => None,
        };
        words.drain(..if wanted.is_some() { 2 } else { 0 });
        let says = lines.next_if(|next| next.starts_with("says "));
        match (run.perform(&words), wanted) {
            (Err(e), Some((_, errno))) => {
                assert_eq!(e.errno(), errno, "{case}: {e}");
                let says = says.map_or("", |s| &s[5..]).to_lowercase();
                assert!(e.to_string().to_lowercase().contains(&says), "{case}: {e}");
            }
            (Err(e), None) => panic!("{case}: {e}"),
            (Ok(()), Some(("fails", _))) => panic!("{case}: it succeeded"),
            (Ok(()), _) => {
                if ["create", "goto", "delete", "write-snapshots"].contains(&words[0]) {
                    steps += 1;
                    now = unpacked(&folder.join(format!("after-{steps}.qcow2.gz")));
                }
            }
        }
        if !one_handle && !words[0].starts_with("open-") {
            run.image = None;
        }
        equal(&case, &std::fs::read(&at).unwrap(), &now);
    }
    steps
}

fn all(one_handle: bool) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("c-tests/images");
    let (mut cases, mut verbs) = (0, 0);
    for folder in std::fs::read_dir(root).unwrap().flatten() {
        let before = folder.path().join("before.qcow2.gz");
        if !before.exists() {
            continue;
        }
        if unpacked(&before).len() > MOST {
            println!("left to the C tests: {}", folder.path().display());
            continue;
        }
        cases += 1;
        verbs += replay(&folder.path(), one_handle);
    }
    assert!(
        cases > 100 && verbs > 200,
        "{cases} cases with {verbs} verbs"
    );
}

#[test]
fn each_verb_on_a_handle_of_its_own_leaves_the_file_of_qemu_img() {
    all(false);
}

#[test]
fn verbs_on_one_handle_leave_the_files_of_qemu_img() {
    all(true);
}
