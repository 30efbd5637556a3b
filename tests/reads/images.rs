//! Images with everything a read can meet.

use super::files::{at, R};
use super::generate::{Spec, QEMU};
use super::qemu::Tools;
use super::rng::Rng;

/// Make [`QEMU`] in the folder of `tools`, with snapshots s0, s1 ...
pub fn make(rng: &mut Rng, tools: &mut Tools) -> R<()> {
    if rng.chance(40) {
        differential(rng, tools)
    } else {
        chain(rng, tools)
    }
}

/// An image of the differential test's generator.
fn differential(rng: &mut Rng, tools: &mut Tools) -> R<()> {
    let mut spec = Spec::new(rng);
    spec.build(rng, tools)?;
    for s in 0..rng.range(1, 4) {
        for _ in 0..rng.range(0, 3) {
            spec.guest(rng, tools)?;
        }
        let _ = tools.snapshot("-c", format!("s{s}").as_bytes(), QEMU)?;
    }
    spec.guest(rng, tools)
}

/// Requests of a guest on a disk of `size` bytes.
fn requests(rng: &mut Rng, size: u64, cluster: u64, most: u64, compressed: bool) -> Vec<String> {
    let mut out = Vec::new();
    for _ in 0..rng.range(0, most) {
        let mut from = rng.below(size / 512) * 512;
        let mut n = (rng.range(1, 60) * 512).min(size - from);
        let fill = rng.range(1, 255);
        let what = match rng.below(if compressed { 10 } else { 8 }) {
            0..=4 => format!("write -P {fill}"),
            5 => "write -z".into(),
            6 => "write -z -u".into(),
            7 => "discard".into(),
            _ => {
                from = from / cluster * cluster;
                n = cluster.min(size - from);
                format!("write -c -P {fill}")
            }
        };
        out.push(format!("{what} {from} {n}"));
    }
    out
}

/// A file of random bytes, with holes and an end anywhere.
fn raw(rng: &mut Rng, tools: &Tools, name: &str, size: u64) -> R<()> {
    use std::os::unix::fs::FileExt;
    let path = tools.dir.join(name);
    let file = at("create", std::fs::File::create(&path))?;
    let size = size - if rng.chance(50) { rng.below(512) } else { 0 };
    at("size", file.set_len(size))?;
    for _ in 0..rng.range(0, 4) {
        let from = rng.below(size);
        let n = rng.range(1, 40_000).min(size - from);
        let bytes = rng.bytes(n as usize);
        at("write", file.write_all_at(&bytes, from))?;
    }
    Ok(())
}

/// An image over up to four files of mixed formats and sizes, or with a data file.
fn chain(rng: &mut Rng, tools: &mut Tools) -> R<()> {
    let unit = *rng.pick(&[512, 4096, 65536]);
    let size = *rng.pick(&[1, 7, 33, 200]) * unit + *rng.pick(&[0, 512]);
    let mut behind: Option<(String, &str)> = None;
    for layer in 0..*rng.pick(&[0, 0, 1, 1, 2, 3, 4]) {
        let name = format!("b{layer}");
        let more = rng.range(1, 20) * 512;
        let length = match rng.below(4) {
            0 => size,
            1 => size + more,
            _ => size.saturating_sub(more).max(512),
        };
        if layer == 0 && rng.chance(50) {
            raw(rng, tools, &name, length)?;
            behind = Some((name, "raw"));
            continue;
        }
        let cluster = *rng.pick(&[512, 4096, 65536]);
        let mut options = format!("cluster_size={cluster}");
        if rng.chance(20) {
            options.push_str(",compression_type=zstd");
        }
        if behind.is_none() && rng.chance(20) {
            options.push_str(",preallocation=metadata");
        }
        create(tools, &name, &options, &behind, length)?;
        let writes = requests(rng, length, cluster, 5, true);
        one_by_one(tools, &name, &writes)?;
        behind = Some((name, "qcow2"));
    }
    let cluster = *rng.pick(&[512u64, 4096, 16384, 65536]);
    let data_file = behind.is_none() && rng.chance(20);
    let mut options = format!("cluster_size={cluster}");
    if cluster >= 16384 && rng.chance(40) {
        options.push_str(",extended_l2=on");
    } else if !data_file && rng.chance(10) {
        options.push_str(",compat=0.10");
    }
    if !options.contains("compat") && rng.chance(40) {
        options.push_str(",compression_type=zstd");
    }
    if data_file {
        // A relative name would be taken from the current folder, which is not the image's here.
        let path = tools.dir.join("r.data");
        options.push_str(&format!(",data_file={}", path.display()));
        if rng.chance(30) {
            options.push_str(",data_file_raw=on");
        }
    }
    if (behind.is_none() || options.contains("extended")) && rng.chance(20) {
        options.push_str(",preallocation=metadata");
    }
    create(tools, QEMU, &options, &behind, size)?;
    let mut now = size;
    for s in 0..rng.range(1, 4) {
        let writes = requests(rng, now, cluster, 6, !data_file);
        one_by_one(tools, QEMU, &writes)?;
        if data_file {
            continue;
        }
        let _ = tools.snapshot("-c", format!("s{s}").as_bytes(), QEMU)?;
        if rng.chance(20) && !options.contains("compat") {
            let to = (now + rng.range(1, 99) * 512).to_string();
            let down = (now.saturating_sub(rng.range(1, 99) * 512))
                .max(512)
                .to_string();
            let to = if rng.chance(50) { to } else { down };
            let args = [&b"resize"[..], b"-q", b"--shrink"];
            let done = tools.on("qemu-img", &args, QEMU, &[to.as_bytes()])?;
            if done.ok {
                now = at("size", to.parse())?;
            }
        }
    }
    Ok(())
}

fn create(
    tools: &mut Tools,
    name: &str,
    options: &str,
    behind: &Option<(String, &str)>,
    size: u64,
) -> R<()> {
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some((file, format)) = behind {
        args.extend(["-b", file, "-F", format]);
    }
    args.extend([name, &size]);
    tools.must("qemu-img", &args).map(|_| ())
}

/// Some may fail: a compressed write where a cluster is in use, for one.
fn one_by_one(tools: &mut Tools, name: &str, commands: &[String]) -> R<()> {
    if !commands.is_empty() {
        tools.io(name, false, commands)?;
    }
    Ok(())
}
