//! One image in two copies: a verb by qemu-img on one, by the library on the other, and the
//! comparison of the two files after it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::files::{self, at, R};
use super::generate::QEMU;
use super::ours::{Lib, Listed, Side, Usage, Verb};
use super::qemu::{Failure, Tools};
use super::qimg::{self, Qcow, COMPRESSED, COPIED, OFFSET};
use super::rng::Rng;

/// What every run shares.
pub struct Ctx {
    pub lib: Option<Lib>,
    pub scratch: PathBuf,
    pub keep: PathBuf,
}

#[derive(Default, Clone)]
pub struct Stats {
    pub creates: u64,
    pub gotos: u64,
    pub deletes: u64,
    /// Verbs that failed on both sides with the same errno and left our file as it was.
    pub same_errors: BTreeMap<i32, u64>,
    pub on_kept_handle: u64,
    pub not_compared: BTreeMap<String, u64>,
    /// Rounds of guest activity and of crafted changes.
    pub guest: u64,
    pub crafts: BTreeMap<&'static str, u64>,
    /// Sets of snapshots deleted at once by ours and one by one by qemu-img, and how many snapshots.
    pub sets: (u64, u64),
}

impl Stats {
    pub fn verbs(&self) -> u64 {
        self.creates + self.gotos + self.deletes
    }

    pub fn add(&mut self, o: &Stats) {
        self.creates += o.creates;
        self.gotos += o.gotos;
        self.deletes += o.deletes;
        self.on_kept_handle += o.on_kept_handle;
        self.guest += o.guest;
        self.sets = (self.sets.0 + o.sets.0, self.sets.1 + o.sets.1);
        for (k, v) in &o.same_errors {
            *self.same_errors.entry(*k).or_default() += v;
        }
        for (k, v) in &o.not_compared {
            *self.not_compared.entry(k.clone()).or_default() += v;
        }
        for (k, v) in &o.crafts {
            *self.crafts.entry(k).or_default() += v;
        }
    }
}

pub struct Run<'a> {
    ctx: &'a Ctx,
    label: String,
    pub tools: Tools,
    side: Side,
    pub qemu: PathBuf,
    before: PathBuf,
    /// Keep our handle open between verbs.
    pub keep_handle: bool,
    pub stats: Stats,
    verb_no: u64,
}

impl<'a> Run<'a> {
    pub fn new(ctx: &'a Ctx, label: &str) -> R<Run<'a>> {
        let dir = ctx.scratch.join(label.replace(' ', "-"));
        let _ = std::fs::remove_dir_all(&dir);
        at("create scratch folder", std::fs::create_dir_all(&dir))?;
        Ok(Run {
            ctx,
            label: label.to_string(),
            tools: Tools::new(&dir),
            side: Side::new(dir.join("ours.qcow2"), ctx.lib),
            qemu: dir.join(QEMU),
            before: dir.join("before.qcow2"),
            keep_handle: false,
            stats: Stats::default(),
            verb_no: 0,
        })
    }

    pub fn dir(&self) -> &Path {
        &self.tools.dir
    }

    pub fn self_mode(&self) -> bool {
        self.ctx.lib.is_none()
    }

    /// Close our handle and make our copy equal to qemu-img's (after guest writes or crafts).
    pub fn sync(&mut self) -> R<()> {
        self.side.close()?;
        files::copy(&self.qemu, &self.side.path)
    }

    /// The verb that deletes the first entry of that name as qemu-img does, asked of ours in one
    /// of the equivalent ways: 0 by ID and name, 1 by ID, 2 by name.
    pub fn delete_verb(&self, name: &[u8], way: u64) -> R<Verb> {
        let q = Qcow::open(&self.qemu)?;
        let cut = |b: &[u8], n: usize| b[..b.len().min(n)].to_vec();
        let name = cut(name, 255);
        let Some(e) = q.snaps.iter().find(|e| cut(&e.name, 255) == name) else {
            return Ok(Verb::Delete {
                id: None,
                by_name: Some(name.clone()),
                name,
            });
        };
        let unique = q.snaps.iter().filter(|o| o.id == e.id).count() == 1;
        let (id, by_name) = match way {
            1 if unique && e.id.len() < 128 && e.name.len() < 255 => (Some(e.id.clone()), None),
            2 if e.id.len() < 128 && e.name.len() < 255 => (None, Some(name.clone())),
            _ => (Some(cut(&e.id, 127)), Some(name.clone())),
        };
        Ok(Verb::Delete { name, id, by_name })
    }

    pub fn create(&mut self, name: &[u8]) -> R<bool> {
        self.verb(&Verb::Create {
            name: name.to_vec(),
        })
    }

    pub fn goto(&mut self, what: &[u8]) -> R<bool> {
        self.verb(&Verb::Goto {
            what: what.to_vec(),
        })
    }

    pub fn delete(&mut self, name: &[u8]) -> R<bool> {
        let v = self.delete_verb(name, self.verb_no % 3)?;
        self.verb(&v)
    }

    /// Run one verb on both copies. `Ok(true)`: both did it; `Ok(false)`: both failed alike, or the
    /// case was counted as not compared. `Err`: the report of a difference.
    pub fn verb(&mut self, v: &Verb) -> R<bool> {
        self.verb_no += 1;
        match v {
            Verb::Create { .. } => self.stats.creates += 1,
            Verb::Goto { .. } => self.stats.gotos += 1,
            Verb::Delete { .. } => self.stats.deletes += 1,
        }
        files::copy(&self.qemu, &self.before)?;
        self.tools.note(format!(
            "verb {}{}: {v}",
            self.verb_no,
            if self.keep_handle {
                " (kept handle)"
            } else {
                ""
            }
        ));
        let r = self.both(v);
        if !self.keep_handle {
            self.side.close()?;
        }
        r.map_err(|why| self.report(v, &why))
    }

    fn both(&mut self, v: &Verb) -> R<bool> {
        let kept = self.keep_handle && self.side.is_open();
        self.stats.on_kept_handle += u64::from(kept);
        let before = Qcow::open(&self.before)?;
        let by_qemu = v.by_qemu(&mut self.tools, QEMU)?;
        let mut date = (0, 0);
        if let (Verb::Create { .. }, Ok(())) = (v, &by_qemu) {
            let e = Qcow::open(&self.qemu)?
                .snaps
                .pop()
                .ok_or("qemu-img created no snapshot")?;
            date = (e.date_sec, e.date_nsec);
        }
        let by_us = match self.side.open() {
            Ok(()) => self.side.verb(v, date, &mut self.tools, &self.qemu)?,
            Err(f) => Err(f),
        };
        if let (Err(f), false) = (&by_us, self.self_mode()) {
            let d = files::compare(&self.before, &self.side.path)?;
            if !d.is_none() {
                return Err(format!(
                    "ours failed ({}) and changed the file (\"qemu\" is the file before):\n{}",
                    f.text,
                    qimg::explain(&self.before, &self.side.path, &d)
                ));
            }
        }
        if let Err(o) = &by_us {
            if let Some(why) = self.agreed_refusal(v, &before, &by_qemu, o)? {
                *self.stats.not_compared.entry(why.into()).or_default() += 1;
                if by_qemu.is_err() {
                    files::copy(&self.before, &self.qemu)?;
                }
                self.tools.note(format!(
                    "NOT COMPARED: {why}; going on from qemu-img's file"
                ));
                self.sync()?;
                return Ok(false);
            }
        }
        match (&by_qemu, &by_us) {
            (Ok(()), Ok(())) => {
                self.check_list()?;
                if before.h.bitmaps.is_some() && !self.self_mode() {
                    self.bitmap_rules()?;
                    self.side.close()?;
                    files::copy(&self.side.path, &self.qemu)?;
                    return Ok(true);
                }
                let d = files::compare(&self.qemu, &self.side.path)?;
                match v {
                    Verb::Delete { name, .. } if !d.is_none() && cut_off(&before, &[name])? => {
                        *self.stats.not_compared.entry(CUT_OFF.into()).or_default() += 1;
                        self.tools.note(format!(
                            "NOT COMPARED: {CUT_OFF}; going on from qemu-img's file"
                        ));
                        self.side.close()?;
                        self.sync()?;
                        Ok(false)
                    }
                    _ if !d.is_none() => Err(format!(
                        "the files differ:\n{}",
                        qimg::explain(&self.qemu, &self.side.path, &d)
                    )),
                    _ => Ok(true),
                }
            }
            (Err(q), Err(o)) if q.errno == o.errno && q.errno != 0 => {
                *self.stats.same_errors.entry(q.errno).or_default() += 1;
                // QEMU may leak clusters where it fails: go on from ours, which is the file before.
                if self.self_mode() {
                    let d = files::compare(&self.qemu, &self.side.path)?;
                    if !d.is_none() {
                        return Err(format!(
                            "qemu-img failed in two ways:\n{}",
                            qimg::explain(&self.qemu, &self.side.path, &d)
                        ));
                    }
                    files::copy(&self.before, &self.side.path)?;
                }
                files::copy(&self.side.path, &self.qemu)?;
                Ok(false)
            }
            (Ok(()), Err(o)) => Err(format!(
                "qemu-img did it, ours failed with errno {}: {}",
                o.errno, o.text
            )),
            (Err(q), Ok(())) => Err(format!(
                "qemu-img failed with errno {}: {}\nours did it",
                q.errno, q.text
            )),
            (Err(q), Err(o)) => Err(format!(
                "both failed, with different errnos: qemu-img {}: {}\nours {}: {}",
                q.errno, q.text, o.errno, o.text
            )),
        }
    }

    /// Reasons for which ours may refuse today what qemu-img does. Each is counted and printed.
    fn agreed_refusal(
        &self,
        v: &Verb,
        before: &Qcow,
        by_qemu: &Result<(), Failure>,
        f: &Failure,
    ) -> R<Option<&'static str>> {
        if let Verb::Goto { what } = v {
            let s = &before.snaps;
            let to = s
                .iter()
                .find(|e| e.id == *what)
                .or_else(|| s.iter().find(|e| e.name == *what));
            let longer_l1 = to.is_some_and(|e| e.l1_size > before.h.l1_size);
            let to = to.and_then(|e| e.disk_size()).unwrap_or(before.h.size);
            // QEMU never makes an image like that: its active L1 tables do not become shorter.
            let late = f.errno == libc::ENOTSUP && f.text.contains("that the image still uses");
            if late && longer_l1 && to < before.h.size {
                return Ok(Some(
                    "shortened active L1: ours refuses a goto that shrinks the disk and grows the L1",
                ));
            }
            if f.errno == libc::EIO && self.resizes_shared_table(before, to, by_qemu, f)? {
                return Ok(Some(
                    "wrong COPIED bits: QEMU changes a snapshot's L2 table, ours refuses",
                ));
            }
            if f.errno == libc::EIO && self.grows_shared_cluster(before, to, by_qemu, f)? {
                return Ok(Some(
                    "wrong COPIED bits: QEMU writes zeros to a snapshot's data, ours refuses",
                ));
            }
        }
        // qemu-img check calls it an error too; a verb may make the file longer, and zeros of the table.
        let ends = |e: &qimg::Entry| e.l1_off.saturating_add(u64::from(e.l1_size) * 8);
        let cut = before
            .snaps
            .iter()
            .any(|e| e.l1_size != 0 && ends(e) > before.len);
        if f.errno == libc::EIO && cut && f.text.contains("is cut off: the file ends at") {
            return Ok(Some(
                "a snapshot's L1 table behind the end of the file: QEMU reads zeros, ours refuses",
            ));
        }
        if f.errno == libc::ENOTSUP && before.h.incompat & 1 != 0 {
            return Ok(Some("dirty bit set: ours refuses, QEMU repairs"));
        }
        Ok(None)
    }

    /// A goto to another size discards the disk's end first, or covers a backing file with zeros: in
    /// place in an L2 table that the active L1 flags as COPIED, although a snapshot names it too. True
    /// only if the table that our message names is one of these, and qemu-img, where it succeeded,
    /// has changed what the snapshot's table says of the disk between the two ends.
    fn resizes_shared_table(
        &self,
        before: &Qcow,
        to: u64,
        by_qemu: &Result<(), Failure>,
        f: &Failure,
    ) -> R<bool> {
        let Some(table) = shared_but_copied(f, "L2 table") else {
            return Ok(false);
        };
        let (cs, span, size) = (before.cs(), before.l2_span(), before.h.size);
        let names = |q: &Qcow, off: u64, n: u32| -> R<bool> {
            let l1 = q.words(off, n as usize)?;
            Ok(l1.iter().any(|w| w & OFFSET == table))
        };
        let shared = |q: &Qcow| -> R<bool> {
            for s in &q.snaps {
                if names(q, s.l1_off, s.l1_size)? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        if !shared(before)? {
            return Ok(false);
        }
        // Bytes of the table that describe the part of the disk that goes or comes.
        let entry = cs * cs / span;
        let start = if to < size {
            to.div_ceil(cs)
        } else {
            size / cs
        } * cs;
        for (i, word) in (0u64..).zip(before.words(before.h.l1_off, before.h.l1_size as usize)?) {
            let from = start.max(i * span);
            let end = size.max(to).min((i + 1) * span);
            if word & COPIED == 0 || word & OFFSET != table || from >= end {
                continue;
            }
            let at = table + (from % span) / cs * entry;
            let n = ((end - from).div_ceil(cs) * entry) as usize;
            let was = before.bytes(at, n)?;
            let changed = match by_qemu {
                Ok(()) => {
                    let after = Qcow::open(&self.qemu)?;
                    let is = after.bytes(at, n)?;
                    shared(&after)? && is != was && (to > size || is.iter().all(|b| *b == 0))
                }
                Err(_) => to > size || was.iter().any(|b| *b != 0),
            };
            if changed {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The same where the disk ended within a cluster: the zeros up to its end are written in place to
    /// a cluster that the active L2 table flags as COPIED, although a snapshot's table names it too.
    fn grows_shared_cluster(
        &self,
        before: &Qcow,
        to: u64,
        by_qemu: &Result<(), Failure>,
        f: &Failure,
    ) -> R<bool> {
        let Some(cluster) = shared_but_copied(f, "Data cluster") else {
            return Ok(false);
        };
        let (cs, span, size) = (before.cs(), before.l2_span(), before.h.size);
        // The L2 entry that an L1 table has for the last byte of the disk.
        let entry = |l1_off: u64, l1_size: u32| -> R<u64> {
            let l1 = before.words(l1_off, l1_size as usize)?;
            let table = l1.get((size / span) as usize).map_or(0, |w| w & OFFSET);
            if table == 0 {
                return Ok(0);
            }
            let at = table + size % span / cs * (cs * cs / span);
            Ok(before.words(at, 1)?[0])
        };
        let active = entry(before.h.l1_off, before.h.l1_size)?;
        let mut shared = false;
        for s in &before.snaps {
            shared |= entry(s.l1_off, s.l1_size)? & OFFSET == cluster;
        }
        if to <= size || size % cs == 0 || !shared || active & (COPIED | OFFSET) != COPIED | cluster
        {
            return Ok(false);
        }
        let (at, n) = (cluster + size % cs, (cs - size % cs) as usize);
        Ok(match by_qemu {
            Ok(()) => Qcow::open(&self.qemu)?.bytes(at, n)? != before.bytes(at, n)?,
            Err(_) => true,
        })
    }

    /// Delete some snapshots of the image as it is, on two more copies: one by one by qemu-img, at once
    /// by ours. List, disks, counts and the active disk's flags must be equal, and what became free is what
    /// the usage of the set said.
    pub fn many(&mut self, rng: &mut Rng) -> R<()> {
        let (before, Some(lib)) = (Qcow::open(&self.qemu)?, self.ctx.lib) else {
            return Ok(());
        };
        let ids: std::collections::BTreeSet<_> = before.snaps.iter().map(|e| &e.id).collect();
        let plain = |e: &qimg::Entry| {
            e.id.len() < 128 && e.name.len() < 256 && !e.id.contains(&0) && !e.name.contains(&0)
        };
        let usable = ids.len() == before.snaps.len() && before.snaps.iter().all(plain);
        if !usable || before.h.bitmaps.is_some() || before.h.incompat & 1 != 0 {
            return Ok(());
        }
        // qemu-img deletes the first of a name.
        let (mut chosen, mut left) = (vec![], std::collections::BTreeSet::new());
        for e in &before.snaps {
            if left.contains(&e.name) || rng.chance(40) {
                left.insert(e.name.clone());
            } else {
                chosen.push((e.name.clone(), e.id.clone()));
            }
        }
        if chosen.is_empty() {
            return Ok(());
        }
        let (theirs, ours) = (
            self.dir().join("many-qemu.qcow2"),
            self.dir().join("many-ours.qcow2"),
        );
        files::copy(&self.qemu, &theirs)?;
        files::copy(&self.qemu, &ours)?;
        let mut by_qemu = Ok(());
        for (name, _) in &chosen {
            by_qemu = by_qemu.and(self.tools.snapshot("-d", name, "many-qemu.qcow2")?);
        }
        let ids: Vec<Vec<u8>> = chosen.iter().map(|(_, id)| id.clone()).collect();
        let by_us = lib.many(&ours, &ids)?;
        self.stats.sets = (self.stats.sets.0 + 1, self.stats.sets.1 + ids.len() as u64);
        let r = match (by_qemu, by_us) {
            (Ok(()), Ok(_))
                if cut_off(
                    &before,
                    &chosen.iter().map(|(name, _)| name).collect::<Vec<_>>(),
                )? =>
            {
                *self.stats.not_compared.entry(CUT_OFF.into()).or_default() += 1;
                Ok(())
            }
            (Ok(()), Ok(usage)) => self.same_meaning(&before, &theirs, &ours, usage),
            // Damaged on purpose.
            (Err(_), Err(_)) => Ok(()),
            (Err(q), Ok(_)) => Err(format!("qemu-img failed: {}, ours did not", q.text)),
            // Usage, or another snapshot's: as for a verb.
            (Ok(()), Err(o))
                if o.text.contains("is cut off: the file ends at")
                    && cut_off(
                        &before,
                        &before.snaps.iter().map(|e| &e.id).collect::<Vec<_>>(),
                    )? =>
            {
                *self.stats.not_compared.entry(CUT_OFF.into()).or_default() += 1;
                Ok(())
            }
            (Ok(()), Err(o)) => Err(format!("ours failed: {}, qemu-img did not", o.text)),
        };
        r.map_err(|why| {
            let text = format!("deleting {} snapshots at once: {why}", ids.len());
            let v = Verb::Delete {
                name: chosen[0].0.clone(),
                id: None,
                by_name: None,
            };
            self.report(&v, &text)
        })
    }

    fn same_meaning(&mut self, before: &Qcow, theirs: &Path, ours: &Path, usage: Usage) -> R<()> {
        let (q, o) = (Qcow::open(theirs)?, Qcow::open(ours)?);
        let list = |q: &Qcow| -> Vec<qimg::Entry> {
            q.snaps
                .iter()
                .map(|e| qimg::Entry {
                    pos: 0,
                    ..e.clone()
                })
                .collect()
        };
        if list(&q) != list(&o) {
            return Err("the snapshot tables differ".into());
        }
        if digest(&q, q.h.l1_off, q.h.l1_size, !0)? != digest(&o, o.h.l1_off, o.h.l1_size, !0)? {
            return Err("the active disk differs, or its flags".into());
        }
        for s in &q.snaps {
            if digest(&q, s.l1_off, s.l1_size, !COPIED)?
                != digest(&o, s.l1_off, s.l1_size, !COPIED)?
            {
                return Err(format!(
                    "snapshot {:?} differs",
                    String::from_utf8_lossy(&s.id)
                ));
            }
        }
        let clusters = before.len.max(q.len).max(o.len) / before.cs() + 2;
        if clusters < 1 << 14 {
            let of_table = |q: &Qcow, c: u64| {
                let within = |off: u64, n: u64| {
                    n != 0 && (off / q.cs()..(off + n).div_ceil(q.cs())).contains(&c)
                };
                within(q.h.snap_off, q.snaps_size)
                    || within(q.h.rt_off, u64::from(q.h.rt_clusters) * q.cs())
                    || q.reftable
                        .iter()
                        .any(|b| b & OFFSET != 0 && b / q.cs() == c)
            };
            let mut freed = 0;
            let count = |q: &Qcow, c| q.refcount(c).map(|n| n.unwrap_or(0));
            for c in 0..clusters {
                if of_table(before, c) || of_table(&o, c) {
                    continue;
                }
                let y = count(&o, c)?;
                freed += u64::from(count(before, c)? != 0 && y == 0) * before.cs();
                // What the first of qemu-img's deletes has freed may hold the table of the next.
                if of_table(&q, c) {
                    continue;
                }
                let x = count(&q, c)?;
                if x != y {
                    return Err(format!(
                        "the count of cluster {c:#x} is {x} by qemu-img, {y} by ours"
                    ));
                }
            }
            if freed != usage.exclusive || usage.exclusive > usage.referenced {
                return Err(format!("{freed:#x} bytes became free; {usage:?}"));
            }
        }
        let mut check = |f: &str| self.tools.on("qemu-img", &[b"check", b"-q"], f, &[]);
        let (x, y) = (check("many-qemu.qcow2")?, check("many-ours.qcow2")?);
        if x.ok && !y.ok {
            return Err(format!("qemu-img check of ours: {}{}", y.stdout, y.stderr));
        }
        Ok(())
    }

    /// Our list must say what stands in our file.
    fn check_list(&mut self) -> R<()> {
        let Some((list, length)) = self.side.list()? else {
            return Ok(());
        };
        let q = Qcow::open(&self.side.path)?;
        let cut = |b: &[u8], n: usize| b[..b.len().min(n)].to_vec();
        let want: Vec<Listed> = q
            .snaps
            .iter()
            .map(|e| Listed {
                id: cut(&e.id, 127),
                name: cut(&e.name, 255),
                vm_state_size: e.vm_size(),
                date: (e.date_sec, e.date_nsec),
                vm_clock: e.vm_clock,
                icount: e.icount(),
            })
            .collect();
        if list != want {
            let i = (0..).find(|i| list.get(*i) != want.get(*i)).unwrap_or(0);
            return Err(format!(
                "qcow2_snapshot_list: entry {i} is {:?}, the file has {:?}",
                list.get(i),
                want.get(i)
            ));
        }
        if length != q.h.size as i64 {
            return Err(format!(
                "qcow2_getlength gives {length}, the file has {}",
                q.h.size
            ));
        }
        Ok(())
    }

    /// The contract's exception: with persistent bitmaps QEMU moves them, ours leaves them. So the
    /// meaning must be equal, and every byte of the bitmaps as it was.
    fn bitmap_rules(&mut self) -> R<()> {
        let (b, q, o) = (
            Qcow::open(&self.before)?,
            Qcow::open(&self.qemu)?,
            Qcow::open(&self.side.path)?,
        );
        if o.h.bitmaps != b.h.bitmaps || o.h.autoclear != b.h.autoclear {
            return Err(format!(
                "bitmap extension or autoclear bits changed: {:?} {:?}",
                b.h.bitmaps, o.h.bitmaps
            ));
        }
        let mut header = (b.bytes(0, b.cs() as usize)?, o.bytes(0, o.cs() as usize)?);
        header.0[48..72].fill(0);
        header.1[48..72].fill(0);
        if header.0 != header.1 {
            return Err(
                "header bytes beside the snapshot and refcount table fields changed".into(),
            );
        }
        let mut ranges = vec![];
        if let Some((off, n, _)) = b.h.bitmaps {
            ranges.push((off, n));
        }
        for (table, n) in b.bitmap_tables()? {
            ranges.push((table, n * 8));
            ranges.extend(
                b.words(table, n as usize)?
                    .iter()
                    .filter(|w| **w & OFFSET != 0)
                    .map(|w| (w & OFFSET, b.cs())),
            );
        }
        for (off, n) in ranges {
            if b.bytes(off, n as usize)? != o.bytes(off, n as usize)? {
                return Err(format!("bitmap bytes at {off:#x}+{n:#x} changed"));
            }
        }
        let (sq, so) = (&q.snaps, &o.snaps);
        let strip = |s: &[qimg::Entry]| -> Vec<qimg::Entry> {
            s.iter()
                .map(|e| qimg::Entry {
                    pos: 0,
                    l1_off: 0,
                    ..e.clone()
                })
                .collect()
        };
        if strip(sq) != strip(so) {
            return Err("snapshot tables differ beside the L1 offsets".into());
        }
        let disks = |q: &Qcow| -> R<Vec<u64>> {
            let mut v = vec![digest(q, q.h.l1_off, q.h.l1_size, !0)?];
            for s in &q.snaps {
                v.push(digest(q, s.l1_off, s.l1_size, !0)?);
            }
            Ok(v)
        };
        if disks(&q)? != disks(&o)? {
            return Err("L1 and L2 contents or data differ".into());
        }
        let ours = self
            .side
            .path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        self.side.close()?;
        let check = |t: &mut Tools, f: &str| t.on("qemu-img", &[b"check", b"-q"], f, &[]);
        let (x, y) = (
            check(&mut self.tools, QEMU)?,
            check(&mut self.tools, &ours)?,
        );
        // QEMU leaks a cluster now and then when it moves bitmaps; ours must not be worse.
        if !y.ok && x.ok {
            return Err(format!(
                "qemu-img check: QEMU's file {} {}; ours {} {}",
                x.ok, x.stderr, y.ok, y.stderr
            ));
        }
        let info = |t: &mut Tools, f: &str| -> R<String> {
            let o = t.run(
                "qemu-img",
                &[b"info".to_vec(), b"-U".to_vec(), f.as_bytes().to_vec()],
            )?;
            Ok(o.stdout
                .split("Format specific")
                .nth(1)
                .and_then(|s| s.split("Child node").next())
                .unwrap_or("")
                .to_string())
        };
        let (x, y) = (info(&mut self.tools, QEMU)?, info(&mut self.tools, &ours)?);
        if x != y {
            return Err(format!("qemu-img info differs:\n{x}\n{y}"));
        }
        Ok(())
    }

    /// Keep the files and make the text of a failure.
    fn report(&mut self, v: &Verb, why: &str) -> String {
        let keep = self.ctx.keep.join(format!(
            "{}-verb-{}",
            self.label.replace(' ', "-"),
            self.verb_no
        ));
        let mut text = format!(
            "{}, verb {} ({v}{}): {why}\n",
            self.label,
            self.verb_no,
            if self.keep_handle {
                ", kept handle"
            } else {
                ""
            }
        );
        let _ = self.side.close();
        let _ = std::fs::create_dir_all(&keep);
        for name in [QEMU, "ours.qcow2", "before.qcow2", "base.img"] {
            let from = self.dir().join(name);
            if from.exists() {
                if let Err(e) = files::copy(&from, &keep.join(name)) {
                    text += &format!("  (not kept: {e})\n");
                }
            }
        }
        text += &format!(
            "  files and the commands that made them: {}\n",
            keep.display()
        );
        let _ = std::fs::write(
            keep.join("report.txt"),
            format!("{text}\n{}\n", self.tools.log.join("\n")),
        );
        text
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        let _ = self.side.close();
        let _ = std::fs::remove_dir_all(&self.tools.dir);
    }
}

/// FNV over everything an L1 reaches: the entries, as far as `mask` has them, and the contents of the
/// clusters.
fn digest(q: &Qcow, off: u64, n: u32, mask: u64) -> R<u64> {
    let mut h = 0xcbf2_9ce4_8422_2325u64;
    let mut mix = |w: u64| h = (h ^ w).wrapping_mul(0x0000_0100_0000_01b3);
    let step = if q.ext_l2() { 2 } else { 1 };
    for (i, l1) in q.words(off, n as usize)?.into_iter().enumerate() {
        if l1 == 0 {
            continue;
        }
        mix(i as u64);
        mix(l1 & mask);
        for (j, w) in q
            .words(l1 & OFFSET, (q.cs() / 8) as usize)?
            .into_iter()
            .enumerate()
        {
            if w != 0 {
                mix(j as u64);
                mix(w & mask);
                if j % step == 0 && w & COMPRESSED == 0 && w & OFFSET != 0 {
                    q.words(w & OFFSET, (q.cs() / 8) as usize)?
                        .into_iter()
                        .for_each(&mut mix);
                }
            }
        }
    }
    Ok(h)
}

/// An agreed difference: the table may say anything, so nothing of that snapshot is freed.
const CUT_OFF: &str =
    "a snapshot's L1 or L2 table behind the end of the file: QEMU reads zeros, a delete of ours frees nothing";

/// Is the L1 table of a snapshot of one of these names cut off by the end of the file, or an L2 table behind it?
fn cut_off(before: &Qcow, names: &[&Vec<u8>]) -> R<bool> {
    for s in &before.snaps {
        let name = &s.name[..s.name.len().min(255)];
        let asked = names.iter().any(|n| **n == name || **n == s.id);
        let l1 = before.words(s.l1_off, if asked { s.l1_size as usize } else { 0 })?;
        let end = s.l1_off.saturating_add(u64::from(s.l1_size) * 8);
        if asked && end > before.len || l1.iter().any(|w| w & OFFSET >= before.len) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The offset in our message about a table or cluster that only claims to be owned.
fn shared_but_copied(f: &Failure, what: &str) -> Option<u64> {
    let text = f.text.split(&format!("{what} 0x")).nth(1)?;
    let (offset, _) = text.split_once(" is shared but flagged as COPIED")?;
    u64::from_str_radix(offset, 16).ok()
}
