//! What an image holds and what it says of its clusters, from the bytes alone: no code of the library.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{Hash, Hasher};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Tables are followed so far.
const MANY: u64 = 1 << 16;

pub struct Raw<'a>(pub &'a [u8]);

impl Raw<'_> {
    pub fn number(&self, at: u64, n: usize) -> u64 {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let part = at.checked_add(n).and_then(|end| self.0.get(at..end));
        part.map_or(0, |p| p.iter().fold(0, |v, b| v << 8 | u64::from(*b)))
    }
    fn cs(&self) -> u64 {
        1 << self.number(20, 4).clamp(9, 21)
    }
    fn v3(&self) -> bool {
        self.number(4, 4) >= 3
    }
    fn extended(&self) -> bool {
        self.v3() && self.number(72, 8) & 16 != 0
    }
    pub fn bits(&self) -> u64 {
        if self.v3() {
            self.number(72, 8)
        } else {
            0
        }
    }
    /// Is a cluster at `at` wholly in the file?
    fn holds(&self, at: u64, n: u64) -> bool {
        at.checked_add(n)
            .is_some_and(|end| end <= self.0.len() as u64)
    }
    fn hash(&self, at: u64, n: u64) -> u64 {
        let mut h = DefaultHasher::new();
        let end = at.saturating_add(n).min(self.0.len() as u64);
        let part = self.0.get(at as usize..end as usize).unwrap_or_default();
        // Behind the end of the file zeros are read, and stay so when it becomes longer.
        let mut part = part.to_vec();
        part.resize(n as usize, 0);
        part.hash(&mut h);
        h.finish()
    }

    /// Where the snapshot table ends.
    pub fn table_end(&self) -> u64 {
        let mut at = self.number(64, 8);
        for _ in 0..self.number(60, 4).min(1000) {
            let entry = at.next_multiple_of(8);
            let names = self.number(entry + 12, 2) + self.number(entry + 14, 2);
            at = entry + 40 + self.number(entry + 36, 4) + names;
        }
        at
    }

    /// The active disk and the snapshots: a name, and where the L1 table is.
    pub fn l1s(&self) -> Vec<(String, u64, u64)> {
        let mut out = vec![("active".to_owned(), self.number(40, 8), self.number(36, 4))];
        let mut at = self.number(64, 8);
        for _ in 0..self.number(60, 4).min(1000) {
            at = at.saturating_add(7) & !7;
            if !self.holds(at, 40) {
                break;
            }
            let (id, name) = (self.number(at + 12, 2), self.number(at + 14, 2));
            let (offset, size) = (self.number(at, 8), self.number(at + 8, 4));
            let text = at + 40 + self.number(at + 36, 4);
            // What follows a NUL is lost when a table is written.
            let key = |from: u64, n: u64| -> Vec<u8> {
                let bytes = (from..from + n).map(|i| self.number(i, 1) as u8);
                bytes.take_while(|b| *b != 0).collect()
            };
            let mut h = DefaultHasher::new();
            (key(text, id), key(text + id, name)).hash(&mut h);
            out.push((format!("{:x} {offset:x} {size}", h.finish()), offset, size));
            at = text + id + name;
        }
        out
    }

    /// The L2 entries that can be followed: (place of the table's L1 entry, guest cluster, word, bitmap).
    fn entries(&self, l1: u64, n: u64, mut f: impl FnMut(u64, u64, u64, u64)) {
        let (cs, size) = (self.cs(), if self.extended() { 16 } else { 8 });
        for i in 0..n.min(MANY) {
            let l1_entry = self.number(l1.saturating_add(i * 8), 8);
            let l2 = l1_entry & OFFSET;
            if l2 == 0 || l2 % cs != 0 || !self.holds(l2, 1) {
                continue;
            }
            for j in 0..cs / size {
                let word = self.number(l2 + j * size, 8);
                let bitmap = if size == 16 {
                    self.number(l2 + j * size + 8, 8)
                } else {
                    0
                };
                if word | bitmap != 0 {
                    f(l1_entry, i * (cs / size) + j, word, bitmap);
                }
            }
        }
    }

    fn compressed(&self, word: u64) -> (u64, u64) {
        let shift = 62 - (self.cs().trailing_zeros() - 8);
        let offset = word & ((1 << shift) - 1);
        let sectors = (word >> shift & (self.cs() / 256 - 1)) + 1;
        (offset, sectors * 512 - offset % 512)
    }

    /// Clusters of the structures that a repair writes or leaves.
    fn metadata(&self) -> BTreeSet<u64> {
        let cs = self.cs();
        let mut out = BTreeSet::from([0]);
        let mut add = |at: u64, n: u64| {
            let end = at.saturating_add(n).min(self.0.len() as u64);
            out.extend(at / cs..end.div_ceil(cs));
        };
        let (table, clusters) = (self.number(48, 8), self.number(56, 4));
        add(table, clusters.saturating_mul(cs));
        for i in 0..(clusters.saturating_mul(cs) / 8).min(MANY) {
            add(self.number(table.saturating_add(i * 8), 8) & !511, cs);
        }
        add(self.number(64, 8), 65536);
        out
    }

    /// Clusters of L1 and L2 tables.
    fn tables(&self) -> BTreeSet<u64> {
        let cs = self.cs();
        let mut tables = BTreeSet::new();
        for (_, l1, n) in self.l1s() {
            let end = l1.saturating_add(n * 8).min(self.0.len() as u64);
            tables.extend(l1 / cs..end.div_ceil(cs));
            self.entries(l1, n, |l1_entry, _, _, _| {
                tables.insert((l1_entry & OFFSET) / cs);
            });
        }
        tables
    }

    /// Clusters whose contents a repair may change.
    pub fn odd(&self) -> BTreeSet<u64> {
        self.metadata().union(&self.tables()).copied().collect()
    }

    /// What each state reads as, where its tables are in the file and not where structures are. Data in
    /// `odd` clusters is left out.
    pub fn states(&self, structures: &BTreeSet<u64>, odd: &BTreeSet<u64>) -> BTreeMap<String, u64> {
        let cs = self.cs();
        let mut out = BTreeMap::new();
        for (name, l1, n) in self.l1s() {
            let mut bad = l1 % cs != 0 || !self.holds(l1, n * 8);
            bad |= (l1 / cs
                ..l1.saturating_add(n * 8)
                    .min(self.0.len() as u64)
                    .div_ceil(cs))
                .any(|c| structures.contains(&c));
            self.entries(l1, n, |l1_entry, _, _, _| {
                bad |= structures.contains(&((l1_entry & OFFSET) / cs));
            });
            if bad {
                continue;
            }
            let mut h = DefaultHasher::new();
            self.entries(l1, n, |_, guest, word, bitmap| {
                let mut word = word & !COPIED;
                if word & COMPRESSED != 0 {
                    let (at, n) = self.compressed(word);
                    // The header changes.
                    let mut clusters = at / cs..(at + n).div_ceil(cs);
                    if !clusters.any(|c| odd.contains(&c)) {
                        (guest, word, self.hash(at, n)).hash(&mut h);
                    }
                    return;
                }
                let extended = self.extended();
                let zero = if extended {
                    bitmap & 0xffff_ffff == 0
                } else {
                    word & 1 != 0
                };
                let offset = word & OFFSET;
                if zero && offset % cs != 0 {
                    word = if extended { 0 } else { 1 };
                }
                if word | bitmap == 0 {
                    return;
                }
                let (first, last) = (offset / cs, offset.div_ceil(cs));
                let odd = odd.contains(&first) || odd.contains(&last);
                let data = offset != 0 && !zero && !odd;
                let data = data.then(|| self.hash(offset, cs));
                (guest, word, bitmap, data).hash(&mut h);
            });
            out.insert(name, h.finish());
        }
        out
    }

    /// References to clusters from all that is followed, and those by which a COPIED is seen.
    fn references(&self) -> (HashMap<u64, u64>, Vec<(u64, u64)>) {
        let cs = self.cs();
        let mut refs: HashMap<u64, u64> = HashMap::new();
        let mut flags = Vec::new();
        for (i, (_, l1, n)) in self.l1s().into_iter().enumerate() {
            // An L1 table of more than 32 MiB is none.
            if l1 % cs != 0 || n > 4 << 20 {
                continue;
            }
            let mut tables = BTreeSet::new();
            self.entries(l1, n, |l1_entry, guest, word, _| {
                let table = guest / (cs / if self.extended() { 16 } else { 8 });
                if tables.insert(table) {
                    *refs.entry((l1_entry & OFFSET) / cs).or_default() += 1;
                    if i == 0 {
                        flags.push(((l1_entry & OFFSET) / cs, l1_entry & COPIED));
                    }
                }
                if word & COMPRESSED != 0 {
                    let (at, n) = self.compressed(word);
                    for c in at / cs..=(at + n - 1) / cs {
                        *refs.entry(c).or_default() += 1;
                    }
                } else if word & OFFSET != 0 && word & OFFSET & (cs - 1) == 0 {
                    *refs.entry((word & OFFSET) / cs).or_default() += 1;
                    if i == 0 {
                        flags.push(((word & OFFSET) / cs, word & COPIED));
                    }
                }
            });
        }
        (refs, flags)
    }

    pub fn order(&self) -> u64 {
        if self.v3() {
            self.number(96, 4).min(6)
        } else {
            4
        }
    }

    pub fn count(&self, cluster: u64) -> u64 {
        let order = self.order();
        let cs = self.cs();
        let per_block = (cs * 8) >> order;
        let i = cluster / per_block;
        if i * 8 >= self.number(56, 4).saturating_mul(cs) {
            return 0;
        }
        let block = self.number(self.number(48, 8).saturating_add(i * 8), 8) & !511;
        if block == 0 || block % cs != 0 {
            return 0;
        }
        let index = cluster % per_block;
        if order >= 3 {
            let n = 1u64 << (order - 3);
            return self.number(block.saturating_add(index * n), n as usize);
        }
        let byte = self.number(block.saturating_add((index << order) / 8), 1);
        byte >> ((index << order) % 8) & ((1 << (1 << order)) - 1)
    }

    /// For each cluster that is referred to: how much of that its count covers; and the clusters that a
    /// guest may write in place although another state has them.
    pub fn safety(&self) -> (BTreeMap<u64, u64>, BTreeSet<u64>) {
        let (refs, flags) = self.references();
        // Behind the end of the file nothing is counted, but flags say what they say.
        let end = (self.0.len() as u64).div_ceil(self.cs());
        let inside = refs.iter().filter(|(c, _)| **c < end);
        let covered = inside.map(|(c, n)| (*c, self.count(*c).min(*n)));
        let shared = |c: &u64| refs.get(c).is_some_and(|n| *n > 1);
        let exposed = flags.iter().filter(|(c, f)| *f != 0 && shared(c));
        (covered.collect(), exposed.map(|(c, _)| *c).collect())
    }
}

/// Is `after` no worse than `before`, in any state and any count?
pub fn no_worse(before: &[u8], after: &[u8]) -> Result<(), String> {
    let (b, a) = (Raw(before), Raw(after));
    let odd = b.odd().union(&a.odd()).copied().collect();
    let (old, new) = (
        b.states(&b.metadata(), &odd),
        a.states(&BTreeSet::new(), &odd),
    );
    let listed: BTreeSet<String> = a.l1s().into_iter().map(|(name, ..)| name).collect();
    for (name, hash) in &old {
        match new.get(name) {
            Some(h) if h == hash => {}
            Some(_) => return Err(format!("{name} reads differently")),
            None if listed.contains(name) => return Err(format!("{name} cannot be read any more")),
            None => return Err(format!("{name} is gone")),
        }
    }
    if !old.contains_key("active") {
        // The active L1 table lies where something else is: nothing can be said of what it refers to.
        return Ok(());
    }
    let ((covered, exposed), (covered_now, exposed_now)) = (b.safety(), a.safety());
    for (cluster, n) in &covered {
        let now = covered_now.get(cluster).copied();
        if now.is_some_and(|now| now < *n) {
            return Err(format!(
                "cluster {cluster} was covered {n} times, now {now:?}"
            ));
        }
    }
    if let Some(c) = exposed_now.difference(&exposed).next() {
        return Err(format!(
            "cluster {c} may be written in place, but is shared"
        ));
    }
    Ok(())
}
