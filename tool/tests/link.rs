//! Under the name qemu-img: what is served, what is passed on, and that it ends.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{assert_says, image, link, qemu_img, said, Said};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Call `qemu-img` as a script does: by name, with these folders as PATH.
fn by_name<S: AsRef<OsStr>>(path: &[&Path], folder: &Path, words: &[S]) -> Said {
    // The shell looks the name up, so argv[0] is the bare name.
    said(
        Command::new("/bin/bash")
            .current_dir(folder)
            .env("PATH", std::env::join_paths(path).unwrap())
            .args(["-c", "exec -- qemu-img \"$@\"", "bash"])
            .args(words),
    )
}

/// A stand-in for the real qemu-img that says what it was given.
fn echo() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("qemu-img");
    std::fs::write(&file, "#!/bin/bash\nprintf '<%s>' \"$@\"\nexit 42\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

#[test]
fn snapshots_are_served_without_another_qemu_img() {
    let (link, folder) = (link(), image("names", "after-7"));
    let alone = [link.path()];
    for words in [
        &["snapshot", "-l", "image.qcow2"],
        &["snapshot", "-c", "image.qcow2"][..],
    ] {
        let got = by_name(&alone, folder.path(), words);
        let expected = common::ours(folder.path(), &words[1..]);
        assert_eq!((got.code, &got.out), (expected.code, &expected.out));
    }
    for words in [
        ["snapshot", "-cx", "image.qcow2"],
        ["snapshot", "-ax", "image.qcow2"],
    ] {
        let got = by_name(&alone, folder.path(), &words);
        assert_eq!((got.code, got.out + &got.err), (Some(0), String::new()));
    }
    let got = by_name(
        &alone,
        folder.path(),
        &["snapshot", "-d", "no", "image.qcow2"],
    );
    assert_eq!(
        got.err,
        "qemu-img: Could not delete snapshot 'no': snapshot not found\n"
    );
    let got = by_name(&alone, folder.path(), &["info", "image.qcow2"]);
    assert_eq!(got.code, Some(1));
    assert!(
        got.err
            .starts_with("qemu-img: Only 'snapshot' is served here"),
        "{got:?}"
    );
}

#[test]
fn what_is_not_served_is_passed_on_unchanged() {
    let (link, echo, folder) = (link(), echo(), image("names", "after-7"));
    let path = [
        link.path(),
        echo.path(),
        Path::new("/usr/bin"),
        Path::new("/bin"),
    ];
    std::fs::write(folder.path().join("raw.img"), [0; 4096]).unwrap();
    let bytes = OsString::from_vec(b"\xff odd".to_vec());
    let os = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let mut calls = vec![
        os(&[]),
        os(&["--version"]),
        os(&["--help"]),
        os(&["info", "image.qcow2"]),
        os(&["convert", "-O", "raw", "a b", ""]),
        os(&["-T", "x", "snapshot", "-l", "image.qcow2"]),
        os(&["snapshot", "-l", "raw.img"]),
        os(&["snapshot", "-c", "x", "raw.img"]),
        os(&["snapshot", "-f", "vmdk", "image.qcow2"]),
        os(&["snapshot", "--object", "secret,id=a", "-l", "image.qcow2"]),
        os(&["snapshot", "--image-opts", "driver=qcow2,file.driver=nbd"]),
        os(&["snapshot", "-l", "nbd:localhost:1"]),
        os(&["snapshot", "-l", "json:{}"]),
        os(&["snapshot", "-l", "nothing.qcow2"]),
    ];
    calls.push([os(&["snapshot", "-l"]), vec![bytes]].concat());
    for call in calls {
        let got = by_name(&path, folder.path(), &call);
        let expected = said(Command::new(echo.path().join("qemu-img")).args(&call));
        assert_eq!(got, expected, "{call:?}");
        assert_eq!(got.code, Some(42));
    }
    for (case, words) in [
        ("dirty-bit", ["snapshot", "-c", "x", "image.qcow2"]),
        ("data-file", ["snapshot", "-c", "x", "image.qcow2"]),
        ("data-file", ["snapshot", "-l", "-q", "image.qcow2"]),
    ] {
        let folder = image(case, "before");
        let before = std::fs::read(folder.path().join("image.qcow2")).unwrap();
        let got = by_name(&path, folder.path(), &words);
        assert_eq!(got.code, Some(42), "{case}: {got:?}");
        assert!(before == std::fs::read(folder.path().join("image.qcow2")).unwrap());
    }
    // What qemu-img would say in the same way is said at once.
    for call in [["snapshot", "-z"], ["snapshot", "-l"]] {
        let got = by_name(&path, folder.path(), &call);
        assert_eq!(got.code, Some(1));
        assert!(got.err.contains("qemu-img"), "{got:?}");
    }
}

#[test]
fn a_call_does_not_go_round_in_a_circle() {
    let (first, folder) = (link(), image("names", "after-7"));
    // Copies, not links: other files, each of which finds the others in PATH.
    let copies = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for copy in &copies {
        std::fs::copy(common::tool(), copy.path().join("qemu-img")).unwrap();
    }
    // And a script that calls qemu-img by name.
    let script = tempfile::tempdir().unwrap();
    let file = script.path().join("qemu-img");
    std::fs::write(&file, "#!/bin/bash\nexec qemu-img \"$@\"\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    let (a, b) = (copies[0].path(), copies[1].path());
    let path = [
        first.path(),
        a,
        b,
        script.path(),
        a,
        first.path(),
        b,
        Path::new(""),
    ];
    let got = by_name(&path, folder.path(), &["info", "image.qcow2"]);
    assert_eq!(got.code, Some(1));
    assert!(
        got.err
            .starts_with("qemu-img: Only 'snapshot' is served here"),
        "{got:?}"
    );

    let echo = echo();
    let path = [first.path(), a, script.path(), b, echo.path()];
    let got = by_name(&path, folder.path(), &["info", "image.qcow2"]);
    assert_eq!(
        (got.code, got.out.as_str()),
        (Some(42), "<info><image.qcow2>")
    );
}

#[test]
fn with_the_link_everything_says_what_the_real_one_says() {
    let Some(qemu) = qemu_img("the link against the real qemu-img") else {
        return;
    };
    let link = link();
    let real = qemu.parent().unwrap();
    let calls: &[&[&str]] = &[
        &["--version"],
        &["--help"],
        &["bogus"],
        &["info", "image.qcow2"],
        &["check", "image.qcow2"],
        &["snapshot", "-l", "image.qcow2"],
        &["snapshot", "-d", "no", "image.qcow2"],
        &["snapshot", "-a", "no", "image.qcow2"],
        &["snapshot", "-U", "-c", "x", "image.qcow2"],
        &["snapshot", "-l", "nothing.qcow2"],
        &["snapshot", "-c", "x", "raw.img"],
        &["snapshot", "-l", "raw.img"],
        &["snapshot", "-l", "-a", "x", "image.qcow2"],
        &["snapshot", "--bogus", "image.qcow2"],
        &[
            "snapshot",
            "--object",
            "secret,id=a,data=b",
            "-l",
            "image.qcow2",
        ],
        &[
            "snapshot",
            "-l",
            "json:{\"driver\":\"qcow2\",\"file.filename\":\"image.qcow2\"}",
        ],
    ];
    for (case, state) in [
        ("names", "after-7"),
        ("data-file", "before"),
        ("bitmap-goto", "before"),
    ] {
        let folder = image(case, state);
        std::fs::write(folder.path().join("raw.img"), [0; 4096]).unwrap();
        for call in calls {
            let rest = [Path::new("/usr/bin"), Path::new("/bin")];
            let got = by_name(
                &[&[link.path(), real], &rest[..]].concat(),
                folder.path(),
                call,
            );
            let mut expected = by_name(&[&[real], &rest[..]].concat(), folder.path(), call);
            // The last line of complaints has changed since 10.0.
            expected.err = expected
                .err
                .replace("--help' for more info\n", "--help' for more information\n");
            let mut got = got;
            got.err = got
                .err
                .replace("--help' for more info\n", "--help' for more information\n");
            assert_says(&got, &expected, "qemu-img: ", &(case, call));
        }
    }
}

#[test]
fn what_is_in_the_current_folder_is_never_run() {
    let (link, trap) = (link(), echo());
    std::fs::create_dir(trap.path().join("bin")).unwrap();
    std::fs::rename(
        trap.path().join("qemu-img"),
        trap.path().join("bin/qemu-img"),
    )
    .unwrap();
    std::fs::copy(
        trap.path().join("bin/qemu-img"),
        trap.path().join("qemu-img"),
    )
    .unwrap();
    for part in ["", ".", "bin", "./bin"] {
        let path = [link.path(), Path::new(part)];
        let got = by_name(&path, trap.path(), &["info", "x"]);
        assert_eq!((got.code, got.out.as_str()), (Some(1), ""), "'{part}'");
    }
    let path = [link.path(), Path::new(""), &trap.path().join("bin")];
    assert_eq!(by_name(&path, trap.path(), &["info", "x"]).code, Some(42));
}

#[test]
fn the_name_that_cloudstack_looks_for_serves_as_well() {
    let (folder, echo) = (image("names", "after-7"), echo());
    let cloud = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_qcow2-snapshot");
    std::os::unix::fs::symlink(program, cloud.path().join("cloud-qemu-img")).unwrap();
    let call = |words: &[&str]| {
        let path = std::env::join_paths([cloud.path(), echo.path()]).unwrap();
        said(
            Command::new("/bin/bash")
                .current_dir(folder.path())
                .env("PATH", path)
                .args(["-c", "exec -- cloud-qemu-img \"$@\"", "bash"])
                .args(words),
        )
    };
    let got = call(&["snapshot", "-l", "image.qcow2"]);
    let expected = common::ours(folder.path(), &["-l", "image.qcow2"]);
    assert_eq!((got.code, got.out), (expected.code, expected.out));
    // The rest goes to qemu-img.
    let got = call(&["convert", "-l", "x", "a", "b"]);
    assert_eq!(
        (got.code, got.out.as_str()),
        (Some(42), "<convert><-l><x><a><b>")
    );
}

#[test]
fn a_real_one_that_dpkg_has_put_aside_is_next() {
    let (link, echo, folder) = (link(), echo(), image("names", "after-7"));
    let aside = link.path().join("qemu-img.distrib");
    std::fs::rename(echo.path().join("qemu-img"), aside).unwrap();
    let got = by_name(&[link.path()], folder.path(), &["info", "image.qcow2"]);
    assert_eq!(
        (got.code, got.out.as_str()),
        (Some(42), "<info><image.qcow2>")
    );
}

/// What these programs run on the image `d` (docs/clients.md), to read and to change it.
const CLIENTS: [(&str, &str); 4] = [
    (
        "CloudStack, managesnapshot.sh",
        "qemu-img snapshot -c 'vm snap' d && qemu-img snapshot -U -l d | grep -c 'vm snap'
        qemu-img convert -U -f qcow2 -O qcow2 -l snapshot.name='vm snap' d out && qemu-img compare d out
        qemu-img snapshot -a 'vm snap' d && qemu-img snapshot -d 'vm snap' d
        qemu-img snapshot -l d | tail -n +3 | awk '{print $1}' | xargs -I {} qemu-img snapshot -d {} d
        qemu-img snapshot -l d",
    ),
    (
        "Proxmox VE, PVE/Storage/Plugin.pm, by absolute path",
        "qemu_img=$(command -v qemu-img)
        $qemu_img snapshot -c one $PWD/d && $qemu_img snapshot -a one $PWD/d && $qemu_img snapshot -d one $PWD/d
        $qemu_img info --output=json $PWD/d | grep -c vm-clock",
    ),
    (
        "Multipass, qemu_snapshot.cpp",
        "qemu-img snapshot -l d | grep -c @x; qemu-img snapshot -c @x d; qemu-img snapshot -l d | grep -c @x
        qemu-img snapshot -a @x d; qemu-img snapshot -d @x d; qemu-img snapshot -d @x d",
    ),
    (
        "Lima",
        "qemu-img snapshot -c t d; qemu-img snapshot -l d | awk '{print $1, $2}'
        qemu-img snapshot -a t d; qemu-img snapshot -d t d; qemu-img snapshot -a t d",
    ),
];

#[test]
fn the_command_lines_of_clients_do_what_they_do_with_qemu_img() {
    if qemu_img("the command lines of clients").is_none() {
        return;
    }
    let link = link();
    for (client, script) in CLIENTS {
        let [ours, theirs] = [Some(link.path()), None].map(|first| {
            let folder = image("names", "after-7");
            std::fs::rename(folder.path().join("image.qcow2"), folder.path().join("d")).unwrap();
            let mut path: Vec<_> = first.map(Path::to_owned).into_iter().collect();
            path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
            let script = format!("{script}\nqemu-img check d; qemu-img snapshot -l d");
            let mut bash = Command::new("/bin/bash");
            bash.current_dir(folder.path()).args(["-c", &script]);
            said(bash.env("PATH", std::env::join_paths(path).unwrap()))
        });
        assert_eq!(
            (ours.code, &ours.out),
            (theirs.code, &theirs.out),
            "{client}: {}",
            ours.err
        );
        assert!(
            ours.out.contains("No errors were found"),
            "{client}: {ours:?}"
        );
    }
}
