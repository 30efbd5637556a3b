//! From below: what the kernel sees of the tool is what the crash tests assume of the library.
//!
//! Crash tests cut the log of the recorder (`io::trace`), which is memory. Here strace writes down every
//! call of the real tool that touches a file; what it did to the image is made into such a log, and
//! compared with the recorder's for the same verb: the same writes, lengths, holes and barriers in the same
//! order. Nothing else may touch the image (no mapping, no second way to write), nor any other file.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "../../tests/reference/ops.rs"]
mod ops;
#[macro_use]
#[path = "../../tests/reference/pass_on.rs"]
mod pass_on;
use common::{cases, prepare, tool};
use ops::{name, new_snapshot, unpacked};
use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::trace::{Event, TraceStorage};
use qcow2_snapshot::io::Storage;
use qcow2_snapshot::{Fix, Image, OpenFlags, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
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
            // The disk may begin; nothing is promised.
            ("sync_file_range", true) if call.args[3] == "SYNC_FILE_RANGE_WRITE" => {}
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
fn traced(folder: &Path, program: &Path, args: &[OsString], verb: &str) -> Option<Vec<Call>> {
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
        .env("BELOW_VERB", verb)
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

/// The recorder, and the files beside the image.
struct Recorder {
    memory: TraceStorage,
    folder: PathBuf,
}

impl Storage for Recorder {
    pass_on!(length read write truncate discard barrier close);
    fn open_named(&mut self, name: &[u8], _: &[u8]) -> Option<std::io::Result<Box<dyn Storage>>> {
        let bytes = std::fs::read(self.folder.join(OsStr::from_bytes(name)));
        Some(bytes.map(|bytes| Box::new(MemoryStorage::new(bytes)) as Box<dyn Storage>))
    }
}

/// A verb, in the words of `ops`; and those that `ops` does not have.
struct Verb<'a> {
    words: Vec<&'a str>,
    /// When the tool has made its snapshot.
    date: (u32, u32),
}

impl Verb<'_> {
    fn flags(&self) -> OpenFlags {
        match self.words[0] {
            "check" => OpenFlags::RDWR | OpenFlags::CHECK,
            _ => OpenFlags::RDWR,
        }
    }

    fn perform(&self, image: &mut Image) -> Result<()> {
        let list = image.snapshot_list().map(<[_]>::to_vec).unwrap_or_default();
        match self.words[..] {
            ["create", text, _, _] => {
                // QEMU's buffer, and so qemu-img's, has 255 bytes.
                let mut new = new_snapshot(&[text, "0", "0"]);
                new.name.truncate(255);
                (new.date_sec, new.date_nsec) = self.date;
                image.snapshot_create(&new).map(drop)
            }
            ["create", ..] => image
                .snapshot_create(&new_snapshot(&self.words[1..]))
                .map(drop),
            ["goto", text] => image.snapshot_goto(&name(text)),
            ["delete", text] => {
                let cut = |text: &[u8], most: usize| text[..text.len().min(most)].to_vec();
                match list.iter().find(|s| cut(&s.name, 255) == name(text)) {
                    Some(s) => image.snapshot_delete(Some(&cut(&s.id, 127)), Some(&name(text))),
                    None => image.snapshot_delete(None, Some(&name(text))),
                }
            }
            ["write-snapshots"] => image.write_snapshots(),
            ["rename"] => image.snapshot_rename(&list[0].id, b"another name"),
            ["delete-all"] => {
                image.snapshot_delete_many(&list.iter().map(|s| &s.id[..]).collect::<Vec<_>>())
            }
            ["check"] => image.check(Fix::LEAKS | Fix::ERRORS, &mut |_| ()).map(drop),
            ["flatten"] => image.flatten(),
            _ => panic!("an unknown verb: {:?}", self.words),
        }
    }

    /// The program that does it to `image.qcow2`: the tool, or for what the tool cannot ask for, this one.
    fn program(&self, image: &mut Image) -> (PathBuf, Vec<OsString>) {
        let text = |text: &str| OsString::from_vec(name(text));
        let file = || OsString::from("image.qcow2");
        let args = match self.words[..] {
            ["create", text_, _, _] => vec!["-c".into(), text(text_), file()],
            ["goto", text_] => vec!["-a".into(), text(text_), file()],
            ["delete", text_] => vec!["-d".into(), text(text_), file()],
            ["rename"] => {
                let list = image.snapshot_list().unwrap();
                let id = OsString::from_vec(list[0].id.clone());
                vec![
                    "rename".into(),
                    "--".into(),
                    file(),
                    id,
                    "another name".into(),
                ]
            }
            ["delete-all"] => vec!["delete".into(), file(), "--all".into()],
            ["check"] => vec!["check".into(), "-r".into(), "all".into(), file()],
            ["flatten"] => vec!["flatten".into(), file()],
            _ => {
                let args = ["--exact", "one_verb", "--ignored", "--test-threads=1"];
                return (
                    std::env::current_exe().unwrap(),
                    args.map(OsString::from).into(),
                );
            }
        };
        (tool().to_owned(), args)
    }
}

/// What is traced where the tool has no words for it: VM state, `write-snapshots`.
#[test]
#[ignore = "performs the verb in BELOW_VERB on image.qcow2, for the others"]
fn one_verb() {
    let words = std::env::var("BELOW_VERB").unwrap_or_default();
    let verb = Verb {
        words: words.split(' ').collect(),
        date: (0, 0),
    };
    if !words.is_empty() {
        let mut image = Image::open(Path::new("image.qcow2"), verb.flags()).unwrap();
        verb.perform(&mut image).unwrap();
        image.close().unwrap();
    }
}

/// What was compared.
#[derive(Default)]
struct Compared {
    verbs: BTreeMap<String, u64>,
    writes: usize,
    barriers: usize,
    refused: u64,
}

impl Compared {
    /// One verb on an image in its folder. What is there afterwards; nothing where strace cannot trace.
    fn verb(
        &mut self,
        case: &str,
        folder: &Path,
        before: &[u8],
        words: Vec<&str>,
    ) -> Option<Vec<u8>> {
        let image = folder.join("image.qcow2");
        // Without holes: the recorder knows of none.
        std::fs::write(&image, before).unwrap();
        let mut verb = Verb {
            words,
            date: (0, 0),
        };
        let recorder = |bytes: &[u8]| Recorder {
            memory: TraceStorage::new(bytes.to_vec()),
            folder: folder.to_owned(),
        };
        let opened = |bytes: &[u8], flags| Image::open_storage(Box::new(recorder(bytes)), flags);
        let Ok(mut looked_at) = opened(before, verb.flags()) else {
            panic!("{case}: not opened for {:?}", verb.words);
        };
        let (program, args) = verb.program(&mut looked_at);
        let calls = traced(folder, &program, &args, &verb.words.join(" "))?;
        let after = std::fs::read(&image).unwrap();
        let (seen, wrong) = log_of(&calls, &image);
        assert!(wrong.is_empty(), "{case}, {:?}: {wrong:#?}", verb.words);

        let last = opened(&after, OpenFlags::default()).ok();
        let last = last.and_then(|mut i| i.snapshot_list().ok().and_then(|l| l.last().cloned()));
        verb.date = last.map_or((0, 0), |l| (l.date_sec, l.date_nsec));
        let recorder = recorder(before);
        let trace = recorder.memory.trace();
        let mut image = Image::open_storage(Box::new(recorder), verb.flags()).unwrap();
        let done = verb.perform(&mut image).is_ok();
        let log = as_a_file(trace.events());
        assert!(
            seen == log,
            "{case}, {:?}\n  strace: {}\n  recorder: {}",
            verb.words,
            told(&seen),
            told(&log)
        );
        if !done {
            assert!(
                seen.is_empty(),
                "{case}, {:?}: refused, and it wrote {}",
                verb.words,
                told(&seen)
            );
            self.refused += 1;
            return Some(after);
        }
        let kind = match verb.words[..] {
            ["create", _, _, _] => "create",
            ["create", ..] => "create with VM state, a clock or icount",
            _ => verb.words[0],
        };
        *self.verbs.entry(kind.into()).or_default() += 1;
        self.writes += seen.iter().filter(|e| **e != Event::Barrier).count();
        self.barriers += seen.iter().filter(|e| **e == Event::Barrier).count();
        Some(after)
    }
}

#[test]
fn the_kernel_sees_the_writes_and_barriers_of_the_recorder_and_nothing_else() {
    let (mut compared, mut left_out, mut not_opened) = (Compared::default(), vec![], vec![]);
    for (case, path) in cases() {
        let Ok(ops) = std::fs::read_to_string(path.join("ops")) else {
            continue;
        };
        let folder = tempfile::tempdir().unwrap();
        prepare(&path, folder.path());
        let mut before = unpacked(&path.join("before.qcow2.gz"));
        // A backing file in qcow2 has another length inside; the recorder's named files are raw.
        if before.len() as u64 > MOST || case.starts_with("backing-qcow2") {
            left_out.push(case);
            continue;
        }
        let opens = |flags| {
            let storage = Box::new(MemoryStorage::new(before.clone()));
            Image::open_storage(storage, OpenFlags::RDWR | flags).is_ok()
        };
        let sound = opens(OpenFlags::default());
        if !sound && !opens(OpenFlags::CHECK) {
            not_opened.push(case);
            continue;
        }
        for line in ops.lines().filter(|_| sound) {
            let mut words: Vec<&str> = line.split(' ').collect();
            let (refused, later) = (words[0] == "fails", words[0] == "later");
            words.drain(..if refused || later { 2 } else { 0 });
            if matches!(words[0], "list" | "says" | "open-ro" | "open-rw") {
                continue;
            }
            let n = compared.refused;
            let Some(after) = compared.verb(&case, folder.path(), &before, words) else {
                return;
            };
            assert!(later || (compared.refused > n) == refused, "{case}, {line}");
            before = after;
        }
        // What `ops` does not have, on what its verbs have left.
        let mut more = vec!["check"];
        if sound && before[60..64] != [0; 4] {
            more.push("rename");
            // Of snapshots with one ID the tool deletes none.
            more.extend((case != "ids-wrap").then_some("delete-all"));
        }
        if sound && before[8..16] != [0; 8] {
            more.push("flatten");
        }
        for verb in more {
            compared.verb(&case, folder.path(), &before, vec![verb]);
        }
    }
    println!(
        "SKIPPED: not traced, too large or with a backing file in qcow2: {}; not opened: {}",
        left_out.join(", "),
        not_opened.join(", ")
    );
    println!(
        "strace of verbs on the reference images ({:?}): {} writes, lengths and holes, {} barriers, as recorded; {} refused without any",
        compared.verbs, compared.writes, compared.barriers, compared.refused
    );
    assert!(compared.verbs.len() == 9 && compared.refused > 20);
}

/// The comparison sees what it is there to see.
#[test]
fn a_program_that_writes_in_another_way_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image.qcow2");
    std::fs::write(&image, [0; 4096]).unwrap();
    let shell = "printf x >> image.qcow2; printf y > other; mv other another";
    let args = [OsString::from("-c"), OsString::from(shell)];
    let Some(calls) = traced(folder.path(), Path::new("/bin/sh"), &args, "") else {
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
        let Some(calls) = traced(folder.path(), tool(), &args, "") else {
            return;
        };
        assert!(folder.path().join("out").exists(), "{way:?}");
        // What a power cut may still take: a file's contents, or a name in a folder.
        let here = folder.path().to_owned();
        let (mut unstable, mut steps) = (BTreeSet::new(), vec![]);
        for call in calls.iter().filter(|c| c.result >= 0) {
            let of = |arg| call.path(arg).map(|p| PathBuf::from(OsString::from_vec(p)));
            let named = |arg: usize| here.join(OsString::from_vec(plain(&call.args[arg])));
            let made = match call.name.as_str() {
                "fsync" | "fdatasync" => {
                    unstable.remove(&of(0).unwrap());
                    continue;
                }
                "rename" => Some(named(1)),
                "renameat" | "renameat2" | "linkat" => Some(named(3)),
                "mkdir" => Some(named(0)),
                "mkdirat" => Some(named(1)),
                "openat" if call.args[2].contains("O_CREAT") => Some(named(1)),
                "copy_file_range" => {
                    unstable.extend(of(2));
                    continue;
                }
                "write" | "pwrite64" | "pwritev" | "writev" | "ftruncate" | "fallocate"
                | "sendfile" | "ioctl" => {
                    unstable.extend(of(0).filter(|p| p.starts_with(&here)));
                    continue;
                }
                _ => continue,
            };
            let Some(made) = made.filter(|p| p.starts_with(&here)) else {
                continue;
            };
            let parent = made.parent().unwrap().to_owned();
            if made == here.join("out") {
                // Its other name, which goes, is in this folder.
                unstable.remove(&here);
                steps.push(format!("named, {unstable:?} unstable"));
            } else if call.name == "openat" || call.name.starts_with("mkdir") {
                unstable.insert(made);
            }
            unstable.insert(parent);
        }
        assert_eq!(steps, ["named, {} unstable"], "{way:?}");
        assert!(unstable.is_empty(), "{way:?}: {unstable:?}");
    }
}
