//! The snapshot table as a whole: reading, finding, writing a new one.

use super::{copies, Snapshot};
use crate::error::{Error, Result};
use crate::format::geometry::{Geometry, MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, TABLE_ENTRY};
use crate::format::header::{validate_table, AT_SNAPSHOTS};
use crate::format::record;
use crate::image::plan::Plan;
use crate::image::progress::Stage;
use crate::image::refcount::Freed;
use crate::image::replay::overlap::Protected;
use crate::image::replay::Replay;
use crate::image::{device, Image, SnapshotList};
use crate::room;
use crate::words::printable;

/// The table is read in requests of this size.
const READ_AHEAD: u64 = 1 << 20;
/// What is being done then.
const TABLE_OP: &str = "Could not read the snapshot table";
/// No entry is longer: fixed part, 1024 bytes of extra data, ID and name of 65535 bytes each.
const LONGEST_ENTRY: u64 = 256 << 10;

/// Where the L1 table of a state is, and how much disk it maps.
#[derive(Clone, Copy)]
pub(super) struct L1Table {
    pub(super) offset: u64,
    pub(super) entries: u32,
    pub(super) disk_size: u64,
}

impl L1Table {
    pub(super) fn bytes(&self) -> u64 {
        u64::from(self.entries).saturating_mul(TABLE_ENTRY)
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes())
    }
}

impl Snapshot {
    pub(super) fn l1_table(&self) -> L1Table {
        L1Table {
            offset: self.l1_table_offset,
            entries: self.l1_size,
            disk_size: self.disk_size,
        }
    }

    /// Is the L1 table where one can be, and not too long?
    pub(crate) fn has_a_place_for_l1(&self, g: Geometry) -> bool {
        let (offset, entries) = (self.l1_table_offset, self.l1_size.into());
        validate_table(g, offset, entries, TABLE_ENTRY, MAX_L1_BYTES, "").is_ok()
    }
}

impl Image {
    /// Load the snapshot table from the image (`qcow2_read_snapshots`).
    pub(crate) fn load_snapshots(&mut self) -> Result<()> {
        // A handle that is to check the image has taken the header as it is.
        self.header.validate_snapshots()?;
        // Where no lock keeps others out, the file may have been cut.
        self.dev.length_now()?;
        let start = self.header.snapshots_offset;
        let mut list = SnapshotList {
            loaded: true,
            ..SnapshotList::default()
        };
        let mut window: Vec<u8> = Vec::new();
        // `window` holds the file's bytes from `window_at`.
        let (mut window_at, mut at) = (start, start);
        for index in 0..u64::from(self.header.nb_snapshots) {
            at = record::align(at);
            let (snapshot, len) = loop {
                let rest = window
                    .get(at.saturating_sub(window_at) as usize..)
                    .unwrap_or_default();
                if let Some(found) = record::decode(rest, index, self.header.disk_size())? {
                    break found;
                }
                // The longest entry is known only when it has been read: a second look is as long as any.
                let least = if window_at == at && !window.is_empty() {
                    LONGEST_ENTRY
                } else {
                    4096
                };
                let want = READ_AHEAD
                    .min(self.dev.length().saturating_sub(at))
                    .max(least);
                let had = if window_at == at { window.len() } else { 0 };
                let read = self.dev.read_vec(TABLE_OP, at, want);
                window = read.or_else(|e| self.readable_part(at, want, had, e))?;
                window_at = at;
            };
            self.dev.check_inside(
                format_args!(
                    "Entry {} of {} of the snapshot table",
                    index + 1,
                    self.header.nb_snapshots
                ),
                at,
                len,
            )?;
            at = at.saturating_add(len);
            if at.saturating_sub(start) > MAX_SNAPSHOT_TABLE_BYTES {
                return Err(Error::TooBig("Snapshot table is too big".into()));
            }
            room::push(&mut list.entries, snapshot)?;
        }
        list.size = at - start;
        self.snapshots = list;
        self.caches.compared = None;
        Ok(())
    }

    /// What can be read from `at` on, if it is more than `had`: something behind the table may be what cannot.
    /// Where all of it can be read now, the read has failed for once: `error` stands.
    fn readable_part(&mut self, at: u64, want: u64, had: usize, error: Error) -> Result<Vec<u8>> {
        let mut part = Vec::new();
        let mut sector = [0; 512];
        if matches!(error, Error::Io { .. }) {
            while (part.len() as u64) < want {
                let next = at.saturating_add(part.len() as u64);
                if self.dev.read(TABLE_OP, next, &mut sector).is_err() {
                    break;
                }
                room::append(&mut part, &sector)?;
            }
        }
        match part.len() > had && (part.len() as u64) < want {
            true => Ok(part),
            false => Err(error),
        }
    }

    /// The first snapshot that matches: by ID and name together, or by the one that is given
    /// (`find_snapshot_by_id_and_name`).
    pub(crate) fn find(&self, id: Option<&[u8]>, name: Option<&[u8]>) -> Option<usize> {
        if id.is_none() && name.is_none() {
            return None;
        }
        self.snapshots
            .entries
            .iter()
            .position(|s| id.is_none_or(|id| s.id == id) && name.is_none_or(|name| s.name == name))
    }

    /// Are the L1 tables of all snapshots in the file? A verb may make it longer, and one that is cut
    /// off would then look like a table of zeros. Those that are about to be `gone` do not matter.
    pub(crate) fn check_snapshots_inside(&mut self, gone: &[usize]) -> Result<()> {
        let g = self.header.geometry;
        for (i, s) in self.snapshots.entries.iter().enumerate() {
            if gone.binary_search(&i).is_ok() || !(gone.is_empty() || s.has_a_place_for_l1(g)) {
                continue;
            }
            let id = String::from_utf8_lossy(&s.id);
            let bytes = s.l1_table().bytes();
            let inside = self.dev.check_inside(
                format_args!("The L1 table of snapshot '{id}'"),
                s.l1_table_offset,
                bytes,
            );
            inside.map_err(|e| match gone {
                [] => e,
                _ => Error::Corrupt(format!(
                    "{e}; or delete that snapshot too, in the same call"
                )),
            })?;
        }
        Ok(())
    }

    /// Does the L1 table of a snapshot lie in the active L1 table? Only in a damaged image.
    pub(super) fn check_apart_from_active(&self, s: L1Table) -> Result<()> {
        let active = self.active_l1_table();
        if active.offset < s.end() && s.offset < active.end() {
            return Err(Error::Corrupt(
                "The snapshot's L1 table overlaps the active L1 table".into(),
            ));
        }
        Ok(())
    }

    pub(super) fn active_l1_table(&self) -> L1Table {
        L1Table {
            offset: self.header.l1_offset,
            entries: self.header.l1_size,
            disk_size: self.header.size,
        }
    }

    /// Where the L1 tables of the snapshots at these places of the list are.
    pub(super) fn l1_tables_of(&self, places: &[usize]) -> Result<Vec<L1Table>> {
        let entries = places.iter().filter_map(|i| self.snapshots.entries.get(*i));
        let mut tables = room::collected(entries.map(Snapshot::l1_table))?;
        tables.sort_unstable_by_key(|t| (t.offset, t.entries));
        // Else a damaged image could have one table read 65,536 times.
        match tables.windows(2).find(|w| w[1].offset < w[0].end()) {
            Some(w) => Err(Error::Corrupt(format!(
                "The L1 tables of two snapshots overlap, at {:#x} and {:#x}; 'qcow2-snapshot check' tells more",
                w[0].offset, w[1].offset
            ))),
            None => Ok(tables),
        }
    }

    /// Read the L1 table of a snapshot.
    pub(super) fn checked_l1(&mut self, s: L1Table) -> Result<Vec<u64>> {
        let l1 = self.snapshot_l1(s.offset, s.entries)?;
        self.check_apart_from_active(s)?;
        Ok(l1)
    }

    /// Is the L1 table of a snapshot where one can be?
    pub(super) fn check_l1_table(&mut self, s: L1Table) -> Result<()> {
        self.check_snapshot_l1(s.offset, s.entries)?;
        self.check_apart_from_active(s)
    }

    /// The places in the list of snapshots by their IDs, else their names, in order and each once; and
    /// is the active disk among them (`None`)?
    pub(super) fn find_all(&self, wanted: &[Option<&[u8]>]) -> Result<(Vec<usize>, bool)> {
        let entries = &self.snapshots.entries;
        let text = |i: usize, part: fn(&Snapshot) -> &Vec<u8>| {
            entries.get(i).map_or(&[][..], |s| part(s).as_slice())
        };
        // Sorted, for there may be 65,536 of both.
        let sorted = |part| -> Result<Vec<usize>> {
            let mut order = room::collected(0..entries.len())?;
            order.sort_unstable_by(|a, b| (text(*a, part), a).cmp(&(text(*b, part), b)));
            Ok(order)
        };
        let first = |order: &[usize], part, name: &[u8]| {
            let at = order.partition_point(|i| text(*i, part) < name);
            order.get(at).copied().filter(|i| text(*i, part) == name)
        };
        let (by_id, by_name) = (sorted(|s| &s.id)?, sorted(|s| &s.name)?);
        let mut found = Vec::new();
        for name in wanted.iter().flatten() {
            let at = first(&by_id, |s| &s.id, name).or_else(|| first(&by_name, |s| &s.name, name));
            let at = at.ok_or_else(|| {
                Error::NotFound(format!("Can't find the snapshot '{}'", printable(name)))
            })?;
            room::push(&mut found, at)?;
        }
        found.sort_unstable();
        found.dedup();
        Ok((found, wanted.contains(&None)))
    }

    /// Replay `qcow2_write_snapshots`: a new table is allocated and written, the header is switched
    /// to it, the old one is freed. Returns the new table's size in bytes.
    pub(super) fn replay_table(
        &mut self,
        replay: &mut Replay,
        plan: &mut Plan,
        list: &[Snapshot],
    ) -> Result<u64> {
        let size = self.replay_new_table(replay, plan, list)?;
        let (old_offset, old_size) = (self.header.snapshots_offset, self.snapshots.size);
        let epoch = replay.refs.forgotten_now();
        replay
            .refs
            .free(&mut self.dev, old_offset, old_size, Freed::Punched, epoch)?;
        Ok(size)
    }

    fn replay_new_table(
        &mut self,
        replay: &mut Replay,
        plan: &mut Plan,
        list: &[Snapshot],
    ) -> Result<u64> {
        let compat = self.compat_2_1();
        let mut size = 0u64;
        for s in list {
            size = record::align(size).saturating_add(record::encoded_len(s, compat));
            if size > MAX_SNAPSHOT_TABLE_BYTES {
                return Err(Error::TooBig(
                    "Snapshot table would become too big: it may have 64 MiB; delete snapshots, or use shorter names"
                        .into(),
                ));
            }
        }
        let offset = replay.refs.alloc(&mut self.dev, size)?;
        replay.check_new(offset, size)?;
        let contents = self.encode_table(offset, size, list)?;
        replay.write_new(&mut self.dev, "snapshot table", offset, contents)?;

        plan.decisive = replay.refs.epoch();
        replay.meaning.nb_snapshots = list.len() as u32;
        replay.meaning.snapshots_offset = offset;
        Ok(size)
    }

    /// The table's bytes. QEMU never writes the gaps between entries: they show what was there.
    fn encode_table(&mut self, offset: u64, size: u64, list: &[Snapshot]) -> Result<Vec<u8>> {
        let mut old = device::zeroed(size)?;
        self.dev
            .read("Could not read free clusters", offset, &mut old)?;
        let mut out = Vec::new();
        out.try_reserve_exact(old.len())
            .map_err(|_| Error::NoMemory(size))?;
        for s in list {
            let gap = record::align(out.len() as u64) as usize;
            let stays = old.get(out.len()..gap).unwrap_or_default();
            room::append(&mut out, stays)?;
            record::encode(s, self.compat_2_1(), &mut out);
        }
        Ok(out)
    }

    /// Table entries as they will be read back: what is lost in writing is lost in memory too.
    pub(super) fn as_written(&self, mut list: Vec<Snapshot>) -> Vec<Snapshot> {
        for s in &mut list {
            if self.compat_2_1() {
                (s.extra_data_size, s.icount) = (record::EXTRA_2014, u64::MAX);
                s.unknown_extra_data = Vec::new();
            } else {
                s.extra_data_size = s.extra_data_size.max(record::KNOWN_EXTRA);
            }
        }
        list
    }

    /// Load the table from the image again (`qcow2_read_snapshots`).
    ///
    /// # Errors
    /// `TooBig` for tables beyond QEMU's limits, `Io`.
    pub fn read_snapshots(&mut self) -> Result<()> {
        self.usable()?;
        // Where no lock keeps others out, the table may have moved.
        let place = self
            .dev
            .read_vec("Could not read the header", AT_SNAPSHOTS, 12)?;
        let old = (self.header.nb_snapshots, self.header.snapshots_offset);
        self.header.set_snapshots(&place)?;
        self.load_snapshots()
            .inspect_err(|_| (self.header.nb_snapshots, self.header.snapshots_offset) = old)
    }

    /// Drop the list in memory; the image is not touched. Listing gives nothing until
    /// [`Image::read_snapshots`] or a verb loads the table again.
    pub fn free_snapshots(&mut self) {
        self.snapshots = SnapshotList::default();
    }

    /// Write the table again, to new clusters (`qcow2_write_snapshots`).
    ///
    /// # Errors
    /// As the table part of [`Image::snapshot_delete`].
    pub fn write_snapshots(&mut self) -> Result<()> {
        self.rewrite_table(None)
    }

    /// [`Image::write_snapshots`]; with `from` for a table whose size is not to be believed, since it is
    /// damaged. What of it nothing else uses a recount finds, and anything may lie in it. The new one goes
    /// behind all of it, for it is read to its end until then, and not before the cluster `from`.
    pub(crate) fn rewrite_table(&mut self, from: Option<u64>) -> Result<()> {
        self.begin_change()?;

        let (mut replay, mut plan) = (self.replay()?, Plan::default());
        self.dev.progress.begin(Stage::Check, || 0);
        let list = copies(&self.snapshots.entries)?;
        let size = if let Some(mut from) = from {
            let (g, old) = (replay.g, self.header.snapshots_offset);
            replay.overlap.release(Protected::SnapshotTable, &[old]);
            let end = old.saturating_add(self.snapshots.size.min(MAX_SNAPSHOT_TABLE_BYTES));
            // Of one that begins behind the end of the file nothing can be lost.
            if old < self.dev.length() && end > self.dev.length() {
                from = from.max(g.clusters_for(end));
            }
            replay.refs.least = from;
            self.replay_new_table(&mut replay, &mut plan, &list)?
        } else {
            self.replay_table(&mut replay, &mut plan, &list)?
        };

        let list = self.as_written(list);
        self.commit(replay, plan, list, size)
    }
}
