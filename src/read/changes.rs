//! Which bytes of a disk changed between two of its states.
//!
//! ```text
//!   L1 of `from`   | a | b | c | d |          equal entries: the same L2 table, nothing to look at
//!   L1 of `to`     | a | x | c | y |
//!                        |       |
//!                   L2 tables b, x and d, y: entries that differ are clusters that may differ
//!                        |
//!                   with `compare`: their data, sector by sector
//! ```

use super::mapping::Extent;
use super::tables::StateTables;
use crate::error::{Error, Result};
use crate::format::entry::COPIED;
use crate::format::geometry::Geometry;
use crate::image::replay::named;
use crate::image::{device, Image};
use crate::room;
use byteorder::{BigEndian, ByteOrder};

/// What is compared in one go, in bytes of each side.
const CHUNK: u64 = 1 << 20;
/// A change is told to a sector.
const SECTOR: u64 = 512;

/// What one state has at some bytes, by its own tables; backing files left aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The disk ends before.
    Beyond,
    /// Nothing: the backing file shows through, or zeros.
    Unallocated,
    /// Zeros.
    Zero,
    /// Data.
    Data,
    /// Compressed data.
    Compressed,
}

/// A run of bytes in which one state of the disk differs, or may differ, from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// First byte, from the start of the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// What was there, in the whole run.
    pub from: Mapping,
    /// What is there now, in the whole run.
    pub to: Mapping,
}

/// One state of the disk: what maps it, and where it ends.
pub(super) struct State {
    pub(super) l1: Vec<u64>,
    pub(super) size: u64,
}

/// Two states, and what is in memory of them for the next question.
pub(crate) struct Pair {
    /// What they were called.
    names: [Option<Vec<u8>>; 2],
    from: State,
    to: State,
    tables: StateTables,
    sectors: Sectors,
}

/// Which sectors of a stretch of data differ.
#[derive(Default)]
struct Sectors {
    start: u64,
    differ: Vec<bool>,
}

/// `from` and `to` as mapped in a stretch of bytes; `None` where they are equal for certain.
type Differs = Option<(Mapping, Mapping)>;

/// The changes of a disk in order ([`Image::snapshot_changes`]).
pub struct Changes<'a> {
    image: &'a mut Image,
    names: [Option<Vec<u8>>; 2],
    compare: bool,
    at: Option<u64>,
}

impl Iterator for Changes<'_> {
    type Item = Result<Change>;

    fn next(&mut self) -> Option<Result<Change>> {
        let at = self.at.take()?;
        let [from, to] = &self.names;
        let (from, to) = (from.as_deref(), to.as_deref());
        let found = self
            .image
            .snapshot_next_change(from, to, at, u64::MAX, self.compare)
            .transpose()?;
        if let Ok(change) = &found {
            self.at = change.start.checked_add(change.length);
        }
        Some(found)
    }
}

impl Image {
    /// All runs that [`Image::snapshot_next_change`] finds; none after an error.
    pub fn snapshot_changes(
        &mut self,
        from: Option<&[u8]>,
        to: Option<&[u8]>,
        compare: bool,
    ) -> Changes<'_> {
        Changes {
            image: self,
            #[allow(clippy::disallowed_methods)] // as long as the caller's
            names: [from, to].map(|name| name.map(<[u8]>::to_vec)),
            compare,
            at: Some(0),
        }
    }

    /// The first run of bytes, within `bytes` bytes from `offset`, in which the disk in the state `to`
    /// may differ from the state `from`: snapshots by their ID, else name, or (`None`) the active disk,
    /// whatever `load_tmp` shows. What is in no run is equal. Only tables are read, and of these only
    /// where the L1 entries differ; with `compare` also data, and runs are exact to the sector.
    ///
    /// Bytes behind the end of `from` are changed ([`Mapping::Beyond`]); the run ends where `to` ends.
    /// Where `from` and `to` are mapped otherwise, a new run begins.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` for damaged tables; `Unsupported` for an external data file and, with
    /// `compare`, for encrypted images; with `compare` those of opening a backing file.
    pub fn snapshot_next_change(
        &mut self,
        from: Option<&[u8]>,
        to: Option<&[u8]>,
        offset: u64,
        bytes: u64,
        compare: bool,
    ) -> Result<Option<Change>> {
        self.begin_look()?;
        if self.header.has_data_file() {
            return Err(Error::Unsupported(
                "Internal snapshots are not supported on images with an external data file".into(),
            ));
        }
        if compare && self.header.crypt_method != 0 {
            return Err(Error::Unsupported(
                "Comparing encrypted guest data is not supported; without QCOW2_CHANGE_COMPARE the tables are compared".into(),
            ));
        }
        let known = self.caches.compared.take();
        let mut pair = match known.and_then(|known| known.downcast::<Pair>().ok()) {
            Some(pair) if pair.names.each_ref().map(Option::as_deref) == [from, to] => pair,
            #[allow(clippy::disallowed_methods)] // one box, and names as long as the caller's
            _ => Box::new(Pair {
                names: [from, to].map(|name| name.map(<[u8]>::to_vec)),
                from: self.state(from)?,
                to: self.state(to)?,
                tables: StateTables::default(),
                sectors: Sectors::default(),
            }),
        };
        let end = offset.saturating_add(bytes).min(pair.to.size);
        let found = self.first_change(&mut pair, offset, end, compare);
        // After an error nothing of it is kept.
        if found.is_ok() {
            self.caches.compared = Some(pair);
        }
        found
    }

    /// A snapshot by its ID, else by its name, or the active disk.
    fn state(&mut self, name: Option<&[u8]>) -> Result<State> {
        if !self.snapshots.loaded {
            self.load_snapshots()?;
        }
        let state = match name {
            None => State {
                l1: room::copy_of(&self.l1)?,
                size: self.header.disk_size(),
            },
            Some(name) => {
                let found = self
                    .find(Some(name), None)
                    .or_else(|| self.find(None, Some(name)));
                let found = found.and_then(|i| self.snapshots.entries.get(i)).cloned();
                let Some(found) = found else {
                    return Err(Error::NotFound(format!(
                        "Can't find the snapshot '{}'",
                        String::from_utf8_lossy(name)
                    )));
                };
                State {
                    l1: self.snapshot_l1(found.l1_table_offset, found.l1_size)?,
                    size: found.disk_size & !(SECTOR - 1),
                }
            }
        };
        named::check_repeats(self.header.geometry, &state.l1)?;
        Ok(state)
    }

    fn first_change(
        &mut self,
        pair: &mut Pair,
        offset: u64,
        end: u64,
        compare: bool,
    ) -> Result<Option<Change>> {
        let mut found: Option<Change> = None;
        let mut data = [Vec::new(), Vec::new()];
        let mut at = offset;
        while at < end {
            let most = if compare { CHUNK } else { u64::MAX };
            let (mut n, mut differs) = self.piece(pair, at, end, most)?;
            if compare && differs.is_some_and(|(from, _)| from != Mapping::Beyond) {
                let differ;
                (n, differ) = self.compare(pair, &mut data, at, n)?;
                differs = differs.filter(|_| differ);
            }
            match (&mut found, differs) {
                (None, None) => {}
                (None, Some((from, to))) => {
                    found = Some(Change {
                        start: at,
                        length: n,
                        from,
                        to,
                    });
                }
                (Some(run), Some(kinds)) if (run.from, run.to) == kinds => run.length += n,
                (Some(_), _) => break,
            }
            at += n;
        }
        Ok(found)
    }

    /// How both states map the bytes from `at` on, and for how many before `end` that holds at least;
    /// where they differ no more than about `most` are looked at.
    fn piece(&mut self, pair: &mut Pair, at: u64, end: u64, most: u64) -> Result<(u64, Differs)> {
        let g = self.header.geometry;
        let Pair {
            from, to, tables, ..
        } = pair;
        let beyond = at >= from.size;
        let end = if beyond { end } else { end.min(from.size) };
        let index = g.l1_index(at);
        let until = g.l1_index(end - 1) + 1;

        // Without a table behind the end of `from`, or with the same table on both sides: as far as
        // it goes.
        let alike = |index| to.table(index) == if beyond { 0 } else { from.table(index) };
        if alike(index) {
            let named = to.l1.len().max(from.l1.len()) as u64;
            let next = (index..until.min(named)).find(|i| !alike(*i));
            let next = next.and_then(|i| g.guest_of_l1(i)).unwrap_or(end);
            let differs = beyond.then_some((Mapping::Beyond, Mapping::Unallocated));
            return Ok((next.min(end) - at, differs));
        }

        for table in [from.table(index), to.table(index)] {
            if g.in_cluster(table) != 0 {
                return Err(Error::Corrupt(format!(
                    "L2 table offset {table:#x} unaligned"
                )));
            }
        }
        let here = tables.get(&mut self.dev, g, [&*from, &*to], index, until)?;
        let end = g.guest_of_l1(index + 1).map_or(end, |next| next.min(end));
        let (mut n, first) = self.entries(here, beyond, at, end)?;
        while n < end - at && (n < most || first.is_none()) {
            let (more, next) = self.entries(here, beyond, at + n, end)?;
            if next != first {
                break;
            }
            n += more;
        }
        Ok((n.min(end - at), first))
    }

    /// What the entries for `at` in a pair of L2 tables say, and for how many bytes in the table: of
    /// a cluster or subclusters, or up to `end` and a little more where the tables are equal.
    fn entries(
        &self,
        tables: [Option<&[u8]>; 2],
        beyond: bool,
        at: u64,
        end: u64,
    ) -> Result<(u64, Differs)> {
        let g = self.header.geometry;
        let place = g.l2_index(at) as usize * g.l2_entry_size();
        let [from, to] = tables.map(|t| t.and_then(|t| t.get(place..)).unwrap_or_default());
        if !beyond {
            let most = g.clusters_for(end - at) + 1;
            let equal = equal_entries(g, from, to, most);
            if equal > 0 {
                return Ok(((equal << g.cluster_bits) - g.in_cluster(at), None));
            }
        }
        let word = |table: &[u8], at| table.get(at..at + 8).map_or(0, BigEndian::read_u64);
        let extent = |table: &[u8]| {
            let bitmap = if g.extended_l2 { word(table, 8) } else { 0 };
            self.entry_extent(word(table, 0), bitmap, at)
        };
        let (new, n) = extent(to)?;
        if beyond {
            return Ok((n, Some((Mapping::Beyond, mapping(new)))));
        }
        let (old, until) = extent(from)?;
        let differs = !self.equal(old, new);
        Ok((n.min(until), differs.then(|| (mapping(old), mapping(new)))))
    }

    /// Do the same bytes read the same in both states, by the tables alone?
    fn equal(&self, old: Extent, new: Extent) -> bool {
        use Extent::{Compressed, Data, Unallocated, Zero};
        match (old, new) {
            (Unallocated(_), Unallocated(_)) | (Zero(_), Zero(_)) => true,
            (Unallocated(_), Zero(_)) | (Zero(_), Unallocated(_)) => self.backing_file.is_empty(),
            (Data(_), Data(_)) | (Compressed { .. }, Compressed { .. }) => old == new,
            _ => false,
        }
    }

    /// Do the data of the two states differ in the sector at `at`, and for how many of `max` bytes,
    /// all in one L2 table and mapped alike, does that hold at least?
    fn compare(
        &mut self,
        pair: &mut Pair,
        data: &mut [Vec<u8>; 2],
        at: u64,
        max: u64,
    ) -> Result<(u64, bool)> {
        let known = |s: &Sectors| {
            let first = at.checked_sub(s.start)? / SECTOR;
            let rest = s.differ.get(first as usize..)?;
            let differ = *rest.first()?;
            let same = rest.iter().take_while(|d| **d == differ).count();
            let end = (first + same as u64) * SECTOR + s.start;
            Some((max.min(end - at), differ))
        };
        if let Some(answer) = known(&pair.sectors) {
            return Ok(answer);
        }
        let start = at / SECTOR * SECTOR;
        let bytes = (at + max - start).next_multiple_of(SECTOR).min(CHUNK);
        let g = self.header.geometry;
        let index = g.l1_index(at);
        let tables = pair.tables.held(g, index);
        for (side, state) in [&pair.from, &pair.to].into_iter().enumerate() {
            if let Some(Some(table)) = tables.get(side) {
                for guest in [start, start + bytes - 1] {
                    self.keep_slice(state.table(index), guest, table)?;
                }
            }
            if data[side].len() as u64 != bytes {
                data[side] = device::zeroed(bytes)?;
            }
            self.read_through(Some(&state.l1), start, &mut data[side])?;
        }
        let [old, new] = data;
        pair.sectors.start = start;
        pair.sectors.differ.clear();
        if old == new {
            room::resize(&mut pair.sectors.differ, (bytes / SECTOR) as usize, false)?;
        } else {
            let sectors = old.chunks(SECTOR as usize).zip(new.chunks(SECTOR as usize));
            pair.sectors.differ = room::collected(sectors.map(|(a, b)| a != b))?;
        }
        known(&pair.sectors).ok_or_else(|| Error::Corrupt("No sector was compared".into()))
    }
}

/// How many of the first `most` entries of two L2 tables' rests are the same, but for COPIED.
fn equal_entries(g: Geometry, from: &[u8], to: &[u8], most: u64) -> u64 {
    let size = g.l2_entry_size();
    from.chunks_exact(size)
        .zip(to.chunks_exact(size))
        .take(most as usize)
        .take_while(|(a, b)| {
            (BigEndian::read_u64(a) ^ BigEndian::read_u64(b)) & !COPIED == 0
                && a.get(8..) == b.get(8..)
        })
        .count() as u64
}

fn mapping(extent: Extent) -> Mapping {
    match extent {
        Extent::Unallocated(_) => Mapping::Unallocated,
        Extent::Zero(_) => Mapping::Zero,
        Extent::Data(_) => Mapping::Data,
        Extent::Compressed { .. } => Mapping::Compressed,
    }
}
