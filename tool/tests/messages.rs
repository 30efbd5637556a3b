//! What is said when something is wrong, where, and the exit codes: those of `qemu-img snapshot`.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{assert_says, cases, image, ours, prepare, qemu_img, said, theirs, unpacked, NAME};
use std::path::Path;
use std::process::Command;

/// Options that qemu-img 10.0 takes too.
const CALLS: &[&[&str]] = &[
    &[],
    &["-l"],
    &["-l", "image.qcow2", "other.qcow2"],
    &["-l", "-a", "x", "image.qcow2"],
    &["-c", "x", "-c", "y", "image.qcow2"],
    &["-l", "-l", "image.qcow2"],
    &["-ll", "image.qcow2"],
    &["-z", "image.qcow2"],
    &["-lz", "image.qcow2"],
    &["-l", "image.qcow2", "-z"],
    &["-a"],
    &["-lqa"],
    &["--bogus", "image.qcow2"],
    &["--bogus=1", "image.qcow2"],
    &["--object"],
    &["--force-share=1", "-l", "image.qcow2"],
    &["--image-opts=", "-l", "image.qcow2"],
    &["-l", "--", "-z"],
    &["-l", "--", "image.qcow2", "-z"],
    &["-l", "--force", "image.qcow2"],
    &["-q", "-l", "image.qcow2"],
    &["-Ul", "image.qcow2"],
    &["image.qcow2", "-l"],
    &["-U", "-c", "x", "image.qcow2"],
    &["-U", "-c", "x", "nothing.qcow2"],
    &["-l", "nothing.qcow2"],
    &["-c", "x", "nothing.qcow2"],
    &["-l", "no/such/folder.qcow2"],
    &["-l", "image.qcow2/below"],
    &["-l", ""],
    &["-l", "."],
    &["-l", "/dev/null/x"],
    &["-l", "xyz:image.qcow2"],
    &["-l", "file:image.qcow2"],
    &["-l", "./image.qcow2"],
    &["-l", "-"],
    &["-d", "nothing", "image.qcow2"],
    &["-a", "nothing", "image.qcow2"],
    &["-a", "", "image.qcow2"],
    &["-d2", "image.qcow2"],
    &["-d", "2", "image.qcow2"],
    &["-a2", "image.qcow2"],
    &["-a", "twin", "image.qcow2"],
    &["-d", "twin", "image.qcow2"],
    &["-l", "raw.img"],
    &["-c", "x", "raw.img"],
    &["-a", "x", "raw.img"],
    &["-d", "x", "raw.img"],
    &["-l", "empty.img"],
    &[
        "-l",
        "--image-opts",
        "driver=qcow2,file.filename=image.qcow2",
    ],
    &[
        "-l",
        "--image-opts",
        "file.driver=file,file.filename=image.qcow2",
    ],
    &[
        "-l",
        "--image-opts",
        "driver=qcow2,file.filename=nothing.qcow2",
    ],
    &["-l", "--image-opts", "driver=qcow2,file.filename=raw.img"],
    &["-l", "--image-opts", "driver=foo,file.filename=image.qcow2"],
    &["-l", "--image-opts", "driver=qcow2"],
    &[
        "-a",
        "2",
        "--image-opts",
        "driver=qcow2,file.filename=image.qcow2",
    ],
    &[
        "-d",
        "x",
        "--image-opts",
        "driver=qcow2,file.filename=image.qcow2,force-share=on",
    ],
];

/// Reference images with damage that rules a goto out here, and the ID of the snapshot.
const REFUSED: &[(&str, &str)] = &[
    ("damaged-copied-grow", "1"),
    ("damaged-copied-head", "1"),
    ("damaged-copied-shrink", "1"),
    ("l1-growth-shrink-data", "1"),
    ("l1-growth-shrink-table", "1"),
];

fn fill(folder: &Path) {
    std::fs::write(folder.join("raw.img"), vec![0; 65536]).unwrap();
    std::fs::write(folder.join("empty.img"), []).unwrap();
}

#[test]
fn the_same_is_said_as_by_qemu_img() {
    let Some(qemu) = qemu_img("messages and exit codes") else {
        return;
    };
    for call in CALLS {
        let (a, b) = (image("names", "after-7"), image("names", "after-7"));
        fill(a.path());
        fill(b.path());
        let expected = theirs(&qemu, a.path(), call);
        assert_says(&ours(b.path(), call), &expected, "qcow2-snapshot: ", call);
        for file in ["image.qcow2", "raw.img"] {
            assert!(
                std::fs::read(a.path().join(file)).unwrap()
                    == std::fs::read(b.path().join(file)).unwrap(),
                "{call:?}: {file} differs"
            );
        }
    }
}

#[test]
fn verbs_on_reference_images_end_as_by_qemu_img() {
    let Some(qemu) = qemu_img("what is said of the reference images") else {
        return;
    };
    let mut compared = 0;
    for (name, path) in cases() {
        // Agreed differences: no key is needed, the dirty bit is for 'check', and a table that
        // the end of the file cuts off is not read as zeros (tool/tests/listing.rs).
        if name.starts_with("encrypted") || name == "dirty-bit" || name == "damaged-table-past-end"
        {
            continue;
        }
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let images = prepare(&path, a.path());
        prepare(&path, b.path());
        // The state before, the one with the most snapshots on the way, and the last.
        for packed in [images.first(), images.get(images.len() / 2), images.last()] {
            let bytes = unpacked(packed.unwrap());
            for call in [
                ["-c", "new"],
                ["-a", "1"],
                ["-a", "two"],
                ["-d", "one"],
                ["-d", "a"],
            ] {
                for folder in [a.path(), b.path()] {
                    std::fs::write(folder.join("image.qcow2"), &bytes).unwrap();
                }
                let call = [call[0], call[1], "image.qcow2"];
                let mut expected = theirs(&qemu, a.path(), &call);
                // Agreed: nothing is ever marked as corrupt here, and the library prints nothing.
                expected.err = expected
                    .err
                    .lines()
                    .filter(|l| !l.contains("Marking image as corrupt"))
                    .filter(|l| !l.starts_with("qcow2_free_clusters failed"))
                    .map(|l| l.replace("with qemu-img check", "with qcow2-snapshot check") + "\n")
                    .collect();
                let got = ours(b.path(), &call);
                // Agreed: what qemu-img does at the cost of a snapshot, or what cannot be made safe
                // (docs/design.md), is refused.
                if REFUSED.contains(&(&name, call[1])) {
                    let codes = (expected.code, got.code);
                    assert_eq!(codes, (Some(0), Some(1)), "{name}: {call:?}");
                    continue;
                }
                // Agreed: what cannot be read can be deleted.
                if name == "damaged-snapshot-l1" && call[0] == "-d" && call[1] == "one" {
                    let codes = (expected.code, got.code);
                    assert_eq!(codes, (Some(1), Some(0)), "{call:?}: {got:?}");
                    assert!(got.err.contains("check -r leaks"), "{got:?}");
                    continue;
                }
                assert_says(&got, &expected, "qcow2-snapshot: ", &(&name, packed, call));
                compared += 1;
            }
        }
    }
    println!("{compared} verbs compared");
}

#[test]
fn an_image_in_use_is_refused_in_qemus_words() {
    let Some(qemu) = qemu_img("an image in use") else {
        return;
    };
    use qcow2_snapshot::{Image, OpenFlags};
    let folder = image("names", "after-7");
    let file = folder.path().join("image.qcow2");
    let calls: [&[&str]; 4] = [
        &["-l", "image.qcow2"],
        &["-c", "x", "image.qcow2"],
        &["-U", "-l", "image.qcow2"],
        &["-a", "1", "image.qcow2"],
    ];
    for flags in [OpenFlags::RDWR, OpenFlags::read_only()] {
        let held = Image::open(&file, flags).unwrap();
        for call in calls {
            let expected = theirs(&qemu, folder.path(), call);
            assert_eq!(ours(folder.path(), call), expected, "{flags:?} {call:?}");
        }
        held.close().unwrap();
    }
}

#[test]
fn options_of_today_and_refusals_have_their_own_words() {
    let folder = image("names", "after-7");
    let expect = |words: &[&str], code: i32, err: &str| {
        let got = ours(folder.path(), words);
        assert_eq!(got.code, Some(code), "{words:?}: {got:?}");
        assert_eq!(got.err, err, "{words:?}");
        got.out
    };
    let listing = expect(&["-f", "qcow2", "image.qcow2"], 0, "");
    assert!(listing.starts_with("Snapshot list:\n"));
    assert_eq!(
        expect(&["--list", "--format=qcow2", "image.qcow2"], 0, ""),
        listing
    );
    assert_eq!(
        expect(
            &["--li", "--form", "qcow2", "--quiet", "image.qcow2"],
            0,
            ""
        ),
        listing
    );
    expect(
        &["--f", "qcow2", "image.qcow2"],
        1,
        "qcow2-snapshot: option '--f' is ambiguous; possibilities: '--format' '--force-share'\n\
         Try 'qcow2-snapshot --help' for more information\n",
    );
    expect(
        &["-f", "qcow2", "--image-opts", "file.filename=image.qcow2"],
        1,
        "qcow2-snapshot: --image-opts and --format are mutually exclusive\n",
    );
    expect(
        &["-f", "foo", "image.qcow2"],
        1,
        "qcow2-snapshot: Could not open 'image.qcow2': Unknown driver 'foo'\n",
    );
    expect(
        &["--object", "secret,id=a,data=b", "image.qcow2"],
        1,
        "qcow2-snapshot: --object is not supported: there is no QEMU object system here\n",
    );
    let refused = ours(
        folder.path(),
        &[
            "--image-opts",
            "driver=qcow2,file.filename=image.qcow2,encrypt.key-secret=a",
        ],
    );
    assert_eq!(refused.code, Some(1));
    assert!(refused
        .err
        .starts_with("qcow2-snapshot: --image-opts: 'encrypt.key-secret=a'"));
    std::fs::write(folder.path().join("raw.img"), [0; 512]).unwrap();
    expect(&["-f", "raw", "-l", "raw.img"], 0, "");
    expect(
        &["-f", "raw", "-c", "x", "raw.img"],
        1,
        "qcow2-snapshot: Image is not in qcow2 format\n\
         qcow2-snapshot: Could not create snapshot 'x': Operation not supported\n",
    );
    expect(
        &["-f", "qcow2", "-l", "raw.img"],
        1,
        "qcow2-snapshot: Could not open 'raw.img': Image is not in qcow2 format\n",
    );
    for help in ["-h", "--help", "--he"] {
        let page = expect(&["-l", help, "--bogus"], 0, "");
        for option in [
            "--list",
            "--apply",
            "--create",
            "--delete",
            "--format",
            "--force-share",
        ] {
            assert!(page.contains(option), "{page}");
        }
    }
    let dirty = image("dirty-bit", "before");
    let got = ours(dirty.path(), &["-c", "x", "image.qcow2"]);
    assert_eq!(got.code, Some(1));
    assert!(got.err.contains("qcow2-snapshot check -r all"), "{got:?}");
}

#[test]
fn create_stores_what_qemu_img_stores_at_the_same_time() {
    let Some(qemu) = qemu_img("the same bytes at the same time") else {
        return;
    };
    let preload = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";
    if !Path::new(preload).exists() {
        println!("SKIPPED: no {preload}: the same bytes at the same time were not tested");
        return;
    }
    let (a, b) = (image("v3-64k", "before"), image("v3-64k", "before"));
    for call in [
        ["-c", "one"],
        ["-c", "two"],
        ["-a", "one"],
        ["-d", "one"],
        ["-a", "1"],
    ] {
        let run = |program: &Path, words: &[&str], folder: &Path| {
            said(
                Command::new(program)
                    .current_dir(folder)
                    .args(words)
                    .args(call)
                    .arg("image.qcow2")
                    .env("LD_PRELOAD", preload)
                    .env("FAKETIME", "2024-02-29 12:34:56"),
            )
        };
        let mut expected = run(&qemu, &["snapshot"], a.path());
        let got = run(common::tool(), &[], b.path());
        expected.err = common::as_today(&expected.err, &qemu);
        assert_says(&got, &expected, "qcow2-snapshot: ", &call);
        assert!(
            std::fs::read(a.path().join("image.qcow2")).unwrap()
                == std::fs::read(b.path().join("image.qcow2")).unwrap(),
            "{call:?}"
        );
    }
}

#[test]
fn nothing_but_the_work_is_said_where_nobody_looks() {
    let folder = image("names", "after-7");
    for call in [["-c", "x"], ["-a", "x"], ["-d", "x"]] {
        let got = ours(folder.path(), &[call[0], call[1], "image.qcow2"]);
        assert_eq!((got.code, got.out + &got.err), (Some(0), String::new()));
    }
}

#[test]
fn a_closed_output_is_no_crash() {
    let folder = image("names", "after-7");
    let line = format!("{} -l image.qcow2 | true", common::tool().display());
    let got = said(
        Command::new("bash")
            .current_dir(folder.path())
            .args(["-c", &format!("{line}; exit ${{PIPESTATUS[0]}}")]),
    );
    assert_eq!((got.code, got.err.as_str()), (Some(0), ""));
}

/// An image whose second L2 entry names a cluster that no refcount block describes, or that is past
/// all limits. Entries from 1 on, so that other tables stay as they are.
fn damaged(entry: u64) -> tempfile::TempDir {
    let folder = image("v3-64k", "before");
    let path = folder.path().join("image.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    let word = |b: &[u8], at: usize| {
        let word = b[at..at + 8].try_into().unwrap();
        u64::from_be_bytes(word) as usize & 0x00ff_ffff_ffff_fe00
    };
    let l1 = word(&bytes, 40);
    let l2 = word(&bytes, l1);
    bytes[l2 + 8..l2 + 16].copy_from_slice(&entry.to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    folder
}

const REPAIR: &str = "qcow2-snapshot: The image is damaged: 'qcow2-snapshot check' says where, 'qcow2-snapshot check -r all' repairs what it can\n";

#[test]
fn a_failure_says_what_the_library_knows_and_the_way_out_before_qemu_imgs_line() {
    let says = |folder: &Path, words: &[&str], lines: &[&str]| {
        let got = ours(folder, words);
        let expected: String = lines
            .iter()
            .map(|l| match l.ends_with('\n') {
                true => (*l).to_owned(),
                false => format!("{NAME}: {l}\n"),
            })
            .collect();
        assert_eq!(got.err, expected, "{words:?}");
        assert_eq!(got.code, Some(1), "{words:?}");
    };
    let absent = damaged(0x8000_007f_0000_0000);
    let sentence = "No refcount block describes the cluster at 0x7f00000000, which is in use";
    for (verb, line) in [
        ("-c", "Could not create snapshot 'one': Input/output error"),
        (
            "-a",
            "Could not apply snapshot 'one': Failed to load snapshot: Input/output error",
        ),
    ] {
        let words = [verb, "one", "image.qcow2"];
        says(absent.path(), &words, &[sentence, REPAIR, line]);
    }
    let far = damaged(0x80ff_ffff_ffff_0000);
    let sentence = "The cluster at 0xffffffffff0000, which is in use, is out of range";
    let line = "Could not create snapshot 'x': File too large";
    says(
        far.path(),
        &["-c", "x", "image.qcow2"],
        &[sentence, REPAIR, line],
    );

    let other = image("data-file", "before");
    let sentence = "Internal snapshots are not supported on images with an external data file";
    let line = "Could not create snapshot 'x': Operation not supported";
    says(other.path(), &["-c", "x", "image.qcow2"], &[sentence, line]);
    let line = format!("Could not list the snapshots: {sentence}");
    let json = ["--output=json", "image.qcow2"];
    says(other.path(), &json, &[line.as_str()]);

    let bitmaps = image("bitmap-goto", "before");
    let list = ours(bitmaps.path(), &["-l", "image.qcow2"]).out;
    let id = list.lines().nth(2).unwrap().split(' ').next().unwrap();
    let got = ours(bitmaps.path(), &["-a", id, "image.qcow2"]);
    let hint = "qcow2-snapshot: 'qemu-img bitmap --remove FILE BITMAP' removes a bitmap; 'qemu-img info FILE' names them\n";
    let line = format!(
        "qcow2-snapshot: Could not apply snapshot '{id}': Device has active dirty bitmaps\n"
    );
    assert_eq!((got.code, got.err), (Some(1), format!("{hint}{line}")));

    // What the two have in common is said once, also by export and for a name that needs no care.
    let folder = absent.path();
    for words in [
        ["-c", "x", "no such.qcow2"].as_slice(),
        &["-l", "no such.qcow2"],
        &["export", "no such.qcow2", "1", "out"],
    ] {
        let line = "Could not open 'no such.qcow2': No such file or directory";
        says(folder, words, &[line]);
    }
}

#[test]
fn errors_of_all_kinds_begin_with_the_name() {
    let folder = image("names", "after-7");
    let calls: &[&[&str]] = &[
        &[],
        &["--bogus"],
        &["-z"],
        &["-a"],
        &["--output=xml", "image.qcow2"],
        &["--output"],
        &["-l", "-a", "x", "image.qcow2"],
        &["-l", "nothing"],
        &["-c", "x", "/dev/null"],
        &["export"],
        &["export", "image.qcow2", "1"],
        &["export", "--bogus", "image.qcow2", "1", "out"],
        &["export", "image.qcow2", "nothing", "out"],
        &["export", "image.qcow2", "1", "image.qcow2"],
        &["completions"],
        &["completions", "tcsh"],
        &["create", "x", "image.qcow2"],
    ];
    for call in calls {
        let got = ours(folder.path(), call);
        assert_eq!(got.code, Some(1), "{call:?}: {got:?}");
        assert!(got.err.starts_with("qcow2-snapshot: "), "{call:?}: {got:?}");
        assert!(!got.err.contains("error: "), "{call:?}: {got:?}");
    }
}

#[test]
fn long_options_may_be_abbreviated() {
    let folder = image("names", "after-7");
    let whole = ours(folder.path(), &["--output=json", "image.qcow2"]);
    assert!(whole.out.starts_with('['));
    for words in [
        ["--outp=json", "image.qcow2"].as_slice(),
        &["--ou", "json", "image.qcow2"],
        &["--lis", "--qui", "--out=json", "image.qcow2"],
    ] {
        assert_eq!(ours(folder.path(), words), whole, "{words:?}");
    }
    let version = ours(folder.path(), &["--vers"]);
    assert_eq!(version, ours(folder.path(), &["--version"]));
    assert_eq!(version.code, Some(0));
    // QEMU's own abbreviations stay what they are there.
    let object = ours(folder.path(), &["--o", "secret,id=a", "image.qcow2"]);
    assert!(
        object.err.contains("--object is not supported"),
        "{object:?}"
    );
    let words = ["export", "--qui", "--force", "image.qcow2", "1", "out"];
    assert_eq!(ours(folder.path(), &words).code, Some(0));
}

#[test]
fn a_verb_in_the_place_of_an_option_gets_a_hint() {
    let folder = image("names", "after-7");
    for (words, option) in [
        (["ls", "image.qcow2"].as_slice(), "list IMAGE"),
        (&["rm", "image.qcow2", "1"], "delete IMAGE SNAPSHOT"),
        (&["goto", "image.qcow2", "1"], "revert IMAGE SNAPSHOT"),
        (&["snapshot", "-l", "image.qcow2"], "-l|-c|-a|-d ... FILE"),
    ] {
        let got = ours(folder.path(), words);
        let verb = words[0];
        let hint = format!(
            "qcow2-snapshot: '{verb}' is not a subcommand; use 'qcow2-snapshot {option}'\n\
             Try 'qcow2-snapshot --help' for more information\n"
        );
        assert_eq!((got.code, got.err), (Some(1), hint), "{words:?}");
    }
    // An image may have such a name.
    std::fs::rename(
        folder.path().join("image.qcow2"),
        folder.path().join("list"),
    )
    .unwrap();
    assert!(ours(folder.path(), &["list"])
        .out
        .starts_with("Snapshot list"));
    let help = ours(folder.path(), &["create", "--help"]);
    assert!(help.code == Some(0) && help.out.contains("create [OPTIONS] <IMAGE> <NAME>"));
}

#[test]
fn the_limit_of_a_files_size_is_an_error_and_not_the_end() {
    let link = common::link();
    let linked = link.path().join("qemu-img");
    let removed = "Could not delete snapshot 'one': Failed to remove snapshot from snapshot list";
    for (program, name, before) in [
        (common::tool(), "qcow2-snapshot", ""),
        (&linked, "qemu-img", "snapshot "),
    ] {
        for (words, line) in [
            ("-c x", "Could not create snapshot 'x'"),
            (
                "-a one",
                "Could not apply snapshot 'one': Failed to load snapshot",
            ),
            ("-d one", removed),
        ] {
            let folder = image("v3-64k", "after-1");
            let words = format!("ulimit -f 0; exec \"$0\" {before}{words} image.qcow2");
            let mut shell = Command::new("sh");
            shell.current_dir(folder.path()).args(["-c", &words]);
            let got = said(shell.arg(program));
            assert_eq!(got.code, Some(1), "{words}: {got:?}");
            let lines: Vec<&str> = got.err.lines().collect();
            assert_eq!(lines.len(), 2, "{words}: {got:?}");
            assert!(lines[0].starts_with(name) && lines[0].contains(" at offset "));
            assert_eq!(lines[1], format!("{name}: {line}: File too large"));
        }
    }
    let folder = image("names", "after-7");
    let line = format!(
        "ulimit -f 1; exec {} export image.qcow2 1 out.raw",
        common::tool().display()
    );
    let got = said(
        Command::new("sh")
            .current_dir(folder.path())
            .args(["-c", &line]),
    );
    let words = "qcow2-snapshot: Could not write 'out.raw': File too large\n";
    assert_eq!((got.code, got.err.as_str()), (Some(1), words));
}
