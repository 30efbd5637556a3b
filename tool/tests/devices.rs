//! Images on block devices: what is said and done is what qemu-img says and does.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "../../tests/devices/loop_device.rs"]
mod loop_device;

use common::{assert_says, image, link, ours, qemu_img, said, theirs};
use loop_device::{have_devices, LoopDevice};
use std::process::Command;

/// What is called, and whether the device may be written. `DEVICE` stands for its path.
const CALLS: &[(&[&str], bool)] = &[
    (&["-l", "DEVICE"], true),
    (&["-l", "DEVICE"], false),
    (&["-c", "x", "DEVICE"], true),
    (&["-c", "x", "DEVICE"], false),
    (&["-a", "2", "DEVICE"], true),
    (&["-d", "twin", "DEVICE"], true),
    (&["-a", "nothing", "DEVICE"], true),
    (&["-l", "host_device:DEVICE"], true),
    (&["-d", "twin", "host_device:DEVICE"], true),
    (&["-l", "file:DEVICE"], true),
    (&["-c", "x", "file:DEVICE"], true),
    (&["-l", "host_device:image.qcow2"], true),
    (&["-l", "host_device:nothing"], true),
    (&["-c", "x", "-f", "host_device", "DEVICE"], true),
    (&["-c", "x", "-f", "raw", "DEVICE"], true),
    (&["-l", "-f", "host_device", "DEVICE"], true),
    (
        &["-l", "--image-opts", "driver=qcow2,file.filename=DEVICE"],
        true,
    ),
    (
        &[
            "-a",
            "2",
            "--image-opts",
            "driver=qcow2,file.driver=host_device,file.filename=DEVICE",
        ],
        true,
    ),
    (
        &[
            "-l",
            "--image-opts",
            "driver=qcow2,file.driver=file,file.filename=DEVICE",
        ],
        true,
    ),
    (
        &[
            "-l",
            "--image-opts",
            "driver=qcow2,file.driver=host_device,file.filename=image.qcow2",
        ],
        true,
    ),
];

fn device(bytes: &[u8], more: u64, writable: bool) -> LoopDevice {
    let options: &[&str] = if writable { &[] } else { &["--read-only"] };
    let length = (bytes.len() as u64).next_multiple_of(512) + more;
    LoopDevice::with(bytes, length, options)
}

fn named(call: &[&str], device: &LoopDevice) -> Vec<String> {
    call.iter()
        .map(|word| word.replace("DEVICE", device.name()))
        .collect()
}

#[test]
fn on_a_device_the_same_is_said_as_by_qemu_img() {
    let what = "what is said of images on block devices";
    let Some(qemu) = qemu_img(what).filter(|_| have_devices(what)) else {
        return;
    };
    let folder = image("names", "after-7");
    let bytes = std::fs::read(folder.path().join("image.qcow2")).unwrap();
    for (call, writable) in CALLS {
        let (a, b) = (
            device(&bytes, 1 << 20, *writable),
            device(&bytes, 1 << 20, *writable),
        );
        let mut expected = theirs(&qemu, folder.path(), &named(call, &a));
        expected.err = expected.err.replace(a.name(), b.name());
        let got = ours(folder.path(), &named(call, &b));
        assert_says(&got, &expected, "qcow2-snapshot: ", call);
        if !call.contains(&"-c") || expected.code != Some(0) {
            assert!(a.bytes() == b.bytes(), "{call:?}: the devices differ");
        }
    }
    // No room.
    let (a, b) = (device(&bytes, 0, true), device(&bytes, 0, true));
    let call = &["-c", "x", "DEVICE"];
    let expected = theirs(&qemu, folder.path(), &named(call, &a));
    assert!(expected.err.contains("No space left"), "{expected:?}");
    let got = ours(folder.path(), &named(call, &b));
    assert_says(&got, &expected, "qcow2-snapshot: ", call);
    assert!(got.err.contains("but its block device ends at"), "{got:?}");
    // A device that holds something else.
    let (a, b) = (device(&[0; 512], 0, true), device(&[0; 512], 0, true));
    for call in [&["-l", "DEVICE"][..], &["-c", "x", "DEVICE"]] {
        let mut expected = theirs(&qemu, folder.path(), &named(call, &a));
        expected.err = expected.err.replace(a.name(), b.name());
        let got = ours(folder.path(), &named(call, &b));
        assert_says(&got, &expected, "qcow2-snapshot: ", &call);
    }
}

#[test]
fn a_revert_that_could_not_be_atomic_says_so() {
    if !have_devices("what is said of a revert without room for a temporary L1 table") {
        return;
    }
    let folder = image("resize-4k", "before");
    let bytes = std::fs::read(folder.path().join("image.qcow2")).unwrap();
    for call in [&["revert", "DEVICE", "1"][..], &["-a", "1", "DEVICE"]] {
        let full = device(&bytes, 0, true);
        let got = ours(folder.path(), &named(call, &full));
        assert_eq!((got.code, got.out.as_str()), (Some(0), ""), "{got:?}");
        assert!(got.err.contains("L1 table was written in place"), "{got:?}");
        let roomy = device(&bytes, 1 << 20, true);
        let got = ours(folder.path(), &named(call, &roomy));
        assert_eq!((got.code, got.err.as_str()), (Some(0), ""), "{got:?}");
    }
}

#[test]
fn export_and_the_link_serve_devices() {
    let what = "export and the link with images on block devices";
    let Some(qemu) = qemu_img(what).filter(|_| have_devices(what)) else {
        return;
    };
    let (folder, link) = (image("names", "after-7"), link());
    let bytes = std::fs::read(folder.path().join("image.qcow2")).unwrap();
    let device = device(&bytes, 1 << 20, true);
    // Nobody else is there to hand the call on to.
    let by_name = |args: &[&str]| {
        said(
            Command::new(link.path().join("qemu-img"))
                .env("PATH", link.path())
                .arg("snapshot")
                .args(args),
        )
    };
    let got = by_name(&["-c", "from the link", device.name()]);
    assert_eq!((got.code, got.err.as_str()), (Some(0), ""));
    let got = by_name(&["-l", device.name()]);
    assert!(got.out.contains("from the link"), "{got:?}");

    let got = ours(
        folder.path(),
        &["export", device.name(), "from the link", "ours"],
    );
    assert_eq!((got.code, got.err.as_str()), (Some(0), ""));
    let convert = said(
        Command::new(qemu)
            .current_dir(folder.path())
            .args(["convert", "-O", "raw", "-l", "snapshot.name=from the link"])
            .args([device.name(), "theirs"]),
    );
    assert_eq!(convert.code, Some(0), "{convert:?}");
    let read = |name| std::fs::read(folder.path().join(name)).unwrap();
    assert!(read("ours") == read("theirs"));
}
