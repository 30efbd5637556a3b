//! `--no-lock`, and calls without standard descriptors.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{image, link, ours, said, tool, Said};
use qcow2_snapshot::{Image, OpenFlags};
use std::process::Command;

#[test]
fn an_image_is_opened_without_locks_when_that_is_asked_for() {
    let folder = image("names", "after-7");
    let path = folder.path().join("image.qcow2");
    let free = ours(folder.path(), &["-l", "image.qcow2"]);
    assert_eq!(free.code, Some(0), "{free:?}");
    let held = Image::open(&path, OpenFlags::RDWR).unwrap();
    let refused = |got: Said| {
        assert_eq!(got.code, Some(1), "{got:?}");
        assert!(got.err.contains("Is another process using"), "{got:?}");
    };
    refused(ours(folder.path(), &["-l", "image.qcow2"]));
    refused(ours(folder.path(), &["-c", "x", "image.qcow2"]));
    refused(ours(folder.path(), &["export", "image.qcow2", "1", "out"]));
    let auto = "driver=qcow2,file.filename=image.qcow2,file.locking=auto";
    refused(ours(folder.path(), &["-l", "--image-opts", auto]));

    assert_eq!(
        ours(folder.path(), &["--no-lock", "-l", "image.qcow2"]),
        free
    );
    assert_eq!(
        ours(folder.path(), &["-U", "--no-lock", "image.qcow2"]),
        free
    );
    let off = "driver=qcow2,file.filename=image.qcow2,file.locking=off";
    assert_eq!(ours(folder.path(), &["-l", "--image-opts", off]), free);
    for args in [
        &["export", "--no-lock", "image.qcow2", "1", "out"][..],
        &["--no-lock", "-c", "x", "image.qcow2"],
    ] {
        let got = ours(folder.path(), args);
        assert_eq!(got.code, Some(0), "{got:?}");
    }
    held.close().unwrap();
    assert!(folder.path().join("out").exists());
    let after = ours(folder.path(), &["-l", "image.qcow2"]).out;
    assert_eq!(after.lines().count(), free.out.lines().count() + 1);
}

#[test]
fn under_the_name_qemu_img_there_is_no_such_option() {
    let (folder, link) = (image("names", "after-7"), link());
    let got = said(
        Command::new(link.path().join("qemu-img"))
            .env("PATH", link.path())
            .current_dir(folder.path())
            .args(["snapshot", "--no-lock", "-l", "image.qcow2"]),
    );
    assert_eq!(got.code, Some(1), "{got:?}");
    assert!(
        got.err.contains("unrecognized option '--no-lock'"),
        "{got:?}"
    );
}

#[test]
fn messages_do_not_go_into_the_image_when_no_standard_descriptor_is_open() {
    let folder = image("names", "after-7");
    let path = folder.path().join("image.qcow2");
    let before = std::fs::read(&path).unwrap();
    for args in ["-l image.qcow2", "-d nothing image.qcow2"] {
        let script = format!("exec \"$0\" {args} <&- >&- 2>&-");
        said(
            Command::new("sh")
                .current_dir(folder.path())
                .args(["-c", &script])
                .arg(tool()),
        );
        assert!(std::fs::read(&path).unwrap() == before, "{args}");
    }
}
