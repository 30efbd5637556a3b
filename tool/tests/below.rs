//! From below: what the kernel sees of the tool is what the crash tests assume of the library.
//!
//! Crash tests cut the log of the recorder (`io::trace`), which is memory. Here strace writes down every
//! call of the real tool that touches a file; what it did to the image is made into such a log, and
//! compared with the recorder's for the same verb: the same writes, lengths, holes and barriers in the same
//! order. Nothing else may touch the image (no mapping, no second way to write), nor any other file.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{cases, prepare, tool, unpacked};
use qcow2_snapshot::io::trace::{Event, TraceStorage};
use qcow2_snapshot::{Image, NewSnapshot, OpenFlags};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::Command;

/// Larger images say nothing new and take long: their writes go through a text of four times the size.
const MOST: u64 = 6 << 20;

/// `\x41` and the like, as strace writes text with `-xx`.
fn plain(text: &str) -> Vec<u8> {
    let hex = text.split("\\x").skip(1);
    hex.map(|h| u8::from_str_radix(&h[..2], 16).unwrap())
        .collect()
}

/// One call: its name, its arguments, what it returned.
struct Call {
    name: String,
    args: Vec<String>,
    result: i64,
}

impl Call {
    /// The file behind an argument that is a descriptor: `3<\x2f...>`.
    fn path(&self, arg: usize) -> Option<Vec<u8>> {
        let (fd, path) = self.args.get(arg)?.split_once('<')?;
        fd.parse::<u32>().ok()?;
        Some(plain(path))
    }

    fn number(&self, arg: usize) -> u64 {
        self.args[arg].parse().unwrap()
    }
}

/// The calls that strace wrote down. One that another thread interrupted is in two lines.
fn calls(log: &str) -> Vec<Call> {
    let mut begun: BTreeMap<String, String> = BTreeMap::new();
    let mut out = vec![];
    for line in log.lines() {
        let (pid, rest) = line.split_once(' ').unwrap();
        let rest = rest.trim_start();
        let whole = if let Some(start) = rest.strip_suffix(" <unfinished ...>") {
            begun.insert(pid.to_owned(), start.to_owned());
            continue;
        } else if let Some(at) = rest.find(" resumed>").filter(|_| rest.starts_with("<...")) {
            begun.remove(pid).unwrap() + &rest[at + " resumed>".len()..]
        } else {
            rest.to_owned()
        };
        // Signals and exits are no calls.
        let Some((call, result)) = whole.rsplit_once(" = ") else {
            continue;
        };
        let (name, args) = call.trim_end().split_once('(').unwrap();
        let result = result.split([' ', '<']).next().unwrap();
        out.push(Call {
            name: name.to_owned(),
            // Text is all `\x..`, so no comma is in it.
            args: args
                .trim_end_matches(')')
                .split(", ")
                .map(str::to_owned)
                .collect(),
            result: match result.strip_prefix("0x") {
                Some(hex) => i64::from_str_radix(hex, 16).unwrap_or(-1),
                None => result.parse().unwrap_or(-1),
            },
        });
    }
    out
}

/// What was done to the image, and what should not have been done at all.
fn log_of(calls: &[Call], image: &Path) -> (Vec<Event>, Vec<String>) {
    let (mut events, mut wrong) = (vec![], vec![]);
    for call in calls.iter().filter(|c| c.result >= 0) {
        let ours = (0..call.args.len())
            .any(|i| call.path(i).as_deref() == Some(image.as_os_str().as_bytes()));
        let said = || {
            format!("{}({})", call.name, call.args.join(", "))
                .chars()
                .take(300)
                .collect::<String>()
        };
        match (call.name.as_str(), ours) {
            ("pwrite64", true) => {
                let data = plain(&call.args[1]);
                if call.result as usize != data.len() {
                    wrong.push(format!("in part: {}", said()));
                }
                events.push(Event::Write {
                    label: "",
                    offset: call.number(3),
                    data,
                });
            }
            ("ftruncate", true) => events.push(Event::Truncate {
                length: call.number(1),
            }),
            ("fallocate", true) if call.args[1] == "FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE" => {
                events.push(Event::Discard {
                    offset: call.number(2),
                    bytes: call.number(3),
                });
            }
            ("fdatasync", true) => events.push(Event::Barrier),
            // These look.
            (
                "pread64" | "lseek" | "fstat" | "newfstatat" | "statx" | "fcntl" | "fadvise64"
                | "close" | "readlink" | "fstatfs",
                true,
            ) => {}
            ("openat", _) => {
                let writes = call.args[2].contains("O_WRONLY") || call.args[2].contains("O_RDWR");
                let known = ours
                    || plain(&call.args[1]).ends_with(b"/image.qcow2")
                    || call.args[1].contains(&hex("image.qcow2"));
                if writes && !known {
                    wrong.push(said());
                }
            }
            (_, true) => wrong.push(said()),
            ("write", _) if call.args[0].starts_with("1<") || call.args[0].starts_with("2<") => {}
            (
                "write" | "pwrite64" | "pwritev" | "pwritev2" | "writev" | "ftruncate" | "truncate"
                | "fallocate" | "rename" | "renameat" | "renameat2" | "unlink" | "unlinkat"
                | "link" | "linkat" | "symlink" | "mkdir" | "copy_file_range" | "sendfile"
                | "creat",
                _,
            ) => wrong.push(said()),
            _ => {}
        }
    }
    (events, wrong)
}

fn hex(text: &str) -> String {
    text.bytes().map(|b| format!("\\x{b:02x}")).collect()
}

/// The recorder's log as a file's barriers are: none where nothing has changed since the last one.
fn as_a_file(log: Vec<Event>) -> Vec<Event> {
    let mut out: Vec<Event> = vec![];
    for e in log {
        if e == Event::Barrier && out.last().is_none_or(|last| *last == Event::Barrier) {
            continue;
        }
        out.push(match e {
            Event::Write { offset, data, .. } => Event::Write {
                label: "",
                offset,
                data,
            },
            e => e,
        });
    }
    out
}

fn told(log: &[Event]) -> String {
    log.iter().map(|e| format!("\n    {e}")).collect()
}

/// Run a program under strace, in a folder. `None` where that is not possible.
fn traced(folder: &Path, program: &Path, args: &[OsString]) -> Option<Vec<Call>> {
    let log = folder.join("strace.log");
    let out = Command::new("strace")
        .args([
            "-f",
            "-y",
            "-xx",
            "-s",
            "9000000",
            "-e",
            "trace=%desc,%file",
            "-e",
            "signal=none",
            "-o",
        ])
        .arg(&log)
        .arg(program)
        .args(args)
        .current_dir(folder)
        .env("TZ", "UTC")
        .output();
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    match out {
        Ok(_) if text.contains("execve(") => Some(calls(&text)),
        Ok(out) => {
            println!(
                "SKIPPED: strace cannot trace here: {}",
                String::from_utf8_lossy(&out.stderr)
            );
            None
        }
        Err(e) => {
            println!("SKIPPED: no strace here ({e}): what the kernel sees of the tool was not compared with the recorder");
            None
        }
    }
}

/// A name in `ops`: what is not plain is `%41`, nothing is `""`.
fn name(text: &str) -> OsString {
    let (mut out, mut rest) = (vec![], text.as_bytes());
    if text == "\"\"" {
        return OsString::new();
    }
    while let Some((b, more)) = rest.split_first() {
        rest = more;
        match b {
            b'%' => {
                out.push(u8::from_str_radix(std::str::from_utf8(&rest[..2]).unwrap(), 16).unwrap());
                rest = &rest[2..];
            }
            b => out.push(*b),
        }
    }
    OsString::from_vec(out)
}

/// The same verb on the recorder, at the time at which the tool made its snapshot. Did it succeed?
fn recorded(
    before: &[u8],
    after: &[u8],
    named: u64,
    flag: &str,
    name: &OsStr,
) -> (bool, Vec<Event>) {
    let storage = TraceStorage::new(before.to_vec()).with_named(named);
    let trace = storage.trace();
    let Ok(mut image) = Image::open_storage(Box::new(storage), OpenFlags::RDWR) else {
        return (false, vec![]);
    };
    let name = name.as_bytes().to_vec();
    let result = match flag {
        "-c" => {
            let storage = TraceStorage::new(after.to_vec()).with_named(named);
            let last = Image::open_storage(Box::new(storage), OpenFlags::RDWR).ok();
            let last =
                last.and_then(|mut i| i.snapshot_list().ok().and_then(|l| l.last().cloned()));
            image
                .snapshot_create(&NewSnapshot {
                    name: name[..name.len().min(255)].to_vec(),
                    date_sec: last.as_ref().map_or(0, |l| l.date_sec),
                    date_nsec: last.as_ref().map_or(0, |l| l.date_nsec),
                    ..NewSnapshot::default()
                })
                .map(|_| ())
        }
        "-a" => image.snapshot_goto(&name),
        _ => {
            let list = image.snapshot_list().map(<[_]>::to_vec).unwrap_or_default();
            let cut = |text: &[u8], most: usize| text[..text.len().min(most)].to_vec();
            match list.iter().find(|s| cut(&s.name, 255) == name) {
                Some(s) => image.snapshot_delete(Some(&cut(&s.id, 127)), Some(&name)),
                None => return (false, vec![]),
            }
        }
    };
    (result.is_ok(), as_a_file(trace.events()))
}

#[test]
fn the_kernel_sees_the_writes_and_barriers_of_the_recorder_and_nothing_else() {
    let (mut verbs, mut writes, mut barriers, mut refused, mut left_out) = (0, 0, 0, 0, vec![]);
    for (case, path) in cases() {
        let Ok(ops) = std::fs::read_to_string(path.join("ops")) else {
            continue;
        };
        let folder = tempfile::tempdir().unwrap();
        prepare(&path, folder.path());
        let image = folder.path().join("image.qcow2");
        let mut before = unpacked(&path.join("before.qcow2.gz"));
        // A backing file in qcow2 has another length inside; the recorder's named files are raw.
        if before.len() as u64 > MOST || case.starts_with("backing-qcow2") {
            left_out.push(case);
            continue;
        }
        let named = std::fs::read_dir(folder.path()).unwrap();
        let named = named
            .map(|f| f.unwrap().metadata().unwrap().len())
            .max()
            .unwrap_or(0);
        for line in ops.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let (flag, text) = match words[..] {
                ["create", name, _, _] => ("-c", name),
                ["goto", name] => ("-a", name),
                ["delete", name] => ("-d", name),
                _ => continue,
            };
            // Without holes: the recorder knows of none.
            std::fs::write(&image, &before).unwrap();
            let args = [OsString::from(flag), name(text), image.clone().into()];
            let Some(calls) = traced(folder.path(), tool(), &args) else {
                return;
            };
            let after = std::fs::read(&image).unwrap();
            let (seen, wrong) = log_of(&calls, &image);
            assert!(wrong.is_empty(), "{case}, {line}: {wrong:#?}");
            let (done, log) = recorded(&before, &after, named, flag, &args[1]);
            assert!(
                seen == log,
                "{case}, {line}\n  strace: {}\n  recorder: {}",
                told(&seen),
                told(&log)
            );
            if !done {
                assert!(
                    seen.is_empty(),
                    "{case}, {line}: refused, and it wrote {}",
                    told(&seen)
                );
                refused += 1;
                continue;
            }
            verbs += 1;
            writes += seen.iter().filter(|e| **e != Event::Barrier).count();
            barriers += seen.iter().filter(|e| **e == Event::Barrier).count();
            before = after;
        }
    }
    if !left_out.is_empty() {
        println!(
            "SKIPPED: not traced, too large or with a backing file in qcow2: {}",
            left_out.join(", ")
        );
    }
    println!("strace of {verbs} verbs on the reference images: {writes} writes, lengths and holes, {barriers} barriers, as recorded; {refused} refused without any");
    assert!(verbs > 100 && refused > 0);
}

/// The comparison sees what it is there to see.
#[test]
fn a_program_that_writes_in_another_way_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image.qcow2");
    std::fs::write(&image, [0; 4096]).unwrap();
    let shell = "printf x >> image.qcow2; printf y > other; mv other another";
    let args = [OsString::from("-c"), OsString::from(shell)];
    let Some(calls) = traced(folder.path(), Path::new("/bin/sh"), &args) else {
        return;
    };
    let (events, wrong) = log_of(&calls, &image);
    let said = wrong.join("\n");
    assert!(events.is_empty(), "{}", told(&events));
    for call in ["write(", "openat(", "rename"] {
        assert!(said.contains(call), "{call} in {said}");
    }
}

/// A name is given to what is stable, and is stable when the program ends: after a power cut there is the whole
/// file or none, and who deletes a snapshot that was exported does not lose both.
#[test]
fn what_is_exported_gets_its_name_when_it_is_whole_and_the_name_is_stable() {
    let case = cases().into_iter().find(|(name, _)| name == "goto-basic");
    let (_, path) = case.or_else(|| cases().into_iter().next()).unwrap();
    for way in [
        &["-O", "raw", "image.qcow2", "s", "out"][..],
        &["-O", "qcow2", "image.qcow2", "s", "out"],
        &["--all", "out", "image.qcow2"],
    ] {
        let folder = tempfile::tempdir().unwrap();
        prepare(&path, folder.path());
        let image = folder.path().join("image.qcow2");
        std::fs::write(&image, unpacked(&path.join("before.qcow2.gz"))).unwrap();
        let args = ["create", "image.qcow2", "s"];
        let made = Command::new(tool())
            .args(args)
            .current_dir(folder.path())
            .status();
        assert!(made.unwrap().success());
        let args: Vec<OsString> = [&["export"], way]
            .concat()
            .iter()
            .map(OsString::from)
            .collect();
        let Some(calls) = traced(folder.path(), tool(), &args) else {
            return;
        };
        assert!(folder.path().join("out").exists(), "{way:?}");
        let mut steps = vec![];
        for call in calls.iter().filter(|c| c.result >= 0) {
            let path = call.path(0).unwrap_or_default();
            match call.name.as_str() {
                "fsync" | "fdatasync" if path == folder.path().as_os_str().as_bytes() => {
                    steps.push("name is stable")
                }
                "fsync" | "fdatasync" => steps.push("stable"),
                "rename" | "renameat" | "renameat2" | "link" | "linkat" => steps.push("named"),
                "openat"
                    if call.args[2].contains("O_CREAT")
                        && plain(&call.args[1]).ends_with(b"out") =>
                {
                    steps.push("named while it is empty");
                }
                _ => {}
            }
        }
        steps.dedup();
        assert_eq!(steps, ["stable", "named", "name is stable"], "{way:?}");
    }
}
