//! `export` writes what `qemu-img convert -l` writes.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{cases, ours, prepare, qemu_img, said, unpacked};
use qcow2_snapshot::{Image, OpenFlags, Snapshot};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

fn leftovers(folder: &Path) -> Vec<String> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.contains("partial") || n == "out.raw")
        .collect()
}

#[test]
fn the_snapshots_of_the_reference_images_are_exported_as_by_qemu_img() {
    let Some(qemu) = qemu_img("export") else {
        return;
    };
    let mut exported = 0;
    for (name, path) in cases() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let images = prepare(&path, folder);
        for packed in [&images[images.len() / 2], images.last().unwrap()] {
            std::fs::write(folder.join("image.qcow2"), unpacked(packed)).unwrap();
            let Ok(mut image) = Image::open(&folder.join("image.qcow2"), OpenFlags::read_only())
            else {
                continue;
            };
            let size = image.length();
            let list = image.snapshot_list().map(<[_]>::to_vec).unwrap_or_default();
            image.close().unwrap();
            // One that shows the way is enough for each image; of equal IDs QEMU takes the first.
            let small = |s: &&Snapshot| s.disk_size.max(size) <= 64 << 20;
            for s in list.iter().filter(small).take(2) {
                let id = String::from_utf8_lossy(&s.id).into_owned();
                let (ours_out, theirs_out) = (folder.join("out.raw"), folder.join("qemu.raw"));
                let got = ours(folder, &["export", "--", "image.qcow2", &id, "out.raw"]);
                let expected = said(
                    Command::new(&qemu)
                        .current_dir(folder)
                        .args(["convert", "-l", &format!("snapshot.id={id}")])
                        .args(["-O", "raw", "image.qcow2", "qemu.raw"]),
                );
                assert_eq!(got.code, expected.code, "{name} {id}: {got:?} {expected:?}");
                if got.code != Some(0) {
                    assert_eq!(leftovers(folder), Vec::<String>::new(), "{name}");
                    continue;
                }
                assert_eq!(got.out + &got.err, "");
                let (a, b) = (
                    std::fs::read(&ours_out).unwrap(),
                    std::fs::read(&theirs_out).unwrap(),
                );
                assert_eq!(a.len() as u64, s.disk_size & !511, "{name}");
                // QEMU keeps the active disk's size.
                assert_eq!(b.len() as u64, size, "{name}");
                let n = a.len().min(b.len());
                assert!(a[..n] == b[..n], "{name}: snapshot {id}: contents differ");
                if a.len() == b.len() {
                    let blocks = |p: &Path| std::fs::metadata(p).unwrap().blocks();
                    // File systems count a little differently while data is on its way to the disk.
                    let (a, b) = (blocks(&ours_out), blocks(&theirs_out));
                    assert!(a <= b + 64, "{name}: not sparse: {a} {b}");
                }
                exported += 1;
                std::fs::remove_file(ours_out).unwrap();
                std::fs::remove_file(theirs_out).unwrap();
            }
        }
    }
    println!("{exported} snapshots exported");
    assert!(exported > 60);
}

#[test]
fn names_count_when_no_id_matches_and_files_are_not_overwritten() {
    let folder = common::image("names", "after-7");
    let folder = folder.path();
    let run = |words: &[&str]| {
        let got = ours(folder, &[&["export"], words].concat());
        (got.code, got.err)
    };
    assert_eq!(
        run(&["-q", "image.qcow2", "a b", "out.raw"]),
        (Some(0), String::new())
    );
    let first = std::fs::read(folder.join("out.raw")).unwrap();
    let exists = "qcow2-snapshot: Could not write 'out.raw': File exists\n".to_owned();
    assert_eq!(run(&["image.qcow2", "1", "out.raw"]), (Some(1), exists));
    assert!(first == std::fs::read(folder.join("out.raw")).unwrap());
    let (code, err) = run(&["image.qcow2", "1", "image.qcow2"]);
    assert_eq!((code, err.contains("File exists")), (Some(1), true));
    let (code, err) = run(&["image.qcow2", "nothing", "new.raw"]);
    assert_eq!(code, Some(1));
    assert_eq!(
        err,
        "qcow2-snapshot: Could not export snapshot 'nothing': Can't find snapshot\n"
    );
    let (code, err) = run(&["image.qcow2", "1", "no/folder/new.raw"]);
    assert_eq!(
        (code, err.contains("No such file or directory")),
        (Some(1), true),
        "{err}"
    );
    assert_eq!(run(&["-U", "image.qcow2", "1", "new.raw"]).0, Some(0));
    assert_eq!(run(&["image.qcow2", "1"]).0, Some(1));
    assert_eq!(run(&["--help"]), (Some(0), String::new()));
    // An image may have the name of a subcommand.
    std::fs::rename(folder.join("image.qcow2"), folder.join("export")).unwrap();
    assert!(ours(folder, &["export"]).out.starts_with("Snapshot list:"));
    assert!(ours(folder, &["-l", "export"])
        .out
        .starts_with("Snapshot list:"));
}

#[test]
fn ctrl_c_removes_the_partial_output() {
    let (Some(qemu), Ok(io)) = (
        qemu_img("Ctrl-C during export"),
        Command::new("qemu-io").arg("--version").output(),
    ) else {
        println!("SKIPPED: no qemu-io here: Ctrl-C during export was not tested");
        return;
    };
    assert!(io.status.success());
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let run = |program: &Path, words: &[&str]| {
        let got = said(Command::new(program).current_dir(folder).args(words));
        assert_eq!(got.code, Some(0), "{got:?}");
    };
    run(
        &qemu,
        &["create", "-q", "-f", "qcow2", "image.qcow2", "256M"],
    );
    run(
        Path::new("qemu-io"),
        &["-c", "write -P 7 0 256M", "image.qcow2"],
    );
    run(common::tool(), &["-c", "x", "image.qcow2"]);
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let mut child = Command::new(common::tool())
            .current_dir(folder)
            .args(["export", "image.qcow2", "x", "out.raw"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while leftovers(folder).is_empty() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        // The shell's own: the program is not everywhere.
        let kill = format!("kill -s {signal} {}", child.id());
        run(Path::new("sh"), &["-c", &kill]);
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(code), "{ended:?}");
        assert_eq!(leftovers(folder), Vec::<String>::new());
    }
    run(common::tool(), &["export", "image.qcow2", "x", "out.raw"]);
    assert_eq!(
        std::fs::metadata(folder.join("out.raw")).unwrap().len(),
        256 << 20
    );
}

#[test]
fn a_dash_is_the_standard_output() {
    let folder = common::image("names", "after-7");
    let folder = folder.path();
    let run = |out: &str| {
        let mut command = Command::new(common::tool());
        command.args(["export", "image.qcow2", "1", out]);
        command.current_dir(folder).output().unwrap()
    };
    let piped = run("-");
    assert_eq!((piped.status.code(), piped.stderr), (Some(0), vec![]));
    assert!(!folder.join("-").exists());
    assert_eq!(run("./-").status.code(), Some(0));
    let file = std::fs::read(folder.join("-")).unwrap();
    assert!(!file.is_empty() && file == piped.stdout);

    // A reader that has gone has not got the disk.
    let mut reader = Command::new("true").stdin(Stdio::piped()).spawn().unwrap();
    let writer = reader.stdin.take().unwrap();
    reader.wait().unwrap();
    let mut command = Command::new(common::tool());
    command.args(["export", "image.qcow2", "1", "-"]);
    let gone = said(command.current_dir(folder).stdout(writer));
    let words = "qcow2-snapshot: Could not write the output: Broken pipe\n";
    assert_eq!((gone.code, gone.err.as_str()), (Some(1), words));
}

/// `export/no_links.c`: as on a file system that can neither link nor rename without replacing.
#[test]
fn a_finished_copy_gets_its_name_on_every_file_system() {
    if !common::have("cc", "export to a file system without links") {
        return;
    }
    let folder = common::image("names", "after-7");
    let folder = folder.path();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/export/no_links.c");
    let made = Command::new("cc")
        .args(["-Wall", "-Werror", "-o"])
        .args([&folder.join("no_links"), &source])
        .status();
    assert!(made.unwrap().success());
    let run = |words: &[&str]| said(Command::new("./no_links").current_dir(folder).args(words));
    let able = run(&["ln", "image.qcow2", "link"]);
    if able.code == Some(77) {
        println!("SKIPPED: no seccomp here: export to a file system without links was not tested");
        return;
    }
    assert_eq!(able.code, Some(1), "links still work: {able:?}");
    let tool = common::tool().to_str().unwrap();
    let export = [tool, "export", "image.qcow2", "1", "out.raw"];
    let got = run(&export);
    assert_eq!((got.code, got.err.as_str()), (Some(0), ""));
    assert!(std::fs::metadata(folder.join("out.raw")).unwrap().len() > 0);
    // And still nobody's file is replaced.
    std::fs::write(folder.join("out.raw"), "mine").unwrap();
    assert!(run(&export).err.contains("File exists"));
    assert_eq!(std::fs::read(folder.join("out.raw")).unwrap(), b"mine");
    let partial: Vec<_> = leftovers(folder);
    assert_eq!(partial, ["out.raw"]);
}

/// A snapshot's blocks are shared with the copy where the file system can do that, and the bytes are the same.
#[test]
fn on_a_file_system_with_reflinks_blocks_are_shared() {
    if !common::have("mkfs.xfs", "sharing blocks") || qemu_img("sharing blocks").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let tool = common::tool().display();
    let sh = |script: &str| {
        said(
            Command::new("unshare")
                .args(["-m", "sh", "-ec", script])
                .current_dir(folder),
        )
    };
    let mount =
        "rm -rf fs m && truncate -s 400M fs && mkfs.xfs -q -m reflink=1 fs && mkdir -p m && mount -o loop fs m";
    let able = sh(mount);
    if able.code != Some(0) {
        println!("SKIPPED: no XFS can be mounted here: sharing blocks was not tested");
        return;
    }
    // Data in two files and compressed, zeros, a disk that ends within a cluster, clusters that are no blocks.
    let script = format!(
        "{mount}; cd m
        qemu-img create -q -f raw base 50000384 && qemu-io -f raw -c 'write -q -P 7 0 30M' base
        qemu-img create -q -f qcow2 -b base -F raw i.qcow2 100000256 && qemu-io -c 'write -q -P 1 20M 60M' \
            -c 'write -q -z 25M 1M' -c 'write -q -P 4 95M 512' i.qcow2 && qemu-io -c 'write -q -c -P 5 90M 64k' i.qcow2
        {tool} -c x i.qcow2 && qemu-io -c 'write -q -P 2 30M 1M' i.qcow2
        qemu-img create -q -f qcow2 -o cluster_size=1k small 3M && qemu-io -c 'write -q -P 8 1k 2M' small && {tool} -c x small
        used() {{ sync; df -k . | tail -1 | awk '{{ print $3 }}'; }}
        a=$(used); {tool} export i.qcow2 x shared; b=$(used)
        {tool} export --no-reflink i.qcow2 x copied; c=$(used)
        cmp shared copied; qemu-img convert -l x -O raw i.qcow2 theirs; cmp shared theirs
        echo $((b - a)) $((c - b))
        {tool} export small x s && qemu-img compare -q -f qcow2 -F raw small s
        ! {tool} export i.qcow2 x shared 2> /dev/null"
    );
    let got = sh(&script);
    assert_eq!((got.code, got.err.as_str()), (Some(0), ""), "{got:?}");
    let taken: Vec<i64> = got
        .out
        .split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect();
    // In KiB: 80 MiB of data.
    assert!(taken[0] < 4 << 10 && taken[1] > 70 << 10, "{taken:?}");
}
