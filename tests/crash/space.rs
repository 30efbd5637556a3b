// Included by crash.rs: what sets of snapshots hold, and deleting them at once.

use judge::{be32, be64};
use std::collections::BTreeSet;

/// What an image says of itself, as far as these tests need it, by code of their own.
struct Plain<'a> {
    b: &'a [u8],
    bits: u32,
    extended: bool,
}

const PLACE: u64 = 0x00ff_ffff_ffff_fe00;

/// What one cluster of a state is for.
type Reached = BTreeMap<u64, Vec<(bool, bool)>>;

impl Plain<'_> {
    fn new(b: &[u8]) -> Plain<'_> {
        let extended = be32(b, 4) >= 3 && be64(b, 72) & 16 != 0;
        Plain { b, bits: be32(b, 20), extended }
    }

    /// Behind the end of the file are zeros; a refcount block may lie there to the last byte.
    fn word(&self, at: u64) -> u64 {
        let there = self.b.iter().skip(at as usize).chain(std::iter::repeat(&0));
        there.take(8).fold(0, |word, byte| word << 8 | u64::from(*byte))
    }

    fn clusters(&self, at: u64, bytes: u64) -> std::ops::Range<u64> {
        at >> self.bits..(at + bytes).div_ceil(1 << self.bits)
    }

    /// Counts of clusters that have one, and the clusters of the refcount structures and of the
    /// snapshot table.
    fn counts(&self) -> (BTreeMap<u64, u64>, BTreeSet<u64>) {
        let order = if be32(self.b, 4) >= 3 { be32(self.b, 96) } else { 4 };
        let (cs, mut counts, mut structures) = (1u64 << self.bits, BTreeMap::new(), BTreeSet::new());
        let (table, n) = (be64(self.b, 48), u64::from(be32(self.b, 56)));
        structures.extend(self.clusters(table, n * cs));
        let per_block = (cs * 8) >> order;
        for i in 0..n * cs / 8 {
            let block = self.word(table + i * 8);
            if block == 0 {
                continue;
            }
            structures.insert(block >> self.bits);
            for j in 0..per_block {
                let bits = 1u64 << order;
                let count = match order {
                    0..=2 => self.word(block + j * bits / 8) >> 56 >> (j * bits % 8) & ((1 << bits) - 1),
                    _ => self.word(block + j * bits / 8) >> (64 - bits),
                };
                if count != 0 {
                    counts.insert(i * per_block + j, count);
                }
            }
        }
        let (mut at, start) = (be64(self.b, 64), be64(self.b, 64));
        for _ in 0..be32(self.b, 60) {
            at = at.next_multiple_of(8);
            let p = at as usize;
            let texts = self.word(at + 12) >> 48;
            let name = self.word(at + 14) >> 48;
            at += 40 + u64::from(be32(self.b, p + 36)) + texts + name;
        }
        structures.extend(self.clusters(start, at - start));
        (counts, structures)
    }

    /// Where a state reaches each cluster: (a table, behind the disk's end).
    fn reach(&self, l1: u64, entries: u64, disk: u64, into: &mut Reached) {
        let cs = 1u64 << self.bits;
        let entry = if self.extended { 16 } else { 8 };
        for c in self.clusters(l1, entries * 8) {
            into.entry(c).or_default().push((true, false));
        }
        for i in 0..entries {
            let l2 = self.word(l1 + i * 8) & PLACE;
            if l2 == 0 {
                continue;
            }
            let behind = |n: u64| n * cs >= disk.next_multiple_of(cs);
            into.entry(l2 >> self.bits).or_default().push((true, behind(i * (cs / entry))));
            for j in 0..cs / entry {
                let w = self.word(l2 + j * entry);
                let behind = behind(i * (cs / entry) + j);
                let host = if w >> 62 & 1 != 0 {
                    let shift = 62 - (self.bits - 8);
                    let at = w & ((1 << shift) - 1);
                    let sectors = (w >> shift & ((1 << (self.bits - 8)) - 1)) + 1;
                    self.clusters(at, sectors * 512 - at % 512)
                } else if w & PLACE != 0 {
                    self.clusters(w & PLACE, 1)
                } else {
                    0..0
                };
                for c in host {
                    into.entry(c).or_default().push((false, behind));
                }
            }
        }
    }

    /// COPIED entries in tables that an L1 table names whose clusters do not have a count of one.
    fn wrong_flags(&self, l1: u64, entries: u64, counts: &BTreeMap<u64, u64>) -> usize {
        let entry = if self.extended { 16 } else { 8 };
        let tables = (0..entries).map(|i| self.word(l1 + i * 8) & PLACE).filter(|t| *t != 0);
        let words = tables.flat_map(|t| (0..(1 << self.bits) / entry).map(move |j| t + j * entry));
        let wrong = |w: &u64| w >> 63 == 1 && counts.get(&((w & PLACE) >> self.bits)) != Some(&1);
        words.map(|at| self.word(at)).filter(wrong).count()
    }

    /// The active L1 table and all L2 tables that it names.
    fn active(&self) -> Vec<u64> {
        let (l1, n) = (be64(self.b, 40), u64::from(be32(self.b, 36)));
        let mut out: Vec<u64> = (0..n).map(|i| self.word(l1 + i * 8)).collect();
        for table in out.clone() {
            if table & PLACE != 0 {
                out.extend((0..(1u64 << self.bits) / 8).map(|j| self.word((table & PLACE) + j * 8)));
            }
        }
        out
    }
}

/// All sets of the snapshots of an image: usage against an own count, delete_many against one after
/// the other. Returns how many sets.
fn sets(chain: &Chain) -> Result<u64, String> {
    let before = &chain.image;
    let (Ok(old), Ok(_)) = (judge(before), memory(before, OpenFlags::RDWR)) else {
        return Ok(0);
    };
    let plain = Plain::new(before);
    let (counts, structures) = plain.counts();
    let wrong = |p: &Plain, snaps: &[judge::Snap]| -> usize {
        let counts = p.counts().0;
        snaps.iter().map(|s| p.wrong_flags(s.l1_offset, s.l1_size.into(), &counts)).sum()
    };
    let mut n = 0;
    // The last bit is the active disk.
    let first = old.state.snaps.len().min(4);
    for set in 0..2u32 << first {
        let active = set >> first == 1;
        let chosen = old.state.snaps.iter().take(first).enumerate().filter(|(i, _)| set >> i & 1 == 1);
        let chosen: Vec<_> = chosen.map(|(_, s)| s).collect();
        let ids: Vec<&[u8]> = chosen.iter().map(|s| s.id.as_slice()).collect();
        let mut states: Vec<Option<&[u8]>> = ids.iter().copied().map(Some).collect();
        if active {
            states.push(None);
        }
        let mut reached = Reached::new();
        for s in &chosen {
            let size = s.disk_size.unwrap_or(old.state.size) & !511;
            plain.reach(s.l1_offset, s.l1_size.into(), size, &mut reached);
        }
        if states.is_empty() || active {
            let (l1, n) = (be64(before, 40), be32(before, 36));
            plain.reach(l1, n.into(), old.state.size, &mut reached);
        }
        let cs = 1u64 << plain.bits;
        let sole = |(c, refs): &(&u64, &Vec<(bool, bool)>)| counts.get(c) == Some(&(refs.len() as u64));
        let want = (
            reached.len() as u64 * cs,
            reached.iter().filter(sole).count() as u64 * cs,
            reached.iter().filter(sole).filter(|(_, r)| r[0].0).count() as u64 * cs,
            reached.values().filter(|r| r.iter().all(|r| r.1)).count() as u64 * cs,
        );
        let u = memory(before, OpenFlags::read_only())?.snapshot_usage(&states);
        let u = u.map_err(|e| format!("usage of {set:#b}: {e}"))?;
        let is = (u.referenced, u.exclusive, u.tables, u.vm_state);
        if is != want || u.allocated != u.referenced {
            let _ = std::fs::write("/tmp/qcow2-usage.qcow2", before);
            return Err(format!("usage of {set:#b}: {u:?}, and it is {want:?}"));
        }
        n += 1;
        if active || ids.is_empty() {
            continue;
        }

        let run = |verb: &dyn Fn(&mut Image) -> Result<(), qcow2_snapshot::Error>| {
            let storage = MemoryStorage::new(before.clone());
            let kept = storage.handle();
            let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
            verb(&mut image).map_err(|e| e.to_string()).map(|()| kept.borrow().clone())
        };
        let many = run(&|image| image.snapshot_delete_many(&ids));
        let one_by_one = run(&|image| ids.iter().try_for_each(|id| image.snapshot_delete(Some(id), None)));
        let (many, one_by_one) = match (many, one_by_one) {
            (Ok(a), Ok(b)) => (a, b),
            (Err(_), Err(_)) => continue,
            (a, b) => return Err(format!("set {set:#b}: {:?} and {:?}", a.err(), b.err())),
        };
        if ids.len() == 1 && many != one_by_one {
            return Err(format!("a set of one, {set:#b}: other bytes"));
        }
        let (a, b) = (judge(&many)?, judge(&one_by_one)?);
        if a.state != b.state || (a.leaks, a.odd_flags) != (b.leaks, b.odd_flags) {
            return Err(format!("set {set:#b}: {} or {}", a.state.describe(), b.state.describe()));
        }
        let after = Plain::new(&many);
        if after.active() != Plain::new(&one_by_one).active() {
            return Err(format!("set {set:#b}: the active tables differ"));
        }
        if wrong(&after, &a.state.snaps) > wrong(&plain, &a.state.snaps) {
            return Err(format!("set {set:#b}: wrong COPIED flags in snapshots"));
        }
        let left = after.counts().0;
        let freed = counts.keys().filter(|c| !left.contains_key(c) && !structures.contains(c));
        let freed = freed.count() as u64 * cs;
        if freed != u.exclusive {
            return Err(format!("set {set:#b}: {freed:#x} bytes freed, exclusive are {:#x}", u.exclusive));
        }
    }
    Ok(n)
}

#[test]
fn a_set_holds_what_deleting_it_frees_and_goes_as_one_by_one() {
    let mut chains = cases::rare(seeds());
    chains.extend((1..=number("CRASH_RANDOM", if all() { 1000 } else { 100 })).map(cases::random));
    chains.extend(cases::reference(if all() { 4 << 20 } else { 600 << 10 }).0);
    let most = if all() { usize::MAX } else { 48 << 10 };
    let only = std::env::var("CRASH_ONLY").unwrap_or_default();
    chains.retain(|c| c.image.len() <= most && c.name.contains(&only));
    let (mut n, mut wrong) = (0, vec![]);
    for chain in &chains {
        match sets(chain) {
            Ok(sets) => n += sets,
            Err(why) => wrong.push(format!("{}: {why}", chain.name)),
        }
    }
    println!("{n} sets of snapshots in {} images", chains.len());
    assert!(wrong.is_empty() && (n > 100 || !only.is_empty()), "{} of {}: {}", wrong.len(), n, wrong.join("\n"));
}
