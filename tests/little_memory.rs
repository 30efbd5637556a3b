//! A verb that may hold few refcounts in memory does what any other does, with the others in a temporary
//! file. What 64 TiB in random order come to is tested here with images of a few MiB.
//!
//! `RUSTFLAGS='--cfg qcow2_little_memory' cargo test` runs all other tests in that way too.

#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "abi/toolbox.rs"]
mod toolbox;

use flate2::read::GzDecoder;
use qcow2_snapshot::io::trace::TraceStorage;
use qcow2_snapshot::{Error, Image, NewSnapshot, OpenFlags};
use std::io::Read;
use std::path::Path;
use std::process::Command;

/// Temporary files of these tests hold a few KiB, and there are thousands of them.
fn temporary_files_in_memory() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        if tempfile::tempfile_in("/dev/shm").is_ok() {
            std::env::set_var("TMPDIR", "/dev/shm");
        }
    });
}

/// What a verb came to: its result, the file, and the bytes that went to a temporary file.
struct Done {
    result: Result<(), Error>,
    file: Vec<u8>,
    put_away: u64,
}

/// Bytes that this thread has written to files. The images are in memory.
fn written() -> u64 {
    let io = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    let line = io.lines().find_map(|l| l.strip_prefix("wchar: "));
    line.unwrap().parse().unwrap()
}

fn run(file: &[u8], memory: Option<u64>, verb: &Verb) -> Done {
    let storage = TraceStorage::new(file.to_vec());
    let trace = storage.trace();
    let opened = Image::open_storage(Box::new(storage), OpenFlags::RDWR);
    let before = written();
    let result = opened.and_then(|mut image| {
        if let Some(bytes) = memory {
            image.limit_refcount_memory(bytes);
        }
        verb.run(&mut image)?;
        image.close()
    });
    Done {
        result,
        file: trace.contents(),
        put_away: written() - before,
    }
}

#[derive(Clone, Debug)]
enum Verb {
    Create,
    Goto(Vec<u8>),
    Delete(Vec<u8>),
}

impl Verb {
    fn run(&self, image: &mut Image) -> Result<(), Error> {
        match self {
            Verb::Create => image
                .snapshot_create(&NewSnapshot {
                    name: b"new".to_vec(),
                    ..NewSnapshot::default()
                })
                .map(|_| ()),
            Verb::Goto(id) => image.snapshot_goto(id),
            Verb::Delete(id) => image.snapshot_delete(Some(id), None),
        }
    }
}

/// All verbs that the image's own list offers.
fn verbs(file: &[u8]) -> Vec<Verb> {
    let storage = TraceStorage::new(file.to_vec());
    let mut out = vec![Verb::Create];
    let image = Image::open_storage(Box::new(storage), OpenFlags::read_only());
    let Ok(mut image) = image else {
        return out;
    };
    for s in image.snapshot_list().unwrap_or_default().iter().take(6) {
        out.extend([Verb::Goto(s.id.clone()), Verb::Delete(s.id.clone())]);
    }
    out
}

/// The same verb with much memory and with `bytes`. Returns the file, and what was put away.
fn same(name: &str, file: &[u8], bytes: u64, verb: &Verb) -> (Vec<u8>, u64) {
    let (much, little) = (run(file, None, verb), run(file, Some(bytes), verb));
    let said = |r: &Result<(), Error>| r.as_ref().map_err(|e| (e.errno(), e.to_string())).err();
    assert_eq!(
        said(&much.result),
        said(&little.result),
        "{name}: {verb:?} in {bytes} bytes"
    );
    assert!(
        much.file == little.file,
        "{name}: {verb:?} in {bytes} bytes leaves another file"
    );
    let always = cfg!(qcow2_little_memory);
    assert!(always || much.put_away == 0, "{name}: {verb:?}");
    (much.file, little.put_away)
}

#[test]
fn reference_images_come_out_the_same() {
    temporary_files_in_memory();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("c-tests/images");
    let (mut images, mut runs) = (0, 0);
    for entry in std::fs::read_dir(&root).unwrap().flatten() {
        let Ok(packed) = std::fs::read(entry.path().join("before.qcow2.gz")) else {
            continue;
        };
        let mut file = Vec::new();
        GzDecoder::new(&packed[..]).read_to_end(&mut file).unwrap();
        if file.len() > 8 << 20 || !file.starts_with(b"QFI\xfb") {
            continue;
        }
        images += 1;
        for verb in verbs(&file) {
            for bytes in [0, 1000] {
                same(&entry.file_name().to_string_lossy(), &file, bytes, &verb);
                runs += 1;
            }
        }
    }
    println!("{images} images, {runs} runs");
    assert!(images > 60 && runs > 400, "{images} images, {runs} runs");
}

/// Random numbers, the same ones for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// An image with 2 snapshots and clusters in random order, some of them in all three disks.
fn scattered(cluster_bits: u32, order: u32, extended: bool, tables: u64, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let cluster = 1u64 << cluster_bits;
    let entry = if extended { 16 } else { 8 };
    let per_table = cluster / entry;
    let per_block = (cluster * 8) >> order;
    let l1_clusters = (tables * 8).div_ceil(cluster);
    let used = tables * per_table * 2;
    // Header, snapshot table, refcount table, blocks, three L1 tables, their L2 tables, data.
    let all = used + 3 * (l1_clusters + tables) + 4096 / cluster * 4 + 64;
    let blocks = (all + all / per_block + 64).div_ceil(per_block);
    let table_clusters = (blocks * 8).div_ceil(cluster);
    let list_clusters = 512u64.div_ceil(cluster);
    let at_list = 1;
    let at_table = at_list + list_clusters;
    let at_blocks = at_table + table_clusters;
    let at_l1 = at_blocks + blocks;
    let at_l2 = at_l1 + 3 * l1_clusters;
    let at_data = at_l2 + 3 * tables;
    let end = at_data + used;
    assert!(end <= blocks * per_block);
    let mut file = vec![0u8; (end * cluster) as usize];
    let mut counts = vec![0u64; (blocks * per_block) as usize];
    counts[..at_l2 as usize + 3 * tables as usize].fill(1);
    let put = |file: &mut Vec<u8>, at: u64, bytes: &[u8]| {
        file[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    // Entries: the disks share what they have in the same place, four times in five.
    let mut shared: Vec<u64> = (0..used).collect();
    for i in (1..used).rev() {
        shared.swap(i as usize, random.below(i + 1) as usize);
    }
    let mut spare = shared.split_off((tables * per_table) as usize);
    let mut entries = Vec::new();
    for disk in 0..3u64 {
        for (i, at) in shared.iter().enumerate() {
            let own = disk != 0 && random.below(5) == 0;
            let at = if own && !spare.is_empty() {
                spare.pop().unwrap()
            } else {
                *at
            };
            let none = random.below(9) == 0;
            if !none {
                counts[(at_data + at) as usize] += 1;
                entries.push((disk, i as u64, (at_data + at) * cluster));
            }
        }
    }
    for (disk, i, at) in entries {
        let copied = u64::from(counts[(at / cluster) as usize] == 1) << 63;
        let table = at_l2 + disk * tables + i / per_table;
        let place = table * cluster + i % per_table * entry;
        put(&mut file, place, &(at | copied).to_be_bytes());
        if extended {
            put(&mut file, place + 8, &0xffff_ffffu64.to_be_bytes());
        }
    }
    for disk in 0..3 {
        for t in 0..tables {
            let entry = ((at_l2 + disk * tables + t) * cluster) | (1 << 63);
            let at = (at_l1 + disk * l1_clusters) * cluster + t * 8;
            put(&mut file, at, &entry.to_be_bytes());
        }
    }
    for i in 0..blocks {
        put(
            &mut file,
            at_table * cluster + i * 8,
            &((at_blocks + i) * cluster).to_be_bytes(),
        );
    }
    for (i, count) in counts.iter().enumerate() {
        let bits = 1u64 << order;
        let bit = at_blocks * cluster * 8 + i as u64 * bits;
        if bits >= 8 {
            let be = count.to_be_bytes();
            put(&mut file, bit / 8, &be[8 - bits as usize / 8..]);
        } else {
            file[(bit / 8) as usize] |= (*count as u8) << (bit % 8);
        }
    }
    let size = tables * per_table * cluster;
    let mut header = Vec::new();
    header.extend(0x5146_49fb_0000_0003u64.to_be_bytes());
    header.extend([0; 12]);
    header.extend(cluster_bits.to_be_bytes());
    header.extend(size.to_be_bytes());
    put(&mut file, 0, &header);
    put(&mut file, 36, &(tables as u32).to_be_bytes());
    put(&mut file, 40, &(at_l1 * cluster).to_be_bytes());
    put(&mut file, 48, &(at_table * cluster).to_be_bytes());
    put(&mut file, 56, &(table_clusters as u32).to_be_bytes());
    put(&mut file, 60, &2u32.to_be_bytes());
    put(&mut file, 64, &(at_list * cluster).to_be_bytes());
    put(&mut file, 72, &(u64::from(extended) << 4).to_be_bytes());
    put(&mut file, 96, &order.to_be_bytes());
    put(&mut file, 100, &104u32.to_be_bytes());
    for (i, id) in (0..2u64).zip([b"1", b"2"]) {
        let at = at_list * cluster + i * 72;
        put(
            &mut file,
            at,
            &((at_l1 + (i + 1) * l1_clusters) * cluster).to_be_bytes(),
        );
        put(&mut file, at + 8, &(tables as u32).to_be_bytes());
        put(&mut file, at + 12, &[0, 1]);
        put(&mut file, at + 36, &24u32.to_be_bytes());
        put(&mut file, at + 48, &size.to_be_bytes());
        put(&mut file, at + 64, id);
    }
    file
}

/// What `qemu-img check` says; nothing is wrong where there is none.
fn checks(file: &[u8]) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, file).unwrap();
    let mut check = Command::new("qemu-img");
    match check.args(["check", "-q"]).arg(&path).status() {
        Ok(status) => status.success(),
        Err(_) => {
            static ONCE: std::sync::Once = std::sync::Once::new();
            ONCE.call_once(|| {
                toolbox::skip("qemu-img check of images made in little memory (no qemu-img here)");
            });
            true
        }
    }
}

#[test]
fn scattered_images_come_out_the_same_by_a_temporary_file() {
    temporary_files_in_memory();
    for (cluster_bits, order, extended, tables) in [
        (9, 1, false, 150),
        (9, 4, false, 150),
        (9, 6, false, 60),
        (12, 3, false, 20),
        (12, 5, false, 16),
        (14, 6, true, 3),
    ] {
        let name = format!("{cluster_bits}/{order}/{extended}");
        let file = scattered(
            cluster_bits,
            order,
            extended,
            tables,
            0x9e37_79b9 + u64::from(order),
        );
        assert!(checks(&file), "{name}: not what qemu-img accepts");
        for bytes in [0, 600, 3000] {
            // No memory at all costs a request for each entry.
            let few = if bytes == 0 { 1 } else { usize::MAX };
            for verb in verbs(&file).into_iter().take(few) {
                let (after, put_away) = same(&name, &file, bytes, &verb);
                assert!(bytes != 600 || checks(&after), "{name}: {verb:?}");
                let fits = bytes == 3000;
                assert!(fits || put_away != 0, "{name}: {verb:?} in {bytes} bytes");
                // And one more on top of it.
                let next = Verb::Delete(b"1".to_vec());
                same(&name, &after, bytes, &next);
            }
        }
    }
}
