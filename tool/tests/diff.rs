//! `diff` shows what changed, in words, as JSON, and says what is wrong.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{ours, qemu_img, said};
use std::process::Command;

/// 1 MiB: "one" has data at 64 KiB; since then zeros, compressed data, and the same data again.
fn folder() -> Option<tempfile::TempDir> {
    qemu_img("diff")?;
    let folder = tempfile::tempdir().unwrap();
    let script = "
        qemu-img create -q -f qcow2 i.qcow2 1M && qemu-io -c 'write -P 1 64k 192k' i.qcow2 &&
        qemu-img snapshot -c one i.qcow2 && qemu-img resize -q i.qcow2 2M &&
        qemu-io -c 'write -P 1 64k 64k' -c 'write -z 128k 64k' -c 'write -c -P 2 320k 64k' \
            -c 'write -P 3 1536k 512' i.qcow2 && qemu-img snapshot -c two i.qcow2";
    let made = said(
        Command::new("sh")
            .args(["-ec", script])
            .current_dir(folder.path()),
    );
    assert_eq!(made.code, Some(0), "{made:?}");
    Some(folder)
}

const BY_TABLES: &str = "\
OFFSET                 LENGTH  WAS         IS
0x10000                64 KiB  data        data
0x20000                64 KiB  data        zeros
0x50000                64 KiB  unallocated compressed
0x100000              512 KiB  past end    unallocated
0x180000               64 KiB  past end    data
0x190000              448 KiB  past end    unallocated
1.19 MiB in 6 runs may have changed
";

#[test]
fn changes_are_shown_in_words_with_sizes_in_units() {
    let Some(folder) = folder() else { return };
    for args in [&["one"][..], &["one", "two"], &["1", "2"], &["-U", "one"]] {
        let words = [&["diff", "i.qcow2"], args].concat();
        let got = ours(folder.path(), &words);
        assert_eq!(got.err, "");
        assert_eq!((got.code, got.out.as_str()), (Some(0), BY_TABLES));
    }
    let exact = ours(folder.path(), &["diff", "--compare", "i.qcow2", "one"]);
    let without_the_first: Vec<&str> = BY_TABLES
        .lines()
        .filter(|l| !l.starts_with("0x10000 "))
        .collect();
    let wanted = without_the_first.join("\n") + "\n";
    let wanted = wanted.replace(
        "1.19 MiB in 6 runs may have changed",
        "1.12 MiB in 5 runs changed",
    );
    assert_eq!((exact.code, exact.out.as_str()), (Some(0), wanted.as_str()));
    let none = ours(folder.path(), &["diff", "i.qcow2", "two"]);
    assert_eq!((none.code, none.out.as_str()), (Some(0), "No changes\n"));
}

#[test]
fn json_has_the_fields_of_qemu_img_map_and_what_was_there() {
    let Some(folder) = folder() else { return };
    let got = ours(
        folder.path(),
        &["diff", "--output=json", "i.qcow2", "two", "one"],
    );
    let none = "\"present\": false, \"zero\": false, \"data\": false, \"compressed\": false";
    let data = "\"present\": true, \"zero\": false, \"data\": true, \"compressed\": false";
    let zero = "\"present\": true, \"zero\": true, \"data\": false, \"compressed\": false";
    let packed = "\"present\": true, \"zero\": false, \"data\": true, \"compressed\": true";
    let entry = |start: u64, is: &str, was: &str| {
        format!(
            "{{ \"start\": {start}, \"length\": 65536, \"depth\": 0, {is}, \"was\": {{ {was}, \"beyond\": false }} }}"
        )
    };
    let entries = [
        entry(65536, data, data),
        entry(131_072, data, zero),
        entry(327_680, none, packed),
    ];
    assert_eq!(got.out, format!("[{}]\n", entries.join(",\n")));
    assert_eq!((got.code, got.err.as_str()), (Some(0), ""));
    let got = ours(folder.path(), &["diff", "--output=json", "i.qcow2", "one"]);
    assert_eq!(got.out.matches("\"beyond\": true").count(), 3);
    let got = ours(
        folder.path(),
        &["diff", "--output=json", "i.qcow2", "one", "one"],
    );
    assert_eq!((got.code, got.out.as_str()), (Some(0), "[]\n"));
}

#[test]
fn what_is_wrong_is_said_and_the_exit_status_is_one() {
    let Some(folder) = folder() else { return };
    for (args, words) in [
        (
            &["i.qcow2", "three"][..],
            "Could not compare the snapshots: Can't find the snapshot 'three'",
        ),
        (
            &["i.qcow2", "one", "three"],
            "Can't find the snapshot 'three'",
        ),
        (
            &["gone.qcow2", "one"],
            "Could not open 'gone.qcow2': No such file or directory",
        ),
        (&["i.qcow2"], "required"),
    ] {
        let got = ours(folder.path(), &[&["diff"], args].concat());
        assert_eq!((got.code, got.out.as_str()), (Some(1), ""), "{args:?}");
        assert!(
            got.err.starts_with("qcow2-snapshot: ") && got.err.contains(words),
            "{got:?}"
        );
    }
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let Some(folder) = folder() else { return };
    let tool = common::tool().display();
    let script = format!("{tool} diff i.qcow2 one | true; {tool} diff i.qcow2 one > /dev/full");
    let got = said(
        Command::new("sh")
            .args(["-c", &script])
            .current_dir(folder.path()),
    );
    let text = "qcow2-snapshot: Could not write the output: No space left on device\n";
    assert_eq!((got.code, got.err.as_str()), (Some(1), text));
}
