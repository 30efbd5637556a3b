//! The subcommands that change or measure snapshots, many at once too.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{ours, qemu_img, said, Said};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// A disk of 1 MiB with 64 KiB written before each snapshot, in the same place.
fn folder() -> Option<tempfile::TempDir> {
    qemu_img("snapshots at once")?;
    let folder = tempfile::tempdir().unwrap();
    let script = "
        qemu-img create -q -f qcow2 i.qcow2 1M
        for s in auto-1 auto-2 manual auto-3; do
            qemu-io -c 'write -P 7 0 64k' i.qcow2 && qemu-img snapshot -c $s i.qcow2
        done
        qemu-io -c 'write -P 8 0 64k' i.qcow2";
    let made = said(
        Command::new("sh")
            .args(["-ec", script])
            .current_dir(folder.path()),
    );
    assert_eq!(made.code, Some(0), "{made:?}");
    Some(folder)
}

fn names(folder: &Path) -> String {
    let list = ours(folder, &["list", "--output=json", "i.qcow2"]);
    assert_eq!(list.code, Some(0), "{list:?}");
    let named = list
        .out
        .lines()
        .filter_map(|l| l.trim().strip_prefix("\"name\": \""));
    let names: Vec<&str> = named.filter_map(|l| l.split('"').next()).collect();
    names.join(" ")
}

/// It worked, and a script sees nothing of it.
fn quietly(folder: &Path, args: &[&str]) {
    let got = ours(folder, args);
    assert_eq!(
        (got.code, got.out.as_str(), got.err.as_str()),
        (Some(0), "", ""),
        "{args:?}"
    );
    let check = said(
        Command::new("qemu-img")
            .args(["check", "-q", "i.qcow2"])
            .current_dir(folder),
    );
    assert_eq!(check.code, Some(0), "{args:?}: {check:?}");
}

fn fails(got: &Said, words: &str) {
    let named = got.err.starts_with("qcow2-snapshot: ") && got.err.contains(words);
    assert!(got.code == Some(1) && named, "{words}: {got:?}");
}

#[test]
fn the_ones_that_are_meant_go() {
    for (args, left) in [
        (&["manual"][..], "auto-1 auto-2 auto-3"),
        (&["1", "auto-3", "1"], "auto-2 manual"),
        (&["auto-*"], "manual"),
        (&["--keep-last", "1", "auto-*"], "manual auto-3"),
        (&["--keep-last=3"], "auto-2 manual auto-3"),
        (&["--keep-last=9"], "auto-1 auto-2 manual auto-3"),
        (&["--older-than", "1d"], "auto-1 auto-2 manual auto-3"),
        (&["--all"], ""),
        (
            &["--all", "--older-than=30d"],
            "auto-1 auto-2 manual auto-3",
        ),
        (&["--id", "1", "2"], "manual auto-3"),
        (&["--name", "manual", "auto-?"], ""),
    ] {
        let Some(folder) = folder() else { return };
        quietly(folder.path(), &[&["delete", "i.qcow2"], args].concat());
        assert_eq!(names(folder.path()), left, "{args:?}");
    }
}

#[test]
fn a_slip_deletes_nothing() {
    let Some(folder) = folder() else { return };
    let before = std::fs::read(folder.path().join("i.qcow2")).unwrap();
    for (args, words) in [
        (&["1", "gone"][..], "No snapshot is 'gone'"),
        (&["none-*"], "No snapshot is 'none-*'"),
        (&["--id", "manual"], "No snapshot is 'manual'"),
        (&["--name", "1"], "No snapshot is '1'"),
        (&[], "Which snapshots?"),
        (&["--all", "1"], "cannot be used"),
        (&["--older-than", "30"], "an age is"),
    ] {
        fails(
            &ours(folder.path(), &[&["delete", "i.qcow2"], args].concat()),
            words,
        );
    }
    let dry = ours(folder.path(), &["delete", "--dry-run", "i.qcow2", "auto-*"]);
    assert_eq!((dry.code, dry.err.as_str()), (Some(0), ""));
    let wanted =
        "1       auto-1\n2       auto-2\n4       auto-3\nWould delete 3 snapshots and free ";
    assert!(dry.out.starts_with(wanted), "{dry:?}");
    assert!(std::fs::read(folder.path().join("i.qcow2")).unwrap() == before);
}

#[test]
fn du_says_what_delete_frees() {
    let Some(folder) = folder() else { return };
    let got = ours(folder.path(), &["du", "i.qcow2"]);
    // Each has an L1 table, an L2 table and a cluster of its own.
    let wanted = "\
ID      NAME                 REFERENCED  EXCLUSIVE  ALLOCATED
1       auto-1                  192 KiB    192 KiB    192 KiB
2       auto-2                  192 KiB    192 KiB    192 KiB
3       manual                  192 KiB    192 KiB    192 KiB
4       auto-3                  192 KiB    192 KiB    192 KiB
-       the disk                192 KiB    192 KiB    192 KiB
Deleting these 4 would free 768 KiB
";
    let numbers = |text: &str| -> String {
        // What the host has really allocated is its own business.
        let lines = text
            .lines()
            .map(|l| l.get(..54).unwrap_or(l).to_owned() + "\n");
        lines.collect()
    };
    assert_eq!(
        (got.code, numbers(&got.out)),
        (Some(0), numbers(wanted)),
        "{got:?}"
    );
    let json = ours(
        folder.path(),
        &["du", "--output=json", "i.qcow2", "auto-1", "manual"],
    );
    assert!(json.out.contains("\"total\": { \"referenced\": 393216, \"exclusive\": 393216, \"tables\": 262144, \"vm-state\": 0"));
    assert!(!json.out.contains("\"disk\""));
    let gone = ours(
        folder.path(),
        &["delete", "--output=json", "i.qcow2", "auto-1", "manual"],
    );
    let wanted = "\
{ \"deleted\": [
    { \"id\": \"1\", \"name\": \"auto-1\" },
    { \"id\": \"3\", \"name\": \"manual\" }],
  \"dry-run\": false, \"freed\": 393216 }
";
    assert_eq!((gone.code, gone.out.as_str()), (Some(0), wanted));
}

#[test]
fn revert_can_save_what_is_there_first() {
    let Some(folder) = folder() else { return };
    let first = |byte: u8| {
        let read = format!("read -P {byte} 0 64k");
        let got = said(
            Command::new("qemu-io")
                .args(["-c", &read, "i.qcow2"])
                .current_dir(folder.path()),
        );
        got.code == Some(0) && !got.out.contains("failed")
    };
    assert!(first(8) && !first(7));
    // A new snapshot of the same name is not the one that is meant.
    quietly(
        folder.path(),
        &["revert", "--save-as", "manual", "i.qcow2", "manual"],
    );
    assert!(first(7));
    assert_eq!(names(folder.path()), "auto-1 auto-2 manual auto-3 manual");
    quietly(folder.path(), &["revert", "i.qcow2", "5"]);
    assert!(first(8));
    let got = ours(
        folder.path(),
        &["revert", "--save-as", "x", "i.qcow2", "gone"],
    );
    fails(
        &got,
        "Could not apply snapshot 'gone': Failed to load snapshot",
    );
    assert_eq!(names(folder.path()), "auto-1 auto-2 manual auto-3 manual");
}

#[test]
fn names_change_and_the_plain_words_do_what_the_options_do() {
    let Some(folder) = folder() else { return };
    quietly(folder.path(), &["rename", "i.qcow2", "manual", "auto-1"]);
    quietly(folder.path(), &["rename", "i.qcow2", "4", ""]);
    assert_eq!(names(folder.path()), "auto-1 auto-2 auto-1 ");
    fails(
        &ours(folder.path(), &["rename", "i.qcow2", "gone", "x"]),
        "Could not rename snapshot 'gone': Can't find the snapshot 'gone'",
    );
    let long = "x".repeat(256);
    fails(
        &ours(folder.path(), &["rename", "i.qcow2", "1", &long]),
        "256 bytes",
    );
    quietly(folder.path(), &["create", "i.qcow2", "now"]);
    let (word, option) = (
        ours(folder.path(), &["list", "i.qcow2"]),
        ours(folder.path(), &["-l", "i.qcow2"]),
    );
    assert!(word.out == option.out && word.out.contains("now") && word.code == Some(0));
}

/// What a subcommand prints with --output=json: ID and name of what it was about.
#[test]
fn json_names_the_snapshot_that_was_made_or_changed() {
    let Some(folder) = folder() else { return };
    for (args, wanted) in [
        (
            &["create", "--output=json", "i.qcow2", "now"][..],
            r#"{ "created": { "id": "5", "name": "now" } }"#,
        ),
        (
            &["rename", "--output=json", "i.qcow2", "now", "a \"b\""],
            r#"{ "renamed": { "id": "5", "name": "a \"b\"" } }"#,
        ),
        (
            &["revert", "--output=json", "i.qcow2", "auto-2"],
            r#"{ "reverted-to": { "id": "2", "name": "auto-2" } }"#,
        ),
        (
            &["revert", "--output=json", "--save-as=slip", "i.qcow2", "3"],
            "{ \"reverted-to\": { \"id\": \"3\", \"name\": \"manual\" },\n  \"saved\": { \"id\": \"6\", \"name\": \"slip\" } }",
        ),
    ] {
        let got = ours(folder.path(), args);
        let wanted = format!("{wanted}\n");
        assert_eq!(
            (got.code, got.out.as_str(), got.err.as_str()),
            (Some(0), wanted.as_str(), ""),
            "{args:?}"
        );
    }
    // Where it failed, and as an option of the old form, there is nothing to print.
    fails(
        &ours(
            folder.path(),
            &["rename", "--output=json", "i.qcow2", "gone", "x"],
        ),
        "Could not rename snapshot 'gone'",
    );
    quietly(folder.path(), &["-c", "old", "--output=json", "i.qcow2"]);
}

/// What a terminal shows of `qcow2-snapshot REST`, which a shell reads; `typed` is typed there.
fn on_a_terminal(folder: &Path, rest: &str, typed: &str) -> (Option<i32>, String) {
    let shell = format!("{} {rest}", common::tool().display());
    let mut child = Command::new("script")
        .args(["-qec", &shell, "/dev/null"])
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut keys = child.stdin.take().unwrap();
    keys.write_all(typed.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    drop(keys);
    let shown = String::from_utf8_lossy(&out.stdout).replace("\r\n", "\n");
    (out.status.code(), shown)
}

#[test]
fn a_terminal_is_asked_before_more_than_one_goes() {
    if !common::have("script", "the question of delete on a terminal") {
        return;
    }
    let question = "Delete these 2 snapshots, which frees 384 KiB? [y/N] ";
    for (rest, typed, code, asked, left) in [
        (
            "delete i.qcow2 auto-1 auto-2",
            "y\n",
            0,
            true,
            "manual auto-3",
        ),
        (
            "delete i.qcow2 auto-1 auto-2",
            "yes\n",
            0,
            true,
            "manual auto-3",
        ),
        ("delete i.qcow2 auto-1 auto-2", "\n", 1, true, ALL),
        ("delete i.qcow2 auto-1 auto-2", "n\n", 1, true, ALL),
        // Ctrl-D, and a word that is no yes.
        ("delete i.qcow2 auto-1 auto-2", "\u{4}", 1, true, ALL),
        ("delete i.qcow2 auto-1 auto-2", "yesterday\n", 1, true, ALL),
        (
            "delete --yes i.qcow2 auto-1 auto-2",
            "",
            0,
            false,
            "manual auto-3",
        ),
        (
            "delete i.qcow2 auto-1",
            "",
            0,
            false,
            "auto-2 manual auto-3",
        ),
        ("delete --dry-run i.qcow2 auto-1 auto-2", "", 0, false, ALL),
        // Nobody could answer, or could read the question.
        (
            "delete i.qcow2 auto-1 auto-2 </dev/null",
            "",
            0,
            false,
            "manual auto-3",
        ),
        (
            "delete i.qcow2 auto-1 auto-2 2>/dev/null",
            "",
            0,
            false,
            "manual auto-3",
        ),
    ] {
        let Some(folder) = folder() else { return };
        let (ended, shown) = on_a_terminal(folder.path(), rest, typed);
        assert_eq!(ended, Some(code), "{rest}: {shown}");
        assert_eq!(shown.contains(question), asked, "{rest}: {shown}");
        assert_eq!(
            shown.contains("Nothing was deleted"),
            code == 1,
            "{rest}: {shown}"
        );
        assert_eq!(names(folder.path()), left, "{rest}");
    }
}

const ALL: &str = "auto-1 auto-2 manual auto-3";
