//! The judge: reads an image with code that shares nothing with the library, and says what the
//! image holds, or which rule it breaks.
//!
//! Rules, for every image that a power cut or a failing disk leaves:
//! * header, tables and the snapshot table can be read, and lie within their limits;
//! * no cluster has a lower refcount than there are references to it;
//! * no two structures share a cluster (guest data may be shared);
//! * no COPIED flag is reachable from the active L1 on an L2 table or a cluster that a published
//!   snapshot names: with one, a guest writes into the snapshot.

use std::collections::{HashMap, HashSet};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Clusters beyond this one are taken for damage (the images here are small).
const MOST_CLUSTERS: u64 = 1 << 24;

/// One entry of the snapshot table and what the snapshot reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snap {
    pub id: Vec<u8>,
    pub name: Vec<u8>,
    pub l1_offset: u64,
    pub l1_size: u32,
    pub fields: Vec<u8>,
    pub disk_size: Option<u64>,
    /// Of everything that the L1 table reaches, VM state included.
    pub content: u64,
}

/// What an image means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub size: u64,
    /// Of the active disk up to its size.
    pub disk: u64,
    /// Of what the active L1 holds beyond that: VM state.
    pub beyond: u64,
    pub snaps: Vec<Snap>,
}

impl State {
    pub fn describe(&self) -> String {
        let snaps: Vec<String> = self
            .snaps
            .iter()
            .map(|s| {
                let id = String::from_utf8_lossy(&s.id).into_owned();
                format!("{id}@{:#x}={:08x}", s.l1_offset, s.content >> 32)
            })
            .collect();
        format!(
            "size {:#x} disk {:08x} beyond {:08x} snapshots [{}]",
            self.size,
            self.disk >> 32,
            self.beyond >> 32,
            snaps.join(" ")
        )
    }
}

/// What the judge found.
pub struct Verdict {
    pub state: State,
    /// Clusters with a count above their references.
    pub leaks: u64,
    /// Clusters that published snapshots name: L2 tables and data.
    pub named: HashSet<u64>,
    /// Entries reachable from the active L1 whose COPIED flag is not what the count demands.
    pub odd_flags: u64,
    pub unknown_autoclear: bool,
    pub cluster_bits: u32,
}

struct Img<'a> {
    b: &'a [u8],
    cb: u32,
    extended: bool,
    crypt: u32,
    zstd: bool,
    backing: bool,
    v3: bool,
}

pub fn be64(b: &[u8], at: usize) -> u64 {
    let mut w = [0u8; 8];
    if at < b.len() {
        let n = (b.len() - at).min(8);
        w[..n].copy_from_slice(&b[at..at + n]);
    }
    u64::from_be_bytes(w)
}

pub fn be32(b: &[u8], at: usize) -> u32 {
    (be64(b, at) >> 32) as u32
}

fn be16(b: &[u8], at: usize) -> u16 {
    (be64(b, at) >> 48) as u16
}

pub use qcow2_snapshot::io::trace::digest as hash;

/// By memcmp: most of what is judged is zeros.
fn is_zero(data: &[u8]) -> bool {
    data.first()
        .is_none_or(|first| *first == 0 && data[1..] == data[..data.len() - 1])
}

/// What one L2 entry says.
enum Entry {
    Nothing,
    Zero,
    Data { host: u64, zero: bool },
    Packed { host: u64, bytes: u64 },
}

impl Img<'_> {
    fn cs(&self) -> u64 {
        1 << self.cb
    }
    fn entry_size(&self) -> u64 {
        if self.extended {
            16
        } else {
            8
        }
    }
    fn per_l2(&self) -> u64 {
        self.cs() / self.entry_size()
    }
    fn word(&self, at: u64) -> u64 {
        be64(self.b, usize::try_from(at).unwrap_or(usize::MAX))
    }
    /// `n` bytes at `at`, zeros past the end.
    fn bytes(&self, at: u64, n: u64) -> Vec<u8> {
        let mut out = vec![0; n as usize];
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        if at < self.b.len() {
            let have = (self.b.len() - at).min(out.len());
            out[..have].copy_from_slice(&self.b[at..at + have]);
        }
        out
    }
    fn entry(&self, w: u64) -> Entry {
        if w & COMPRESSED != 0 {
            let x = 62 - (self.cb - 8);
            let host = w & ((1 << x) - 1);
            let sectors = (w >> x) & ((1 << (self.cb - 8)) - 1);
            return Entry::Packed {
                host,
                bytes: (sectors + 1) * 512 - host % 512,
            };
        }
        let host = w & OFFSET;
        let zero = self.v3 && !self.extended && w & 1 != 0;
        match (host, zero) {
            (0, false) => Entry::Nothing,
            (0, true) => Entry::Zero,
            _ => Entry::Data { host, zero },
        }
    }

    /// The contents of one guest cluster, cut to `limit` bytes, as a number; 0 for a cluster that
    /// reads as if it had never been written.
    fn content(&self, l2_at: u64, index: u64, limit: u64) -> Result<u64, String> {
        let at = l2_at + index * self.entry_size();
        let w = self.word(at);
        if w == 0 && self.crypt == 0 && (!self.extended || self.word(at + 8) == 0) {
            return Ok(0);
        }
        let mut through = 0u32; // subclusters where a backing file shows through
        let mut buf;
        let mut salt = 0;
        match self.entry(w) {
            Entry::Packed { host, bytes } => {
                let packed = self.bytes(host, bytes);
                if self.zstd {
                    // Its end is not known without decoding: the cluster it lies in is compared.
                    return Ok(hash(&packed, 77));
                }
                buf = vec![0; self.cs() as usize];
                let mut d = flate2::Decompress::new(false);
                let r = d.decompress(&packed, &mut buf, flate2::FlushDecompress::Finish);
                if d.total_out() != self.cs() {
                    return Err(format!(
                        "compressed cluster at {host:#x} does not unpack: {r:?}"
                    ));
                }
            }
            kind if self.extended => {
                let map = self.word(at + 8);
                buf = match kind {
                    Entry::Data { host, .. } => self.bytes(host, self.cs()),
                    _ => vec![0; self.cs() as usize],
                };
                let sub = (self.cs() / 32) as usize;
                for i in 0..32 {
                    let (alloc, zero) = (map >> i & 1 == 1, map >> (32 + i) & 1 == 1);
                    if alloc && matches!(kind, Entry::Nothing) {
                        return Err(format!(
                            "subcluster allocated without a cluster, L2 entry at {at:#x}"
                        ));
                    }
                    if !alloc {
                        buf[i * sub..(i + 1) * sub].fill(0);
                        if !zero && self.backing {
                            through |= 1 << i;
                        }
                    }
                }
                salt = u64::from(self.crypt);
            }
            Entry::Nothing => {
                through = if self.backing { u32::MAX } else { 0 };
                buf = vec![];
            }
            Entry::Zero | Entry::Data { zero: true, .. } => buf = vec![0; self.cs() as usize],
            Entry::Data { host, .. } => {
                if self.crypt != 0 {
                    salt = host; // the cipher depends on the place
                }
                buf = self.bytes(host, self.cs());
            }
        }
        buf.truncate(limit as usize);
        if through == u32::MAX || (!self.backing && salt == 0 && is_zero(&buf)) {
            return Ok(0);
        }
        Ok(hash(&buf, u64::from(through) ^ salt) | 1)
    }
}

/// Count references, watching that structures keep apart.
struct Refs {
    cb: u32,
    counts: Vec<u32>,
    owner: Vec<u32>,
    names: Vec<String>,
}

const DATA: u32 = u32::MAX;

impl Refs {
    fn structure(&mut self, name: String, offset: u64, bytes: u64) -> Result<(), String> {
        if offset & ((1 << self.cb) - 1) != 0 {
            return Err(format!("{name} at {offset:#x} is not at a cluster"));
        }
        self.names.push(name);
        let id = self.names.len() as u32;
        self.add(id, offset, bytes)
    }
    fn add(&mut self, id: u32, offset: u64, bytes: u64) -> Result<(), String> {
        if bytes == 0 {
            return Ok(());
        }
        let (first, last) = (offset >> self.cb, (offset + bytes - 1) >> self.cb);
        if last >= MOST_CLUSTERS {
            return Err(format!("{} lies at {offset:#x}", self.name(id)));
        }
        if last as usize >= self.counts.len() {
            self.counts.resize(last as usize + 1, 0);
            self.owner.resize(last as usize + 1, 0);
        }
        for c in first as usize..=last as usize {
            if self.owner[c] != 0 && self.owner[c] != id {
                return Err(format!(
                    "{} overlaps {} in cluster {c:#x}",
                    self.name(id),
                    self.name(self.owner[c])
                ));
            }
            self.owner[c] = id;
            self.counts[c] += 1;
        }
        Ok(())
    }
    fn name(&self, id: u32) -> String {
        match id {
            DATA => "guest data".into(),
            _ => self.names[id as usize - 1].clone(),
        }
    }
}

/// Judge an image.
pub fn judge(b: &[u8]) -> Result<Verdict, String> {
    if b.len() < 72 || be32(b, 0) != 0x5146_49fb {
        return Err("no qcow2 header".into());
    }
    let version = be32(b, 4);
    let v3 = version >= 3;
    let (incompatible, autoclear, order, header_length) = if v3 {
        (be64(b, 72), be64(b, 88), be32(b, 96), be32(b, 100))
    } else {
        (0, 0, 4, 72)
    };
    if !(2..=3).contains(&version) || order > 6 || incompatible & !0x1f != 0 {
        return Err(format!(
            "header: version {version} incompatible {incompatible:#x}"
        ));
    }
    let img = Img {
        b,
        cb: be32(b, 20),
        extended: incompatible & 16 != 0,
        crypt: be32(b, 32),
        zstd: incompatible & 8 != 0 && b[104] == 1,
        backing: be64(b, 8) != 0,
        v3,
    };
    if !(9..=21).contains(&img.cb) {
        return Err(format!("header: cluster bits {}", img.cb));
    }
    let cs = img.cs();
    let size = be64(b, 24) & !511;
    let mut refs = Refs {
        cb: img.cb,
        counts: vec![0; b.len() / cs as usize + 1],
        owner: vec![0; b.len() / cs as usize + 1],
        names: vec![],
    };
    refs.structure("header".into(), 0, cs)?;
    extensions(&img, &mut refs, u64::from(header_length))?;

    // Refcounts.
    let (table, clusters) = (be64(b, 48), u64::from(be32(b, 56)));
    if clusters == 0 || clusters * cs > 8 << 20 {
        return Err(format!("refcount table of {clusters} clusters"));
    }
    refs.structure("refcount table".into(), table, clusters * cs)?;
    let per_block = (cs * 8) >> order;
    let blocks: Vec<u64> = (0..clusters * cs / 8)
        .map(|i| img.word(table + i * 8))
        .collect();
    for (i, &block) in blocks.iter().enumerate() {
        if block != 0 {
            if block & 511 != 0 {
                return Err(format!("refcount table entry {i} is {block:#x}"));
            }
            refs.structure(format!("refcount block {i}"), block, cs)?;
        }
    }
    let count_of = |c: u64| -> u64 {
        match blocks.get((c / per_block) as usize) {
            None | Some(0) => 0,
            Some(&block) => {
                let i = c % per_block;
                match order {
                    6 => img.word(block + i * 8),
                    5 => img.word(block + i * 4) >> 32,
                    4 => img.word(block + i * 2) >> 48,
                    3 => img.word(block + i) >> 56,
                    _ => {
                        let bits = 1u64 << order;
                        let per_byte = 8 / bits;
                        let byte = img.word(block + i / per_byte) >> 56;
                        byte >> (i % per_byte * bits) & ((1 << bits) - 1)
                    }
                }
            }
        }
    };

    // The snapshot table, then everything that the L1 tables reach.
    let (l1_offset, l1_size) = (be64(b, 40), be32(b, 36));
    let mut snaps = snapshot_table(&img, &mut refs)?;
    refs.structure("active L1 table".into(), l1_offset, u64::from(l1_size) * 8)?;
    for s in &snaps {
        let name = format!("L1 table of snapshot {}", String::from_utf8_lossy(&s.id));
        refs.structure(name, s.l1_offset, u64::from(s.l1_size) * 8)?;
    }
    let mut named = HashSet::new();
    let mut tables = HashSet::new();
    let mut l2_digests = HashMap::new();
    for s in &mut snaps {
        let l1 = (s.l1_offset, u64::from(s.l1_size));
        walk(&img, &mut refs, &mut tables, l1, |entry, cluster| {
            let _ = entry;
            named.insert(cluster);
            Ok(())
        })?;
        s.content = digest(&img, l1, 0, u64::MAX, &mut l2_digests)?;
    }
    let mut odd_flags = 0;
    let l1 = (l1_offset, u64::from(l1_size));
    walk(&img, &mut refs, &mut tables, l1, |entry, cluster| {
        let copied = entry & COPIED != 0;
        if copied && named.contains(&cluster) {
            return Err(format!(
                "COPIED reachable from the active L1 on cluster {cluster:#x}, which a snapshot names"
            ));
        }
        if copied != (count_of(cluster) == 1) {
            odd_flags += 1;
        }
        Ok(())
    })?;
    let disk = digest(&img, l1, 0, size, &mut l2_digests)?;
    let beyond = digest(
        &img,
        l1,
        size.next_multiple_of(cs),
        u64::MAX,
        &mut l2_digests,
    )?;
    let reach = u128::from(l1_size) * u128::from(img.per_l2()) * u128::from(cs);
    if u128::from(size) > reach {
        return Err(format!(
            "the active L1 table of {l1_size} entries does not cover the disk of {size:#x} bytes"
        ));
    }

    let mut leaks = 0;
    for c in 0..refs
        .counts
        .len()
        .max((b.len() as u64).div_ceil(cs) as usize)
    {
        let (want, have) = (refs.counts.get(c).copied().unwrap_or(0), count_of(c as u64));
        if have < u64::from(want) {
            return Err(format!(
                "cluster {c:#x} ({}) has count {have} and {want} references",
                refs.name(refs.owner[c])
            ));
        }
        // What is counted behind the end of the file costs nothing; QEMU does not look there.
        leaks += u64::from(have > u64::from(want) && (c as u64) << img.cb < b.len() as u64);
    }
    Ok(Verdict {
        state: State {
            size,
            disk,
            beyond,
            snaps,
        },
        leaks,
        named,
        odd_flags,
        unknown_autoclear: autoclear & !3 != 0,
        cluster_bits: img.cb,
    })
}

/// Clusters that header extensions name: bitmaps and the LUKS header.
fn extensions(img: &Img, refs: &mut Refs, mut at: u64) -> Result<(), String> {
    let end = match be64(img.b, 8) {
        0 => img.cs(),
        backing => backing,
    };
    while at + 8 <= end.min(img.b.len() as u64) {
        let (magic, len) = (be32(img.b, at as usize), be32(img.b, at as usize + 4));
        let data = at + 8;
        match magic {
            0 => break,
            0x0537_be77 => {
                refs.structure("LUKS header".into(), img.word(data), img.word(data + 8))?;
            }
            0x2385_2875 if be64(img.b, 88) & 1 != 0 => {
                let (bytes, dir) = (img.word(data + 8), img.word(data + 16));
                refs.structure("bitmap directory".into(), dir, bytes)?;
                let mut p = dir;
                while p < dir + bytes {
                    let (table, entries) = (img.word(p), u64::from(be32(img.b, p as usize + 8)));
                    refs.structure("bitmap table".into(), table, entries * 8)?;
                    for i in 0..entries {
                        let data = img.word(table + i * 8) & OFFSET;
                        if data != 0 {
                            refs.structure("bitmap data".into(), data, img.cs())?;
                        }
                    }
                    let extra = u64::from(be32(img.b, p as usize + 20));
                    let name = u64::from(be16(img.b, p as usize + 18));
                    p += (24 + extra + name).next_multiple_of(8);
                }
            }
            _ => {}
        }
        at = data + u64::from(len).next_multiple_of(8);
    }
    Ok(())
}

fn c_string(mut text: Vec<u8>) -> Vec<u8> {
    if let Some(end) = text.iter().position(|b| *b == 0) {
        text.truncate(end);
    }
    text
}

fn snapshot_table(img: &Img, refs: &mut Refs) -> Result<Vec<Snap>, String> {
    let (n, start) = (be32(img.b, 60), be64(img.b, 64));
    if n > 65536 {
        return Err(format!("{n} snapshots"));
    }
    let mut at = start;
    let mut out: Vec<Snap> = Vec::new();
    for i in 0..n {
        at = at.next_multiple_of(8);
        let p = at as usize;
        if p + 40 > img.b.len() {
            return Err(format!("snapshot table entry {i} lies past the end"));
        }
        let (id, name) = (
            u64::from(be16(img.b, p + 12)),
            u64::from(be16(img.b, p + 14)),
        );
        let extra = u64::from(be32(img.b, p + 36));
        if extra > 1024 {
            return Err(format!(
                "snapshot table entry {i}: extra data of {extra} bytes"
            ));
        }
        let (l1_offset, l1_size) = (be64(img.b, p), be32(img.b, p + 8));
        if l1_size > 4 << 20 {
            return Err(format!("snapshot table entry {i}: L1 of {l1_size} entries"));
        }
        out.push(Snap {
            // QEMU has them as C strings.
            id: c_string(img.bytes(at + 40 + extra, id)),
            name: c_string(img.bytes(at + 40 + extra + id, name)),
            l1_offset,
            l1_size,
            fields: img.bytes(at, 40 + extra),
            disk_size: (extra >= 16).then(|| img.word(at + 48)),
            content: 0,
        });
        at += 40 + extra + id + name;
    }
    refs.structure("snapshot table".into(), start, at - start)?;
    Ok(out)
}

/// References of one L1 table; `see` gets each entry with a host cluster, and the cluster.
/// `tables` remembers the L2 tables seen.
fn walk(
    img: &Img,
    refs: &mut Refs,
    tables: &mut HashSet<u64>,
    (l1, entries): (u64, u64),
    mut see: impl FnMut(u64, u64) -> Result<(), String>,
) -> Result<(), String> {
    for i in 0..entries {
        let w = img.word(l1 + i * 8);
        let l2 = w & OFFSET;
        if l2 == 0 {
            continue;
        }
        if l2 & (img.cs() - 1) != 0 {
            return Err(format!("L1 entry {i} at {l1:#x}: {w:#x}"));
        }
        if l2 >> img.cb >= MOST_CLUSTERS {
            return Err(format!("L2 table at {l2:#x}"));
        }
        // The name of an L2 table is its place: several L1 tables may share it.
        let name = format!("L2 table {l2:#x}");
        match tables.contains(&l2) {
            true => {
                let id = refs.owner[(l2 >> img.cb) as usize];
                if id == DATA || !refs.name(id).starts_with("L2 table") {
                    return Err(format!("{name} overlaps {}", refs.name(id)));
                }
                refs.add(id, l2, img.cs())?;
            }
            false => refs.structure(name, l2, img.cs())?,
        }
        see(w, l2 >> img.cb)?;
        for j in 0..img.per_l2() {
            let w = img.word(l2 + j * img.entry_size());
            match img.entry(w) {
                Entry::Nothing | Entry::Zero => {}
                Entry::Data { host, .. } => {
                    if host & (img.cs() - 1) != 0 {
                        return Err(format!("L2 entry {j} at {l2:#x}: {w:#x}"));
                    }
                    refs.add(DATA, host, img.cs())?;
                    see(w, host >> img.cb)?;
                }
                Entry::Packed { host, bytes } => {
                    refs.add(DATA, host, bytes)?;
                    if w & COPIED != 0 {
                        return Err(format!("compressed L2 entry {j} at {l2:#x} with COPIED"));
                    }
                }
            }
        }
        tables.insert(l2);
    }
    Ok(())
}

/// What `from..to` of the disk behind an L1 table reads, as a number.
fn digest(
    img: &Img,
    (l1, entries): (u64, u64),
    from: u64,
    to: u64,
    known: &mut HashMap<u64, u64>,
) -> Result<u64, String> {
    let (cs, per) = (img.cs(), img.per_l2());
    let mut out = 0u64;
    for i in 0..entries {
        let l2 = img.word(l1 + i * 8) & OFFSET;
        let start = u128::from(i) * u128::from(per) * u128::from(cs);
        let end = start + u128::from(per) * u128::from(cs);
        if (l2 == 0 && !img.backing) || start >= u128::from(to) || end <= u128::from(from) {
            continue;
        }
        if l2 == 0 {
            continue; // the backing file shows through: as if never written
        }
        let whole = start >= u128::from(from) && end <= u128::from(to);
        let sum = match known.get(&l2).filter(|_| whole) {
            Some(sum) => *sum,
            None => {
                let mut sum = 0u64;
                for j in 0..per {
                    let at = start as u64 + j * cs;
                    if at < from || at >= to {
                        continue;
                    }
                    let c = img.content(l2, j, cs.min(to - at))?;
                    if c != 0 {
                        sum = hash(&j.to_be_bytes(), sum ^ c);
                    }
                }
                if whole {
                    known.insert(l2, sum);
                }
                sum
            }
        };
        if sum != 0 {
            out = hash(&i.to_be_bytes(), out ^ sum);
        }
    }
    Ok(out)
}
