//! Every small image: a walk through all answers to a list of questions.
//!
//! [`Chooser`] asks "which of n?"; whoever goes through all its paths has gone through every image.
//! The questions are [`Spec::choose`]; what is folded away, because another image is the same to the
//! code under test, is said there. [`Spec::bytes`] lays an image out, with deviations from a clean one.

const CLUSTER: usize = 512;
const PER_TABLE: usize = CLUSTER / 8;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// How large an image may be, and how it is tried.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// L2 tables that the size of a disk may ask for.
    pub wants: usize,
    /// L2 tables and data clusters in use, in all states together.
    pub clusters: usize,
    /// Entries of an L2 table that may be in use: the first, the last.
    pub slots: usize,
    pub snapshots: usize,
    /// Verbs one after the other, on a clean image and on one that deviates.
    pub verbs: (usize, usize),
    /// Deviations at a time.
    pub deviations: usize,
}

/// A path through a tree of choices; [`Chooser::next`] is the path after it.
#[derive(Default)]
pub struct Chooser {
    path: Vec<(usize, usize)>,
    at: usize,
}

impl Chooser {
    /// One of `n`.
    fn pick(&mut self, n: usize) -> usize {
        if self.at == self.path.len() {
            self.path.push((0, n));
        }
        let (chosen, of) = self.path[self.at];
        assert_eq!(of, n, "the same path, other questions");
        self.at += 1;
        chosen
    }

    /// Go to the next path. Is there one?
    pub fn next(&mut self) -> bool {
        self.at = 0;
        while let Some((chosen, n)) = self.path.pop() {
            if chosen + 1 < n {
                self.path.push((chosen + 1, n));
                return true;
            }
        }
        false
    }
}

/// What an L2 entry is. The number names a data cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nothing,
    Zeros,
    Data(usize),
    ZeroData(usize),
    Packed(usize),
}

/// One state of the disk: L2 tables that its size wants; its L1 table.
#[derive(Clone, Debug)]
struct Disk {
    wants: usize,
    l1: Vec<Option<usize>>,
}

/// An image, but for where things lie.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The snapshots, then the active disk.
    states: Vec<Disk>,
    tables: Vec<Vec<Kind>>,
    data: usize,
}

/// One thing that is not as in a clean image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deviation {
    /// The flag of the nth entry that has one.
    Flag(usize),
    /// Every flag that may be the other one.
    AllFlags,
    /// The nth cluster is counted once more.
    More(usize),
    /// The nth cluster is counted once less.
    Less(usize),
    /// The file ends in the last cluster.
    Short,
    /// The file goes on behind the last cluster.
    Long,
    /// A free cluster before all tables, such as a deleted snapshot leaves.
    Gap,
    /// Counts of 64 bits, so many of them free in the only block.
    Left(usize),
    /// Counts of one bit.
    OneBit,
    /// Version 2.
    Version2,
    /// A backing file shows where a disk has nothing.
    Backing,
}

impl Spec {
    /// Every image of the bound. Folded: data and tables lie in the order in which they are first
    /// named; what is shared is shared at the same guest offset, as QEMU shares; of the entries of a
    /// table the first and the last stand for all; a cluster's bytes are its own; IDs count from 1.
    pub fn choose(c: &mut Chooser, bound: &Bound) -> Spec {
        let snapshots = c.pick(bound.snapshots + 1);
        let mut spec = Spec {
            states: vec![],
            tables: vec![],
            data: 0,
        };
        for state in 0..=snapshots {
            let wants = 1 + c.pick(bound.wants);
            // The L1 of a snapshot may be shorter than its size wants; that of the active disk not.
            let length = match state == snapshots {
                true => wants + c.pick(2),
                false => wants - 1 + c.pick(3),
            };
            let mut l1 = vec![];
            for i in 0..length {
                let mut shared: Vec<usize> = vec![];
                for s in &spec.states {
                    let table = s.l1.get(i).copied().flatten();
                    shared.extend(table.filter(|t| !shared.contains(t)));
                }
                let new = usize::from(spec.used() < bound.clusters);
                l1.push(match c.pick(1 + shared.len() + new) {
                    0 => None,
                    n if n <= shared.len() => Some(shared[n - 1]),
                    _ => {
                        spec.tables.push(vec![]);
                        let table = spec.table(c, bound, &shared);
                        *spec.tables.last_mut().unwrap() = table;
                        Some(spec.tables.len() - 1)
                    }
                });
            }
            spec.states.push(Disk { wants, l1 });
        }
        spec
    }

    fn used(&self) -> usize {
        self.tables.len() + self.data
    }

    /// The entries of a new table; `others` at the same place of an L1 may have clusters to share.
    fn table(&mut self, c: &mut Chooser, bound: &Bound, others: &[usize]) -> Vec<Kind> {
        let mut out = vec![];
        for slot in 0..bound.slots {
            let mut kinds = vec![Kind::Nothing, Kind::Zeros];
            for other in others {
                let kind = self.tables[*other][slot];
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
            if self.used() < bound.clusters {
                let new = self.data;
                kinds.extend([Kind::Data(new), Kind::ZeroData(new), Kind::Packed(new)]);
            }
            let kind = kinds[c.pick(kinds.len())];
            if let Kind::Data(n) | Kind::ZeroData(n) | Kind::Packed(n) = kind {
                self.data = self.data.max(n + 1);
            }
            out.push(kind);
        }
        out
    }

    fn active(&self) -> &Disk {
        &self.states[self.states.len() - 1]
    }

    fn snapshots(&self) -> usize {
        self.states.len() - 1
    }

    /// Fixed clusters: header, refcount table, block; the active L1, the list, the snapshots' L1s.
    fn structures(&self) -> usize {
        let l1s = self.states[..self.snapshots()].iter();
        let l1s = l1s.filter(|s| !s.l1.is_empty()).count();
        4 + usize::from(self.snapshots() > 0) + l1s
    }

    /// How often tables and data clusters are named.
    fn counts(&self) -> (Vec<u64>, Vec<u64>) {
        let (mut tables, mut data) = (vec![0; self.tables.len()], vec![0; self.data]);
        for table in self.states.iter().flat_map(|s| s.l1.iter().flatten()) {
            tables[*table] += 1;
            for kind in &self.tables[*table] {
                if let Kind::Data(n) | Kind::ZeroData(n) | Kind::Packed(n) = kind {
                    data[*n] += 1;
                }
            }
        }
        (tables, data)
    }

    /// Every single deviation that this image can have.
    pub fn deviations(&self) -> Vec<Deviation> {
        use Deviation::*;
        let clusters = self.structures() + self.used();
        let (tables, data) = self.counts();
        let mut all: Vec<Deviation> = (0..self.flags()).map(Flag).collect();
        if all.len() > 1 {
            all.push(AllFlags);
        }
        all.extend((0..clusters).flat_map(|n| [More(n), Less(n)]));
        all.extend([Long, Gap, Backing]);
        all.extend((0..4).map(Left));
        if self.used() > 0 {
            all.push(Short);
        }
        if tables.iter().chain(&data).all(|n| *n == 1) {
            all.push(OneBit);
        }
        let kinds = self.tables.iter().flatten();
        if kinds
            .clone()
            .all(|k| !matches!(k, Kind::Zeros | Kind::ZeroData(_)))
        {
            all.push(Version2);
        }
        all
    }

    /// Entries with a flag: of all L1 tables, then of all L2 tables.
    fn flags(&self) -> usize {
        let l1 = self.states.iter().flat_map(|s| s.l1.iter().flatten());
        let l2 = self.tables.iter().flatten();
        l1.count()
            + l2.filter(|k| matches!(k, Kind::Data(_) | Kind::ZeroData(_)))
                .count()
    }

    /// The file; the cluster that is counted too low. `None`: no legal image, or the same as another.
    pub fn bytes(&self, deviations: &[Deviation]) -> Option<(Vec<u8>, Option<u64>)> {
        use Deviation::*;
        let has = |d: Deviation| deviations.contains(&d);
        let left = deviations.iter().find_map(|d| match d {
            Left(n) => Some(*n),
            _ => None,
        });
        let order = match (left, has(OneBit)) {
            (Some(_), true) => return None,
            (Some(_), _) => 6u32,
            (_, true) => 0,
            _ => 4,
        };
        if has(Version2) && order != 4 || has(Short) && has(Long) {
            return None;
        }

        // Places.
        let gap = usize::from(has(Gap));
        let snapshots = self.snapshots();
        let active_l1 = 3 + gap;
        let list = active_l1 + 1;
        let mut next = list + usize::from(snapshots > 0);
        let mut l1_at = vec![];
        for s in &self.states[..snapshots] {
            l1_at.push(if s.l1.is_empty() { 0 } else { next });
            next += usize::from(!s.l1.is_empty());
        }
        l1_at.push(active_l1);
        let table_at = |t: usize| next + t;
        let data_at = |d: usize| next + self.tables.len() + d;
        let total = next + self.used();

        // Counts.
        let mut counts = vec![0u64; 64];
        for (c, count) in counts.iter_mut().enumerate().take(next) {
            *count = u64::from(gap == 0 || c != 3);
        }
        let (tables, data) = self.counts();
        for (t, n) in tables.iter().enumerate() {
            counts[table_at(t)] = *n;
        }
        for (d, n) in data.iter().enumerate() {
            counts[data_at(d)] = *n;
        }
        let mut low = None;
        for d in deviations {
            let place = |n: usize| n + usize::from(gap == 1 && n >= 3);
            match d {
                More(n) => counts[place(*n)] += 1,
                // The judge knows one such cluster.
                Less(_) if low.is_some() => return None,
                Less(n) => {
                    counts[place(*n)] = counts[place(*n)].checked_sub(1)?;
                    low = Some(place(*n) as u64);
                }
                _ => {}
            }
        }
        // Counted behind the end of the file, and nothing there: the block is full all the same.
        if let Some(left) = left {
            for count in &mut counts[total..64 - left] {
                *count = 1;
            }
        }
        if counts.iter().any(|n| order == 0 && *n > 1) {
            return None;
        }

        let mut file = vec![0u8; total * CLUSTER];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        let at = |cluster: usize| (cluster * CLUSTER) as u64;
        let active = self.active();
        put(0, b"QFI\xfb");
        put(4, &(if has(Version2) { 2u32 } else { 3 }).to_be_bytes());
        put(20, &9u32.to_be_bytes());
        put(24, &self.size(active).to_be_bytes());
        put(36, &(active.l1.len() as u32).to_be_bytes());
        put(40, &at(active_l1).to_be_bytes());
        put(48, &at(1).to_be_bytes());
        put(56, &1u32.to_be_bytes());
        if !has(Version2) {
            put(96, &order.to_be_bytes());
            put(100, &104u32.to_be_bytes());
        }
        if has(Backing) {
            let extensions = if has(Version2) { 72 } else { 104 };
            put(8, &256u64.to_be_bytes());
            put(16, &4u32.to_be_bytes());
            put(256, b"base");
            put(extensions, b"\xe2\x79\x2a\xca\0\0\0\x03raw");
        }
        put(CLUSTER, &at(2).to_be_bytes());
        for (c, n) in counts.iter().enumerate() {
            match order {
                6 => put(2 * CLUSTER + c * 8, &n.to_be_bytes()),
                4 => put(2 * CLUSTER + c * 2, &(*n as u16).to_be_bytes()),
                _ => {}
            }
        }
        if order == 0 {
            for (i, eight) in counts.chunks(8).enumerate() {
                let bits = eight.iter().rev().fold(0u8, |b, n| b << 1 | *n as u8);
                put(2 * CLUSTER + i, &[bits]);
            }
        }
        if snapshots > 0 {
            put(60, &(snapshots as u32).to_be_bytes());
            put(64, &at(list).to_be_bytes());
        }
        for (i, s) in self.states[..snapshots].iter().enumerate() {
            let entry = list * CLUSTER + i * 72;
            put(entry, &at(l1_at[i]).to_be_bytes());
            put(entry + 8, &(s.l1.len() as u32).to_be_bytes());
            put(entry + 12, &[0, 1, 0, 1]);
            put(entry + 36, &24u32.to_be_bytes());
            put(entry + 48, &self.size(s).to_be_bytes());
            put(entry + 64, &[b'1' + i as u8, b'a' + i as u8]);
        }

        // Entries, with flags: each as counted, or the other one where an image may have that.
        let mut nth = 0;
        let mut flag = |count: u64, guest_reaches: bool| -> Option<u64> {
            let own = count == 1;
            let other = has(Flag(nth)) || has(AllFlags) && (own || !guest_reaches);
            nth += 1;
            match (own != other, guest_reaches && !own) {
                (true, true) => None,
                (set, _) => Some(if set { COPIED } else { 0 }),
            }
        };
        for (s, state) in self.states.iter().enumerate() {
            for (i, table) in state.l1.iter().enumerate() {
                let Some(table) = table else { continue };
                let flag = flag(counts[table_at(*table)], s == snapshots)?;
                let word = at(table_at(*table)) | flag;
                put(l1_at[s] * CLUSTER + i * 8, &word.to_be_bytes());
            }
        }
        for (t, table) in self.tables.iter().enumerate() {
            let guest_reaches = active.l1.contains(&Some(t));
            for (slot, kind) in table.iter().enumerate() {
                let word = match kind {
                    Kind::Nothing => continue,
                    Kind::Zeros => 1,
                    Kind::Packed(d) => COMPRESSED | at(data_at(*d)),
                    Kind::Data(d) | Kind::ZeroData(d) => {
                        let zeros = u64::from(matches!(kind, Kind::ZeroData(_)));
                        at(data_at(*d)) | zeros | flag(counts[data_at(*d)], guest_reaches)?
                    }
                };
                let slot = slot * (PER_TABLE - 1);
                put(table_at(t) * CLUSTER + slot * 8, &word.to_be_bytes());
            }
        }
        for d in 0..self.data {
            put(data_at(d) * CLUSTER, &[0xa0 + d as u8; CLUSTER]);
        }
        if has(Short) {
            // Of a table no entry may be lost, nor all of the data.
            let keep = if self.data > 0 { 100 } else { 8 };
            if self.data == 0 && self.tables.last().is_some_and(|t| t.len() > 1) {
                return None;
            }
            file.truncate((total - 1) * CLUSTER + keep);
        }
        if has(Long) {
            file.resize(file.len().next_multiple_of(CLUSTER) + CLUSTER * 3 / 2, 0xee);
        }
        Some((file, low))
    }

    fn size(&self, disk: &Disk) -> u64 {
        (disk.wants * PER_TABLE * CLUSTER) as u64
    }
}
