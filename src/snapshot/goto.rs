//! `qcow2_snapshot_goto`.

use super::delete::merged;
use super::{copies, Snapshot};
use crate::error::{Error, Result};
use crate::format::entry::COPIED;
use crate::format::geometry::{HostCluster, TABLE_ENTRY};
use crate::format::record::EXTRA_2014;
use crate::format::run::Step;
use crate::image::device::{bytes_of, Device};
use crate::image::overlap::Kind;
use crate::image::progress::{table_bytes, Stage};
use crate::image::refcount::Refcounts;
use crate::image::replay::Replay;
use crate::image::resize::shared_but_copied;
use crate::image::room;
use crate::image::update::{no_room, L1Change, Plan};
use crate::image::walk::{Counts, Walked};
use crate::image::Image;

/// Where a temporary L1 table may go. Disks are full at times.
#[derive(Clone, Copy, PartialEq)]
enum Room {
    Anywhere,
    InFile,
    Nowhere,
}

impl Image {
    /// Make the active disk what the snapshot with this ID, else with this name, holds.
    ///
    /// ```text
    /// prepare  counts of all that the snapshot's L1 reaches + 1; COPIED cleared there
    /// publish  the active L1 (one sector in place, or by way of a temporary L1), and the disk size
    /// reclaim  counts of all that the old L1 reached - 1; COPIED as the counts say
    /// ```
    /// QEMU writes the active L1 with the snapshot's stale COPIED flags and mends them later; here
    /// it is written without them, and no moment lets a guest write into the snapshot.
    ///
    /// # Errors
    /// `NotFound`; `Busy` with valid dirty bitmaps; `Unsupported` for another disk size in a version 2
    /// image or with `COMPAT_2_1`; `TooBig`, `Invalid`, `Corrupt` for damaged tables.
    pub fn snapshot_goto(&mut self, id_or_name: &[u8]) -> Result<()> {
        self.begin_change()?;
        if self.active_bitmaps() {
            return Err(Error::Busy("Device has active dirty bitmaps".into()));
        }
        let index = self
            .find(Some(id_or_name), None)
            .or_else(|| self.find(None, Some(id_or_name)));
        let Some(snapshot) = index.and_then(|i| self.snapshots.entries.get(i)).cloned() else {
            return Err(Error::NotFound("Can't find the snapshot".into()));
        };
        let stored_l1 = self.snapshot_l1(snapshot.l1_table_offset, snapshot.l1_size)?;
        self.check_apart_from_active(&snapshot)?;

        for room in [Room::Anywhere, Room::InFile] {
            match self.replace_disk(&snapshot, &stored_l1, room) {
                Err(e) if no_room(&e) => self.dev.progress.again(),
                result => return result,
            }
        }
        self.replace_disk(&snapshot, &stored_l1, Room::Nowhere)
    }

    /// The verb, when all is known that it needs.
    fn replace_disk(&mut self, snapshot: &Snapshot, stored_l1: &[u64], room: Room) -> Result<()> {
        let (mut replay, mut plan) = (self.replay()?, Plan::new());
        let tables = || {
            let entries = |size| replay.g.l1_entries_for(size);
            let cut = entries(self.header.size).saturating_sub(entries(snapshot.disk_size));
            table_bytes(replay.g, &[stored_l1, &self.l1, stored_l1])
                .saturating_add(cut << replay.g.cluster_bits)
        };
        self.dev.progress.begin(Stage::Check, tables);
        self.replay_resize(&mut replay, snapshot)?;
        replay.grow_l1(&mut self.dev, stored_l1.len() as u64)?;
        let up = replay.walk(&mut self.dev, stored_l1, Step::Up)?;
        if up.l1_changed {
            let end = snapshot
                .l1_table_offset
                .saturating_add(stored_l1.len() as u64 * TABLE_ENTRY);
            replay.reach = replay.reach.max(end);
            let (before, after) = (room::copy_of(stored_l1)?, room::copy_of(&up.l1)?);
            room::push(&mut plan.copied, (snapshot.l1_table_offset, before, after))?;
        }
        let mut new_l1 = up.l1;
        room::resize(&mut new_l1, replay.l1.len(), 0)?;
        let change = self.choose_publish(&mut replay, &new_l1, room)?;
        let old_l1 = std::mem::take(&mut replay.l1);
        let mut down = replay.walk(&mut self.dev, &old_l1, Step::Down)?;
        // A table may have 32 MiB.
        drop((old_l1, std::mem::take(&mut down.l1)));
        self.check_after_resize(&mut replay)?;
        // A count of one after counting up was none before: only where counts lie, and now it is
        // none again.
        let last = if down.ones || up.ones {
            replay.walk(&mut self.dev, &new_l1, Step::Look)?
        } else {
            Walked {
                l1: new_l1,
                ..Walked::default()
            }
        };
        replay.l1 = last.l1;
        (plan.clear, plan.set) = (up.tables, merged(down.tables, last.tables)?);
        if !up.ones && !down.ones {
            plan.counts = Counts::NoneIsOne;
        }
        plan.decisive = replay.refs.epoch;
        self.place_l1(&mut replay, &mut plan, change)?;

        let (list, table_size) = (self.sized_again(snapshot.disk_size)?, self.snapshots.size);
        let torn = matches!(plan.l1.0, L1Change::InPlace);
        self.commit(replay, &plan, list, table_size)?;
        if torn {
            self.set_remark(
                "The active L1 table was written in place, as QEMU does: no free clusters were there to do it atomically",
            );
        }
        Ok(())
    }

    /// The list as it is read back at the new disk size: entries that store none follow the disk.
    fn sized_again(&self, size: u64) -> Result<Vec<Snapshot>> {
        let mut list = copies(&self.snapshots.entries)?;
        for s in list.iter_mut().filter(|s| s.extra_data_size < EXTRA_2014) {
            s.disk_size = size;
        }
        Ok(list)
    }

    /// Bring the disk to the snapshot's size, in memory.
    fn replay_resize(&mut self, replay: &mut Replay, snapshot: &Snapshot) -> Result<()> {
        let (old, new) = (self.header.disk_size(), snapshot.disk_size);
        if old == new {
            return Ok(());
        }
        if self.compat_2_1() {
            return Err(Error::Unsupported(
                "The snapshot has another disk size, which is not supported".into(),
            ));
        }
        if new % 512 != 0 {
            return Err(Error::Invalid(
                "The new size must be a multiple of 512".into(),
            ));
        }
        if self.header.version < 3 {
            return Err(Error::Unsupported(
                "Can't resize a v2 image which has snapshots".into(),
            ));
        }
        if self.extensions.has_bitmaps && self.active_bitmaps() {
            return Err(Error::Unsupported(
                "Can't resize an image with bitmaps".into(),
            ));
        }
        if new < old {
            replay.shrink(&mut self.dev, old, new)?;
        } else {
            let entries = replay.g.l1_entries_for(new);
            // The one case in which a verb needs the backing file, for its length.
            let backing = self
                .backing_length()
                .map_err(|e| e.context("Could not learn the length of the backing file"))?;
            replay.grow_l1(&mut self.dev, entries)?;
            if backing > old {
                replay.cover_backing(&mut self.dev, old, new)?;
            }
        }
        replay.switch(|h| h.size = new);
        Ok(())
    }

    /// How the new L1 table can be published. Called when all allocations have been replayed and
    /// before counts go down: a table written in place needs both disks counted.
    fn choose_publish(
        &mut self,
        replay: &mut Replay,
        new_l1: &[u64],
        room: Room,
    ) -> Result<L1Change> {
        let bytes = new_l1.len() as u64 * TABLE_ENTRY;
        let offset = replay.header.l1_offset;
        replay.overlap.check(offset, bytes, Some(Kind::ActiveL1))?;
        replay.reach = replay.reach.max(offset.saturating_add(bytes));
        if replay.grown_l1().is_some() {
            return Ok(L1Change::Moved);
        }
        // Where the L1 grew in an epoch before the last it is on the disk with the old contents.
        // Entries beyond the old end are zero on disk or were never looked at: QEMU writes them too.
        let old = self.l1.iter().copied().chain(std::iter::repeat(0));
        let differs = |(new, old): (&u64, u64)| new & !COPIED != old & !COPIED;
        let mut changed = new_l1
            .iter()
            .zip(old)
            .enumerate()
            .filter(|(_, pair)| differs(*pair))
            .map(|(i, _)| i as u64);
        let resized = replay.header.size != self.header.size;
        match (changed.next(), changed.last()) {
            (None, _) => return Ok(L1Change::OneSector),
            (Some(_), None) if !resized => return Ok(L1Change::OneSector),
            (Some(first), Some(last)) if !resized && same_sector(offset, first, last) => {
                return Ok(L1Change::OneSector)
            }
            _ => {}
        }
        let clusters = replay.g.clusters_for(bytes);
        let end = replay
            .g
            .clusters_for(self.dev.length().max(replay.length()));
        let mut place = None;
        if room == Room::Anywhere {
            place = replay.refs.find_untouched(&mut self.dev, end, clusters)?;
        }
        if place.is_none() && room != Room::Nowhere {
            place = replay.refs.find_untouched(&mut self.dev, 1, clusters)?;
        }
        let length = self.dev.length();
        let ends = |c| replay.g.offset_of(HostCluster(c)).saturating_add(bytes);
        let place = place.filter(|c| room == Room::Anywhere || ends(*c) <= length);
        match place {
            Some(c) => Ok(L1Change::Through(replay.g.offset_of(HostCluster(c)))),
            None => {
                replay.refs.mark_published()?;
                Ok(L1Change::InPlace)
            }
        }
    }

    /// Tables that the resize made are free again, with a hole where they were; none of the tables
    /// that it emptied may have survived in a snapshot.
    fn check_after_resize(&mut self, replay: &mut Replay) -> Result<()> {
        let temporary = std::mem::take(&mut replay.temporary);
        for cluster in temporary.sorted()?.into_iter().map(HostCluster) {
            self.dev.progress.pass(TABLE_ENTRY)?;
            if replay.refs.get(&mut self.dev, cluster)? == 0 {
                replay.refs.punched.insert(cluster.0)?;
            } else if replay.zero_tables.contains(cluster.0) {
                return Err(shared_but_copied(replay.g.offset_of(cluster)));
            }
        }
        for offset in replay.tables.sorted()? {
            let cluster = replay.g.cluster_of(offset);
            if replay.refs.get(&mut self.dev, cluster)? != 0 {
                return Err(shared_but_copied(offset));
            }
        }
        Ok(())
    }

    /// Say where the new contents of the active L1 go.
    fn place_l1(&mut self, replay: &mut Replay, plan: &mut Plan, change: L1Change) -> Result<()> {
        let before = match &change {
            L1Change::Moved => Vec::new(),
            _ => room::copy_of(&self.l1)?,
        };
        match &change {
            L1Change::Through(offset) => {
                let bytes = replay.l1.len() as u64 * TABLE_ENTRY;
                count_temporary(
                    &mut replay.refs,
                    &mut self.dev,
                    replay.g.cluster_of(*offset),
                    replay.g.clusters_for(bytes),
                )?;
            }
            L1Change::Moved => {
                // The table that the growth allocated takes the snapshot's contents at once.
                let bare = room::collected(replay.l1.iter().map(|e| e & !COPIED))?;
                let bare = bytes_of(&bare)?;
                let Some(grown) = replay.grown_l1() else {
                    return Err(Error::Unsupported(
                        "The L1 table would have to be published before its contents are known"
                            .into(),
                    ));
                };
                grown.data.splice(..bare.len().min(grown.data.len()), bare);
            }
            _ => {}
        }
        if let Some((offset, after)) = replay.left_l1.take() {
            // Not where something else has taken its clusters.
            let bytes = after.len() as u64 * TABLE_ENTRY;
            let (first, n) = (replay.g.cluster_of(offset).0, replay.g.clusters_for(bytes));
            if !replay.refs.any_taken(first, n) {
                plan.left = Some((offset, room::copy_of(&self.l1)?, after));
            }
        }
        plan.l1 = (change, before, room::copy_of(&replay.l1)?);
        Ok(())
    }
}

/// Do two entries of a table lie in the same 512-byte sector?
fn same_sector(offset: u64, first: u64, last: u64) -> bool {
    let sector = |i: u64| offset.saturating_add(i * TABLE_ENTRY) / 512;
    sector(first) == sector(last)
}

fn count_temporary(
    refs: &mut Refcounts,
    dev: &mut Device,
    first: HostCluster,
    n: u64,
) -> Result<()> {
    let mut clusters = first.0..first.0.saturating_add(n);
    clusters.try_for_each(|c| refs.count_temporarily(dev, HostCluster(c)))
}
