//! What the fuzzers run, without libFuzzer: `tests/corpus.rs` and `tests/hostile.rs` of the library
//! include these files too.
//!
//! An input is [`PROGRAM`] bytes that say what to do, and an image. Each target panics when the
//! library breaks a promise; see [`verbs`] for most of them.

pub mod disk;
pub mod mutate;
pub mod oracle;
pub mod verbs;

pub use verbs::verbs;

use disk::Disk;
use oracle::Raw;
use qcow2_snapshot::{CheckResult, Fix, Image, Mapping, OpenFlags};

/// Bytes of an input in front of the image.
pub const PROGRAM: usize = 16;
/// Larger tables are QEMU's limits being met, not work being done: such inputs are passed over.
pub const TABLE_CAP: u64 = 1 << 20;

/// Program and image, if the image asks for no table above [`TABLE_CAP`].
pub fn split(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (program, image) = data.split_at_checked(PROGRAM)?;
    let raw = Raw::new(image);
    let cap = cap(program);
    let small = raw.l1_size().saturating_mul(8) <= cap
        && raw.reftable_bytes() <= cap.max(1 << raw.cluster_bits().min(16))
        && raw.nb_snapshots().saturating_mul(256) <= cap.min(TABLE_CAP >> 3)
        && raw.cluster_bits() <= 16;
    small.then_some((program, image))
}

/// One program in sixteen may have longer tables, one in 256 the longest: they cost a thousand times
/// as much.
pub fn cap(program: &[u8]) -> u64 {
    match program[0] {
        0xff => TABLE_CAP,
        0xf0.. => TABLE_CAP >> 4,
        _ => TABLE_CAP >> 6,
    }
}

/// The flags that the program's first byte chooses, read-write or not.
pub fn flags(program: &[u8], read_write: bool) -> OpenFlags {
    let byte = program.first().copied().unwrap_or(0);
    let mut flags = OpenFlags::NO_BACKING;
    if read_write {
        flags = flags | OpenFlags::RDWR;
    }
    if byte & 1 != 0 {
        flags = flags | OpenFlags::NO_DISCARD;
    }
    if byte & 2 != 0 {
        flags = flags | OpenFlags::COMPAT_2_1;
    }
    flags
}

/// Open, read-only and read-write. Nothing is written by it.
pub fn open(data: &[u8]) {
    let Some((program, image)) = split(data) else {
        return;
    };
    for read_write in [false, true] {
        let disk = Disk::new(image);
        let seen = disk.handle();
        let opened = Image::open_storage(Box::new(disk), flags(program, read_write));
        assert_eq!(seen.borrow().requests, 0, "open has written");
        if let Ok(image) = opened {
            let _ = image.length();
            let _ = image.close();
        }
        assert_eq!(seen.borrow().requests, 0, "close has written");
    }
}

/// The snapshot table: read it, write it again, and read that.
pub fn table(data: &[u8]) {
    let Some((program, image)) = split(data) else {
        return;
    };
    let disk = Disk::new(image);
    let seen = disk.handle();
    let Ok(mut image) = Image::open_storage(Box::new(disk), flags(program, true)) else {
        return;
    };
    let Ok(list) = image.snapshot_list().map(<[_]>::to_vec) else {
        return;
    };
    image.free_snapshots();
    assert!(image.snapshot_list().is_ok_and(|l| l.is_empty()));
    assert!(image.read_snapshots().is_ok());
    assert!(image.snapshot_list().is_ok_and(|l| *l == list));

    let before = seen.borrow().clone();
    let result = image.write_snapshots();
    oracle::judge(&before, &seen.borrow(), &image, &result, "write_snapshots");
    if result.is_err() {
        return;
    }
    let wanted = image.snapshot_list().map(<[_]>::to_vec).unwrap_or_default();
    drop(image);
    let copy = Disk::of(seen.borrow().clone());
    let mut again = match Image::open_storage(Box::new(copy), OpenFlags::read_only()) {
        Ok(image) => image,
        Err(e) => panic!("the image does not open after write_snapshots: {e}"),
    };
    assert_eq!(again.snapshot_list().unwrap_or_default(), wanted);
    assert_eq!(list.len(), wanted.len());
    for (a, b) in list.iter().zip(&wanted) {
        assert_eq!(
            (&a.id, &a.name, a.l1_table_offset, a.l1_size),
            (&b.id, &b.name, b.l1_table_offset, b.l1_size)
        );
    }
}

/// Check, repair, check again: looking writes nothing and finds the same twice; a repair says what the next
/// look finds, and another one finds nothing more to do; an image that is found good opens read-write.
pub fn check(data: &[u8]) {
    let Some((program, file)) = split(data) else {
        return;
    };
    let disk = Disk::new(file);
    let seen = disk.handle();
    // A look goes over all clusters of the file: structures that a repair puts far behind its end cost
    // milliseconds in each. One time in 32, whatever the seeds' program says.
    if data.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)) % 32 != 0 {
        let cluster_bits = file.get(23).map_or(16, |b| u32::from(*b).clamp(9, 21));
        seen.borrow_mut().most = file.len() as u64 + (1024 << cluster_bits);
    }
    let flags = flags(program, true) | OpenFlags::CHECK;
    let Ok(mut image) = Image::open_storage(Box::new(disk), flags) else {
        return;
    };
    // Windows of the least size, but where each of them would read tables of megabytes.
    let list = image.snapshot_list().map(<[_]>::to_vec).unwrap_or_default();
    // So does each L1 table, which may have megabytes behind the end of the file.
    if seen.borrow().most != 0 && list.iter().any(|s| s.l1_size > 1 << 13) {
        return;
    }
    let counted = file
        .get(60..64)
        .is_some_and(|n| n == (list.len() as u32).to_be_bytes());
    let small = counted && list.iter().all(|s| s.l1_size <= 1 << 15);
    if program[1] & 1 != 0 && small {
        image.limit_refcount_memory(0);
    }
    let (mut lines, mut nobody) = (0u64, |_: &str| {});
    let first = image.check(Fix::NONE, &mut |_| lines += 1);
    assert!(lines <= (1 << 20) + 1, "a check says {lines} things");
    let again = image.check(Fix::NONE, &mut nobody);
    assert_eq!(first.as_ref().ok(), again.as_ref().ok(), "two looks differ");
    assert_eq!(seen.borrow().requests, 0, "looking has written");

    let fix = [
        Fix::LEAKS | Fix::ERRORS,
        Fix::LEAKS,
        Fix::ERRORS,
        Fix::LEAKS | Fix::ERRORS | Fix::TABLE_ONLY,
    ][usize::from(program[2] % 4)];
    // Whether a reason has been said, and this one, which leaves the table as it was.
    let (mut said, mut table) = (false, false);
    let result = image.check(fix, &mut |line| {
        said = true;
        table |= line.starts_with("ERROR failed to update snapshot table");
    });
    let Ok(result) = result else {
        // A reason is stated; the disk of the fuzzer may also be full.
        return;
    };
    if fix.has(Fix::TABLE_ONLY) {
        return;
    }
    drop(image);
    let handle = |flags| Image::open_storage(Box::new(Disk::of(seen.borrow().clone())), flags);
    let mut second = handle(flags).expect("a repaired image opens to be checked");
    let now = CheckResult {
        corruptions_fixed: 0,
        leaks_fixed: 0,
        ..result
    };
    match second.check(Fix::NONE, &mut nobody) {
        Ok(found) => assert!(table || found == now, "said {now:?}, is {found:?}"),
        Err(e) => assert!(table, "cannot be checked after a repair: {e}"),
    }
    let wrong = |r: &CheckResult| r.corruptions + r.leaks + r.check_errors;
    if let (Ok(third), false) = (second.check(fix, &mut nobody), table) {
        assert_eq!(
            third.corruptions_fixed + third.leaks_fixed,
            0,
            "a second repair finds more to do: {third:?}"
        );
    }
    if wrong(&result) != 0 {
        assert!(said, "no reason for what is left");
    } else if let Err(e) = handle(OpenFlags::NO_BACKING | OpenFlags::RDWR) {
        // Found good, and refused for something that is no damage.
        let text = e.to_string();
        let dirty = text.contains("dirty bit") || text.contains("marked corrupt");
        assert!(!dirty, "good, but not for a verb: {text}");
    }
}

/// Guest reads: the active disk, the VM state behind it, and every snapshot.
pub fn reads(data: &[u8]) {
    let Some((program, image)) = split(data) else {
        return;
    };
    let disk = Disk::new(image);
    let seen = disk.handle();
    let Ok(mut image) = Image::open_storage(Box::new(disk), flags(program, false)) else {
        return;
    };
    let count = image.snapshot_list().map_or(0, <[_]>::len);
    let mut buf = vec![0u8; 1 + usize::from(program[2]) * 97];
    read_some(&mut image, program, &mut buf);
    for index in 0..count.min(4) {
        let Ok(list) = image.snapshot_list() else {
            break;
        };
        let s = list[index].clone();
        if u64::from(s.l1_size) * 8 > cap(program) {
            continue;
        }
        let by_name = program[1] & 1 != 0;
        let (id, name) = if by_name {
            (None, Some(&s.name[..]))
        } else {
            (Some(&s.id[..]), None)
        };
        if image.snapshot_load_tmp(id, name).is_ok() {
            read_some(&mut image, program, &mut buf);
        }
    }
    changes(&mut image, program);
    let _ = image.close();
    assert_eq!(seen.borrow().requests, 0, "reading has written");
}

/// What changed between the disk and its first snapshots: runs are in order and in the part that was
/// asked for, exact ones are within those by tables, and what is in none reads the same.
fn changes(image: &mut Image, program: &[u8]) {
    let list = image.snapshot_list().unwrap_or_default();
    // Which one an ID means is not looked at here.
    let small = list
        .iter()
        .all(|s| u64::from(s.l1_size) * 8 <= cap(program));
    let ids = list.iter().take(if small { 2 } else { 0 });
    let states: Vec<_> = [None]
        .into_iter()
        .chain(ids.map(|s| Some(s.id.clone())))
        .collect();
    let start = u64::from(program[3]) << (program[9] % 32);
    let bytes = [u64::MAX, 70_000, 1 << 20][usize::from(program[10] % 3)];
    let end = start.saturating_add(bytes);
    for from in &states {
        for to in &states {
            let (from, to) = (from.as_deref(), to.as_deref());
            let shown = image.length();
            let mut ask = |at: u64, compare| {
                // Comparing data takes as long as reading it, which an image makes as much of as it likes.
                let end = if compare {
                    end.min(at.saturating_add(4 << 20))
                } else {
                    end
                };
                let found = image.snapshot_next_change(from, to, at, end - at, compare);
                if let Ok(Some(c)) = &found {
                    assert!(at <= c.start && c.length > 0 && c.start + c.length <= end);
                    assert!(from != to, "a state differs from itself");
                    assert!(c.to != Mapping::Beyond);
                }
                found
            };
            let (mut by_tables, mut at, mut whole) = (Vec::new(), start, false);
            for _ in 0..64 {
                match ask(at, false) {
                    Ok(Some(c)) => {
                        at = c.start + c.length;
                        by_tables.push(c);
                    }
                    Ok(None) => whole = true,
                    Err(_) => {}
                }
                if whole || at >= end {
                    break;
                }
            }
            // From the start again, where the tables in memory are not these.
            if let Some(first) = by_tables.first() {
                assert!(ask(start, false).is_ok_and(|c| c == Some(*first)));
            }
            if let Ok(Some(exact)) = ask(start, true) {
                let inside = by_tables.iter().any(|c| {
                    c.start <= exact.start && exact.start + exact.length <= c.start + c.length
                });
                assert!(inside || !whole, "a sector differs, but no table");
            }
            assert_eq!(image.length(), shown, "another disk is shown");
        }
    }
}

/// A few reads: start, end, places that the program chooses, and twice the same.
fn read_some(image: &mut Image, program: &[u8], buf: &mut [u8]) {
    let length = image.length();
    let mut again = buf.to_vec();
    let word = |at: usize| {
        program.get(at..at + 4).map_or(0, |b| {
            u64::from(u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
        })
    };
    let end = length.saturating_sub(buf.len() as u64);
    let places = [
        0,
        end,
        end.saturating_add(1),
        word(4) << 4,
        word(8) << 9,
        u64::MAX - word(12),
    ];
    for at in places {
        let inside = at
            .checked_add(buf.len() as u64)
            .is_some_and(|e| e <= length);
        buf.fill(0x55);
        again.fill(0xaa);
        let first = image.read(at, buf).is_ok();
        assert!(inside || !first, "a read past the end of the disk succeeds");
        if first {
            assert!(
                image.read(at, &mut again).is_ok() && *buf == again[..],
                "two reads differ"
            );
        }
    }
    for pos in [0, word(4), word(8) << 20, u64::MAX - word(12)] {
        let _ = image.load_vmstate(pos, buf);
    }
    // The whole disk, where it is small.
    let mut at = 0;
    for _ in 0..64 {
        if at >= length {
            break;
        }
        let n = (length - at).min(buf.len() as u64) as usize;
        let _ = image.read(at, &mut buf[..n]);
        at += n as u64;
    }
    // What it is made of: each answer goes on, and what is said to be zeros reads as zeros.
    let mut at = 0;
    for _ in 0..32 {
        let left = length - at.min(length);
        let Ok(status) = image.block_status(at, left) else {
            break;
        };
        if left == 0 {
            assert_eq!(status.length, 0);
            break;
        }
        assert_eq!(status.start, at);
        assert!((1..=left).contains(&status.length));
        let part = &mut buf[..];
        let n = status.length.min(part.len() as u64) as usize;
        if status.zero && image.read(at, &mut part[..n]).is_ok() {
            assert!(part[..n].iter().all(|b| *b == 0), "zeros that are none");
        }
        // A compressed cluster as it is stored: cut to its stream, it still is what a read gives.
        let mut run = qcow2_snapshot::PackedRun::default();
        if let Ok(1..) = image.read_packed(at, part.len() as u64, &mut run) {
            assert!(status.compressed, "a compressed cluster that is none");
            let size = image.geometry().cluster_len();
            for (k, cluster) in run.clusters.iter().enumerate() {
                let guest = at + (k * size) as u64;
                let mut read = vec![0; size];
                if image.read(guest, &mut read).is_err() {
                    continue;
                }
                let mut data = vec![0; size];
                let packed = &run.bytes[cluster.range.clone()];
                let good = qcow2_snapshot::format::compress::unpack(
                    image.compression(),
                    packed,
                    &mut data,
                );
                assert!(
                    good.is_ok() && data == read,
                    "cut too short, or another cluster"
                );
                assert!(
                    !cluster.zero || data.iter().all(|b| *b == 0),
                    "zeros that are none"
                );
            }
        }
        at += status.length;
    }
}
