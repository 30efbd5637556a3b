//! Ctrl-C at every request of a verb, and the bar of a verb that takes long. `signals/disk.c`
//! makes the disk on which it happens, so that nothing here depends on how fast anything is.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{image, ours, qemu_img, Said};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

/// The disk, for LD_PRELOAD; says so loudly where it cannot be made.
fn disk(folder: &Path, what: &str) -> Option<PathBuf> {
    let library = folder.join("disk.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/signals/disk.c");
    let made = Command::new("cc")
        .args(["-Wall", "-Werror", "-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .arg("-ldl")
        .status();
    match made {
        Ok(status) => {
            assert!(status.success(), "disk.c does not compile");
            Some(library)
        }
        Err(_) => {
            println!("SKIPPED: no cc here: {what} was not tested");
            None
        }
    }
}

/// `qcow2-snapshot ARGS image.qcow2` on that disk: how it ended, and what it said.
fn run(folder: &Path, disk: &Path, at: &str, what: &str, args: &[&str]) -> (ExitStatus, String) {
    // A shell's job in the background, which the tests may be, has them ignored.
    let mut command = Command::new("env");
    command.arg("--default-signal=INT,TERM,HUP");
    command.arg(format!("LD_PRELOAD={}", disk.display()));
    command.args([format!("AT={at}"), format!("DO={what}")]);
    command.arg(common::tool()).args(args).arg("image.qcow2");
    command.current_dir(folder);
    let output = command.output().unwrap();
    let status = output.status;
    (status, Said::from(output).err)
}

fn bytes(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("image.qcow2")).unwrap()
}

fn listed(folder: &Path) -> String {
    ours(folder, &["-l", "image.qcow2"]).out
}

#[test]
fn ctrl_c_at_any_request_leaves_the_old_state_or_the_whole_new_one() {
    let folder = image("v3-4k", "before");
    let folder = folder.path();
    let Some(disk) = disk(folder, "Ctrl-C during a verb") else {
        return;
    };
    let qemu = qemu_img("whether an interrupted image is sound");
    let (before, list) = (bytes(folder), listed(folder));
    assert_eq!(ours(folder, &["-d", "two", "image.qcow2"]).code, Some(0));
    let (after, new_list) = (bytes(folder), listed(folder));

    let mut ends = [0; 4];
    for kind in ["read", "write", "sync"] {
        for nth in 1.. {
            std::fs::write(folder.join("image.qcow2"), &before).unwrap();
            let at = format!("{kind} {nth}");
            let (killed, _) = run(folder, &disk, &at, "signal 9 1", &["-d", "two"]);
            if killed.success() {
                break; // the verb makes no such request any more
            }
            assert_eq!(killed.signal(), Some(libc::SIGKILL), "{at}");
            let left = listed(folder);
            assert!(left == list || left == new_list, "{at}: {left}");

            std::fs::write(folder.join("image.qcow2"), &before).unwrap();
            let (status, err) = run(folder, &disk, &at, "signal 2 1", &["-d", "two"]);
            let now = bytes(folder);
            let told = format!("{at}: {status}, {err}");
            match (status.signal(), status.code()) {
                // Before the verb nothing is there to be broken off with care.
                (Some(libc::SIGINT), _) => {
                    assert_eq!(kind, "read", "{told}");
                    assert!(now == before, "{told}");
                    ends[0] += 1;
                }
                (_, Some(130)) if err.contains("before anything was written") => {
                    let line = "qcow2-snapshot: Could not delete snapshot 'two': Cancelled before anything was written\n";
                    assert_eq!(err, line);
                    assert!(now == before, "{told}");
                    ends[1] += 1;
                }
                (_, Some(130)) => {
                    assert!(err.starts_with("qcow2-snapshot: Could not delete snapshot 'two': "));
                    assert!(err.contains("qcow2-snapshot check -r leaks"), "{told}");
                    assert_eq!(listed(folder), list, "{told}");
                    if let Some(qemu) = &qemu {
                        let mut check = Command::new(qemu);
                        check.args(["check", "-q", "-r", "leaks", "image.qcow2"]);
                        check.stdout(Stdio::null());
                        let checked = check.current_dir(folder).status().unwrap();
                        assert!(checked.success(), "{told}: {checked}");
                    }
                    let again = ours(folder, &["-d", "two", "image.qcow2"]);
                    assert_eq!(again.code, Some(0), "{told}: {again:?}");
                    ends[2] += 1;
                }
                (_, Some(0)) => {
                    assert_eq!(err, "", "{told}");
                    assert!(now == after, "{told}");
                    ends[3] += 1;
                }
                _ => panic!("{told}"),
            }
        }
    }
    assert!(ends.iter().all(|n| *n > 0), "{ends:?}");
}

#[test]
fn ctrl_c_in_a_flatten_leaves_every_snapshot_as_it_was_and_another_call_ends_it() {
    if qemu_img("Ctrl-C during a flatten").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let sh = |script: &str| {
        let mut sh = Command::new("sh");
        assert!(
            sh.args(["-ec", script])
                .current_dir(folder)
                .status()
                .unwrap()
                .success(),
            "{script}"
        );
    };
    sh("qemu-img create -q -f raw base 1M && qemu-io -f raw -c 'write -P 1 0 1M' base >/dev/null &&
        qemu-img create -q -f qcow2 -b base -F raw before.qcow2 && qemu-img snapshot -c one before.qcow2 &&
        qemu-io -c 'write -P 2 64k 64k' before.qcow2 >/dev/null && qemu-img convert -O raw before.qcow2 disk &&
        qemu-img convert -l one -O raw before.qcow2 one");
    let Some(disk) = disk(folder, "Ctrl-C during a flatten") else {
        return;
    };
    let same = "qemu-img compare -q -F raw image.qcow2 disk && qemu-img convert -l one -O raw image.qcow2 now && cmp now one";
    let mut broken_off = 0;
    for kind in ["read", "write", "sync"] {
        for nth in 1.. {
            let mut ended = true;
            for signal in [libc::SIGKILL, libc::SIGINT] {
                sh("rm -f image.qcow2; cp before.qcow2 image.qcow2");
                let at = format!("{kind} {nth}");
                let what = format!("signal {signal} 1");
                let (status, said) = run(folder, &disk, &at, &what, &["flatten"]);
                ended &= status.success();
                sh(same);
                if signal == libc::SIGINT && !status.success() {
                    // While the image is opened nobody watches yet.
                    if status.signal() != Some(libc::SIGINT) {
                        assert_eq!(status.code(), Some(130), "{at}: {said}");
                        assert!(said.contains("Cancelled"), "{at}: {said}");
                        broken_off += 1;
                    }
                    sh("qemu-img check -q image.qcow2");
                }
                assert_eq!(
                    ours(folder, &["flatten", "image.qcow2"]).code,
                    Some(0),
                    "{at}"
                );
                sh(&format!("mv base away; {same}; mv away base"));
            }
            if ended {
                break;
            }
        }
    }
    assert!(broken_off > 5, "{broken_off}");
}

#[test]
fn the_second_signal_ends_the_program_and_an_ignored_one_does_nothing() {
    let folder = image("v3-4k", "before");
    let folder = folder.path();
    let Some(disk) = disk(folder, "a second Ctrl-C, and an ignored one") else {
        return;
    };
    let list = listed(folder);
    let twice = run(folder, &disk, "sync 1", "signal 2 2", &["-d", "two"]);
    assert_eq!(twice.0.signal(), Some(libc::SIGINT), "{twice:?}");
    assert_eq!(twice.1, "");
    assert_eq!(listed(folder), list);

    let (status, err) = run(folder, &disk, "sync 1", "signal 15 1", &["-d", "two"]);
    assert_eq!(status.code(), Some(143), "{err}");
    let (status, err) = run(folder, &disk, "sync 1", "signal 1 1", &["-d", "two"]);
    assert_eq!(status.code(), Some(129), "{err}");

    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' INT; exec \"$0\" -d two image.qcow2"]);
    shell.arg(common::tool()).current_dir(folder);
    shell
        .env("LD_PRELOAD", &disk)
        .env("AT", "sync 1")
        .env("DO", "signal 2 2");
    let ignored = common::said(&mut shell);
    assert_eq!((ignored.code, ignored.err), (Some(0), String::new()));
    assert_ne!(listed(folder), list);
}

/// `qcow2-snapshot REST`, which a shell reads, on a terminal, with a disk that hangs before the verb takes
/// effect. `until`: see this before the disk goes on. Returns all that the terminal has shown.
fn on_a_terminal(folder: &Path, disk: &Path, rest: &str, until: Option<&str>) -> String {
    hanging_at("sync 1", folder, disk, rest, until)
}

/// The same with a disk that hangs at another request.
fn hanging_at(at: &str, folder: &Path, disk: &Path, rest: &str, until: Option<&str>) -> String {
    let go = folder.join("go");
    let _ = std::fs::remove_file(&go);
    // A new terminal has no size; and script(1) itself shall not hang.
    let preload = format!("LD_PRELOAD={}", disk.display());
    let tool = common::tool().display();
    let shell = format!("stty cols 100 rows 30; {preload} {tool} {rest}");
    let mut child = Command::new("script")
        .args(["-qec", &shell, "/dev/null"])
        .current_dir(folder)
        .env("AT", at)
        .env("DO", format!("wait {}", go.display()))
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let (mut shown, mut buffer) = (String::new(), [0; 4096]);
    if until.is_none() {
        // Longer than any bar would wait.
        std::thread::sleep(Duration::from_secs(2));
        std::fs::write(&go, "").unwrap();
    }
    loop {
        let n = out.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        shown += &String::from_utf8_lossy(&buffer[..n]);
        if until.is_some_and(|u| shown.contains(u)) {
            std::fs::write(&go, "").unwrap();
        }
    }
    assert!(child.wait().unwrap().success(), "{shown}");
    shown
}

#[test]
fn a_verb_that_takes_long_shows_a_bar_on_a_terminal_and_nowhere_else() {
    if Command::new("script").arg("--version").output().is_err() {
        println!("SKIPPED: no script(1) here: the progress bar was not tested");
        return;
    }
    let folder = image("v3-4k", "before");
    let folder = folder.path();
    let Some(disk) = disk(folder, "the progress bar") else {
        return;
    };
    let bar = "Creating the snapshot, writing";
    let shown = on_a_terminal(folder, &disk, "-c new image.qcow2", Some(bar));
    assert!(shown.contains('%'), "{shown}");
    let list = listed(folder);
    assert!(list.contains(" new "), "{list}");

    // Looking takes long as well, and is no change. (It hangs at the first read of a table, say.)
    let bar = "Looking at the snapshots, reading";
    let shown = hanging_at("read 8", folder, &disk, "du image.qcow2", Some(bar));
    assert!(shown.contains('%') && shown.contains("the disk"), "{shown}");
    let quiet = hanging_at("read 8", folder, &disk, "du -q image.qcow2", None);
    assert!(
        quiet.contains("the disk") && !quiet.contains('%'),
        "{quiet}"
    );

    for silent in ["-q -d new image.qcow2", "-d two image.qcow2 2>&1 | cat"] {
        assert_eq!(on_a_terminal(folder, &disk, silent, None), "", "{silent}");
    }
    assert!(!listed(folder).contains(" new "));
}
