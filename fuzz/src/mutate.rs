//! Damage that knows the format.

use super::oracle::{be, entries, Raw};
use super::PROGRAM;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// splitmix64.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            0
        } else {
            self.next() % n
        }
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Places in an image where words stand that mean something.
struct Places {
    cs: u64,
    /// Offsets that the image's structures have.
    offsets: Vec<u64>,
    /// L1 tables: (offset, entries).
    l1s: Vec<(u64, u64)>,
    l2s: Vec<u64>,
    refblocks: Vec<u64>,
    entries: Vec<u64>,
}

fn places(file: &[u8]) -> Places {
    let raw = Raw::new(file);
    let cs = 1 << raw.cluster_bits().clamp(9, 21);
    let mut p = Places {
        cs,
        offsets: vec![
            0,
            raw.l1_offset(),
            raw.reftable_offset(),
            raw.snapshots_offset(),
        ],
        l1s: vec![(raw.l1_offset(), raw.l1_size())],
        l2s: Vec::new(),
        refblocks: Vec::new(),
        entries: Vec::new(),
    };
    let read = |at: u64, n: usize| be(file, at, n);
    for e in entries(&read, raw.snapshots_offset(), raw.nb_snapshots().min(16)) {
        p.entries.push(e.at);
        p.l1s.push((e.l1_offset, e.l1_size));
        p.offsets.push(e.l1_offset);
    }
    for i in 0..(raw.reftable_bytes() / 8).min(64) {
        let o = be(file, raw.reftable_offset().saturating_add(i * 8), 8) & OFFSET;
        if o != 0 {
            p.refblocks.push(o);
        }
    }
    for (offset, n) in &p.l1s {
        for i in 0..(*n).min(32) {
            let o = be(file, offset.saturating_add(i * 8), 8) & OFFSET;
            if o != 0 && !p.l2s.contains(&o) {
                p.l2s.push(o);
            }
        }
    }
    let data: Vec<u64> = p
        .l2s
        .iter()
        .take(8)
        .flat_map(|o| (0..16).map(|i| be(file, o.saturating_add(i * 8), 8)))
        .map(|e| e & OFFSET)
        .filter(|o| *o != 0)
        .take(32)
        .collect();
    p.offsets
        .extend(p.refblocks.iter().chain(&p.l2s).chain(&data));
    p
}

/// An offset that means trouble; `own` is where it will stand.
fn offset(rng: &mut Rng, p: &Places, file_len: u64, own: u64) -> u64 {
    match rng.below(16) {
        0 => own & !(p.cs - 1),
        1 => file_len.next_multiple_of(p.cs) + rng.below(4) * p.cs,
        2 => rng
            .pick(&p.offsets)
            .wrapping_add(rng.pick(&[1, 8, 256, 511, 512, p.cs / 2])),
        3 => rng.pick(&[
            0x00ff_ffff_ffff_fe00,
            (1 << 56) - p.cs,
            1 << 55,
            1 << 40,
            i64::MAX as u64 & !(p.cs - 1),
            !(p.cs - 1),
            1 << 62,
            (1 << 63) + p.cs,
        ]),
        4 | 5 => rng.below(file_len / p.cs + 3) * p.cs,
        6 => rng.pick(&p.offsets).wrapping_add(p.cs),
        7 => 0,
        _ => rng.pick(&p.offsets),
    }
}

/// A count or a size at some limit.
fn number(rng: &mut Rng, old: u64) -> u64 {
    match rng.below(8) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => old.wrapping_mul(2),
        3 => old / 2,
        4 => rng.below(40),
        5 => 1 << rng.below(64),
        6 => (1u64 << rng.below(64)).wrapping_sub(1),
        _ => rng.pick(&[
            0,
            1,
            0xff,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            u64::MAX,
            65_535,
            65_536,
            4 << 20,
            1024,
            1025,
        ]),
    }
}

fn put(file: &mut [u8], at: u64, n: usize, value: u64) {
    let Ok(at) = usize::try_from(at) else { return };
    if let Some(slot) = at.checked_add(n).and_then(|end| file.get_mut(at..end)) {
        slot.copy_from_slice(&value.to_be_bytes()[8 - n..]);
    }
}

fn update(file: &mut [u8], at: u64, n: usize, f: impl FnOnce(u64) -> u64) {
    let old = be(file, at, n);
    put(file, at, n, f(old));
}

/// Damage an input of `size` bytes in `data` in place; returns its new size.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u64) -> usize {
    let mut rng = Rng::new(seed);
    let max_size = max_size.min(data.len());
    let mut size = size.min(max_size);
    if size < PROGRAM + 112 {
        return size;
    }
    for _ in 0..1 + rng.below(3) * rng.below(3) {
        size = damage(data, size, max_size, &mut rng);
    }
    size
}

fn damage(data: &mut [u8], size: usize, max_size: usize, rng: &mut Rng) -> usize {
    if rng.below(5) == 0 {
        let at = rng.below(PROGRAM as u64) as usize;
        data[at] = if rng.below(3) == 0 {
            rng.below(8) as u8
        } else {
            rng.next() as u8
        };
        return size;
    }
    if rng.below(40) == 0 {
        // Cut, or lengthen with what was there.
        let unit = rng.pick(&[1, 8, 512, 4096]);
        let by = rng.below(8) * unit;
        return if rng.below(2) == 0 {
            (size as u64).saturating_sub(by).max(PROGRAM as u64 + 112) as usize
        } else {
            let new = (size as u64 + by).min(max_size as u64) as usize;
            data[size..new].fill(0);
            new
        };
    }
    let file = &mut data[PROGRAM..size];
    image(file, rng);
    size
}

/// One piece of damage to the image itself.
pub fn image(file: &mut [u8], rng: &mut Rng) {
    let p = places(file);
    let len = file.len() as u64;
    let some = |rng: &mut Rng, list: &[u64]| (!list.is_empty()).then(|| rng.pick(list));
    match rng.below(20) {
        0 | 1 => header(file, rng, &p),
        // L1 entries
        2..=4 => {
            let (l1, n) = rng.pick(&p.l1s);
            let at = l1.saturating_add(rng.below(n.min(64)) * 8);
            let new = offset(rng, &p, len, at);
            word(file, rng, at, new);
        }
        // L2 entries
        5..=8 => {
            let Some(l2) = some(rng, &p.l2s) else { return };
            let n = rng.pick(&[4, 16, p.cs / 8]);
            let at = l2.saturating_add(rng.below(n) * 8);
            let new = offset(rng, &p, len, at);
            match rng.below(6) {
                0 => update(file, at, 8, |old| old ^ COMPRESSED),
                1 => update(file, at, 8, |old| old ^ 1),
                2 => put(file, at, 8, COMPRESSED | rng.next() >> 2),
                3 => put(file, at, 8, COMPRESSED | new | rng.next() << 54 & OFFSET),
                _ => word(file, rng, at, new),
            }
        }
        // Refcount table
        9 => {
            let raw = Raw::new(file);
            let n = rng.pick(&[1, 2, 64, raw.reftable_bytes() / 8]);
            let at = raw.reftable_offset().saturating_add(rng.below(n) * 8);
            let new = offset(rng, &p, len, at);
            put(file, at, 8, if rng.below(4) == 0 { 0 } else { new });
        }
        // Refcounts that lie
        10..=13 => {
            let Some(block) = some(rng, &p.refblocks) else {
                return;
            };
            let order = Raw::new(file).refcount_order();
            let clusters = len / p.cs + 2;
            if order < 3 {
                let at = block.saturating_add(rng.below((clusters << order) / 8 + 1));
                let new = rng.pick(&[0, 0xff, 0x55, 0xaa, rng.0 & 0xff]);
                put(file, at, 1, new);
            } else {
                let n = 1usize << (order - 3);
                let run = if rng.below(4) == 0 { rng.below(32) } else { 1 };
                let first = rng.below(clusters);
                let new = rng.pick(&[0, 0, 1, 1, 2, 3, u64::MAX, u64::MAX - 1]);
                for i in first..first + run {
                    put(file, block.saturating_add(i * n as u64), n, new);
                }
            }
        }
        // Snapshot table entries
        14..=16 => {
            let Some(at) = some(rng, &p.entries) else {
                return header(file, rng, &p);
            };
            match rng.below(8) {
                0 | 1 => {
                    let new = offset(rng, &p, len, at);
                    put(file, at, 8, new);
                }
                2 => update(file, at.saturating_add(8), 4, |old| number(rng, old)),
                3 => update(file, at.saturating_add(rng.pick(&[12, 14])), 2, |old| {
                    number(rng, old)
                }),
                4 => update(file, at.saturating_add(36), 4, |old| {
                    rng.pick(&[0, 8, 16, 24, 32, 1024, 1025, old + 8])
                }),
                5 => update(
                    file,
                    at.saturating_add(rng.pick(&[24, 32, 40, 56])),
                    8,
                    |old| number(rng, old),
                ),
                6 => update(file, at.saturating_add(48), 8, |old| match rng.below(4) {
                    0 => number(rng, old),
                    1 => old.wrapping_add(p.cs * rng.below(300)),
                    2 => old.saturating_sub(p.cs * rng.below(300)),
                    _ => (old & !511) | (512 * rng.below(20)),
                }),
                // The snapshot's L1 is the active one.
                _ => {
                    let raw = Raw::new(file);
                    let (o, n) = (raw.l1_offset(), raw.l1_size());
                    put(file, at, 8, o);
                    put(file, at.saturating_add(8), 4, n);
                }
            }
        }
        // One cluster over another
        17 => {
            let (from, to) = (rng.pick(&p.offsets) & !511, rng.pick(&p.offsets) & !511);
            let n = rng.pick(&[8, 64, 512, p.cs]);
            if from.max(to).checked_add(n).is_some_and(|e| e <= len) {
                file.copy_within(from as usize..(from + n) as usize, to as usize);
            }
        }
        // A word anywhere
        18 => {
            let at = rng.below(len / 8) * 8;
            let new = if rng.below(2) == 0 {
                offset(rng, &p, len, at)
            } else {
                rng.next()
            };
            put(file, at, 8, new);
        }
        // A byte anywhere
        _ => {
            let at = rng.below(len) as usize;
            file[at] ^= 1 << rng.below(8);
        }
    }
}

/// An offset with or without flags, or the flags of what was there.
fn word(file: &mut [u8], rng: &mut Rng, at: u64, new: u64) {
    match rng.below(6) {
        0 => put(file, at, 8, new),
        1 => update(file, at, 8, |old| old ^ COPIED),
        2 => put(
            file,
            at,
            8,
            new | rng.pick(&[1, COPIED | 1, 1 << 56, 0x1fe]),
        ),
        3 => update(file, at, 8, |old| old & !OFFSET | new & OFFSET),
        _ => put(file, at, 8, new | COPIED),
    }
}

fn header(file: &mut [u8], rng: &mut Rng, p: &Places) {
    let len = file.len() as u64;
    let (at, n, is_offset) = rng.pick(&[
        (4, 4, false),
        (8, 8, true),
        (16, 4, false),
        (20, 4, false),
        (24, 8, false),
        (24, 8, false),
        (32, 4, false),
        (36, 4, false),
        (36, 4, false),
        (40, 8, true),
        (40, 8, true),
        (48, 8, true),
        (56, 4, false),
        (60, 4, false),
        (60, 4, false),
        (64, 8, true),
        (64, 8, true),
        (72, 8, false),
        (80, 8, false),
        (88, 8, false),
        (96, 4, false),
        (100, 4, false),
        (104, 8, false),
        (108, 8, false),
    ]);
    match (at, rng.below(4)) {
        (20, 0..=2) => put(file, 20, 4, 9 + rng.below(8)),
        (24, 0..=2) => update(file, 24, 8, |old| {
            old.wrapping_add(rng.below(200) * p.cs)
                .wrapping_sub(rng.below(200) * p.cs)
        }),
        (72 | 80 | 88, 0..=2) => update(file, at, 8, |old| old ^ 1 << rng.below(6)),
        (96, 0..=2) => put(file, 96, 4, rng.below(7)),
        _ if is_offset => {
            let new = offset(rng, p, len, 0);
            put(file, at, 8, new);
        }
        _ => update(file, at, n, |old| number(rng, old)),
    }
}
