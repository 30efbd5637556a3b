//! A small qcow2 reader that shares nothing with the library: it finds which structure a byte
//! belongs to, reads the snapshot table for the driver, and lets `craft` change images.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use super::files::{self, read_at, R};

pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

pub fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}
pub fn be32(b: &[u8], at: usize) -> u32 {
    (u32::from(be16(b, at)) << 16) | u32::from(be16(b, at + 2))
}
pub fn be64(b: &[u8], at: usize) -> u64 {
    (u64::from(be32(b, at)) << 32) | u64::from(be32(b, at + 4))
}

#[derive(Clone, Debug, Default)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    pub size: u64,
    pub l1_size: u32,
    pub l1_off: u64,
    pub rt_off: u64,
    pub rt_clusters: u32,
    pub nb_snapshots: u32,
    pub snap_off: u64,
    pub incompat: u64,
    pub autoclear: u64,
    pub refcount_order: u32,
    pub backing: Option<(Vec<u8>, bool)>,
    /// Directory offset, size and number of bitmaps.
    pub bitmaps: Option<(u64, u64, u32)>,
    pub luks: Option<(u64, u64)>,
}

/// One snapshot table entry as it stands in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands; set by the reader only.
    pub pos: u64,
    pub l1_off: u64,
    pub l1_size: u32,
    pub date_sec: u32,
    pub date_nsec: u32,
    pub vm_clock: u64,
    pub vm_size32: u32,
    pub extra: Vec<u8>,
    pub id: Vec<u8>,
    pub name: Vec<u8>,
}

impl Entry {
    pub fn vm_size(&self) -> u64 {
        if self.extra.len() >= 8 {
            be64(&self.extra, 0)
        } else {
            u64::from(self.vm_size32)
        }
    }
    pub fn disk_size(&self) -> Option<u64> {
        (self.extra.len() >= 16).then(|| be64(&self.extra, 8))
    }
    pub fn icount(&self) -> u64 {
        if self.extra.len() >= 24 {
            be64(&self.extra, 16)
        } else {
            u64::MAX
        }
    }
    fn end(&self) -> u64 {
        self.pos + 40 + (self.extra.len() + self.id.len() + self.name.len()) as u64
    }
    pub fn encode(&self) -> Vec<u8> {
        let mut v = Vec::new();
        v.extend_from_slice(&self.l1_off.to_be_bytes());
        v.extend_from_slice(&self.l1_size.to_be_bytes());
        v.extend_from_slice(&(self.id.len() as u16).to_be_bytes());
        v.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        v.extend_from_slice(&self.date_sec.to_be_bytes());
        v.extend_from_slice(&self.date_nsec.to_be_bytes());
        v.extend_from_slice(&self.vm_clock.to_be_bytes());
        v.extend_from_slice(&self.vm_size32.to_be_bytes());
        v.extend_from_slice(&(self.extra.len() as u32).to_be_bytes());
        v.extend_from_slice(&self.extra);
        v.extend_from_slice(&self.id);
        v.extend_from_slice(&self.name);
        v
    }
}

pub struct Qcow {
    pub file: File,
    pub len: u64,
    pub h: Header,
    pub snaps: Vec<Entry>,
    /// Bytes of the snapshot table.
    pub snaps_size: u64,
    pub reftable: Vec<u64>,
}

impl Qcow {
    pub fn open(path: &Path) -> R<Qcow> {
        Qcow::from_file(files::open(path)?)
    }

    pub fn open_rw(path: &Path) -> R<Qcow> {
        Qcow::from_file(files::open_rw(path)?)
    }

    fn from_file(file: File) -> R<Qcow> {
        let len = files::len(&file)?;
        let mut b = [0u8; 112];
        read_at(&file, 0, &mut b)?;
        if be32(&b, 0) != 0x5146_49fb {
            return Err("no qcow2 magic".into());
        }
        let mut h = Header {
            version: be32(&b, 4),
            cluster_bits: be32(&b, 20),
            size: be64(&b, 24),
            l1_size: be32(&b, 36),
            l1_off: be64(&b, 40),
            rt_off: be64(&b, 48),
            rt_clusters: be32(&b, 56),
            nb_snapshots: be32(&b, 60),
            snap_off: be64(&b, 64),
            refcount_order: 4,
            ..Default::default()
        };
        let mut ext = 72u64;
        if h.version >= 3 {
            h.incompat = be64(&b, 72);
            h.autoclear = be64(&b, 88);
            h.refcount_order = be32(&b, 96);
            ext = u64::from(be32(&b, 100));
        }
        if !(9..=21).contains(&h.cluster_bits)
            || h.refcount_order > 6
            || h.l1_size > 4 << 20
            || h.rt_clusters > 1 << 20
        {
            return Err("header out of range".into());
        }
        let mut fmt_raw = false;
        let cs = 1u64 << h.cluster_bits;
        loop {
            let mut e = [0u8; 32];
            read_at(&file, ext, &mut e)?;
            let (magic, elen) = (be32(&e, 0), u64::from(be32(&e, 4)));
            match magic {
                0 => break,
                0xe279_2aca => fmt_raw = e[8..].starts_with(b"raw"),
                0x2385_2875 => h.bitmaps = Some((be64(&e, 24), be64(&e, 16), be32(&e, 8))),
                0x0537_be77 => h.luks = Some((be64(&e, 8), be64(&e, 16))),
                _ => {}
            }
            ext += 8 + elen.div_ceil(8) * 8;
            if ext >= cs {
                break;
            }
        }
        let (boff, bsize) = (be64(&b, 8), be32(&b, 16));
        if boff != 0 && bsize < 1024 {
            let mut name = vec![0u8; bsize as usize];
            read_at(&file, boff, &mut name)?;
            h.backing = Some((name, fmt_raw));
        }
        let mut q = Qcow {
            file,
            len,
            h,
            snaps: vec![],
            snaps_size: 0,
            reftable: vec![],
        };
        q.reftable = q.words(q.h.rt_off, (u64::from(q.h.rt_clusters) * cs / 8) as usize)?;
        q.read_table()?;
        Ok(q)
    }

    fn read_table(&mut self) -> R<()> {
        if self.h.nb_snapshots > 65536 {
            return Err("too many snapshots".into());
        }
        let mut pos = self.h.snap_off;
        for _ in 0..self.h.nb_snapshots {
            pos = pos.div_ceil(8) * 8;
            let b = self.bytes(pos, 40)?;
            let (idn, namen, extran) = (
                be16(&b, 12) as usize,
                be16(&b, 14) as usize,
                be32(&b, 36) as usize,
            );
            if extran > 1 << 20 {
                return Err("extra data of a snapshot too long".into());
            }
            let mut v = self.bytes(pos + 40, extran + idn + namen)?;
            let name = v.split_off(extran + idn);
            let id = v.split_off(extran);
            let e = Entry {
                pos,
                l1_off: be64(&b, 0),
                l1_size: be32(&b, 8),
                date_sec: be32(&b, 16),
                date_nsec: be32(&b, 20),
                vm_clock: be64(&b, 24),
                vm_size32: be32(&b, 32),
                extra: v,
                id,
                name,
            };
            pos = e.end();
            self.snaps.push(e);
        }
        self.snaps_size = pos - self.h.snap_off;
        Ok(())
    }

    pub fn cs(&self) -> u64 {
        1 << self.h.cluster_bits
    }

    pub fn ext_l2(&self) -> bool {
        self.h.incompat & 16 != 0
    }

    /// Guest bytes under one L1 entry.
    pub fn l2_span(&self) -> u64 {
        self.cs() * (self.cs() / if self.ext_l2() { 16 } else { 8 })
    }

    pub fn bytes(&self, off: u64, n: usize) -> R<Vec<u8>> {
        let mut v = vec![0u8; n];
        read_at(&self.file, off, &mut v)?;
        Ok(v)
    }

    pub fn words(&self, off: u64, n: usize) -> R<Vec<u64>> {
        let b = self.bytes(off, n * 8)?;
        Ok((0..n).map(|i| be64(&b, i * 8)).collect())
    }

    /// Clusters described by one refcount block.
    pub fn per_block(&self) -> u64 {
        (self.cs() * 8) >> self.h.refcount_order
    }

    /// Refcount of a cluster, or `None` where no block describes it.
    pub fn refcount(&self, cluster: u64) -> R<Option<u64>> {
        let Some(block) = self
            .reftable
            .get((cluster / self.per_block()) as usize)
            .copied()
        else {
            return Ok(None);
        };
        if block & OFFSET == 0 {
            return Ok(None);
        }
        let i = cluster % self.per_block();
        let bits = 1u64 << self.h.refcount_order;
        let b = self.bytes((block & OFFSET) + i * bits / 8, (bits as usize).div_ceil(8))?;
        Ok(Some(if bits < 8 {
            (u64::from(b[0]) >> (i * bits % 8)) & ((1 << bits) - 1)
        } else {
            b.iter().fold(0, |n, x| (n << 8) | u64::from(*x))
        }))
    }

    /// The L1 tables: the active one, then each snapshot's.
    fn l1s(&self) -> Vec<(String, u64, u32)> {
        let mut v = vec![("the active L1".to_string(), self.h.l1_off, self.h.l1_size)];
        for (i, s) in self.snaps.iter().enumerate() {
            v.push((
                format!("the L1 of snapshot {i}"),
                s.l1_off,
                s.l1_size.min(4 << 20),
            ));
        }
        v
    }

    /// Everything that claims bytes of the file, for reports and for cutting ends safely.
    pub fn map(&self) -> R<Map> {
        let cs = self.cs();
        let mut m = Map::default();
        m.add(0, cs, Kind::Header);
        m.add(
            self.h.rt_off,
            u64::from(self.h.rt_clusters) * cs,
            Kind::RefTable,
        );
        for (i, r) in self.reftable.iter().enumerate() {
            if r & OFFSET != 0 {
                m.add(
                    r & OFFSET,
                    cs,
                    Kind::RefBlock {
                        index: i as u64,
                        per: self.per_block(),
                        order: self.h.refcount_order,
                    },
                );
            }
        }
        if self.h.nb_snapshots > 0 {
            for (i, e) in self.snaps.iter().enumerate() {
                m.add(
                    e.pos,
                    e.end() - e.pos,
                    Kind::Entry {
                        index: i,
                        extra: e.extra.len() as u64,
                        id: e.id.len() as u64,
                    },
                );
            }
            m.add(
                self.h.snap_off,
                self.snaps_size.div_ceil(cs) * cs,
                Kind::EntryGap,
            );
        }
        if let Some((off, size, _)) = self.h.bitmaps {
            m.add(off, size, Kind::Other("the bitmap directory"));
            for (table, n) in self.bitmap_tables()? {
                m.add(table, n * 8, Kind::Other("a bitmap table"));
                for w in self.words(table, n as usize)? {
                    if w & OFFSET != 0 {
                        m.add(w & OFFSET, cs, Kind::Other("bitmap data"));
                    }
                }
            }
        }
        if let Some((off, size)) = self.h.luks {
            m.add(off, size, Kind::Other("the LUKS header"));
        }
        let mut l2s: BTreeMap<u64, String> = BTreeMap::new();
        for (who, off, n) in self.l1s() {
            m.add(off, u64::from(n) * 8, Kind::L1(who.clone()));
            for (i, w) in self.words(off, n as usize)?.iter().enumerate() {
                if w & OFFSET != 0 {
                    let s = l2s.entry(w & OFFSET).or_default();
                    if s.len() < 200 {
                        if !s.is_empty() {
                            s.push_str(" and ");
                        }
                        s.push_str(&format!("{who}[{i}]"));
                    }
                }
            }
        }
        let step = if self.ext_l2() { 2 } else { 1 };
        for (off, who) in l2s {
            for (i, w) in self
                .words(off, (cs / 8) as usize)?
                .iter()
                .enumerate()
                .step_by(step)
            {
                if w & COMPRESSED != 0 {
                    let shift = 62 - (self.h.cluster_bits - 8);
                    let host = w & ((1 << shift) - 1);
                    let n = (((w & !(COPIED | COMPRESSED)) >> shift) + 1) * 512 - (host & 511);
                    m.add(
                        host,
                        n,
                        Kind::Data {
                            of: who.clone(),
                            index: i / step,
                            compressed: true,
                        },
                    );
                } else if w & OFFSET != 0 {
                    m.add(
                        w & OFFSET,
                        cs,
                        Kind::Data {
                            of: who.clone(),
                            index: i / step,
                            compressed: false,
                        },
                    );
                }
            }
            m.add(
                off,
                cs,
                Kind::L2 {
                    of: who,
                    extended: self.ext_l2(),
                },
            );
        }
        Ok(m)
    }

    /// Offset and number of entries of each persistent bitmap's table.
    pub fn bitmap_tables(&self) -> R<Vec<(u64, u64)>> {
        let Some((off, size, n)) = self.h.bitmaps else {
            return Ok(vec![]);
        };
        let dir = self.bytes(off, size.min(1 << 20) as usize)?;
        let (mut pos, mut v) = (0usize, vec![]);
        for _ in 0..n {
            if pos + 24 > dir.len() {
                break;
            }
            v.push((be64(&dir, pos), u64::from(be32(&dir, pos + 8))));
            let (extra, name) = (be32(&dir, pos + 20) as usize, be16(&dir, pos + 18) as usize);
            pos += (24 + extra + name).div_ceil(8) * 8;
        }
        Ok(v)
    }
}

#[derive(Clone, Debug)]
pub enum Kind {
    Header,
    RefTable,
    RefBlock {
        index: u64,
        per: u64,
        order: u32,
    },
    Entry {
        index: usize,
        extra: u64,
        id: u64,
    },
    EntryGap,
    L1(String),
    L2 {
        of: String,
        extended: bool,
    },
    Data {
        of: String,
        index: usize,
        compressed: bool,
    },
    Other(&'static str),
}

/// Claims on the file's bytes, by start.
#[derive(Default)]
pub struct Map {
    claims: BTreeMap<u64, Vec<(u64, Kind)>>,
    longest: u64,
}

impl Map {
    fn add(&mut self, start: u64, n: u64, kind: Kind) {
        if n > 0 {
            self.claims.entry(start).or_default().push((n, kind));
            self.longest = self.longest.max(n);
        }
    }

    /// What stands at `off`: metadata before data, a table entry before the gap around it.
    pub fn at(&self, off: u64) -> Option<(u64, &Kind)> {
        let mut found: Option<(u64, &Kind)> = None;
        for (start, list) in self.claims.range(off.saturating_sub(self.longest)..=off) {
            for (n, kind) in list {
                if off < start + n {
                    let better = match (&found, kind) {
                        (None, _) => true,
                        (Some((_, Kind::Data { .. } | Kind::EntryGap)), k) => {
                            !matches!(k, Kind::Data { .. })
                        }
                        _ => false,
                    };
                    if better {
                        found = Some((*start, kind));
                    }
                }
            }
        }
        found
    }

    /// True if nothing but guest data lies in `from..to`.
    pub fn only_plain_data(&self, from: u64, to: u64) -> bool {
        self.claims
            .range(from.saturating_sub(self.longest)..to)
            .all(|(start, list)| {
                list.iter().all(|(n, k)| {
                    start + n <= from
                        || matches!(
                            k,
                            Kind::Data {
                                compressed: false,
                                ..
                            }
                        )
                })
            })
    }

    /// All starts of claims of one sort, for the driver's self-check.
    pub fn starts(&self, want: impl Fn(&Kind) -> bool) -> Vec<(u64, u64)> {
        self.claims
            .iter()
            .flat_map(|(s, l)| l.iter().filter(|(_, k)| want(k)).map(|(n, _)| (*s, *n)))
            .collect()
    }

    /// (structure, place within it) of the word at `off`.
    pub fn describe(&self, off: u64) -> (String, String) {
        let Some((start, kind)) = self.at(off) else {
            return (
                "a free or leaked cluster".into(),
                format!("offset {off:#x}"),
            );
        };
        let i = off - start;
        match kind {
            Kind::Header => ("the header".into(), header_field(off).to_string()),
            Kind::RefTable => ("the refcount table".into(), format!("entry {}", i / 8)),
            Kind::RefBlock { index, per, order } => {
                let first = index * per + i * 8 / (1 << order);
                let n = (64u64 >> order).max(1);
                (
                    format!("refcount block {index}"),
                    format!("counts of clusters {first:#x}..{:#x}", first + n),
                )
            }
            Kind::Entry { index, extra, id } => {
                let f = match i {
                    0..=7 => "L1 offset".to_string(),
                    8..=15 => "L1 size, ID length, name length".to_string(),
                    16..=23 => "date".to_string(),
                    24..=31 => "VM clock".to_string(),
                    32..=39 => "32-bit VM size, extra size".to_string(),
                    i if i < 40 + extra => match i - 40 {
                        0..=7 => "64-bit VM size".to_string(),
                        8..=15 => "disk size".to_string(),
                        16..=23 => "icount".to_string(),
                        n => format!("unknown extra byte {n}"),
                    },
                    i if i < 40 + extra + id => "ID".to_string(),
                    _ => "name".to_string(),
                };
                (format!("snapshot table entry {index}"), f)
            }
            Kind::EntryGap => (
                "unused bytes of the snapshot table's clusters".into(),
                format!("byte {i}"),
            ),
            Kind::L1(who) => (who.clone(), format!("entry {}", i / 8)),
            Kind::L2 {
                of,
                extended: false,
            } => (format!("the L2 table of {of}"), format!("entry {}", i / 8)),
            Kind::L2 { of, .. } => (
                format!("the L2 table of {of}"),
                format!(
                    "{} {}",
                    if i % 16 < 8 {
                        "entry"
                    } else {
                        "subcluster bitmap"
                    },
                    i / 16
                ),
            ),
            Kind::Data {
                of,
                index,
                compressed,
            } => (
                format!(
                    "{} of the L2 table of {of}",
                    if *compressed {
                        "compressed data"
                    } else {
                        "a data cluster"
                    }
                ),
                format!("entry {index}, byte {i}"),
            ),
            Kind::Other(what) => ((*what).into(), format!("byte {i}")),
        }
    }
}

fn header_field(off: u64) -> &'static str {
    match off {
        0..=7 => "magic, version",
        8..=15 => "backing file offset",
        16..=23 => "backing file size, cluster bits",
        24..=31 => "size",
        32..=39 => "encryption, L1 size",
        40..=47 => "L1 offset",
        48..=55 => "refcount table offset",
        56..=63 => "refcount table clusters, number of snapshots",
        64..=71 => "snapshot table offset",
        72..=79 => "incompatible features (v2: extensions)",
        80..=87 => "compatible features (v2: extensions)",
        88..=95 => "autoclear features (v2: extensions)",
        96..=103 => "refcount order, header length (v2: extensions)",
        _ => "extensions and behind",
    }
}

/// The report of a difference: by structure, with the first words of each.
pub fn explain(a: &Path, b: &Path, d: &files::Difference) -> String {
    let mut out = String::new();
    if d.len_a != d.len_b {
        out += &format!("  length: qemu {} ours {}\n", d.len_a, d.len_b);
    }
    out += &format!(
        "  {}{} words of 8 bytes differ\n",
        d.words.len(),
        if d.more { "+" } else { "" }
    );
    let maps = [a, b].map(|p| Qcow::open(p).and_then(|q| q.map().map(|m| (q, m))));
    for (who, m) in ["qemu's", "our"].iter().zip(&maps) {
        if let Err(e) = m {
            out += &format!("  {who} file cannot be read: {e}\n");
        }
    }
    // Where one file is beyond reading, the other one's structures name the bytes.
    let ((_, ma), (_, mb)) = match (&maps[0], &maps[1]) {
        (Ok(x), Ok(y)) => (x, y),
        (Ok(x), Err(_)) | (Err(_), Ok(x)) => (x, x),
        _ => return out,
    };
    let word = |p: &Path, off: u64| -> String {
        let mut w = [0u8; 8];
        match files::open(p).and_then(|f| read_at(&f, off, &mut w)) {
            Ok(()) => format!("{:016x}", be64(&w, 0)),
            Err(e) => e,
        }
    };
    let mut groups: BTreeMap<(String, String), Vec<u64>> = BTreeMap::new();
    for w in &d.words {
        groups
            .entry((ma.describe(*w).0, mb.describe(*w).0))
            .or_default()
            .push(*w);
    }
    for ((x, y), words) in groups {
        let what = if x == y {
            x
        } else {
            format!("{x} in qemu's file, {y} in ours")
        };
        out += &format!("  {what}: {} words\n", words.len());
        for w in words.iter().take(4) {
            out += &format!(
                "    {w:#x} {}: qemu {} ours {}\n",
                ma.describe(*w).1,
                word(a, *w),
                word(b, *w)
            );
        }
    }
    out
}
