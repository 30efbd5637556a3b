//! Images nobody chose: format variants, sizes, backing files, and what a guest does to them.

use super::files::{self, R};
use super::qemu::Tools;
use super::qimg::Qcow;
use super::rng::Rng;

/// Name of qemu-img's copy within the run's folder.
pub const QEMU: &str = "qemu.qcow2";

pub struct Spec {
    pub cluster_bits: u32,
    pub compat10: bool,
    pub refcount_bits: u32,
    pub ext_l2: bool,
    pub zstd: bool,
    pub luks: bool,
    pub bitmaps: bool,
    pub size: u64,
    pub backing: bool,
    /// Places in the guest disk that this run likes to write to.
    zones: Vec<u64>,
    /// Fill the image at the start until the refcount table is nearly too small.
    growth: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Size {
    Zero,
    Tiny,
    Small,
    Medium,
    LongL1,
    Slices,
    Growth,
}

impl Spec {
    pub fn cs(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn span(&self) -> u64 {
        self.cs() * self.cs() / if self.ext_l2 { 16 } else { 8 }
    }

    pub fn new(rng: &mut Rng) -> Spec {
        let class = rng.weighted(&[
            (4, Size::Zero),
            (7, Size::Tiny),
            (28, Size::Small),
            (33, Size::Medium),
            (10, Size::LongL1),
            (8, Size::Slices),
            (10, Size::Growth),
        ]);
        let compat10 = rng.chance(22);
        let ext_l2 = !compat10 && class != Size::Growth && rng.chance(15);
        let cluster_bits = match class {
            Size::Growth => rng.weighted(&[(4, 9), (1, 10)]),
            Size::LongL1 => rng.weighted(&[(4, 9), (2, 10), (2, 12)]),
            Size::Slices => rng.weighted(&[(2, 13), (2, 14), (1, 15), (5, 16), (1, 17)]),
            _ => rng.weighted(&[
                (32, 9),
                (10, 10),
                (8, 11),
                (14, 12),
                (5, 13),
                (5, 14),
                (3, 15),
                (16, 16),
                (2, 17),
                (1, 18),
                (1, 19),
                (1, 20),
                (2, 21),
            ]),
        };
        let cluster_bits = if ext_l2 {
            cluster_bits.clamp(14, 17)
        } else {
            cluster_bits
        };
        let refcount_bits = match (compat10, class) {
            (true, _) => 16,
            (_, Size::Growth) => rng.weighted(&[(3, 64), (2, 32), (2, 16), (1, 8)]),
            _ => rng.weighted(&[(50, 16), (5, 1), (8, 2), (5, 4), (8, 8), (12, 32), (12, 64)]),
        };
        let mut s = Spec {
            cluster_bits,
            compat10,
            refcount_bits,
            ext_l2,
            zstd: !compat10 && rng.chance(25),
            luks: rng.below(400) == 0,
            bitmaps: !compat10 && class != Size::Zero && rng.chance(4),
            size: 0,
            backing: rng.chance(20),
            zones: vec![],
            growth: class == Size::Growth,
        };
        let (cs, span) = (s.cs(), s.span());
        let odd = if rng.chance(50) {
            rng.below(cs / 512) * 512
        } else {
            0
        };
        s.size = match class {
            Size::Zero => 0,
            Size::Tiny => rng.range(1, 8) * 512,
            Size::Small => rng.range(1, 64) * cs + odd,
            Size::Medium => rng.range(1, 40) * span + rng.below(span / cs) * cs + odd,
            Size::LongL1 => rng.range(65, 3000) * span + odd,
            Size::Slices => {
                let entry = if ext_l2 { 16 } else { 8 };
                ((32 << 20) / entry) * cs + rng.below(64) * span + rng.below(span / 512) * 512
            }
            Size::Growth => rng.range(16 << 20, 40 << 20) / 512 * 512,
        };
        s.rezone(rng);
        s
    }

    /// Choose the places to write to anew.
    pub fn rezone(&mut self, rng: &mut Rng) {
        self.zones = vec![0, self.size];
        for _ in 0..rng.range(1, 5) {
            self.zones
                .push(rng.below(self.size / self.span() + 1) * self.span());
        }
        self.zones.push(rng.below(self.size + 1));
    }

    /// Make the image (and its backing file) in `tools.dir`.
    pub fn build(&mut self, rng: &mut Rng, tools: &mut Tools) -> R<()> {
        let mut args: Vec<String> = vec!["create".into(), "-q".into(), "-f".into(), "qcow2".into()];
        let mut opts = vec![format!("cluster_size={}", self.cs())];
        if self.compat10 {
            opts.push("compat=0.10".into());
        } else {
            opts.push(format!("refcount_bits={}", self.refcount_bits));
            if self.ext_l2 {
                opts.push("extended_l2=on".into());
            }
            if self.zstd {
                opts.push("compression_type=zstd".into());
            }
            if rng.chance(15) {
                opts.push("lazy_refcounts=on".into());
            }
        }
        if self.luks {
            opts.push("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10".into());
            args.splice(1..1, ["--object".into(), "secret,id=s,data=abc".into()]);
            tools.luks = true;
        }
        if self.backing && self.size > 0 {
            self.make_backing(rng, tools, &mut args)?;
        } else {
            self.backing = false;
        }
        // Metadata of the whole disk: only where that stays small.
        if (!self.backing || self.ext_l2)
            && !self.luks
            && self.size / self.cs() < 20_000
            && rng.chance(10)
        {
            opts.push("preallocation=metadata".into());
        } else if !self.backing && !self.luks && self.size < 1 << 20 && rng.chance(5) {
            opts.push(format!("preallocation={}", rng.pick(&["falloc", "full"])));
        }
        args.push("-o".into());
        args.push(opts.join(","));
        args.push(QEMU.into());
        args.push(self.size.to_string());
        tools.must(
            "qemu-img",
            &args.iter().map(|a| a.as_str()).collect::<Vec<_>>(),
        )?;
        if self.growth {
            self.fill(rng, tools)?;
        }
        if self.bitmaps {
            for i in 0..rng.range(1, 3) {
                let name = format!("bm{i}");
                let o = tools.on("qemu-img", &[b"bitmap", b"--add"], QEMU, &[name.as_bytes()])?;
                if !o.ok {
                    return Err(format!("qemu-img bitmap --add {name}: {}", o.stderr));
                }
            }
        }
        Ok(())
    }

    fn make_backing(&self, rng: &mut Rng, tools: &mut Tools, args: &mut Vec<String>) -> R<()> {
        let raw = rng.chance(40);
        let size = match rng.below(5) {
            0 => self.size,
            1 => (self.size / 2) / 512 * 512,
            2 => rng.below(self.size) / 512 * 512,
            3 => self.size + rng.range(1, 64) * 512,
            _ => self.size + rng.range(1, 3) * self.span().min(1 << 30),
        };
        let fmt = if raw { "raw" } else { "qcow2" };
        let mut create = vec!["create", "-q", "-f", fmt];
        // qemu-img refuses an L1 table above 32 MiB: 4 KiB clusters reach 8 TiB.
        if !raw && rng.chance(50) && size < 8 << 40 {
            create.extend(["-o", "cluster_size=4096"]);
        }
        let text = size.to_string();
        create.extend(["base.img", &text]);
        tools.must("qemu-img", &create)?;
        let mut v: Vec<&str> = vec!["-f", fmt];
        let mut commands = vec![];
        for _ in 0..rng.range(0, 6) {
            let n = (rng.range(1, 64) * 512).min(size);
            if n > 0 {
                let zone = *rng.pick(&self.zones);
                let off = (zone.min(size - n)) / 512 * 512;
                commands.push(format!("write -P {} {off} {n}", rng.range(1, 255)));
            }
        }
        for c in &commands {
            v.extend(["-c", c]);
        }
        v.push("base.img");
        tools.must("qemu-io", &v)?;
        args.extend(["-b".into(), "base.img".into(), "-F".into(), fmt.into()]);
        Ok(())
    }

    /// Write until the clusters used come near the end of what the refcount table covers.
    fn fill(&self, rng: &mut Rng, tools: &mut Tools) -> R<()> {
        let q = Qcow::open(&tools.dir.join(QEMU))?;
        let covered = q.reftable.len() as u64 * q.per_block();
        let target = covered.saturating_sub(rng.range(0, 120));
        let used = q.len.div_ceil(q.cs());
        // Each cluster of data costs 1 + 1/entries for its L2 table, and a count.
        let (l2n, per) = (q.cs() / 8, q.per_block());
        let data = target.saturating_sub(used) * l2n / (l2n + 1);
        let data = (data - data / per) * q.cs();
        if data > 0 && data < 40 << 20 {
            tools.io(
                QEMU,
                false,
                &[format!("write -P 7 0 {}", data.min(self.size))],
            )?;
        }
        Ok(())
    }

    /// A place and a length for one guest request on a disk of `size` bytes.
    fn request(&self, rng: &mut Rng, size: u64, max: u64) -> Option<(u64, u64)> {
        if size == 0 {
            return None;
        }
        let cs = self.cs();
        let near = rng.pick(&self.zones) + rng.below(6 * cs);
        let off = near.saturating_sub(rng.below(4 * cs)).min(size - 1);
        let unit = *rng.pick(&[512, 512, 512, cs, cs, 1]);
        let off = off / unit * unit;
        let n = (rng.range(1, 8) * if rng.chance(60) { cs } else { 512 })
            .min(max)
            .max(1);
        let n = n.div_ceil(unit) * unit;
        Some((off, n.min(size - off)))
    }

    /// One round of guest activity on qemu-img's copy.
    pub fn guest(&mut self, rng: &mut Rng, tools: &mut Tools) -> R<()> {
        let path = tools.dir.join(QEMU);
        let q = Qcow::open(&path)?;
        let size = q.h.size;
        if q.len > 64 << 20 {
            return Ok(());
        }
        let cs = self.cs();
        let max = (64 * cs).min(if cs >= 1 << 20 { 2 * cs } else { 1 << 20 });
        let mut commands = vec![];
        match rng.below(100) {
            0..=54 => {
                for _ in 0..rng.range(1, 6) {
                    let Some((off, n)) = self.request(rng, size, max) else {
                        break;
                    };
                    commands.push(match rng.below(10) {
                        0..=5 => format!("write -P {} {off} {n}", rng.range(1, 255)),
                        6 => format!("write -z {off} {n}"),
                        7 => format!("write -z -u {off} {n}"),
                        _ => format!("discard {off} {n}"),
                    });
                }
            }
            55..=66 => {
                // Scattered small writes.
                for _ in 0..rng.range(8, if cs > 1 << 16 { 10 } else { 30 }) {
                    if size < 512 {
                        break;
                    }
                    let off = rng.below(self.span().saturating_mul(3).min(size) / 512) * 512;
                    let off = if rng.chance(10) {
                        rng.below(size / 512) * 512
                    } else {
                        off
                    };
                    commands.push(format!("write -P {} {off} 512", rng.range(1, 255)));
                }
            }
            67..=77 if !self.luks => {
                // One compressed cluster for each command: several at once are not deterministic.
                for _ in 0..rng.range(1, 4) {
                    let Some((off, _)) = self.request(rng, size, cs) else {
                        break;
                    };
                    let off = off / cs * cs;
                    let n = cs.min(size - off);
                    let random = n * rng.below(100) / 100;
                    let mut pattern = rng.bytes(random as usize);
                    pattern.resize(n as usize, 0x11);
                    files::at(
                        "write pattern",
                        std::fs::write(tools.dir.join("pattern"), &pattern),
                    )?;
                    tools
                        .note("(the file `pattern` is new random bytes for each compressed write)");
                    tools.io(QEMU, false, &[format!("write -c -s pattern {off} {n}")])?;
                }
            }
            78..=87 => {
                // VM state: behind the disk in the active L1.
                for _ in 0..rng.range(1, 3) {
                    let reach = if rng.chance(80) {
                        16 * cs
                    } else {
                        3 * self.span().min(1 << 26)
                    };
                    let off = rng.below(reach);
                    commands.push(format!(
                        "write -b -P {} {off} {}",
                        rng.range(1, 255),
                        rng.range(1, 4) * cs.min(65536)
                    ));
                }
            }
            88..=95 => {
                let to = match rng.below(6) {
                    0 => size.saturating_sub(rng.below(4 * cs)),
                    1 => size + rng.below(4 * cs),
                    2 => size.saturating_sub(rng.below(self.span().min(1 << 34) * 2)),
                    3 => size + rng.below(self.span().min(1 << 34) * 4),
                    4 => rng.below(size + 1),
                    _ => size + rng.below(size + 1),
                } / 512
                    * 512;
                let text = to.to_string();
                tools.on(
                    "qemu-img",
                    &[b"resize", b"-q", b"--shrink"],
                    QEMU,
                    &[text.as_bytes()],
                )?;
                self.size = Qcow::open(&path)?.h.size;
                if rng.chance(50) {
                    self.rezone(rng);
                }
            }
            _ => {
                // Fill one L2 table with single clusters.
                let base = rng.pick(&self.zones) / self.span() * self.span();
                for _ in 0..20 {
                    let off = base + rng.below(self.span() / cs) * cs;
                    if off + 512 <= size && cs <= 1 << 16 {
                        commands.push(format!("write -P {} {off} 512", rng.range(1, 255)));
                    }
                }
            }
        }
        if !commands.is_empty() {
            tools.io(QEMU, rng.chance(50), &commands)?;
        }
        Ok(())
    }
}
