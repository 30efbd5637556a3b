//! The listing, as a table and as JSON, is that of qemu-img to the byte.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{assert_says, cases, ours, prepare, qemu_img, said, theirs, unpacked, Said};
use qcow2_snapshot::{Image, NewSnapshot, OpenFlags};
use std::path::Path;
use std::process::Command;

/// The lines that `qemu-img info` has under "Snapshot list:": it needs no key.
fn by_info(qemu: &Path, folder: &Path) -> Said {
    let mut info = said(
        Command::new(qemu)
            .current_dir(folder)
            .args(["info", "image.qcow2"]),
    );
    let rest = info.out.find("Snapshot list:\n").map(|at| &info.out[at..]);
    let mut lines = rest.unwrap_or_default().lines();
    let list: Vec<&str> = lines
        .by_ref()
        .take_while(|l| !l.starts_with("Format specific"))
        .collect();
    info.out = list.iter().map(|l| format!("{l}\n")).collect();
    info
}

/// The array under "snapshots" of `qemu-img info --output=json`.
fn json_by_info(qemu: &Path, folder: &Path) -> String {
    let info =
        said(
            Command::new(qemu)
                .current_dir(folder)
                .args(["info", "--output=json", "image.qcow2"]),
        );
    let Some((_, rest)) = info.out.split_once("\n    \"snapshots\": ") else {
        return "[\n]\n".to_owned();
    };
    let (list, _) = rest.split_once("\n    ]").unwrap();
    format!("{}\n]\n", list.replace("\n    ", "\n"))
}

#[test]
fn every_reference_image_is_listed_as_by_qemu_img() {
    let Some(qemu) = qemu_img("the listing of the reference images") else {
        return;
    };
    let mut listed = 0;
    for (name, path) in cases() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        for packed in prepare(&path, folder) {
            std::fs::write(folder.join("image.qcow2"), unpacked(&packed)).unwrap();
            let mut expected = theirs(&qemu, folder, &["-l", "image.qcow2"]);
            // Agreed: no key is needed here.
            if expected.err.contains("encrypt.key-secret") {
                expected = by_info(&qemu, folder);
            }
            let got = ours(folder, &["-l", "image.qcow2"]);
            // Agreed: the way out is our own.
            let (theirs, way_out) = ("with qemu-img check", "with qcow2-snapshot check");
            expected.err = expected.err.replace(theirs, way_out);
            // Agreed: what qemu-img keeps to itself.
            if name == "data-file" && expected.code == Some(0) {
                expected.err = "qcow2-snapshot: Internal snapshots are not supported on images with an external data file\n".into();
            }
            // Agreed: qemu-img reads zeros where the file ends before the table.
            if name == "damaged-table-past-end" {
                assert!(
                    got.code == Some(1) && got.err.contains("the file ends at"),
                    "{got:?}"
                );
                continue;
            }
            assert_says(&got, &expected, "qcow2-snapshot: ", &packed);
            assert_eq!(ours(folder, &["image.qcow2"]), got, "{name}: no action");
            if got.code == Some(0) && name != "data-file" {
                let json = ours(folder, &["--output=json", "image.qcow2"]);
                assert_eq!(json.out, json_by_info(&qemu, folder), "{name}");
                assert_eq!((json.code, json.err.as_str()), (Some(0), ""), "{name}");
            }
            listed += 1;
        }
    }
    println!("{listed} images listed");
    assert!(listed > 400);
}

/// An image with one snapshot for each kind of number.
fn crafted(folder: &Path, qemu: &Path) {
    let path = folder.join("image.qcow2");
    let made = said(
        Command::new(qemu)
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&path)
            .arg("1M"),
    );
    assert_eq!(made.code, Some(0), "{made:?}");
    let sizes: Vec<u64> = vec![
        0,
        1,
        9,
        10,
        99,
        999,
        1000,
        1001,
        1023,
        1024,
        1025,
        1034,
        1035,
        10_239,
        10_240,
        10_291,
        102_399,
        102_400,
        1_022_975,
        1_022_976,
        1_023_487,
        1_023_488,
        1_023_999,
        1_024_000,
        1_048_575,
        1_048_576,
        37 << 20,
        999 << 20,
        1000 << 20,
        1001 << 20,
        1 << 30,
        5 << 40,
        1023 << 40,
        1 << 50,
        1000 << 50,
        1 << 60,
        1 << 63,
        u64::MAX,
    ];
    let clocks = [
        0,
        1,
        999_999,
        1_000_000,
        59_999_999_999,
        60_000_000_000,
        3_599_999_000_000,
        3_600_000_000_000,
        35_999_999_000_000_000,
        36_000_000_000_000_000,
        1 << 62,
        u64::MAX,
    ];
    let dates = [
        0,
        1,
        951_782_400,
        1_143_338_399,
        1_143_338_400,
        1_300_000_000,
        1_319_936_400,
        1_700_000_000,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
    ];
    let icounts = [
        0,
        1,
        12_345_678_901,
        i64::MAX as u64,
        1 << 63,
        u64::MAX - 1,
        u64::MAX,
    ];
    let mut image = Image::open(&path, OpenFlags::RDWR).unwrap();
    for i in 0..sizes.len() {
        let new = NewSnapshot {
            name: format!("sn{i}").into_bytes(),
            date_sec: dates[i % dates.len()],
            date_nsec: 999_999_999,
            vm_clock_nsec: clocks[i % clocks.len()],
            icount: icounts[i % icounts.len()],
            ..NewSnapshot::default()
        };
        image.snapshot_create(&new).unwrap();
    }
    image.close().unwrap();
    // Sizes of VM state that no image has: into the entries by hand.
    let mut bytes = std::fs::read(&path).unwrap();
    let word = |b: &[u8], at: usize, n: usize| {
        b[at..at + n]
            .iter()
            .fold(0usize, |v, b| v << 8 | usize::from(*b))
    };
    let mut at = word(&bytes, 64, 8);
    for size in sizes {
        at = at.next_multiple_of(8);
        bytes[at + 40..at + 48].copy_from_slice(&size.to_be_bytes());
        at += 40 + word(&bytes, at + 36, 4) + word(&bytes, at + 12, 2) + word(&bytes, at + 14, 2);
    }
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn sizes_clocks_counts_and_dates_are_printed_as_by_qemu_img() {
    let Some(qemu) = qemu_img("the listing of unusual numbers") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    crafted(folder, &qemu);
    let zones = [
        "",
        "UTC",
        "America/New_York",
        "Asia/Kolkata",
        "Australia/Lord_Howe",
        ":Europe/Berlin",
        "EST5EDT,M3.2.0,M11.1.0",
        "XYZ-3:30",
        "No/Such_Zone",
    ];
    let list = |program: &Path, words: &[&str], zone: Option<&str>| {
        let mut command = Command::new(program);
        command.current_dir(folder).args(words).env_remove("TZ");
        if let Some(zone) = zone {
            command.env("TZ", zone);
        }
        said(&mut command)
    };
    for zone in zones.map(Some).into_iter().chain([None]) {
        let expected = list(&qemu, &["snapshot", "-l", "image.qcow2"], zone);
        let got = list(common::tool(), &["-l", "image.qcow2"], zone);
        assert_eq!(expected.out.lines().count(), 40);
        assert_eq!(got, expected, "TZ={zone:?}");
    }
    let json = ours(folder, &["--output=json", "image.qcow2"]);
    assert_eq!(json.out, json_by_info(&qemu, folder));
}

#[test]
fn names_of_all_kinds_are_made_and_shown_as_by_qemu_img() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let Some(qemu) = qemu_img("snapshots with unusual names") else {
        return;
    };
    let long = |n| OsString::from("n".repeat(n));
    let names: Vec<OsString> = vec![
        "".into(),
        " ".into(),
        "a b".into(),
        "größer 漢字".into(),
        "-d".into(),
        "--list".into(),
        "--".into(),
        "1".into(),
        "quote\"back\\slash\ttab\nline".into(),
        OsString::from_vec(b"\xff\xfe bytes".to_vec()),
        long(16),
        long(17),
        long(254),
        long(255),
        long(256),
        long(300),
        // Cut in the middle of a letter.
        OsString::from_vec([&[b'x'; 254], "ß".as_bytes()].concat()),
    ];
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for image in ["a.qcow2", "image.qcow2"] {
        let made = said(
            Command::new(&qemu)
                .current_dir(folder)
                .args(["create", "-q", "-f", "qcow2", image, "1M"]),
        );
        assert_eq!(made.code, Some(0));
    }
    let both = |words: &[&OsStr]| {
        let mut a = words.to_vec();
        a.push(OsStr::new("a.qcow2"));
        let mut b = words.to_vec();
        b.push(OsStr::new("image.qcow2"));
        let expected = theirs(&qemu, folder, &a);
        assert_says(&ours(folder, &b), &expected, "qcow2-snapshot: ", &words);
    };
    let undated = |file: &str| {
        let text = ours(folder, &["--output=json", file]).out;
        let lines = text.lines().filter(|l| !l.contains("\"date-"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    for name in &names {
        both(&[OsStr::new("-c"), name]);
        if !name.is_empty() {
            let stuck = [b"-c", name.as_bytes()].concat();
            both(&[OsStr::from_bytes(&stuck)]);
        }
    }
    assert_eq!(undated("image.qcow2"), undated("a.qcow2"));
    assert_eq!(
        ours(folder, &["--output=json", "image.qcow2"]).out,
        json_by_info(&qemu, folder)
    );
    for name in &names {
        both(&[OsStr::new("-a"), name]);
        both(&[OsStr::new("-d"), name]);
    }
    assert_eq!(undated("image.qcow2"), undated("a.qcow2"));
}

#[test]
fn without_snapshots_the_json_array_is_empty() {
    let folder = common::image("names", "before");
    let got = ours(folder.path(), &["--output=json", "image.qcow2"]);
    assert_eq!((got.code, got.out.as_str()), (Some(0), "[\n]\n"));
}

#[test]
fn names_that_are_not_utf_8_are_in_json_as_by_qemu_img_info() {
    let Some(qemu) = qemu_img("JSON of names that are not UTF-8") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let made = ["create", "-q", "-f", "qcow2", "image.qcow2", "1M"];
    let made = said(Command::new(&qemu).current_dir(folder).args(made));
    assert_eq!(made.code, Some(0), "{made:?}");
    // Forms that are too long, surrogates, noncharacters, old forms of five and six bytes, ends that are missing.
    let mut names: Vec<Vec<u8>> = [
        b"\xc0\x80".as_slice(),
        b"\xc0\x81\xc1\xbf\xe0\x9f\xbf\xf0\x8f\xbf\xbf",
        b"\xed\xa0\x80\xed\xbf\xbf\xee\x80\x80",
        b"\xef\xb7\x8f\xef\xb7\x90\xef\xb7\xaf\xef\xb7\xb0",
        b"\xef\xbf\xbd\xef\xbf\xbe\xef\xbf\xbf\xf0\x9f\xbf\xbe\xf0\x9f\xbf\xbd",
        b"\xf4\x8f\xbf\xbd\xf4\x90\x80\x80\xf7\xbf\xbf\xbf",
        b"\xf8\x88\x80\x80\x80x\xfb\xbf\xbf\xbf\xbfx\xfc\x84\x80\x80\x80\x80x\xfd\xbf\xbf\xbf\xbf\xbf",
        b"\x80\xbfx\xc3x\xe2\x82x\xe2x\xf0\x9f\x98x\xf8\x88x\xfe\xffx\xe2",
        b"a\x7f\x01\xc2\x80\xc2\x9b",
    ]
    .map(<[u8]>::to_vec)
    .into();
    let mut random = 88_172_645_463_325_252u64;
    let mut below = |n: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % n
    };
    let parts = b"\x80\x9f\xbf\xc0\xc2\xdf\xe0\xe2\xed\xef\xf0\xf4\xf8\xfc\xff";
    for _ in 0..120 {
        let letters = 1 + below(60);
        names.push(
            (0..letters)
                .map(|_| match below(3) {
                    0 => 0x80 | below(128) as u8,
                    1 => parts[below(parts.len() as u64) as usize],
                    _ => 0x80 | below(64) as u8,
                })
                .collect(),
        );
    }
    let mut image = Image::open(&folder.join("image.qcow2"), OpenFlags::RDWR).unwrap();
    for name in names {
        let new = NewSnapshot {
            name,
            ..NewSnapshot::default()
        };
        image.snapshot_create(&new).unwrap();
    }
    image.close().unwrap();
    let got = ours(folder, &["--output=json", "image.qcow2"]).out;
    let expected = json_by_info(&qemu, folder);
    for (got, expected) in got.lines().zip(expected.lines()) {
        assert_eq!(got, expected);
    }
    assert_eq!(got, expected);
}

#[test]
fn a_terminal_gets_no_control_characters_of_names_and_a_pipe_gets_them_all() {
    if !common::have("script", "the listing on a terminal") {
        return;
    }
    let folder = common::image("v3-4k", "before");
    let name = "a\u{1b}[31m\tb\nc\u{9b}\u{202e}ü \\";
    assert_eq!(
        ours(folder.path(), &["-c", name, "image.qcow2"]).code,
        Some(0)
    );
    let raw = Command::new(common::tool())
        .current_dir(folder.path())
        .args(["-l", "image.qcow2"])
        .output()
        .unwrap();
    let raw = String::from_utf8(raw.stdout).unwrap();
    assert!(raw.contains(name), "{raw:?}");
    let shell = format!("{} -l image.qcow2", common::tool().display());
    let shown = Command::new("script")
        .current_dir(folder.path())
        .args(["-qec", &shell, "/dev/null"])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let escaped = "a\\033[31m\\tb\\nc\\302\\233\\342\\200\\256ü \\";
    assert!(shown.contains(escaped), "{shown:?}");
    assert!(
        !shown.contains('\u{1b}') && !shown.contains('\u{9b}'),
        "{shown:?}"
    );
}
