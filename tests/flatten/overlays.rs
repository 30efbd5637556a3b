//! Overlays with snapshots, made by qemu-img and qemu-io alone.

use super::rng::Rng;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a tool prints, if it must succeed.
pub fn tool(dir: &Path, program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).current_dir(dir).output();
    let out = out.unwrap();
    let (said, wrong) = (
        String::from_utf8_lossy(&out.stdout).into_owned(),
        String::from_utf8_lossy(&out.stderr).into_owned(),
    );
    assert!(out.status.success(), "{program} {args:?}: {said}{wrong}");
    said
}

/// One qemu-io with these commands; what it refuses (past the end, say) is left out.
pub fn io(dir: &Path, file: &str, commands: &[String]) {
    if commands.is_empty() {
        return;
    }
    let mut args = vec!["-d", "unmap"];
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(file);
    let out = Command::new("qemu-io")
        .args(&args)
        .current_dir(dir)
        .output();
    assert!(out.unwrap().status.code().is_some());
}

pub struct Overlay {
    pub dir: tempfile::TempDir,
    /// What was done, for who wants to do it again.
    pub story: String,
}

impl Overlay {
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("o.qcow2")
    }

    /// Nothing is left that the image could read through.
    pub fn without_bases(&self) {
        for name in ["base", "middle.qcow2"] {
            let _ = std::fs::remove_file(self.dir.path().join(name));
        }
    }
}

/// A scratch folder, in memory where there is such a place.
pub fn scratch() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    let made = tempfile::Builder::new().prefix("flatten.").tempdir_in(shm);
    made.unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// Writes of all kinds below `end`.
fn writes(
    rng: &mut Rng,
    n: u64,
    end: u64,
    cluster: u64,
    byte: &mut u64,
    compressed: bool,
) -> Vec<String> {
    let mut all = vec![];
    for _ in 0..n {
        let at = rng.below(end / 512 + 1) * 512;
        let most = cluster * 3;
        let len = (rng.below(most / 512) + 1) * 512;
        let whole = (at / cluster * cluster, len.div_ceil(cluster) * cluster);
        *byte = *byte % 250 + 1;
        all.push(match rng.below(10) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -z -u {} {}", whole.0, whole.1),
            2 => format!("discard {} {}", whole.0, whole.1),
            3 if compressed => format!("write -c -P {byte} {} {cluster}", whole.0),
            _ => format!("write -P {byte} {at} {len}"),
        });
    }
    all
}

/// Does the tool do it?
fn does(dir: &Path, program: &str, args: &[&str]) -> bool {
    let out = Command::new(program).args(args).current_dir(dir).output();
    out.unwrap().status.success()
}

/// A random overlay with up to six snapshots.
pub fn random(seed: u64) -> Overlay {
    made(seed, None)
}

/// One whose counts have a bit or two, as far as qemu-img takes snapshots of such.
pub fn narrow(seed: u64) -> Overlay {
    made(seed, Some(1 + seed % 2))
}

/// VM state is as long as the snapshot's name says.
pub fn vm_bytes(name: &[u8]) -> usize {
    let name = String::from_utf8_lossy(name);
    name.split_once("-vm")
        .map_or(0, |(_, n)| n.parse().unwrap())
}

fn made(seed: u64, narrow: Option<u64>) -> Overlay {
    let mut rng = Rng::new(seed);
    let dir = scratch();
    let d = dir.path();
    let mut story = format!("seed {seed}\n");
    let bits = *rng.pick(&[9u64, 9, 10, 12, 12, 14, 16]);
    let extended = bits >= 14 && rng.below(2) == 0 && narrow.is_none();
    let cluster = 1u64 << bits;
    let size = match bits {
        9 => 20_000 + rng.below(100_000),
        10 => 50_000 + rng.below(400_000),
        12 => 100_000 + rng.below(5_000_000),
        _ => 300_000 + rng.below(2_000_000),
    } / 512
        * 512;
    let v2 = !extended && rng.below(8) == 0 && narrow.is_none();
    let width = if v2 {
        16
    } else {
        narrow.unwrap_or(*rng.pick(&[8, 16, 16, 32, 64, 4]))
    };
    let around = |rng: &mut Rng| match rng.below(3) {
        0 => size,
        1 => (size * (rng.below(90) + 10) / 100) / 512 * 512,
        _ => size + rng.below(size) / 512 * 512,
    };
    let mut byte = rng.below(200);

    // What is behind it: raw or qcow2, perhaps another between.
    let (below, raw) = (around(&mut rng), rng.below(2) == 0);
    let format = if raw { "raw" } else { "qcow2" };
    tool(
        d,
        "qemu-img",
        &["create", "-q", "-f", format, "base", &below.to_string()],
    );
    let n = 3 + rng.below(12);
    io_of(
        d,
        format,
        "base",
        &writes(&mut rng, n, below, cluster * 4, &mut byte, false),
    );
    let mut behind = ("base", format);
    if rng.below(3) == 0 {
        let length = around(&mut rng).to_string();
        let args = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base",
            "-F",
            format,
            "middle.qcow2",
            &length,
        ];
        tool(d, "qemu-img", &args);
        let n = rng.below(6);
        io(
            d,
            "middle.qcow2",
            &writes(&mut rng, n, size, cluster * 2, &mut byte, false),
        );
        behind = ("middle.qcow2", "qcow2");
    }
    let options = if v2 {
        format!("compat=0.10,cluster_size={cluster}")
    } else {
        let extended = if extended { "on" } else { "off" };
        format!("cluster_size={cluster},refcount_bits={width},extended_l2={extended}")
    };
    story += &format!("{options}, {size} bytes over {behind:?}, base of {below}\n");
    let text = size.to_string();
    let args = [
        "create", "-q", "-f", "qcow2", "-o", &options, "-b", behind.0, "-F", behind.1, "o.qcow2",
        &text,
    ];
    tool(d, "qemu-img", &args);
    let mut now = size;
    let mut taken: Vec<String> = vec![];
    if narrow.is_some() {
        // With nothing in it, which shares nothing.
        for n in 0..rng.below(3) {
            let name = format!("s{n}");
            tool(d, "qemu-img", &["snapshot", "-c", &name, "o.qcow2"]);
            story += &format!("snapshot {name}\n");
            taken.push(name);
        }
    }
    for _ in 0..2 + rng.below(7) {
        match rng.below(8) {
            0..=2 => {
                let n = 1 + rng.below(6);
                let commands = writes(&mut rng, n, now, cluster, &mut byte, true);
                story += &format!("{}\n", commands.join("; "));
                io(d, "o.qcow2", &commands);
            }
            3..=5 if taken.len() < 6 => {
                let mut name = format!("s{}", taken.len());
                if rng.below(4) == 0 {
                    let bytes = (1 + rng.below(2 * cluster / 512)) * 512;
                    byte = byte % 250 + 1;
                    let command = format!("write -b -P {byte} 0 {bytes}");
                    story += &format!("{command}\n");
                    io(d, "o.qcow2", &[command]);
                    name += &format!("-vm{bytes}");
                }
                let args = ["snapshot", "-c", &name, "o.qcow2"];
                if does(d, "qemu-img", &args) {
                    story += &format!("snapshot {name}\n");
                    taken.push(name);
                } else {
                    assert!(narrow.is_some(), "{name}\n{story}");
                }
            }
            6 if !v2 => {
                now = around(&mut rng);
                story += &format!("resize {now}\n");
                tool(
                    d,
                    "qemu-img",
                    &["resize", "-q", "--shrink", "o.qcow2", &now.to_string()],
                );
            }
            _ if !taken.is_empty() && rng.below(2) == 0 => {
                let name = rng.pick(&taken).clone();
                let args = ["snapshot", "-a", &name, "o.qcow2"];
                if does(d, "qemu-img", &args) {
                    story += &format!("apply {name}\n");
                } else {
                    assert!(narrow.is_some(), "{name}\n{story}");
                }
                now = virtual_size(d, "o.qcow2");
            }
            _ => {}
        }
    }
    if narrow.is_some() {
        // What a snapshot that could not be taken has left behind.
        does(d, "qemu-img", &["check", "-q", "-r", "leaks", "o.qcow2"]);
    }
    // A base that got longer, or shorter, later.
    if raw && behind.0 == "base" && rng.below(4) == 0 {
        let now = around(&mut rng).to_string();
        story += &format!("base resized to {now}\n");
        tool(
            d,
            "qemu-img",
            &["resize", "-q", "-f", "raw", "--shrink", "base", &now],
        );
    }
    Overlay { dir, story }
}

fn io_of(dir: &Path, format: &str, file: &str, commands: &[String]) {
    let mut args = vec!["-f", format];
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(file);
    let out = Command::new("qemu-io")
        .args(&args)
        .current_dir(dir)
        .output();
    assert!(out.unwrap().status.code().is_some());
}

pub fn virtual_size(dir: &Path, file: &str) -> u64 {
    let info = tool(dir, "qemu-img", &["info", "--output=json", file]);
    let rest = info.rsplit("\"virtual-size\": ").next().unwrap();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// Shapes that random ones seldom have: states that end at different places inside one L2 table or one
/// cluster, VM state, and subclusters that states share.
pub fn shaped() -> Vec<Overlay> {
    let mut all = vec![];
    let new = |story: &str, options: &str, size: &str| {
        let dir = scratch();
        let d = dir.path();
        tool(
            d,
            "qemu-img",
            &["create", "-q", "-f", "raw", "base", "160k"],
        );
        io_of(d, "raw", "base", &["write -P 9 0 160k".into()]);
        let args = [
            "create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw", "o.qcow2",
            size,
        ];
        tool(d, "qemu-img", &args);
        let story = format!("{story}: {options}\n");
        Overlay { dir, story }
    };
    let resize = |o: &Overlay, size: &str| {
        let args = ["resize", "-q", "--shrink", "o.qcow2", size];
        tool(o.dir.path(), "qemu-img", &args);
    };
    let snapshot = |o: &Overlay, name: &str| {
        tool(
            o.dir.path(),
            "qemu-img",
            &["snapshot", "-c", name, "o.qcow2"],
        );
    };
    for options in [
        "cluster_size=4k",
        "cluster_size=4k,refcount_bits=4",
        "cluster_size=16k,extended_l2=on",
    ] {
        // The table is shared, and its states end in it, two of them in one cluster.
        let o = new("ends inside a table", options, "100k");
        io(o.dir.path(), "o.qcow2", &["write -P 1 8k 2k".into()]);
        snapshot(&o, "a");
        resize(&o, "60416");
        snapshot(&o, "b");
        resize(&o, "58880");
        snapshot(&o, "c");
        resize(&o, "150k");
        snapshot(&o, "d");
        resize(&o, "130k");
        all.push(o);
        // The disk itself is the shortest.
        let o = new("the disk ends first", options, "140k");
        io(o.dir.path(), "o.qcow2", &["write -P 1 0 4k".into()]);
        snapshot(&o, "a");
        snapshot(&o, "b");
        resize(&o, "50k");
        all.push(o);
    }
    let o = new("VM state", "cluster_size=512", "64k");
    io(
        o.dir.path(),
        "o.qcow2",
        &["write -P 1 8k 2k".into(), "write -b -P 5 0 20k".into()],
    );
    snapshot(&o, "a-vm20480");
    io(o.dir.path(), "o.qcow2", &["write -P 2 20k 1k".into()]);
    snapshot(&o, "b");
    all.push(o);
    // Two tables name one cluster, of which both lack the same; or one of them, a snapshot's or the disk's,
    // lacks what the other has there.
    for (which, clear) in [
        (0, 0u64),
        (1, 1 << 5),
        (2, 1 << 5),
        (1, 3 << 4),
        (2, 3 << 4),
    ] {
        let story = format!("two tables, {clear:#x} cleared in {which}");
        let o = new(&story, "cluster_size=16k,extended_l2=on", "96k");
        io(o.dir.path(), "o.qcow2", &["write -P 1 2k 1k".into()]);
        snapshot(&o, "a");
        io(o.dir.path(), "o.qcow2", &["write -P 2 40k 512".into()]);
        let mut image = std::fs::read(o.path()).unwrap();
        let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
        let offset = |at: usize| word(at) as usize & 0x00ff_ffff_ffff_fe00;
        // The L1 tables of the disk and of the snapshot.
        let l1 = [offset(40), offset(offset(64))];
        let tables = l1.map(offset);
        assert!(tables[0] != tables[1] && offset(tables[0]) == offset(tables[1]));
        if which > 0 {
            let at = tables[which - 1] + 8;
            let bitmap = word(at) & !clear;
            assert_ne!(bitmap, word(at));
            image[at..at + 8].copy_from_slice(&bitmap.to_be_bytes());
            std::fs::write(o.path(), image).unwrap();
        }
        all.push(o);
    }
    // One cluster of which two states have different subclusters.
    let o = new("subclusters", "cluster_size=16k,extended_l2=on", "96k");
    io(
        o.dir.path(),
        "o.qcow2",
        &["write -P 1 2k 1k".into(), "write -P 2 40k 512".into()],
    );
    snapshot(&o, "a");
    io(o.dir.path(), "o.qcow2", &["write -P 3 41k 512".into()]);
    snapshot(&o, "b");
    all.push(o);
    all
}
