//! Images that qemu-img does not make by itself: foreign snapshot tables, a short active L1,
//! garbage in free clusters, cut ends, wrong COPIED bits, 65,536 snapshots.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::files::{self, at, R};
use super::qimg::{be64, Entry, Qcow, COMPRESSED, COPIED, OFFSET};
use super::rng::Rng;

fn put(q: &Qcow, off: u64, b: &[u8]) -> R<()> {
    at("write", q.file.write_all_at(b, off))
}

/// Store a count in an existing refcount block; false if there is no such block.
fn set_refcount(q: &Qcow, cluster: u64, value: u64) -> R<bool> {
    let Some(block) = q.reftable.get((cluster / q.per_block()) as usize) else {
        return Ok(false);
    };
    if block & OFFSET == 0 {
        return Ok(false);
    }
    let (i, bits) = (cluster % q.per_block(), 1u64 << q.h.refcount_order);
    let pos = (block & OFFSET) + i * bits / 8;
    if bits < 8 {
        let mut b = q.bytes(pos, 1)?;
        let shift = i * bits % 8;
        b[0] = (b[0] & !((((1u64 << bits) - 1) << shift) as u8)) | (value << shift) as u8;
        put(q, pos, &b)?;
    } else {
        put(q, pos, &value.to_be_bytes()[8 - bits as usize / 8..])?;
    }
    Ok(true)
}

/// First cluster of a run of free clusters that existing refcount blocks describe.
fn free_run(q: &Qcow, n: u64, from: u64) -> R<Option<u64>> {
    let end = q.reftable.len() as u64 * q.per_block();
    let (mut run, mut c) = (0, from);
    while c < end && c < from + 20_000 {
        run = if q.refcount(c)? == Some(0) {
            run + 1
        } else {
            0
        };
        c += 1;
        if run == n {
            return Ok(Some(c - n));
        }
    }
    Ok(None)
}

/// Change the snapshot table; false if the new one finds no room.
pub fn edit_table(
    path: &Path,
    rng: &mut Rng,
    edit: impl FnOnce(&mut Vec<Entry>, &mut Rng),
) -> R<bool> {
    let q = Qcow::open_rw(path)?;
    if q.snaps.is_empty() {
        return Ok(false);
    }
    let mut entries = q.snaps.clone();
    edit(&mut entries, rng);
    let mut table: Vec<u8> = vec![];
    for e in &entries {
        table.resize(table.len().div_ceil(8) * 8, 0);
        table.extend(e.encode());
    }
    let (old, new) = (
        q.snaps_size.div_ceil(q.cs()),
        (table.len() as u64).div_ceil(q.cs()),
    );
    let mut off = q.h.snap_off;
    if new > old {
        let from = rng.below(q.len / q.cs() + 1);
        let Some(c) = free_run(&q, new, from)? else {
            return Ok(false);
        };
        for i in 0..new {
            set_refcount(&q, c + i, 1)?;
        }
        if rng.chance(70) {
            for i in 0..old {
                set_refcount(&q, q.h.snap_off / q.cs() + i, 0)?;
            }
        }
        off = c * q.cs();
    } else {
        for i in new..old {
            set_refcount(&q, off / q.cs() + i, 0)?;
        }
    }
    put(&q, off, &table)?;
    put(&q, 60, &(entries.len() as u32).to_be_bytes())?;
    put(&q, 64, &off.to_be_bytes())?;
    Ok(true)
}

/// IDs and names nobody's tool would make.
pub fn strange_entries(entries: &mut [Entry], rng: &mut Rng) {
    let long = [b'x'; 300];
    let ids: [&[u8]; 18] = [
        b"",
        b"a",
        b"07",
        b" 5",
        b"-3",
        b"+9",
        b"0x10",
        b"12abc",
        b"4294967296",
        b"18446744073709551614",
        b"18446744073709551615",
        b"99999999999999999999999",
        &long[..127],
        &long[..128],
        &long[..300],
        "схема".as_bytes(),
        b"\xff\xfe",
        b"1",
    ];
    let names: [&[u8]; 8] = [
        b"",
        b"1",
        b"2",
        &long[..255],
        &long[..256],
        &long[..300],
        "снимок 快照".as_bytes(),
        b"\x80\xff",
    ];
    for e in entries.iter_mut() {
        if rng.chance(40) {
            e.id = rng.pick(&ids).to_vec();
        }
        if rng.chance(30) {
            e.name = rng.pick(&names).to_vec();
        }
    }
}

/// Extra data of other lengths: 16 and 24 bytes mostly, partial fields, unknown fields.
pub fn strange_extra(entries: &mut [Entry], rng: &mut Rng) {
    for e in entries.iter_mut() {
        if rng.chance(60) {
            let n = *rng.pick(&[
                0usize, 4, 7, 8, 12, 15, 16, 16, 16, 20, 23, 24, 25, 31, 32, 40, 100, 512, 1023,
                1024,
            ]);
            let old = e.extra.len();
            e.extra.resize(n, 0);
            if n > old.max(24) {
                let more = rng.bytes(n - old.max(24));
                e.extra[old.max(24)..].copy_from_slice(&more);
            }
        }
        if rng.chance(30) {
            let vm = *rng.pick(&[1u64, 4096, 0xffff_ffff, 0x1_0000_0000, 1 << 40]);
            e.vm_size32 = if rng.chance(20) {
                77
            } else {
                u32::try_from(vm).unwrap_or(0)
            };
            if e.extra.len() >= 8 {
                e.extra[..8].copy_from_slice(&vm.to_be_bytes());
            }
        }
        if rng.chance(30) && e.extra.len() >= 24 {
            let n = *rng.pick(&[u64::MAX, 1, 1 << 50]);
            e.extra[16..24].copy_from_slice(&n.to_be_bytes());
        }
        if rng.chance(30) {
            e.vm_clock = rng.next() >> rng.below(64);
        }
    }
}

/// Make the active L1 as short as the disk allows; false if it is not longer. VM state in it is
/// dropped, its clusters leaked.
pub fn shorten_l1(path: &Path, rng: &mut Rng) -> R<bool> {
    let q = Qcow::open_rw(path)?;
    let l1 = q.words(q.h.l1_off, q.h.l1_size as usize)?;
    let need = q.h.size.div_ceil(q.l2_span()) as usize;
    let n = need.max(1);
    if n >= l1.len() {
        return Ok(false);
    }
    put(&q, q.h.l1_off + n as u64 * 8, &vec![0; (l1.len() - n) * 8])?;
    put(&q, 36, &(n as u32).to_be_bytes())?;
    let (a, b) = (
        (n as u64 * 8).div_ceil(q.cs()),
        (l1.len() as u64 * 8).div_ceil(q.cs()),
    );
    if rng.chance(70) {
        for c in a..b {
            set_refcount(&q, q.h.l1_off / q.cs() + c, 0)?;
        }
    }
    Ok(true)
}

/// Random bytes into some clusters that nothing counts.
pub fn garbage_in_free(path: &Path, rng: &mut Rng) -> R<bool> {
    let q = Qcow::open_rw(path)?;
    let clusters = q.len.div_ceil(q.cs());
    let mut done = false;
    for _ in 0..24 {
        let c = rng.below(clusters + 2);
        if q.refcount(c)?.unwrap_or(0) == 0 && c > 0 {
            let n = q.cs().min(4096) as usize;
            put(
                &q,
                c * q.cs() + rng.below(q.cs() / n as u64) * n as u64,
                &rng.bytes(n),
            )?;
            done = true;
        }
    }
    Ok(done)
}

/// Cut the end of the file: zeros always may go, guest data sometimes.
pub fn cut_end(path: &Path, rng: &mut Rng) -> R<bool> {
    let q = Qcow::open(path)?;
    let content = files::end_of_content(path)?;
    let mut to = q.len;
    if content < q.len {
        to = rng.range(content, q.len);
    } else if q.h.bitmaps.is_none() {
        let cut = q.len.saturating_sub(rng.range(1, q.cs()));
        if cut > q.cs() && q.map()?.only_plain_data(cut, q.len) {
            to = cut;
        }
    }
    if to == q.len {
        return Ok(false);
    }
    at("truncate", files::open_rw(path)?.set_len(to))?;
    Ok(true)
}

/// Count free clusters once although nothing refers to them.
pub fn leak(path: &Path, rng: &mut Rng) -> R<bool> {
    let q = Qcow::open_rw(path)?;
    let clusters = q.len.div_ceil(q.cs()) + 4;
    let mut done = false;
    for _ in 0..rng.range(1, 6) {
        let c = rng.below(clusters);
        if q.refcount(c)? == Some(0) {
            done |= set_refcount(&q, c, 1)?;
        }
    }
    Ok(done)
}

/// Count every cluster below `end` that existing refcount blocks describe, and make the blocks that
/// are missing there (they stand at the start of the range each describes).
pub fn fill(path: &Path, end: u64) -> R<()> {
    let mut q = Qcow::open_rw(path)?;
    let per = q.per_block();
    for i in 0..q.reftable.len() {
        let first = i as u64 * per;
        if first >= end {
            break;
        }
        if q.reftable[i] == 0 {
            let at = first * q.cs();
            put(&q, at, &vec![0; q.cs() as usize])?;
            put(&q, q.h.rt_off + i as u64 * 8, &at.to_be_bytes())?;
            q.reftable[i] = at;
        }
        for c in first..end.min(first + per) {
            if q.refcount(c)? == Some(0) {
                set_refcount(&q, c, 1)?;
            }
        }
    }
    Ok(())
}

/// Flip COPIED, or set reserved bits, in some L1 and L2 entries of the active disk or a snapshot.
pub fn odd_bits(path: &Path, rng: &mut Rng, reserved: bool) -> R<bool> {
    let q = Qcow::open_rw(path)?;
    let which = rng.below(q.snaps.len() as u64 + 1) as usize;
    let (off, n) = if which == 0 {
        (q.h.l1_off, q.h.l1_size)
    } else {
        (q.snaps[which - 1].l1_off, q.snaps[which - 1].l1_size)
    };
    let l1 = q.words(off, n as usize)?;
    let used: Vec<usize> = (0..l1.len()).filter(|i| l1[*i] & OFFSET != 0).collect();
    if used.is_empty() {
        return Ok(false);
    }
    let flip = |w: u64, rng: &mut Rng, l1: bool| match (reserved, l1) {
        (false, _) => w ^ COPIED,
        (true, true) => w | (rng.next() & (0x3f << 56 | 0x1ff)),
        (true, false) => w | (rng.next() & (0x3f << 56 | 0x1fe)),
    };
    for _ in 0..rng.range(1, 4) {
        let i = *rng.pick(&used);
        if rng.chance(40) {
            put(
                &q,
                off + i as u64 * 8,
                &flip(l1[i], rng, true).to_be_bytes(),
            )?;
        }
        let l2 = l1[i] & OFFSET;
        let step = if q.ext_l2() { 16 } else { 8 };
        let b = q.bytes(l2, q.cs() as usize)?;
        let there: Vec<usize> = (0..b.len())
            .step_by(step)
            .filter(|j| be64(&b, *j) & COMPRESSED == 0 && be64(&b, *j) & OFFSET != 0)
            .collect();
        if !there.is_empty() {
            for _ in 0..rng.range(1, 6) {
                let j = *rng.pick(&there);
                put(
                    &q,
                    l2 + j as u64,
                    &flip(be64(&b, j), rng, false).to_be_bytes(),
                )?;
            }
        }
    }
    Ok(true)
}

/// Set an autoclear bit that nobody knows. The header must be as QEMU writes it.
pub fn unknown_autoclear(path: &Path, rng: &mut Rng) -> R<bool> {
    let q = Qcow::open_rw(path)?;
    if q.h.version < 3 || q.h.bitmaps.is_some() {
        return Ok(false);
    }
    put(
        &q,
        88,
        &(q.h.autoclear | 1 << rng.range(2, 63)).to_be_bytes(),
    )?;
    Ok(true)
}

/// Give the new entry of `b` the date of the one in `a`, both written by qemu-img (self mode).
pub fn copy_date(a: &Path, b: &Path) -> R<()> {
    let (qa, qb) = (Qcow::open(a)?, Qcow::open_rw(b)?);
    if let (Some(x), Some(y)) = (qa.snaps.last(), qb.snaps.last()) {
        put(&qb, y.pos + 16, &x.date_sec.to_be_bytes())?;
        put(&qb, y.pos + 20, &x.date_nsec.to_be_bytes())?;
    }
    Ok(())
}

/// A 512-byte-cluster image with 32-bit refcounts, one data cluster and `n` snapshots of it.
/// With `empty`, a disk of size 0 whose snapshots have no L1 at all.
pub fn many_snapshots(path: &Path, n: u64, empty: bool) -> R<()> {
    const CS: u64 = 512;
    let mut table: Vec<u8> = vec![];
    let l1s = if empty { 0 } else { n };
    // header, active L1, L2, data, then the snapshots' L1s, the table, blocks, reftable.
    let (l1, l2, data, first_l1) = (1u64, 2u64, 3u64, 4u64);
    for i in 0..n {
        let mut extra = vec![0u8; 24];
        extra[8..16].copy_from_slice(&(if empty { 0u64 } else { 32768 }).to_be_bytes());
        let e = Entry {
            l1_off: if empty { 0 } else { (first_l1 + i) * CS },
            l1_size: u32::from(!empty),
            date_sec: 1_700_000_000,
            extra,
            id: format!("{}", i + 1).into_bytes(),
            name: format!("s{i}").into_bytes(),
            ..Default::default()
        };
        table.resize(table.len().div_ceil(8) * 8, 0);
        table.extend(e.encode());
    }
    let table_at = first_l1 + l1s;
    let table_n = (table.len() as u64).div_ceil(CS);
    let blocks_at = table_at + table_n;
    let (mut blocks, mut rt) = (1u64, 1u64);
    while blocks * 128 < blocks_at + blocks + rt {
        blocks += 1;
        rt = (blocks * 8).div_ceil(CS);
    }
    let rt_at = blocks_at + blocks;
    let mut h = vec![0u8; 112];
    for (off, v) in [
        (24, if empty { 0 } else { 32768 }),
        (40, l1 * CS),
        (48, rt_at * CS),
        (64, table_at * CS),
    ] {
        h[off..off + 8].copy_from_slice(&v.to_be_bytes());
    }
    let words: [(usize, u32); 9] = [
        (0, 0x5146_49fb),
        (4, 3),
        (20, 9),
        (36, u32::from(!empty)),
        (56, rt as u32),
        (60, n as u32),
        (96, 5),
        (100, 112),
        (16, 0),
    ];
    for (off, v) in words {
        h[off..off + 4].copy_from_slice(&v.to_be_bytes());
    }
    let mut file = vec![0u8; ((rt_at + rt) * CS) as usize];
    let mut place = |cluster: u64, b: &[u8]| {
        file[(cluster * CS) as usize..(cluster * CS) as usize + b.len()].copy_from_slice(b)
    };
    place(0, &h);
    if !empty {
        place(l1, &(l2 * CS).to_be_bytes());
        place(l2, &(data * CS).to_be_bytes());
        place(data, &[0x5a; 512]);
        for i in 0..n {
            place(first_l1 + i, &(l2 * CS).to_be_bytes());
        }
    }
    place(table_at, &table);
    let used = rt_at + rt;
    for b in 0..blocks {
        let mut v = vec![];
        for c in b * 128..(b + 1) * 128 {
            let count = match c {
                _ if c >= used => 0,
                _ if !empty && (c == l2 || c == data) => n as u32 + 1,
                _ => 1,
            };
            v.extend(count.to_be_bytes());
        }
        place(blocks_at + b, &v);
    }
    let reftable: Vec<u8> = (0..blocks)
        .flat_map(|b| ((blocks_at + b) * CS).to_be_bytes())
        .collect();
    place(rt_at, &reftable);
    at("write image", std::fs::write(path, &file))
}
