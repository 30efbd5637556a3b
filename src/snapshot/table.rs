//! The snapshot table as a whole: reading, finding, writing a new one.

use super::{copies, Snapshot};
use crate::error::{Error, Result};
use crate::format::geometry::{MAX_SNAPSHOT_TABLE_BYTES, TABLE_ENTRY};
use crate::format::header::AT_SNAPSHOTS;
use crate::format::record;
use crate::image::plan::Plan;
use crate::image::progress::Stage;
use crate::image::refcount::Freed;
use crate::image::replay::Replay;
use crate::image::{device, room, Image, SnapshotList};

/// The table is read in requests of this size.
const READ_AHEAD: u64 = 1 << 20;
/// No entry is longer: fixed part, 1024 bytes of extra data, ID and name of 65535 bytes each.
const LONGEST_ENTRY: u64 = 256 << 10;

impl Image {
    /// Load the snapshot table from the image (`qcow2_read_snapshots`).
    pub(crate) fn load_snapshots(&mut self) -> Result<()> {
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
                window = self
                    .dev
                    .read_vec("Could not read the snapshot table", at, want)?;
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
    /// off would then look like a table of zeros.
    pub(crate) fn check_snapshots_inside(&mut self) -> Result<()> {
        for s in &self.snapshots.entries {
            self.dev.check_inside(
                format_args!(
                    "The L1 table of snapshot '{}'",
                    String::from_utf8_lossy(&s.id)
                ),
                s.l1_table_offset,
                u64::from(s.l1_size).saturating_mul(TABLE_ENTRY),
            )?;
        }
        Ok(())
    }

    /// Does the L1 table of a snapshot lie in the active L1 table? Only in a damaged image.
    pub(super) fn check_apart_from_active(&self, s: &Snapshot) -> Result<()> {
        let bytes = |entries: u32| u64::from(entries).saturating_mul(8);
        let (a, b) = (self.header.l1_offset, s.l1_table_offset);
        let (a_end, b_end) = (
            a.saturating_add(bytes(self.header.l1_size)),
            b.saturating_add(bytes(s.l1_size)),
        );
        if a < b_end && b < a_end {
            return Err(Error::Corrupt(
                "The snapshot's L1 table overlaps the active L1 table".into(),
            ));
        }
        Ok(())
    }

    /// Replay `qcow2_write_snapshots`: a new table is allocated and written, the header is switched
    /// to it, the old one is freed. Returns the new table's size in bytes.
    pub(super) fn replay_table(
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
                return Err(Error::TooBig("Snapshot table would become too big".into()));
            }
        }
        let offset = replay.refs.alloc(&mut self.dev, size)?;
        replay.check_new(offset, size)?;
        let contents = self.encode_table(replay, offset, size, list)?;
        replay.write_new(&mut self.dev, "snapshot table", offset, contents)?;

        plan.decisive = replay.refs.epoch();
        let (old_offset, old_size) = (self.header.snapshots_offset, self.snapshots.size);
        replay.meaning.nb_snapshots = list.len() as u32;
        replay.meaning.snapshots_offset = offset;
        let epoch = replay.refs.forgotten_now();
        replay
            .refs
            .free(&mut self.dev, old_offset, old_size, Freed::Punched, epoch)?;
        Ok(size)
    }

    /// The table's bytes. QEMU never writes the gaps between entries: they show what was there.
    fn encode_table(
        &mut self,
        replay: &Replay,
        offset: u64,
        size: u64,
        list: &[Snapshot],
    ) -> Result<Vec<u8>> {
        let g = self.header.geometry;
        let mut old = device::zeroed(size)?;
        self.dev
            .read("Could not read free clusters", offset, &mut old)?;
        for (i, cluster) in old.chunks_mut(g.cluster_len()).enumerate() {
            if replay.is_punched(offset.saturating_add((i as u64) << g.cluster_bits)) {
                cluster.fill(0);
            }
        }
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
        self.begin_change()?;

        let (mut replay, mut plan) = (self.replay()?, Plan::new());
        self.dev.progress.begin(Stage::Check, || 0);
        let list = copies(&self.snapshots.entries)?;
        let size = self.replay_table(&mut replay, &mut plan, &list)?;

        let list = self.as_written(list);
        self.commit(replay, plan, list, size)
    }
}
