//! The completion scripts, in the shells that are here.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{image, ours, said};
use std::path::Path;
use std::process::Command;

/// What a shell offers at the word with this index.
fn offers(shell: &str, folder: &Path, index: usize, words: &[&str]) -> Vec<String> {
    let script = folder.join(format!("script.{shell}"));
    let made = Command::new(common::tool())
        .args(["completions", shell])
        .output()
        .unwrap();
    std::fs::write(&script, made.stdout).unwrap();
    let harness = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/completions");
    let path = std::env::var("PATH").unwrap_or_default();
    let bin = common::tool().parent().unwrap().display();
    let got = Command::new(shell)
        .current_dir(folder)
        .env("PATH", format!("{bin}:{path}"))
        .env("HOME", folder)
        .arg(harness.join(shell))
        .arg(script)
        .arg(index.to_string())
        .arg("qcow2-snapshot")
        .args(words)
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&got.stderr);
    assert_eq!(err, "", "{shell}: {words:?}");
    let mut lines: Vec<String> = String::from_utf8(got.stdout)
        .unwrap()
        .lines()
        .filter(|l| !l.is_empty())
        .map(str::to_owned)
        .collect();
    lines.sort();
    lines
}

/// A folder with an image that has snapshots with names of all kinds.
fn folder() -> tempfile::TempDir {
    let folder = image("v3-4k", "before");
    for name in ["noon 1", "noon:2", "it's", "$HOME"] {
        let words = ["-c", name, "image.qcow2"];
        assert_eq!(ours(folder.path(), &words).code, Some(0));
    }
    let odd = folder.path().join("my image.qcow2");
    std::fs::copy(folder.path().join("image.qcow2"), odd).unwrap();
    folder
}

/// Calls, with the cursor in the last word, that are the same for all shells.
const CALLS: &[(&[&str], &[&str])] = &[
    (&["ex"], &["export"]),
    (&["comp"], &["completions"]),
    (&["completions", ""], &["bash", "fish", "zsh"]),
    (&["--fo"], &["--force-share", "--format"]),
    (&["export", "--q"], &["--quiet"]),
    (&["-l", "ima"], &["image.qcow2"]),
    (&["-qUl", "ima"], &["image.qcow2"]),
    (&["ima"], &["image.qcow2"]),
    (&["-c", "x", "ima"], &["image.qcow2"]),
    (&["-cx", "ima"], &["image.qcow2"]),
    (&["--", "ima"], &["image.qcow2"]),
    (&["-f", "q"], &["qcow2"]),
    (&["--output", "j"], &["json"]),
    (&["image.qcow2", "-a", "tw"], &["two"]),
    (&["image.qcow2", "--delete", "tw"], &["two"]),
    (&["image.qcow2", "-c", "tw"], &[]),
    (&["image.qcow2", "ima"], &[]),
    (&["export", "ima"], &["image.qcow2"]),
    (&["export", "-q", "image.qcow2", "tw"], &["two"]),
    (&["export", "image.qcow2", "two", "ima"], &["image.qcow2"]),
    (&["export", "no-image", "tw"], &[]),
    (&["diff", "image.qcow2", "tw"], &["two"]),
    (&["diff", "image.qcow2", "two", "on"], &["one"]),
    (&["diff", "--output", "j"], &["json"]),
    (&["flatten", "ima"], &["image.qcow2"]),
    (&["revert", "image.qcow2", "tw"], &["two"]),
    (&["revert", "--save-as", "x", "image.qcow2", "tw"], &["two"]),
    (&["rename", "image.qcow2", "two", "tw"], &[]),
    (&["delete", "image.qcow2", "tw"], &["two"]),
    (&["delete", "image.qcow2", "one", "two", "tw"], &["two"]),
    (&["du", "-U", "image.qcow2", "one", "tw"], &["two"]),
    (&["delete", "--keep"], &["--keep-last"]),
    (
        &["--image-opts", "file.filename=image.qcow2", "-d", "tw"],
        &["two"],
    ),
];

#[test]
fn every_shell_offers_what_may_stand_there() {
    for shell in ["bash", "zsh", "fish"] {
        if !common::have(shell, "its completion script") {
            continue;
        }
        let folder = folder();
        for (words, expected) in CALLS {
            // bash takes "=" for a word of its own; see below.
            if shell == "bash" && words.iter().any(|w| w.contains('=')) {
                continue;
            }
            let got = offers(shell, folder.path(), words.len(), words);
            assert_eq!(got, *expected, "{shell}: {words:?}");
        }
    }
}

#[test]
fn bash_gets_words_as_they_have_to_be_typed() {
    if !common::have("bash", "its completion script") {
        return;
    }
    let folder = folder();
    let calls: &[(usize, &[&str], &[&str])] = &[
        // Before the image, which stands behind the cursor.
        (2, &["-a", "tw", "image.qcow2"], &["two"]),
        (2, &["-a", "noon", "image.qcow2"], &["noon:2", "noon\\ 1"]),
        (2, &["-a", "noon\\ ", "image.qcow2"], &["noon\\ 1"]),
        (2, &["-a", "\"noon", "image.qcow2"], &["noon 1", "noon:2"]),
        (2, &["-a", "\"$", "image.qcow2"], &["\\$HOME"]),
        (2, &["-a", "'$", "image.qcow2"], &["$HOME"]),
        (2, &["-a", "it", "image.qcow2"], &["it\\'s"]),
        // ":" and "=" end a word in bash, and what stands before them stays.
        (3, &["-d", "noon", ":", "image.qcow2"], &[]),
        (3, &["-d", "noon", ":"], &[]),
        (4, &["image.qcow2", "-d", "noon", ":"], &["2"]),
        (5, &["image.qcow2", "-d", "noon", ":", "2"], &["2"]),
        (2, &["--output", "="], &["human", "json"]),
        (3, &["--output", "=", "h"], &["human"]),
        (4, &["image.qcow2", "--apply", "=", "tw"], &["two"]),
        (
            6,
            &[
                "--image-opts",
                "file.filename",
                "=",
                "image.qcow2",
                "-a",
                "tw",
            ],
            &["two"],
        ),
        // Files: bash puts the backslash there itself.
        (2, &["-l", "my\\ "], &["my image.qcow2"]),
        (3, &["export", "my\\ image.qcow2", "tw"], &["two"]),
        (3, &["export", "'my image.qcow2'", "tw"], &["two"]),
        (3, &["export", "~/image.qcow2", "tw"], &["two"]),
    ];
    for (index, words, expected) in calls {
        let got = offers("bash", folder.path(), *index, words);
        assert_eq!(got, *expected, "{words:?}");
    }
}

#[test]
fn a_call_for_completions_that_makes_no_sense_is_quiet() {
    let folder = folder();
    for words in [
        &["bash"][..],
        &["bash", "x"],
        &["bash", "7", "qcow2-snapshot"],
        &["bash", "0", "qcow2-snapshot"],
        &["bash", "99999999999999999999", "qcow2-snapshot", ""],
    ] {
        let got = ours(folder.path(), &[&["__complete"], words].concat());
        assert_eq!((got.code, got.out + &got.err), (Some(0), String::new()));
    }
    let words = ["__complete", "zsh", "1", "qcow2-snapshot", "--fo"];
    let got = said(Command::new(common::tool()).args(words));
    assert!(got
        .out
        .starts_with("words\n--format\\x09The image's format"));
}
