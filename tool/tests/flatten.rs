//! `flatten` lets go of the backing file with every snapshot, says how much that is, and what is wrong.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{ours, qemu_img, said};
use std::path::Path;
use std::process::Command;

fn sh(folder: &Path, script: &str) {
    let made = said(Command::new("sh").args(["-ec", script]).current_dir(folder));
    assert_eq!(made.code, Some(0), "{made:?}");
}

/// 1 MiB over a base full of ones; "one" and the disk differ in 64 KiB.
fn folder() -> Option<tempfile::TempDir> {
    qemu_img("flatten")?;
    let folder = tempfile::tempdir().unwrap();
    sh(
        folder.path(),
        "qemu-img create -q -f raw base 1M && qemu-io -f raw -c 'write -P 1 0 1M' base &&
         qemu-img create -q -f qcow2 -b base -F raw i.qcow2 &&
         qemu-img snapshot -c one i.qcow2 && qemu-io -c 'write -P 2 64k 64k' i.qcow2 &&
         qemu-img convert -O raw i.qcow2 disk && qemu-img convert -l one -O raw i.qcow2 one",
    );
    Some(folder)
}

#[test]
fn disk_and_snapshots_read_as_before_without_the_backing_file() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    let before = std::fs::read(folder.join("i.qcow2")).unwrap();
    let dry = ours(folder, &["flatten", "--dry-run", "i.qcow2"]);
    assert_eq!(
        (dry.code, dry.out.as_str(), dry.err.as_str()),
        (Some(0), "1 MiB to copy at most\n", "")
    );
    assert!(std::fs::read(folder.join("i.qcow2")).unwrap() == before);
    let got = ours(folder, &["flatten", "i.qcow2"]);
    assert_eq!(
        (got.code, got.out.as_str(), got.err.as_str()),
        (Some(0), "", "")
    );
    sh(
        folder,
        "rm base && qemu-img check -q i.qcow2 && qemu-img compare -q -F raw i.qcow2 disk &&
         qemu-img convert -l one -O raw i.qcow2 now && cmp now one",
    );
    let again = ours(folder, &["flatten", "--dry-run", "i.qcow2"]);
    assert_eq!(
        (again.code, again.out.as_str()),
        (Some(0), "0 B to copy at most\n")
    );
    assert_eq!(ours(folder, &["flatten", "i.qcow2"]).code, Some(0));
}

#[test]
fn what_is_wrong_is_said_and_nothing_is_written() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    std::fs::rename(folder.join("base"), folder.join("elsewhere")).unwrap();
    let before = std::fs::read(folder.join("i.qcow2")).unwrap();
    for args in [
        &["flatten", "i.qcow2"][..],
        &["flatten", "--dry-run", "i.qcow2"],
    ] {
        let got = ours(folder, args);
        assert_eq!((got.code, got.out.as_str()), (Some(1), ""));
        let wanted = "qcow2-snapshot: Could not flatten 'i.qcow2': Could not open backing file";
        assert!(
            got.err.starts_with(wanted) && got.err.contains("base"),
            "{}",
            got.err
        );
    }
    assert!(std::fs::read(folder.join("i.qcow2")).unwrap() == before);
    let got = ours(folder, &["flatten", "missing.qcow2"]);
    assert_eq!(got.code, Some(1));
    assert!(got.err.contains("missing.qcow2"), "{}", got.err);
}

/// A file system that is full on the way leaves everything as it was; with more room another call goes on.
#[test]
fn a_full_disk_costs_nothing_and_another_call_goes_on() {
    let Some(folder) = folder() else { return };
    let folder = folder.path();
    let tool = common::tool().display();
    let run = |script: &str| {
        let words = ["-rm", "sh", "-ec", script];
        said(Command::new("unshare").args(words).current_dir(folder))
    };
    if run("mkdir m && mount -t tmpfs -o size=1m none m").code != Some(0) {
        println!("SKIPPED: no file system can be mounted here: a full disk was not tested");
        return;
    }
    for room in ["400k", "800k", "1100k"] {
        let got = run(&format!(
            "mount -t tmpfs -o size={room} none m; cp i.qcow2 m; ln -s $PWD/base m/base; cd m; ! {tool} flatten i.qcow2 2> ../said
             qemu-img convert -U -O raw i.qcow2 ../now; cmp ../now ../disk
             qemu-img convert -l one -O raw i.qcow2 ../now; cmp ../now ../one
             mount -o remount,size=9m .; {tool} flatten i.qcow2; rm base;
             qemu-img check -q i.qcow2
             qemu-img convert -O raw i.qcow2 ../now; cmp ../now ../disk
             qemu-img convert -l one -O raw i.qcow2 ../now; cmp ../now ../one"
        ));
        assert_eq!(
            (got.code, got.out.as_str(), got.err.as_str()),
            (Some(0), "", "")
        );
        let said = std::fs::read_to_string(folder.join("said")).unwrap();
        assert!(said.contains("No space left on device"), "{said}");
    }
}
