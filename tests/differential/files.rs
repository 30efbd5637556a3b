//! Files with holes: copy, compare, last byte that is not zero.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub type R<T> = Result<T, String>;

/// `map_err` with a place in the text.
pub fn at<T, E: std::fmt::Display>(what: &str, r: Result<T, E>) -> R<T> {
    r.map_err(|e| format!("{what}: {e}"))
}

const BLOCK: u64 = 1 << 18;

pub fn open(path: &Path) -> R<File> {
    at(&format!("open {}", path.display()), File::open(path))
}

pub fn open_rw(path: &Path) -> R<File> {
    at(
        &format!("open {}", path.display()),
        OpenOptions::new().read(true).write(true).open(path),
    )
}

pub fn len(f: &File) -> R<u64> {
    Ok(at("stat", f.metadata())?.len())
}

/// Read with zeros past the end of the file.
pub fn read_at(f: &File, mut off: u64, buf: &mut [u8]) -> R<()> {
    let mut done = 0;
    while done < buf.len() {
        let n = at("read", f.read_at(&mut buf[done..], off))?;
        if n == 0 {
            buf[done..].fill(0);
            break;
        }
        done += n;
        off += n as u64;
    }
    Ok(())
}

/// The next offset >= `pos` that holds data, or `None` if only a hole follows.
#[allow(unsafe_code)]
fn seek_data(f: &File, pos: u64) -> R<Option<u64>> {
    // SAFETY: lseek on a descriptor that `f` keeps open; no memory is passed.
    let r = unsafe { libc::lseek(f.as_raw_fd(), pos as libc::off_t, libc::SEEK_DATA) };
    if r >= 0 {
        return Ok(Some(r as u64));
    }
    let e = std::io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        Some(libc::EINVAL) => Ok((pos < len(f)?).then_some(pos)),
        _ => Err(format!("lseek: {e}")),
    }
}

/// Copy contents and length; zero blocks become holes.
pub fn copy(from: &Path, to: &Path) -> R<()> {
    let src = open(from)?;
    let dst = at(
        &format!("create {}", to.display()),
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(to),
    )?;
    let end = len(&src)?;
    at("truncate", dst.set_len(end))?;
    let mut buf = vec![0u8; BLOCK as usize];
    let mut pos = 0;
    while pos < end {
        let Some(data) = seek_data(&src, pos)? else {
            break;
        };
        let n = BLOCK.min(end.saturating_sub(data)) as usize;
        if n == 0 {
            break;
        }
        read_at(&src, data, &mut buf[..n])?;
        for (i, part) in buf[..n].chunks(4096).enumerate() {
            if part.iter().any(|b| *b != 0) {
                at("write", dst.write_all_at(part, data + i as u64 * 4096))?;
            }
        }
        pos = data + n as u64;
    }
    Ok(())
}

/// What two files differ in.
#[derive(Default)]
pub struct Difference {
    pub len_a: u64,
    pub len_b: u64,
    /// 8-byte aligned offsets of words that differ, at most [`Difference::MAX`] of them.
    pub words: Vec<u64>,
    pub more: bool,
}

impl Difference {
    pub const MAX: usize = 20_000;

    pub fn is_none(&self) -> bool {
        self.len_a == self.len_b && self.words.is_empty()
    }
}

pub fn compare(a: &Path, b: &Path) -> R<Difference> {
    let (fa, fb) = (open(a)?, open(b)?);
    let mut d = Difference {
        len_a: len(&fa)?,
        len_b: len(&fb)?,
        ..Default::default()
    };
    let end = d.len_a.max(d.len_b);
    let (mut x, mut y) = (vec![0u8; BLOCK as usize], vec![0u8; BLOCK as usize]);
    let mut pos = 0;
    while pos < end {
        let next = match (seek_data(&fa, pos)?, seek_data(&fb, pos)?) {
            (None, None) => break,
            (Some(n), None) | (None, Some(n)) => n,
            (Some(n), Some(m)) => n.min(m),
        } & !7;
        let n = BLOCK.min(end - next) as usize;
        read_at(&fa, next, &mut x[..n])?;
        read_at(&fb, next, &mut y[..n])?;
        if x[..n] != y[..n] {
            for i in (0..n).step_by(8) {
                let j = (i + 8).min(n);
                if x[i..j] != y[i..j] {
                    if d.words.len() >= Difference::MAX {
                        d.more = true;
                        return Ok(d);
                    }
                    d.words.push(next + i as u64);
                }
            }
        }
        pos = next + n as u64;
    }
    Ok(d)
}

/// Offset just behind the last byte that is not zero.
pub fn end_of_content(path: &Path) -> R<u64> {
    let f = open(path)?;
    let mut end = len(&f)?;
    let mut buf = vec![0u8; BLOCK as usize];
    while end > 0 {
        let n = BLOCK.min(end) as usize;
        read_at(&f, end - n as u64, &mut buf[..n])?;
        if let Some(i) = buf[..n].iter().rposition(|b| *b != 0) {
            return Ok(end - n as u64 + i as u64 + 1);
        }
        end -= n as u64;
        if let Some(d) = seek_data(&f, 0)? {
            if d >= end {
                return Ok(0);
            }
        } else {
            return Ok(0);
        }
    }
    Ok(0)
}
