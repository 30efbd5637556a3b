//! qemu-img and qemu-io as child processes, and a shell script of what was run.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::files::{at, R};

pub struct Tools {
    pub dir: PathBuf,
    /// Everything done to the image so far, as a shell script or comments.
    pub log: Vec<String>,
    /// The image is encrypted and qemu needs `--object secret`.
    pub luks: bool,
}

/// How a failed call says it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// 0: the text names no errno that we know.
    pub errno: i32,
    pub text: String,
}

pub struct Output {
    pub ok: bool,
    /// Killed by a signal (an assertion).
    pub crashed: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Tools {
    pub fn new(dir: &Path) -> Tools {
        Tools {
            dir: dir.to_path_buf(),
            log: vec![],
            luks: false,
        }
    }

    pub fn note(&mut self, text: impl std::fmt::Display) {
        self.log.push(format!("# {text}"));
    }

    pub fn run(&mut self, program: &str, args: &[Vec<u8>]) -> R<Output> {
        let quoted: Vec<String> = args.iter().map(|a| quote(a)).collect();
        self.log.push(format!("{program} {}", quoted.join(" ")));
        let out = at(
            program,
            Command::new(program)
                .args(args.iter().map(|a| OsString::from_vec(a.clone())))
                .current_dir(&self.dir)
                .env("LC_ALL", "C")
                .env("TZ", "UTC")
                .stdin(std::process::Stdio::null())
                .output(),
        )?;
        Ok(Output {
            ok: out.status.success(),
            crashed: out.status.signal().is_some(),
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        })
    }

    /// A command on an image, with what an encrypted one needs: `args`, then the file, then `tail`.
    pub fn on(&mut self, program: &str, args: &[&[u8]], file: &str, tail: &[&[u8]]) -> R<Output> {
        let mut v: Vec<Vec<u8>> = args.iter().map(|a| a.to_vec()).collect();
        if self.luks {
            let at = usize::from(program == "qemu-img");
            for (i, x) in [&b"--object"[..], b"secret,id=s,data=abc", b"--image-opts"]
                .iter()
                .enumerate()
            {
                v.insert(at + i, x.to_vec());
            }
            v.push(format!("driver=qcow2,encrypt.key-secret=s,file.filename={file}").into_bytes());
        } else {
            v.push(file.as_bytes().to_vec());
        }
        v.extend(tail.iter().map(|a| a.to_vec()));
        self.run(program, &v)
    }

    /// Must succeed.
    pub fn must(&mut self, program: &str, args: &[&str]) -> R<Output> {
        let v: Vec<Vec<u8>> = args.iter().map(|a| a.as_bytes().to_vec()).collect();
        let o = self.run(program, &v)?;
        if o.ok {
            Ok(o)
        } else {
            Err(format!("{program} {}: {}", args.join(" "), o.stderr))
        }
    }

    /// `qemu-io` with some commands; commands that fail (past the end and such) are fine.
    pub fn io(&mut self, file: &str, unmap: bool, commands: &[String]) -> R<Output> {
        let mut v: Vec<&[u8]> = vec![];
        if unmap {
            v.extend([&b"-d"[..], b"unmap"]);
        }
        for c in commands {
            v.extend([&b"-c"[..], c.as_bytes()]);
        }
        self.on("qemu-io", &v, file, &[])
    }

    /// `qemu-img snapshot -c/-d/-a`.
    pub fn snapshot(&mut self, action: &str, name: &[u8], file: &str) -> R<Result<(), Failure>> {
        let o = self.on(
            "qemu-img",
            &[b"snapshot", action.as_bytes(), name],
            file,
            &[],
        )?;
        if o.ok {
            return Ok(Ok(()));
        }
        if o.crashed {
            return Ok(Err(Failure {
                errno: 0,
                text: format!("crashed: {}", o.stderr),
            }));
        }
        Ok(Err(Failure {
            errno: errno_of(&o.stderr),
            text: o.stderr.trim().to_string(),
        }))
    }
}

/// The errno whose text ends the last line of qemu-img's message.
pub fn errno_of(stderr: &str) -> i32 {
    let last = stderr.trim_end().lines().last().unwrap_or("");
    const OTHER: &[(&str, i32)] = &[
        ("snapshot not found", libc::ENOENT),
        ("Can't find the snapshot", libc::ENOENT),
        ("Device has active dirty bitmaps", libc::EBUSY),
        (
            "Image is corrupt; cannot be opened read/write",
            libc::EACCES,
        ),
        (
            "Too much extra metadata in snapshot table entry",
            libc::EFBIG,
        ),
        ("Snapshot L1 table too large", libc::EFBIG),
        ("Snapshot L1 table offset invalid", libc::EINVAL),
    ];
    for (text, e) in OTHER {
        if stderr.contains(text) {
            return *e;
        }
    }
    for e in 1..134 {
        let text = std::io::Error::from_raw_os_error(e).to_string();
        let text = text.split(" (os error").next().unwrap_or("");
        if last.ends_with(&format!(": {text}")) {
            return e;
        }
    }
    0
}

fn quote(a: &[u8]) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_./=,:+".contains(b);
    if !a.is_empty() && a.iter().all(plain) {
        return String::from_utf8_lossy(a).into_owned();
    }
    if a.iter().all(|b| (32..127).contains(b) && *b != b'\'') {
        return format!("'{}'", String::from_utf8_lossy(a));
    }
    let mut s = String::from("$'");
    for b in a {
        if plain(b) || *b == b' ' {
            s.push(*b as char);
        } else {
            s += &format!("\\x{b:02x}");
        }
    }
    s + "'"
}

/// Bytes of a path for a C call.
pub fn path_bytes(p: &Path) -> &[u8] {
    p.as_os_str().as_bytes()
}
