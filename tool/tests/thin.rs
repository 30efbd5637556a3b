//! `export` as qcow2: what a new file is like, and what is refused. That it holds the right disk is the
//! business of `chain.rs`.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::{ours, qemu_img, said, Said};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// In a folder: `i.qcow2` of 1 MiB with the snapshots "one" and "two" (2 MiB, with zeros and a compressed
/// cluster), and the disk of "one" as `one.raw` and `one.qcow2`.
fn folder(what: &str) -> Option<tempfile::TempDir> {
    qemu_img(what)?;
    let folder = tempfile::tempdir().unwrap();
    sh(
        folder.path(),
        "qemu-img create -q -f qcow2 i.qcow2 1M && qemu-io -c 'write -P 1 64k 192k' i.qcow2 &&
        qemu-img snapshot -c one i.qcow2 && qemu-img resize -q i.qcow2 2M &&
        qemu-io -c 'write -P 1 64k 64k' -c 'write -z 128k 64k' -c 'write -c -P 2 320k 64k' \
            -c 'write -P 3 1536k 64k' i.qcow2 && qemu-img snapshot -c two i.qcow2 &&
        qemu-img convert -l one -O qcow2 i.qcow2 one.qcow2 && qemu-img resize -q --shrink one.qcow2 1M &&
        qemu-img convert -O raw one.qcow2 one.raw",
    );
    Some(folder)
}

fn sh(folder: &Path, script: &str) -> Said {
    let made = said(Command::new("sh").args(["-ec", script]).current_dir(folder));
    assert_eq!(made.code, Some(0), "{made:?}");
    made
}

fn export(folder: &Path, words: &str) -> Said {
    let words: Vec<&str> = std::iter::once("export")
        .chain(words.split_whitespace())
        .collect();
    ours(folder, &words)
}

/// Everything in the folder, but what `folder` made.
fn made(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap();
    let names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
    let known = ["i.qcow2", "one.qcow2", "one.raw"];
    let mut names: Vec<_> = names.filter(|n| !known.contains(&n.as_str())).collect();
    names.sort();
    names
}

#[test]
fn an_overlay_holds_what_changed_and_nothing_else() {
    let Some(folder) = folder("an overlay") else {
        return;
    };
    let folder = folder.path();
    for (backing, format) in [("one.qcow2", "qcow2"), ("one.raw", "raw")] {
        let got = export(
            folder,
            &format!("--since one -b {backing} -F {format} i.qcow2 two {format}.out"),
        );
        assert_eq!(
            (got.code, got.out.as_str(), got.err.as_str()),
            (Some(0), "", "")
        );
        let map = sh(folder, &format!("qemu-img map --output=json {format}.out"));
        // Written anew, zeros, compressed, and behind the old end: the rest is the backing file's.
        let own: Vec<&str> = map
            .out
            .lines()
            .filter(|l| l.contains("\"depth\": 0"))
            .collect();
        let places: Vec<_> = own
            .iter()
            .map(|l| l.split(", \"depth\"").next().unwrap())
            .collect();
        assert_eq!(
            places
                .iter()
                .map(|p| p.trim_start_matches(['[', '{', ' ']))
                .collect::<Vec<_>>(),
            [
                "\"start\": 65536, \"length\": 65536",
                "\"start\": 131072, \"length\": 65536",
                "\"start\": 327680, \"length\": 65536",
                "\"start\": 1048576, \"length\": 524288",
                "\"start\": 1572864, \"length\": 65536",
                "\"start\": 1638400, \"length\": 458752",
            ],
            "{map:?}"
        );
        assert!(own[1].contains("\"zero\": true") && own[2].contains("\"compressed\": true"));
        let info = sh(folder, &format!("qemu-img info --output=json {format}.out")).out;
        assert!(info.contains(&format!("\"backing-filename\": \"{backing}\"")));
        assert!(info.contains(&format!("\"backing-filename-format\": \"{format}\"")));
        assert!(info.contains("\"virtual-size\": 2097152"));
    }
    // Nothing changed: nothing but tables.
    let got = export(folder, "--since one -b one.raw -F raw i.qcow2 one none");
    assert_eq!(got.code, Some(0), "{got:?}");
    assert_eq!(folder.join("none").metadata().unwrap().len(), 4 << 16);
}

#[test]
fn compressed_clusters_are_taken_over_byte_for_byte() {
    let Some(folder) = folder("compressed clusters") else {
        return;
    };
    let folder = folder.path();
    let number = |name: &str, field: &str| {
        let out = sh(folder, &format!("qemu-img check --output=json {name}")).out;
        let line = out.lines().find(|l| l.contains(field)).map(str::to_owned);
        line.unwrap_or_default()
    };
    let length = |name: &str| folder.join(name).metadata().unwrap().len();
    for (kind, cluster) in [
        ("zlib", 512),
        ("zlib", 4096),
        ("zlib", 1 << 16),
        ("zlib", 1 << 21),
    ]
    .into_iter()
    .chain([("zstd", 4096), ("zstd", 1 << 16)])
    {
        // What packs well and what does not, and a disk that ends within a cluster.
        sh(
            folder,
            &format!(
                "rm -f c.* plain && head -c 1000000 /dev/zero | tr '\\0' x > plain && seq 400000 >> plain &&
                head -c 300000 /dev/urandom >> plain && seq 500000 90 900000 | base64 >> plain && truncate -s 5000192 plain &&
                qemu-img convert -c -O qcow2 -o compression_type={kind},cluster_size={cluster} plain c.qcow2 &&
                qemu-img snapshot -c s c.qcow2"
            ),
        );
        let got = export(folder, "-O qcow2 c.qcow2 s c.out");
        assert_eq!((got.code, got.err.as_str()), (Some(0), ""));
        sh(
            folder,
            "qemu-img check -q c.out && qemu-img compare -q plain c.out",
        );
        let clusters = ["c.qcow2", "c.out"].map(|name| number(name, "\"compressed-clusters\""));
        assert_eq!(clusters[0], clusters[1], "{kind} {cluster}");
        // Not longer than what QEMU packed one behind the other.
        let (theirs, ours) = (length("c.qcow2"), length("c.out"));
        assert!(ours <= theirs, "{kind} {cluster}: {ours} {theirs}");
    }
    // Over another file, of another kind: those of the file behind are unpacked.
    sh(
        folder,
        "qemu-img create -q -f qcow2 -b c.qcow2 -F qcow2 o.qcow2 && qemu-io -c 'write -q -c -P 9 64k 64k' o.qcow2 &&
        qemu-img snapshot -c s o.qcow2 && qemu-img convert -O raw o.qcow2 o.raw",
    );
    assert_eq!(export(folder, "-O qcow2 o.qcow2 s o.out").code, Some(0));
    sh(
        folder,
        "qemu-img check -q o.out && qemu-img compare -q o.raw o.out",
    );
    assert!(number("o.out", "\"compressed-clusters\"").ends_with(" 1,"));
}

/// Large pieces go through as they were read; tables, refcount blocks and zeros between them do not shift them.
#[test]
fn data_in_order_is_in_order_whatever_stands_between() {
    let Some(folder) = folder("data in order") else {
        return;
    };
    let folder = folder.path();
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=2M",
        "cluster_size=64k,extended_l2=on",
    ] {
        // Beyond 8 MiB a second refcount block of 4-KiB clusters; a hole and zeros; a disk that ends within a cluster.
        sh(
            folder,
            &format!(
                "rm -f d.* plain && head -c 22000128 /dev/urandom > plain
                head -c 700000 /dev/zero | dd of=plain bs=1M seek=9 conv=notrunc 2> /dev/null
                qemu-img convert -O qcow2 -o {options} plain d.qcow2 && qemu-io -c 'write -q -z 15M 1M' d.qcow2 && qemu-img snapshot -c s d.qcow2 && qemu-img convert -O raw d.qcow2 plain"
            ),
        );
        let got = export(folder, "-O qcow2 d.qcow2 s d.out");
        assert_eq!((got.code, got.err.as_str()), (Some(0), ""), "{options}");
        sh(
            folder,
            "qemu-img check -q d.out && qemu-img compare -q -f raw -F qcow2 plain d.out",
        );
        let length = |name: &str| folder.join(name).metadata().unwrap().len();
        let (theirs, ours) = (length("d.qcow2"), length("d.out"));
        assert!(ours <= theirs, "{options}: {ours} {theirs}");
    }
}

/// They are not unpacked: what cannot be is carried on as it is, and found by whoever reads it.
#[test]
fn a_damaged_compressed_cluster_among_others_is_as_damaged_in_the_copy() {
    let Some(folder) = folder("a damaged cluster") else {
        return;
    };
    let folder = folder.path();
    sh(
        folder,
        "seq 400000 > plain && qemu-img convert -c -O qcow2 plain c.qcow2 && qemu-img snapshot -c s c.qcow2",
    );
    let path = folder.join("c.qcow2");
    let mut image = qcow2_snapshot::Image::open(&path, qcow2_snapshot::OpenFlags::read_only());
    let mut run = qcow2_snapshot::PackedRun::default();
    let image = image.as_mut().unwrap();
    assert_eq!(
        image.read_packed(0, 1 << 20, &mut run).unwrap(),
        1 << 20,
        "16 clusters"
    );
    let third = &run.bytes[run.clusters[2].range.clone()];
    let bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(third.len()).position(|w| w == third).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff; 8], at as u64).unwrap();
    let got = export(folder, "c.qcow2 s raw");
    assert_eq!(got.code, Some(1));
    assert!(
        got.err.contains("A compressed cluster is damaged"),
        "{got:?}"
    );
    assert_eq!(export(folder, "-O qcow2 c.qcow2 s c.out").code, Some(0));
    let failed = |name: &str, at: u64| {
        let read = format!("qemu-io -r -c 'read {at}k 64k' {name} 2>&1 | grep -c failed || true");
        sh(folder, &read).out
    };
    for name in ["c.qcow2", "c.out"] {
        let said = [64, 128, 192].map(|at| failed(name, at));
        assert_eq!(said, ["0\n", "1\n", "0\n"], "{name}");
    }
}

#[test]
fn all_is_a_chain_with_an_index() {
    let Some(folder) = folder("--all") else {
        return;
    };
    let folder = folder.path();
    assert_eq!(export(folder, "--all chain i.qcow2").code, Some(0));
    let index = std::fs::read_to_string(folder.join("chain/index.json")).unwrap();
    let python = "import json; a = json.load(open('chain/index.json')); \
        print([[s['id'], s['name'], s['filename'], s.get('backing-filename'), s['virtual-size']] for s in a])";
    if common::have("python3", "the index of --all") {
        let read = sh(folder, &format!("python3 -c \"{python}\""));
        let wanted = "[['1', 'one', '0001.qcow2', None, 1048576], \
            ['2', 'two', '0002.qcow2', '0001.qcow2', 2097152]]\n";
        assert_eq!(read.out, wanted, "{index}");
    }
    // The chain may be moved: names in it are relative.
    sh(
        folder,
        "mv chain elsewhere && qemu-img compare -q one.raw elsewhere/0001.qcow2",
    );
    sh(folder, "qemu-img convert -l two -O raw i.qcow2 two.raw && qemu-img compare -q two.raw elsewhere/0002.qcow2");
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &folder.join("elsewhere").metadata().unwrap().permissions(),
    );
    let plain = sh(folder, "mkdir plain && stat -c %a plain").out;
    assert_eq!(format!("{:o}\n", mode & 0o777), plain);

    sh(folder, "qemu-img create -q -f qcow2 empty.qcow2 1M");
    assert_eq!(export(folder, "--all none empty.qcow2").code, Some(0));
    assert_eq!(
        std::fs::read_to_string(folder.join("none/index.json")).unwrap(),
        "[\n]\n"
    );
}

#[test]
fn what_cannot_be_is_said_and_nothing_is_left() {
    let Some(folder) = folder("refusals of export") else {
        return;
    };
    let folder = folder.path();
    sh(
        folder,
        "qemu-img create -q -f qcow2 gone.qcow2 -u -b nowhere -F raw 1M && qemu-img create -q -f qcow2 o.qcow2 -u -b out -F qcow2 1M &&
        truncate -s 1048064 short && mkdir d",
    );
    let before = made(folder);
    for (words, text) in [
        (
            "--since one -b new/one.raw -F raw i.qcow2 two out",
            "No such file or directory",
        ),
        (
            "--since one -b out -F raw i.qcow2 two out",
            "it is the output itself",
        ),
        (
            "--since one -b ./d/../out -F raw i.qcow2 two ./out",
            "it is the output itself",
        ),
        (
            "--since one -b i.qcow2 -F qcow2 i.qcow2 two out",
            "it is the image itself",
        ),
        (
            "--since one -b d/../i.qcow2 -F raw i.qcow2 two out",
            "it is the image itself",
        ),
        (
            "--since one -b d -F raw i.qcow2 two out",
            "it is not a regular file",
        ),
        (
            "--since one -b nbd:x:1 -F raw i.qcow2 two out",
            "it is not a plain file name",
        ),
        (
            "--since one -b json:{} -F raw i.qcow2 two out",
            "it is not a plain file name",
        ),
        (
            "--since one -b short -F raw i.qcow2 two out",
            "its disk has 1048064 bytes and that of snapshot 'one' 1048576",
        ),
        (
            "--since one -b one.raw -F qcow2 i.qcow2 two out",
            "Image is not in qcow2 format",
        ),
        (
            "--since one -b gone.qcow2 -F qcow2 i.qcow2 two out",
            "'./nowhere'",
        ),
        ("--since one -b o.qcow2 -F qcow2 i.qcow2 two out", "'./out'"),
        (
            "--since three -b one.raw -F raw i.qcow2 two out",
            "snapshot 'three': Can't find snapshot",
        ),
        (
            "--since one -b one.raw -F raw i.qcow2 three out",
            "snapshot 'three': Can't find snapshot",
        ),
        (
            "--since one -b one.raw -F raw -O raw i.qcow2 two out",
            "'-O raw' does not go with them",
        ),
        ("--all new -O raw i.qcow2", "'-O raw' does not go with them"),
        ("--since one i.qcow2 two out", "--backing"),
        ("--since one -b one.raw i.qcow2 two out", "--backing-format"),
        ("-b one.raw -F raw i.qcow2 two out", "--since"),
        ("-O vmdk i.qcow2 two out", "possible values: raw, qcow2"),
        (
            "-O qcow2 i.qcow2 two -",
            "Only a raw disk can be written to the standard output",
        ),
        (
            "-O qcow2 i.qcow2 two one.raw",
            "Could not write 'one.raw': File exists",
        ),
        (
            "--since one -b one.raw -F raw i.qcow2 two one.qcow2",
            "Could not write 'one.qcow2': File exists",
        ),
        (
            "-O qcow2 i.qcow2 two new/out",
            "Could not write 'new/out': No such file or directory",
        ),
        ("--all d i.qcow2", "Could not write 'd': File exists"),
        ("--all new/d i.qcow2", "No such file or directory"),
        ("--all new i.qcow2 one out", "cannot be used with"),
    ] {
        let got = export(folder, words);
        assert_eq!((got.code, got.out.as_str()), (Some(1), ""), "{words}");
        assert!(
            got.err.starts_with("qcow2-snapshot: ") && got.err.contains(text),
            "{words}: {got:?}"
        );
        assert_eq!(made(folder), before, "{words}");
    }
    // In a header cluster of 512 bytes there is no room for every name.
    sh(folder, "qemu-img create -q -f qcow2 -o cluster_size=512 i512.qcow2 1M && qemu-img snapshot -c one i512.qcow2");
    let long = format!("./{}one.raw", "./".repeat(200));
    let got = export(
        folder,
        &format!("--since one -b {long} -F raw i512.qcow2 one out"),
    );
    assert!(
        got.err.contains("the backing file's name is too long"),
        "{got:?}"
    );
}

#[test]
fn a_full_disk_leaves_nothing() {
    let Some(folder) = folder("a full disk") else {
        return;
    };
    let folder = folder.path();
    sh(
        folder,
        "qemu-io -c 'write -P 5 0 2M' i.qcow2 && qemu-img snapshot -c three i.qcow2",
    );
    let tool = common::tool().display();
    let run = |script: &str| said(Command::new("sh").args(["-c", script]).current_dir(folder));
    let before = made(folder);
    for (words, name) in [
        ("-O qcow2 i.qcow2 three out", "out"),
        ("--since one -b one.raw -F raw i.qcow2 three out", "out"),
        ("--all out i.qcow2", "out"),
        ("i.qcow2 three out", "out"),
    ] {
        let got = run(&format!("ulimit -f 1024; {tool} export {words}"));
        let text = format!("qcow2-snapshot: Could not write '{name}': File too large\n");
        assert_eq!((got.code, got.err), (Some(1), text), "{words}");
        assert_eq!(made(folder), before, "{words}");
    }
    // And where the file system itself is full.
    let mount = "mkdir m && mount -t tmpfs -o size=1m none m";
    let able = run(&format!("unshare -rm sh -ec '{mount}'; rmdir m"));
    if !able.err.is_empty() {
        println!("SKIPPED: no file system can be mounted here: a full disk was not tested");
        return;
    }
    for words in [
        "-O qcow2 i.qcow2 three m/out",
        "--all m/out i.qcow2",
        "i.qcow2 three m/out",
    ] {
        let script = format!("{mount} && ! {tool} export {words} && ls -A m");
        let got = run(&format!("unshare -rm sh -ec '{script}'; rmdir m"));
        let text = "qcow2-snapshot: Could not write 'm/out': No space left on device\n";
        assert_eq!((got.out.as_str(), got.err.as_str()), ("", text), "{words}");
    }
}

/// Write bytes into the extra data or the ID of the first snapshot.
fn patch(image: &Path, at: u64, bytes: &[u8]) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(image)
        .unwrap();
    let mut offset = [0; 8];
    file.read_exact_at(&mut offset, 64).unwrap();
    file.write_all_at(bytes, u64::from_be_bytes(offset) + at)
        .unwrap();
}

#[test]
fn hostile_images_are_refused() {
    let Some(folder) = folder("hostile images") else {
        return;
    };
    let folder = folder.path();
    let before = made(folder);
    let image = folder.join("i.qcow2");
    let good = std::fs::read(&image).unwrap();
    let refused = |words: &str, text: &str| {
        let got = export(folder, words);
        assert_eq!((got.code, got.out.as_str()), (Some(1), ""), "{words}");
        assert!(got.err.contains(text), "{words}: {got:?}");
        assert_eq!(made(folder), before, "{words}");
    };
    // A disk of exabytes.
    patch(&image, 48, &(1u64 << 62).to_be_bytes());
    refused(
        "-O qcow2 i.qcow2 one out",
        "Could not write 'out': File too large",
    );
    refused("--all out i.qcow2", "Could not write 'out': File too large");
    refused(
        "--since two -b one.raw -F raw i.qcow2 one out",
        "its disk has",
    );
    // A file of that length is possible on tmpfs.
    if tempfile::tempfile_in(folder)
        .unwrap()
        .set_len(1 << 62)
        .is_err()
    {
        refused("i.qcow2 one out", "Could not write 'out': File too large");
    }
    std::fs::write(&image, &good).unwrap();
    // Two snapshots with one ID: which is meant?
    let entry = sh(folder, "qemu-img snapshot -l i.qcow2")
        .out
        .lines()
        .count();
    assert_eq!(entry, 4);
    patch(&image, 40 + 24, b"2");
    refused("--all out i.qcow2", "two of them have the ID '2'");
    std::fs::write(&image, &good).unwrap();
    // A damaged compressed cluster is not carried on into a backup.
    let map = sh(folder, "qemu-io -r -c 'read -P 2 320k 64k' i.qcow2").out;
    assert!(!map.contains("failed"));
    let stream = folder.join("i.qcow2");
    let bytes = std::fs::read(&stream).unwrap();
    let mut image =
        qcow2_snapshot::Image::open(&stream, qcow2_snapshot::OpenFlags::read_only()).unwrap();
    let mut run = qcow2_snapshot::PackedRun::default();
    let n = image.read_packed(320 << 10, 1 << 20, &mut run).unwrap();
    assert_eq!((n, run.clusters.len()), (64 << 10, 1));
    let packed = &run.bytes[run.clusters[0].range.clone()];
    image.close().unwrap();
    let at = bytes
        .windows(packed.len())
        .position(|w| w == packed)
        .unwrap();
    let file = std::fs::File::options().write(true).open(&stream).unwrap();
    file.write_all_at(&[0xff; 8], at as u64).unwrap();
    let text = "A compressed cluster is damaged (guest offset: 0x50000)";
    refused("-O qcow2 i.qcow2 two out", text);
    refused("--all out i.qcow2", text);
}

#[test]
fn ctrl_c_leaves_nothing_of_a_chain() {
    let Some(folder) = folder("Ctrl-C during --all") else {
        return;
    };
    let folder = folder.path();
    sh(
        folder,
        "rm i.qcow2 && qemu-img create -q -f qcow2 i.qcow2 256M && qemu-io -c 'write -P 7 0 256M' i.qcow2 &&
        qemu-img snapshot -c x i.qcow2",
    );
    for words in [
        &["--all", "out", "i.qcow2"][..],
        &["-O", "qcow2", "i.qcow2", "x", "out"],
    ] {
        let mut child = Command::new(common::tool())
            .current_dir(folder)
            .arg("export")
            .args(words)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while made(folder).is_empty() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        sh(folder, &format!("kill -s INT {}", child.id()));
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(130), "{ended:?}");
        assert_eq!(made(folder), Vec::<String>::new());
    }
}

/// What docs/keep.md shows is what happens.
#[test]
fn the_page_keep_says_what_its_commands_do() {
    if qemu_img("the commands of docs/keep.md").is_none() {
        return;
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/keep.md");
    let page = std::fs::read_to_string(page).unwrap();
    let blocks = page.split("```sh\n").skip(1);
    let script: String = blocks.map(|b| b.split("```").next().unwrap()).collect();
    assert!(script.lines().count() > 25);
    let wanted: Vec<&str> = script
        .lines()
        .filter_map(|l| l.split_once("# prints: "))
        .flat_map(|(_, text)| match text.contains("json") {
            true => text.split(' ').collect(),
            false => vec![text],
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let bin = common::tool().parent().unwrap().display();
    let path = std::env::var("PATH").unwrap_or_default();
    let got = said(
        Command::new("sh")
            .args(["-ec", &script])
            .env("PATH", format!("{bin}:{path}"))
            .env("LC_ALL", "C")
            .current_dir(folder.path()),
    );
    assert_eq!((got.code, got.err.as_str()), (Some(0), ""), "{got:?}");
    assert_eq!(got.out.lines().collect::<Vec<_>>(), wanted);
}
