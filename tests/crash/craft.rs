//! Images made from nothing, in shapes that qemu-img makes only after long histories: any sharing
//! between active disk and snapshots, stale COPIED flags where QEMU leaves them, files that are
//! full to the last cluster of a refcount block or of the refcount table.

use std::collections::HashMap;
use std::io::Write;
use std::rc::Rc;

use qcow2_snapshot::io::trace::SplitMix64;

/// What to make.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub cluster_bits: u32,
    pub refcount_order: u32,
    pub v3: bool,
    pub extended: bool,
    /// Of the active disk, in guest clusters.
    pub disk: u64,
    /// L1 entries beyond those that the disk needs (room for VM state).
    pub extra_l1: u64,
    /// Disk sizes of the snapshots, in guest clusters; one snapshot for each.
    pub snapshots: [Option<u64>; 3],
    /// Guest clusters that each step of the history writes.
    pub writes: u64,
    /// Of 8 writes, how many go to VM state, are compressed, or zero.
    pub vm: u64,
    pub packed: u64,
    pub zero: u64,
    /// Free clusters scattered in the file, of 16 places between structures.
    pub gaps: u64,
    /// Fill the file up with clusters in use, leaving this many of the last refcount block.
    pub fill: Option<Fill>,
    pub unknown_autoclear: bool,
    /// Active L1 with fewer entries than the snapshots'.
    pub short_l1: bool,
    /// The image names a backing file (version 3).
    pub backing: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Fill {
    pub left: u64,
    /// To the end of the refcount table rather than of a refcount block.
    pub table: bool,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape {
            cluster_bits: 9,
            refcount_order: 4,
            v3: true,
            extended: false,
            disk: 40,
            extra_l1: 0,
            snapshots: [Some(40), Some(40), None],
            writes: 12,
            vm: 0,
            packed: 0,
            zero: 1,
            gaps: 2,
            fill: None,
            unknown_autoclear: false,
            short_l1: false,
            backing: false,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Sym {
    Nothing,
    Zero,
    Data(usize),
    ZeroData(usize),
    Packed(usize),
}

type L2 = Vec<(Sym, u64)>;
type L1 = Vec<Option<Rc<L2>>>;

struct Maker {
    s: Shape,
    rng: SplitMix64,
    /// Contents of data clusters, and of compressed ones (packed already).
    data: Vec<Vec<u8>>,
    packed: Vec<Vec<u8>>,
}

impl Maker {
    fn cs(&self) -> u64 {
        1 << self.s.cluster_bits
    }
    fn per_l2(&self) -> u64 {
        self.cs() / if self.s.extended { 16 } else { 8 }
    }

    fn bytes(&mut self) -> Vec<u8> {
        let word = self.rng.next_u64().to_be_bytes();
        word.iter()
            .copied()
            .cycle()
            .take(self.cs() as usize)
            .collect()
    }

    fn fresh(&mut self) -> (Sym, u64) {
        let map = match self.rng.below(3) {
            0 => 0xffff_ffff,
            _ => {
                let alloc = self.rng.next_u64() & 0xffff_ffff;
                alloc | (self.rng.next_u64() << 32 & !(alloc << 32))
            }
        };
        let kind = self.rng.below(8);
        if kind < self.s.packed {
            let plain = self.bytes();
            let mut z = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
            z.write_all(&plain).unwrap();
            self.packed.push(z.finish().unwrap());
            return (Sym::Packed(self.packed.len() - 1), 0);
        }
        if self.s.v3 && kind < self.s.packed + self.s.zero {
            if self.s.extended {
                return (Sym::Nothing, 0xffff_ffff << 32);
            }
            if self.rng.below(2) == 0 {
                return (Sym::Zero, 0);
            }
        }
        let zero = self.s.v3 && !self.s.extended && kind < self.s.packed + self.s.zero;
        let bytes = self.bytes();
        self.data.push(bytes);
        let id = self.data.len() - 1;
        (
            if zero {
                Sym::ZeroData(id)
            } else {
                Sym::Data(id)
            },
            map,
        )
    }

    fn write_some(&mut self, l1: &mut L1, disk: u64) {
        for _ in 0..self.s.writes {
            let first_vm = disk.div_ceil(self.per_l2()) * self.per_l2();
            let room = (l1.len() as u64 * self.per_l2()).saturating_sub(first_vm);
            let at = if room > 0 && self.rng.below(8) < self.s.vm {
                first_vm + self.rng.below(room)
            } else if disk > 0 {
                self.rng.below(disk)
            } else {
                continue;
            };
            let entry = if self.rng.below(10) == 0 {
                (Sym::Nothing, 0)
            } else {
                self.fresh()
            };
            let slot = &mut l1[(at / self.per_l2()) as usize];
            let table = slot.get_or_insert_with(|| {
                Rc::new(vec![
                    (Sym::Nothing, 0);
                    (self.cs() / if self.s.extended { 16 } else { 8 })
                        as usize
                ])
            });
            Rc::make_mut(table)[(at % self.per_l2()) as usize] = entry;
        }
    }

    /// The same disk in clusters of its own.
    fn deep(&mut self, l1: &L1) -> L1 {
        let mut out = L1::new();
        for slot in l1 {
            out.push(slot.as_ref().map(|t| {
                Rc::new(
                    t.iter()
                        .map(|(sym, map)| {
                            let mut again = |id: usize| {
                                self.data.push(self.data[id].clone());
                                self.data.len() - 1
                            };
                            let sym = match *sym {
                                Sym::Data(id) => Sym::Data(again(id)),
                                Sym::ZeroData(id) => Sym::ZeroData(again(id)),
                                Sym::Packed(id) => {
                                    self.packed.push(self.packed[id].clone());
                                    Sym::Packed(self.packed.len() - 1)
                                }
                                other => other,
                            };
                            (sym, *map)
                        })
                        .collect(),
                )
            }));
        }
        out
    }
}

/// Make an image. The same shape and seed make the same bytes.
pub fn image(mut s: Shape, seed: u64) -> Vec<u8> {
    if s.refcount_order < 4 {
        s.packed = 0; // compressed clusters share host clusters: too many for narrow counts
    }
    let mut m = Maker {
        s,
        rng: SplitMix64::new(seed),
        data: vec![],
        packed: vec![],
    };
    let (cs, per) = (m.cs(), m.per_l2());
    let need = |clusters: u64| clusters.div_ceil(per).max(1);

    // A history: write, snapshot, write ...
    let mut active: L1 = vec![];
    let mut snaps: Vec<(L1, u64)> = vec![];
    for disk in s.snapshots.iter().flatten() {
        let entries = (need(*disk) + s.extra_l1) as usize;
        if !s.short_l1 || active.len() < entries {
            active.resize(entries.max(active.len()), None);
        }
        m.write_some(&mut active, *disk);
        let shares = (1u64 << (1 << s.refcount_order).min(63)) - 1;
        let copy = if snaps.len() as u64 + 2 > shares {
            m.deep(&active)
        } else {
            active.clone()
        };
        snaps.push((copy, *disk));
    }
    let entries = (need(s.disk) + if s.short_l1 { 0 } else { s.extra_l1 }) as usize;
    active.resize(
        if s.short_l1 {
            entries
        } else {
            entries.max(active.len())
        },
        None,
    );
    // What a shrinking resize leaves: nothing behind the new end.
    let kept = snaps.iter().any(|(_, disk)| *disk > s.disk);
    if kept && s.extra_l1 == 0 {
        for (i, slot) in active.iter_mut().enumerate() {
            if i as u64 >= need(s.disk) {
                *slot = None;
            } else if let Some(t) = slot {
                let t = Rc::make_mut(t);
                for j in 0..per {
                    if i as u64 * per + j >= s.disk {
                        t[j as usize] = (Sym::Nothing, 0);
                    }
                }
            }
        }
    }
    m.write_some(&mut active, s.disk);

    layout(&mut m, &active, &snaps)
        .unwrap_or_else(|why| panic!("{s:?} seed {seed}: {why} (cluster size {cs})"))
}

/// Things of one or more clusters, in the order in which they are placed.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Thing {
    Reftable(u64),
    Block(u64),
    ActiveL1,
    SnapL1(usize),
    Table(u64),
    L2(*const L2),
    Data(usize),
    Packed(u64),
    Pad(u64),
    Gap(u64),
}

fn layout(m: &mut Maker, active: &L1, snaps: &[(L1, u64)]) -> Result<Vec<u8>, String> {
    let (s, cs, per) = (m.s, m.cs(), m.per_l2());
    let clusters = |bytes: u64| bytes.div_ceil(cs).max(1);
    let per_block = (cs * 8) >> s.refcount_order;
    let per_table = cs / 8;

    let mut l2s: Vec<Rc<L2>> = vec![];
    for t in snaps
        .iter()
        .map(|(l1, _)| l1)
        .chain([active])
        .flatten()
        .flatten()
    {
        if !l2s.iter().any(|known| Rc::ptr_eq(known, t)) {
            l2s.push(Rc::clone(t));
        }
    }
    // Contents that nothing names any more get no cluster.
    let used = |sym: Sym| l2s.iter().any(|t| t.iter().any(|e| e.0 == sym));
    let mut places = vec![];
    let mut stream = vec![];
    for (id, bytes) in m.packed.iter().enumerate() {
        places.push(stream.len() as u64);
        if used(Sym::Packed(id)) {
            stream.extend_from_slice(bytes);
        }
    }

    let mut table = vec![];
    for (i, (l1, disk)) in snaps.iter().enumerate() {
        let (id, name) = ((i + 1).to_string(), format!("snap{i}"));
        table.resize(table.len().next_multiple_of(8), 0);
        table.extend(0u64.to_be_bytes());
        table.extend((l1.len() as u32).to_be_bytes());
        table.extend((id.len() as u16).to_be_bytes());
        table.extend((name.len() as u16).to_be_bytes());
        table.extend([1, 2, 3, 4, 0, 0, 0, 9]);
        table.extend((77u64 + i as u64).to_be_bytes());
        table.extend(0u32.to_be_bytes());
        table.extend(24u32.to_be_bytes());
        table.extend(0u64.to_be_bytes());
        table.extend((disk * cs).to_be_bytes());
        table.extend(u64::MAX.to_be_bytes());
        table.extend(id.bytes().chain(name.bytes()));
    }

    let mut things: Vec<(Thing, u64)> = vec![(Thing::ActiveL1, clusters(active.len() as u64 * 8))];
    for (i, (l1, _)) in snaps.iter().enumerate() {
        things.push((Thing::SnapL1(i), clusters(l1.len() as u64 * 8)));
    }
    if !table.is_empty() {
        things.push((Thing::Table(0), clusters(table.len() as u64)));
    }
    for t in &l2s {
        things.push((Thing::L2(Rc::as_ptr(t)), 1));
    }
    for id in 0..m.data.len() {
        if used(Sym::Data(id)) || used(Sym::ZeroData(id)) {
            things.push((Thing::Data(id), 1));
        }
    }
    if !stream.is_empty() {
        things.push((Thing::Packed(0), clusters(stream.len() as u64)));
    }
    for i in 0..things.len() as u64 {
        if m.rng.below(16) < s.gaps {
            things.push((Thing::Gap(i), 1 + m.rng.below(2)));
        }
    }
    for i in (1..things.len()).rev() {
        things.swap(i, m.rng.below(i as u64 + 1) as usize);
    }
    let sum = |things: &[(Thing, u64)]| 1 + things.iter().map(|t| t.1).sum::<u64>();
    // Refcount structures, and clusters in use up to the wanted length.
    let mut total = sum(&things) + 1;
    loop {
        let blocks = total.div_ceil(per_block);
        let next = sum(&things) + 1 + blocks;
        if next <= total {
            break;
        }
        total = next;
    }
    let target = match s.fill {
        None => total,
        Some(Fill { left, table: true }) => per_block * per_table - left,
        Some(Fill { left, table: false }) => {
            // The pad may need a block more than the image without it.
            let mut t = total.next_multiple_of(per_block);
            if t < total + left {
                t += per_block;
            }
            t - left
        }
    };
    let blocks = target.max(total).div_ceil(per_block);
    if blocks > per_table {
        return Err(format!("{blocks} refcount blocks"));
    }
    things.insert(0, (Thing::Reftable(0), 1));
    for i in 0..blocks {
        let at = 1 + m.rng.below(things.len() as u64) as usize;
        things.insert(at, (Thing::Block(i), 1));
    }
    let now = sum(&things);
    if target > now {
        let at = 1 + m.rng.below(things.len() as u64) as usize;
        things.insert(at, (Thing::Pad(0), target - now));
    }

    let mut at = 1u64;
    let mut place = HashMap::new();
    for (thing, n) in &things {
        place.insert(thing.clone(), at);
        at += n;
    }
    let total = at;
    let mut counts = vec![0u64; total as usize];
    counts[0] = 1;
    for (thing, n) in &things {
        if !matches!(
            thing,
            Thing::Gap(_) | Thing::L2(_) | Thing::Data(_) | Thing::Packed(_)
        ) {
            for c in place[thing]..place[thing] + n {
                counts[c as usize] = 1;
            }
        }
    }
    let packed_at = place.get(&Thing::Packed(0)).copied().unwrap_or(0) * cs;
    let range = |id: usize| {
        let offset = packed_at + places[id];
        let last = offset + m.packed[id].len() as u64 - 1;
        (offset, last)
    };
    for l1 in snaps.iter().map(|(l1, _)| l1).chain([active]) {
        for t in l1.iter().flatten() {
            counts[place[&Thing::L2(Rc::as_ptr(t))] as usize] += 1;
            for (sym, _) in t.iter() {
                match *sym {
                    Sym::Data(id) | Sym::ZeroData(id) => {
                        counts[place[&Thing::Data(id)] as usize] += 1;
                    }
                    Sym::Packed(id) => {
                        let (offset, last) = range(id);
                        // QEMU counts whole sectors.
                        for c in offset / cs..=(last | 511) / cs {
                            counts[c as usize] += 1;
                        }
                    }
                    _ => {}
                }
            }
        }
    }
    if let Some(c) = counts
        .iter()
        .find(|c| s.refcount_order < 6 && **c >> (1 << s.refcount_order) != 0)
    {
        return Err(format!("count {c} of {} bits", 1 << s.refcount_order));
    }

    // The bytes.
    let mut out = vec![0u8; (total * cs) as usize];
    let reftable = place[&Thing::Reftable(0)] * cs;
    put(&mut out, 0, &0x5146_49fbu32.to_be_bytes());
    put(&mut out, 4, &(if s.v3 { 3u32 } else { 2 }).to_be_bytes());
    put(&mut out, 20, &s.cluster_bits.to_be_bytes());
    put(&mut out, 24, &(s.disk * cs).to_be_bytes());
    put(&mut out, 36, &(active.len() as u32).to_be_bytes());
    put(&mut out, 40, &(place[&Thing::ActiveL1] * cs).to_be_bytes());
    put(&mut out, 48, &reftable.to_be_bytes());
    put(&mut out, 56, &1u32.to_be_bytes());
    put(&mut out, 60, &(snaps.len() as u32).to_be_bytes());
    if let Some(at) = place.get(&Thing::Table(0)) {
        put(&mut out, 64, &(at * cs).to_be_bytes());
        for (i, (l1, _)) in snaps.iter().enumerate() {
            let _ = l1;
            // Entries are found by walking them: all have the same shape here.
            let mut p = 0usize;
            for _ in 0..i {
                p = (p + 64 + 1 + "snap0".len()).next_multiple_of(8);
            }
            table[p..p + 8].copy_from_slice(&(place[&Thing::SnapL1(i)] * cs).to_be_bytes());
        }
        put(&mut out, at * cs, &table);
    }
    if s.v3 {
        put(
            &mut out,
            72,
            &(if s.extended { 16u64 } else { 0 }).to_be_bytes(),
        );
        put(
            &mut out,
            88,
            &(if s.unknown_autoclear { 1u64 << 40 } else { 0 }).to_be_bytes(),
        );
        put(&mut out, 96, &s.refcount_order.to_be_bytes());
        put(&mut out, 100, &104u32.to_be_bytes());
        if s.backing {
            // Behind the end of the extensions.
            put(&mut out, 8, &112u64.to_be_bytes());
            put(&mut out, 16, &4u32.to_be_bytes());
            put(&mut out, 112, b"base");
        }
    }
    for i in 0..blocks {
        let block = place[&Thing::Block(i)] * cs;
        put(&mut out, reftable + i * 8, &block.to_be_bytes());
        let bits = 1u64 << s.refcount_order;
        for j in 0..per_block {
            let Some(&count) = counts.get((i * per_block + j) as usize) else {
                break;
            };
            if bits >= 8 {
                let bytes = (bits / 8) as usize;
                put(
                    &mut out,
                    block + j * bits / 8,
                    &count.to_be_bytes()[8 - bytes..],
                );
            } else if count != 0 {
                let at = (block + j * bits / 8) as usize;
                out[at] |= (count << (j * bits % 8)) as u8;
            }
        }
    }
    let copied = |c: u64| {
        if counts[c as usize] == 1 {
            1u64 << 63
        } else {
            0
        }
    };
    for (i, l1) in snaps.iter().map(|(l1, _)| l1).chain([active]).enumerate() {
        let own = i == snaps.len();
        let at = if own {
            place[&Thing::ActiveL1]
        } else {
            place[&Thing::SnapL1(i)]
        };
        for (j, t) in l1.iter().enumerate() {
            let Some(t) = t else { continue };
            let c = place[&Thing::L2(Rc::as_ptr(t))];
            // A snapshot's L1 keeps the flags of the moment when it was made.
            let flag = if own { copied(c) } else { m.rng.below(2) << 63 };
            put(
                &mut out,
                at * cs + j as u64 * 8,
                &((c * cs) | flag).to_be_bytes(),
            );
        }
    }
    for t in &l2s {
        let c = place[&Thing::L2(Rc::as_ptr(t))];
        let own = active.iter().flatten().any(|a| Rc::ptr_eq(a, t));
        for (j, (sym, map)) in t.iter().enumerate() {
            let word = match *sym {
                Sym::Nothing => 0,
                Sym::Zero => 1,
                Sym::Data(id) | Sym::ZeroData(id) => {
                    let d = place[&Thing::Data(id)];
                    let flag = if own || m.rng.below(2) == 0 {
                        copied(d)
                    } else {
                        0
                    };
                    (d * cs) | flag | u64::from(matches!(sym, Sym::ZeroData(_)))
                }
                Sym::Packed(id) => {
                    let (offset, last) = range(id);
                    let sectors = last / 512 - offset / 512;
                    1 << 62 | sectors << (62 - (s.cluster_bits - 8)) | offset
                }
            };
            let size = cs / per;
            put(&mut out, c * cs + j as u64 * size, &word.to_be_bytes());
            if s.extended {
                let map = if matches!(sym, Sym::Packed(_)) {
                    0
                } else {
                    *map
                };
                put(&mut out, c * cs + j as u64 * size + 8, &map.to_be_bytes());
            }
        }
    }
    for (id, bytes) in m.data.iter().enumerate() {
        if let Some(c) = place.get(&Thing::Data(id)) {
            put(&mut out, c * cs, bytes);
        }
    }
    put(&mut out, packed_at, &stream);
    Ok(out)
}

fn put(out: &mut [u8], at: u64, bytes: &[u8]) {
    out[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
}
