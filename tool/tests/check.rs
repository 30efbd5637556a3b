//! `check` prints what `qemu-img check` prints, with its exit codes, and mends with `-r`.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

fn unpacked(name: &str, to: &Path) {
    use std::io::Read;
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../c-tests/images/");
    let packed = std::fs::read(format!("{root}{name}.qcow2.gz")).unwrap();
    let mut image = Vec::new();
    flate2::read::GzDecoder::new(&packed[..])
        .read_to_end(&mut image)
        .unwrap();
    std::fs::write(to, image).unwrap();
}

fn ours(args: &[&str], image: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qcow2-snapshot"))
        .arg("check")
        .args(args)
        .arg(image)
        .output()
        .unwrap()
}

fn theirs(args: &[&str], image: &Path) -> Option<Output> {
    let run = Command::new("qemu-img")
        .arg("check")
        .args(args)
        .arg(image)
        .output();
    match run {
        Ok(out) => Some(out),
        Err(_) => {
            eprintln!("SKIPPED: qemu-img is not here, its output is not compared");
            None
        }
    }
}

const IMAGES: [&str; 6] = [
    "v3-4k/before",
    "compressed-512/after-2",
    "damaged-refcount-zero/before",
    "extra-data-too-much/before",
    "extra-data-short/before",
    "dirty-bit/before",
];

#[test]
fn looking_prints_what_qemu_img_prints_and_ends_as_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    for name in IMAGES {
        unpacked(name, &image);
        for args in [&[][..], &["--output=json"], &["-q"]] {
            let (a, Some(b)) = (ours(args, &image), theirs(args, &image)) else {
                return;
            };
            assert_eq!(a.status.code(), b.status.code(), "{name} {args:?} {a:?}");
            let text = |o: &Output| String::from_utf8_lossy(&o.stdout).into_owned();
            if args != ["-q"] {
                assert_eq!(text(&a), text(&b), "{name} {args:?}");
            }
        }
    }
}

#[test]
fn a_repair_ends_with_a_good_image_and_says_what_it_did() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    for name in IMAGES {
        unpacked(name, &image);
        let out = ours(&["-r", "all"], &image);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert_eq!(out.status.code(), Some(0), "{name}: {out:?}");
        assert!(
            text.contains("No errors were found on the image."),
            "{text}"
        );
        assert_eq!(ours(&[], &image).status.code(), Some(0), "{name}");
        if let Some(b) = theirs(&[], &image) {
            assert_eq!(b.status.code(), Some(0), "{name}: {b:?}");
        }
    }
}

#[test]
fn what_is_no_image_or_makes_no_sense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("raw.img");
    std::fs::write(&other, vec![7; 65536]).unwrap();
    assert_eq!(ours(&[], &other).status.code(), Some(63));
    assert_eq!(
        ours(&[], &dir.path().join("nothing")).status.code(),
        Some(1)
    );
    let image = dir.path().join("a.qcow2");
    unpacked("v3-4k/before", &image);
    assert_eq!(ours(&["-U", "-r", "leaks"], &image).status.code(), Some(1));
    assert_eq!(ours(&["-r", "everything"], &image).status.code(), Some(1));
}

fn tool(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qcow2-snapshot"))
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn a_verb_on_an_image_that_is_to_be_repaired_names_the_command_and_does_it_when_told() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    let path = image.to_str().unwrap();
    // Dirty, with the snapshot that the verbs are about.
    let dirty = || {
        unpacked("v3-4k/after-1", &image);
        let mut bytes = std::fs::read(&image).unwrap();
        bytes[79] |= 1;
        std::fs::write(&image, bytes).unwrap();
    };
    let verbs: [&[&str]; 6] = [
        &["create", path, "new"],
        &["revert", path, "1"],
        &["revert", "--save-as", "kept", path, "1"],
        &["rename", path, "1", "other"],
        &["delete", path, "1"],
        &["flatten", path],
    ];
    for args in verbs {
        dirty();
        let before = std::fs::read(&image).unwrap();
        let refused = tool(args);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{args:?}");
        assert!(text.contains("'qcow2-snapshot check -r all'"), "{text}");
        assert!(std::fs::read(&image).unwrap() == before, "{args:?}");
        let done = tool(&[args, &["--repair"][..]].concat());
        assert_eq!(done.status.code(), Some(0), "{args:?}: {done:?}");
        assert_eq!(ours(&[], &image).status.code(), Some(0), "{args:?}");
    }
    dirty();
    let before = std::fs::read(&image).unwrap();
    let dry = tool(&["delete", "--dry-run", "--repair", path, "1"]);
    assert!(std::fs::read(&image).unwrap() == before, "{dry:?}");
}

#[test]
fn a_snapshot_that_cannot_be_read_is_deleted_and_the_way_to_its_space_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    let path = image.to_str().unwrap();
    for args in [
        &["delete", path, "1", "2"][..],
        &["delete", "--output=json", "-y", path, "1", "2"],
    ] {
        unpacked("damaged-snapshot-l1/before", &image);
        let out = tool(args);
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(0), "{text}");
        assert!(text.contains("'qcow2-snapshot check -r leaks'"), "{text}");
        assert_eq!(ours(&["-r", "leaks"], &image).status.code(), Some(0));
        assert_eq!(ours(&[], &image).status.code(), Some(0));
    }
    // As qemu-img would be called, and with a repair that cannot mend everything.
    unpacked("damaged-snapshot-l1/before", &image);
    let out = tool(&["-d", "one", path]);
    assert!(
        out.status.success() && String::from_utf8_lossy(&out.stderr).contains("check -r leaks")
    );
    let out = tool(&["delete", "--repair", path, "2"]);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.success() && text.contains("could not mend all"),
        "{text}"
    );
}

#[test]
fn the_image_is_named_and_locked_as_by_the_verbs() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    unpacked("v3-4k/before", &image);
    let named = Path::new(&format!("file:{}", image.display())).to_owned();
    assert!(ours(&[], &named).status.success());
    let guest = qcow2_snapshot::Image::open(&image, qcow2_snapshot::OpenFlags::RDWR).unwrap();
    assert_eq!(ours(&[], &image).status.code(), Some(1));
    for option in ["--no-lock", "-U"] {
        assert!(ours(&[option], &image).status.success(), "{option}");
    }
    guest.close().unwrap();
}

#[test]
fn what_is_too_much_in_a_snapshot_table_has_a_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    for (name, what) in [
        ("damaged-count/before", "the snapshots that are too many"),
        ("extra-data-too-much/before", "this extra metadata"),
    ] {
        unpacked(name, &image);
        let hint = format!("You can force-remove {what} with qcow2-snapshot check -r all\n");
        let create = Command::new(env!("CARGO_BIN_EXE_qcow2-snapshot"))
            .args(["-c", "new"])
            .arg(&image)
            .output()
            .unwrap();
        for refused in [ours(&[], &image), create] {
            let said = String::from_utf8(refused.stderr).unwrap();
            assert!(said.contains(&hint), "{name}: {said}");
            assert_eq!(refused.status.code(), Some(1), "{name}: {said}");
        }
        let mended = ours(&["-r", "all"], &image);
        assert!(mended.status.success(), "{name}: {mended:?}");
    }
}
