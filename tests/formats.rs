//! Files in formats that are not read here: they are known as QEMU knows them, and never taken for
//! raw disks.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "abi/toolbox.rs"]
mod toolbox;

use qcow2_snapshot::format::probe::{probe, PROBE_BYTES};
use qcow2_snapshot::{Image, OpenFlags};
use std::path::Path;
use std::process::Command;

fn qemu_img(dir: &Path, args: &[&str]) -> Option<(bool, String)> {
    let mut command = Command::new("qemu-img");
    let out = toolbox::run(
        command.current_dir(dir).args(args),
        "formats as qemu-img knows them",
    )?;
    Some((
        out.status.success(),
        String::from_utf8_lossy(&out.stdout).into(),
    ))
}

/// What qemu-img takes a file for; `None` if it is a format whose header does not convince it.
fn as_qemu_says(dir: &Path, name: &str) -> Option<String> {
    let (good, text) = qemu_img(dir, &["info", name])?;
    let line = text.lines().find_map(|l| l.strip_prefix("file format: "));
    line.filter(|_| good).map(str::to_owned)
}

fn ours(path: &Path) -> &'static str {
    let mut head = std::fs::read(path).unwrap();
    head.truncate(PROBE_BYTES);
    probe(&head, path.as_os_str().as_encoded_bytes())
}

/// An image of each format and kind that this qemu-img can create: its file's name.
fn create_all(dir: &Path) -> Option<Vec<String>> {
    let (_, help) = qemu_img(dir, &["--help"])?;
    let list = help.split("Supported image formats:").nth(1).unwrap();
    let list = list.split("\n\n").find(|part| !part.trim().is_empty());
    let mut made = Vec::new();
    let mut create = |format: &str, options: &str| {
        let name = format!("{format}.{options}").replace(['=', ','], "-");
        let mut args = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        if format == "luks" {
            args.extend(["--object", "secret,id=s,data=abc"]);
        }
        args.extend([name.as_str(), "1M"]);
        if qemu_img(dir, &args).is_some_and(|(good, _)| good) {
            made.push(name);
        }
    };
    for format in list.unwrap().split_whitespace() {
        // Protocols are no formats of a file; these would ask others.
        if ["file", "host_device", "nbd", "ssh"].contains(&format) {
            continue;
        }
        match format {
            "luks" => create(format, "key-secret=s,iter-time=10"),
            _ => create(format, ""),
        }
    }
    for kind in [
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "streamOptimized",
    ] {
        create("vmdk", &format!("subformat={kind}"));
    }
    for format in ["vpc", "vhdx"] {
        create(format, "subformat=fixed");
    }
    create("vdi", "static=on");
    assert!(made.len() >= 15, "{made:?}");
    Some(made)
}

/// Take the backing format out of an image: its extension becomes one that nobody knows.
fn forget_format(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(4).position(|w| w == b"\xe2\x79\x2a\xca");
    bytes[at.unwrap()..][..4].copy_from_slice(b"none");
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_backing_file_in_another_format_is_never_read_as_raw() {
    let dir = tempfile::tempdir().unwrap();
    let Some(files) = create_all(dir.path()) else {
        return;
    };
    let run = |args: &[&str]| assert!(qemu_img(dir.path(), args).unwrap().0, "{args:?}");
    let top = dir.path().join("top.qcow2");
    // The disk was of 2 MiB when the snapshot was taken: going back shows more of the backing file.
    run(&["create", "-q", "-f", "raw", "base", "2M"]);
    run(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base",
        "-F",
        "raw",
        "template.qcow2",
    ]);
    run(&["snapshot", "-c", "large", "template.qcow2"]);
    run(&["resize", "-q", "--shrink", "template.qcow2", "512k"]);
    let mut refused = Vec::new();
    for file in files {
        let format = file.split('.').next().unwrap();
        let probed = as_qemu_says(dir.path(), &file).unwrap();
        assert_eq!(ours(&dir.path().join(&file)), probed, "{file}");
        for recorded in [true, false] {
            std::fs::copy(dir.path().join("template.qcow2"), &top).unwrap();
            run(&["rebase", "-u", "-b", &file, "-F", format, "top.qcow2"]);
            if !recorded {
                forget_format(&top);
            }
            let named = if recorded { format } else { &probed };
            let mut image = Image::open(&top, OpenFlags::RDWR).unwrap();
            let results = [
                image.read(0, &mut [0; 512]),
                image.block_status(0, 512).map(|_| ()),
                image.snapshot_goto(b"large"),
            ];
            if ["raw", "qcow2"].contains(&named) {
                for result in results {
                    result.unwrap();
                }
                continue;
            }
            for result in results {
                let e = result.unwrap_err();
                let words = e.to_string();
                assert_eq!(e.errno(), libc::ENOTSUP, "{file}: {words}");
                assert!(words.contains(&format!("'{named}'")), "{file}: {words}");
                assert!(words.contains(&format!("'{file}'")), "{file}: {words}");
            }
            refused.push(format!("{named} {recorded}"));
            assert_eq!(image.length(), 512 << 10);
        }
    }
    for format in [
        "vmdk",
        "vdi",
        "vpc",
        "vhdx",
        "qed",
        "parallels",
        "qcow",
        "luks",
    ] {
        for recorded in [true, false] {
            assert!(
                refused.contains(&format!("{format} {recorded}")),
                "{refused:?}"
            );
        }
    }
}

#[test]
fn first_bytes_mean_what_they_mean_to_qemu_img() {
    let dir = tempfile::tempdir().unwrap();
    let bochs = |version: &[u8]| {
        let mut head = vec![0; 64];
        head[..22].copy_from_slice(b"Bochs Virtual HD Image");
        head[32..39].copy_from_slice(b"Redolog");
        head[48..55].copy_from_slice(b"Growing");
        head.extend_from_slice(version);
        head
    };
    let cloop =
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
    let mut vdi = vec![0; 64];
    vdi.extend_from_slice(b"\x7f\x10\xda\xbe");
    let long = |n: usize, end: &str| [vec![b'#'; n], end.as_bytes().to_vec()].concat();
    let heads: Vec<Vec<u8>> = vec![
        bochs(b"\0\0\x01\0"),
        bochs(b"\0\0\x02\0"),
        bochs(b"\0\0\x03\0"),
        cloop.to_vec(),
        cloop[..30].to_vec(),
        vdi,
        long(501, "\nversion=1\n"),
        long(502, "\nversion=1\n"),
        long(600, ""),
    ]
    .into_iter()
    .chain(
        [
            b"WithoutFreeSpace\x02\0\0\0".as_slice(),
            b"WithoutFreeSpace\x01\0\0\0",
            b"WithouFreSpacExt\x02\0\0\0",
            b"WithouFreSpacExt",
            b"LUKS\xba\xbe\0\x01",
            b"LUKS\xba\xbe\0\x02",
            b"LUKS\xba\xbe",
            b"QFI\xfb",
            b"QFI\xfb\0\0\0\x01",
            b"QFI\xfb\0\0\0\x02",
            b"QFI\xfb\xff\0\0\0",
            b"QED\0",
            b"QED",
            b"vhdxfile",
            b"vhdxfil",
            b"conectix",
            b"KDMV",
            b"COWD",
            b"# Disk DescriptorFile\nversion=1\n",
            b"# Disk DescriptorFile\nversion=4\n",
            b"# Disk DescriptorFile\n",
            b"version=2\n",
            b"version=3\r\n",
            b"version=3\r",
            b"version=3",
            b"#x\n  \n  \r\nversion=1\n",
            b"\nversion=1\n",
            b"\r\nversion=1\n",
            b"#\n\nversion=1\n",
            b"#!/bin/sh\nversion=1\n",
            b"   x\nversion=1\n",
        ]
        .map(<[u8]>::to_vec),
    )
    .collect();
    let mut raw = 0;
    for head in heads {
        for (name, length) in [("long.img", 65536), ("short.img", head.len())] {
            let mut bytes = head.clone();
            bytes.resize(length.max(bytes.len()), 0);
            std::fs::write(dir.path().join(name), bytes).unwrap();
            if qemu_img(dir.path(), &["--version"]).is_none() {
                return;
            }
            // Without more than these bytes no format opens; raw always does.
            let is_raw = as_qemu_says(dir.path(), name).as_deref() == Some("raw");
            let got = ours(&dir.path().join(name));
            let text = String::from_utf8_lossy(&head);
            assert_eq!(got == "raw", is_raw, "{got}: {text:?} in {name}");
            raw += usize::from(is_raw);
        }
    }
    assert!(raw > 20);
}
