//! `qcow2_snapshot_goto`.
//!
//! ```text
//! Sized --count_up--> BothCounted --choose_publish--> Chosen --count_down--> Plan
//! ```
//! Each stage can only be made of the one before it: how the new L1 table can be published is found
//! out while both disks are counted, and nothing is counted down before.

use super::delete::merged;
use super::{copies, Snapshot};
use crate::error::{Error, Result};
use crate::format::entry::COPIED;
use crate::format::geometry::{HostCluster, TABLE_ENTRY};
use crate::format::header::Header;
use crate::format::record::EXTRA_2014;
use crate::format::run::Tally;
use crate::image::device::{bytes_of, Device};
use crate::image::plan::{no_room, Edit, How, Plan, Temporary};
use crate::image::progress::{table_bytes, Stage};
use crate::image::replay::overlap::Protected;
use crate::image::replay::resize::shared_but_copied;
use crate::image::replay::walk::{Flags, Marked, Walked};
use crate::image::replay::Replay;
use crate::image::Image;
use crate::room;
use std::rc::Rc;

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
        let stored_l1 = self.checked_l1(snapshot.l1_table())?;

        // Behind the end of a device that does not grow there is no room.
        let within = usize::from(self.dev.fixed_length());
        for room in [Room::Anywhere, Room::InFile].into_iter().skip(within) {
            match self.replace_disk(&snapshot, &stored_l1, room) {
                Err(e) if no_room(&e) => self.dev.progress.again(),
                result => return result,
            }
        }
        self.replace_disk(&snapshot, &stored_l1, Room::Nowhere)
    }

    /// The verb, when all is known that it needs.
    fn replace_disk(&mut self, snapshot: &Snapshot, stored_l1: &[u64], room: Room) -> Result<()> {
        let mut replay = self.replay()?;
        let tables = || {
            let entries = |size| replay.g.l1_entries_for(size);
            let cut = entries(self.header.size).saturating_sub(entries(snapshot.disk_size));
            table_bytes(replay.g, &[stored_l1, &self.l1, stored_l1])
                .saturating_add(cut << replay.g.cluster_bits)
        };
        self.dev.progress.begin(Stage::Check, tables);
        let end = self.needed_end()?;
        self.replay_resize(&mut replay, snapshot)?;
        replay.grow_l1(&mut self.dev, stored_l1.len() as u64)?;
        let sized = Sized {
            replay: &mut replay,
            dev: &mut self.dev,
            was: Was {
                header: &self.header,
                l1: &self.l1,
                end,
            },
        };
        let plan = sized
            .count_up(snapshot.l1_table_offset, stored_l1)?
            .choose_publish(room)?
            .count_down()?;

        let (list, table_size) = (self.sized_again(snapshot.disk_size)?, self.snapshots.size);
        let torn = matches!(plan.l1, Some((_, How::InPlace)));
        self.commit(replay, plan, list, table_size)?;
        if torn {
            self.set_remark(
                "The active L1 table was written in place, as QEMU does: no free clusters were there to do it atomically",
            );
        }
        Ok(())
    }

    /// Where the file ends. A length that was told in whole sectors may be longer than the file: then the
    /// table that stands in the last sector, with zeros behind it, ends where the file does. A file may well
    /// be whole clusters long, and what no table says nobody can know: then it is as long as was told.
    fn needed_end(&mut self) -> Result<u64> {
        let told = self.dev.length();
        let whole = self.header.geometry.in_cluster(told) == 0;
        if !self.dev.length_in_sectors() || told % SECTOR != 0 || whole {
            return Ok(told);
        }
        let l1_tables = self.snapshots.entries.iter().map(Snapshot::l1_table);
        let l1_ends = l1_tables
            .chain([self.active_l1_table()])
            .map(|t| t.offset.saturating_add(t.bytes()));
        let list_end = self
            .header
            .snapshots_offset
            .saturating_add(self.snapshots.size);
        let in_last = |end: &u64| *end < told && told - *end < SECTOR;
        let Some(end) = l1_ends.chain([list_end]).filter(in_last).max() else {
            return Ok(told);
        };
        let behind = self
            .dev
            .read_vec("Could not read the end of the file", end, told - end)?;
        Ok(match behind.iter().all(|b| *b == 0) {
            true => end,
            false => told,
        })
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
        replay.meaning.size = new;
        Ok(())
    }
}

const SECTOR: u64 = 512;

/// The image before the verb.
#[derive(Clone, Copy)]
struct Was<'a> {
    header: &'a Header,
    l1: &'a [u64],
    /// Where the file ends.
    end: u64,
}

/// The old disk has the snapshot's size, and room for its L1 table.
struct Sized<'a> {
    replay: &'a mut Replay,
    dev: &'a mut Device,
    was: Was<'a>,
}

/// What the snapshot reaches is counted for both of them.
struct BothCounted<'a> {
    at: Sized<'a>,
    up: Walked,
    plan: Plan,
}

/// It is known how the new contents of the active L1 table are published.
struct Chosen<'a> {
    both: BothCounted<'a>,
    how: How,
}

impl<'a> Sized<'a> {
    fn count_up(self, offset: u64, stored_l1: &[u64]) -> Result<BothCounted<'a>> {
        let up = self.replay.walk(self.dev, stored_l1, Tally::Up)?;
        let mut plan = Plan::default();
        plan.flag(self.replay, offset, stored_l1, &up)?;
        Ok(BothCounted { at: self, up, plan })
    }
}

impl<'a> BothCounted<'a> {
    /// All allocations have been replayed. A table written in place needs both disks counted.
    fn choose_publish(mut self, room: Room) -> Result<Chosen<'a>> {
        let Sized { replay, dev, was } = &mut self.at;
        room::resize(&mut self.up.l1, replay.l1.len(), 0)?;
        let new_l1 = &self.up.l1;
        let bytes = new_l1.len() as u64 * TABLE_ENTRY;
        let offset = replay.l1_place().offset;
        replay
            .overlap
            .check(offset, bytes, Some(Protected::ActiveL1))?;
        replay.refs.reach_to(offset.saturating_add(bytes));
        let how = if replay.unpublished_l1().is_some() {
            How::Moved
        } else if within_a_sector(replay, *was, offset, new_l1) {
            How::OneSector
        } else {
            let clusters = replay.g.clusters_for(bytes);
            let end = replay.g.clusters_for(dev.length().max(replay.refs.reach));
            let mut place = None;
            if room == Room::Anywhere {
                place = replay.refs.find_untouched(dev, end, clusters)?;
            }
            if place.is_none() && room != Room::Nowhere {
                place = replay.refs.find_untouched(dev, 1, clusters)?;
            }
            let place = place.map(|c| replay.g.offset_of(HostCluster(c)));
            let in_file = |at: &u64| at.saturating_add(bytes) <= dev.length();
            match place.filter(|at| room == Room::Anywhere || in_file(at)) {
                Some(at) => How::Through(Rc::new(Temporary::new(dev, at, bytes, was.end)?)),
                None => {
                    replay.refs.mark_published()?;
                    How::InPlace
                }
            }
        };
        Ok(Chosen { both: self, how })
    }
}

/// Can one sector of the L1 table, which stands where it is on the disk, make the old disk the new one?
fn within_a_sector(replay: &Replay, was: Was, offset: u64, new_l1: &[u64]) -> bool {
    // Entries beyond the old end are zero on disk or were never looked at: QEMU writes them too.
    let old = was.l1.iter().copied().chain(std::iter::repeat(0));
    let pairs = (0u64..).zip(new_l1.iter().zip(old));
    let mut changed = pairs
        .filter(|(_, (new, old))| (**new ^ old) & !COPIED != 0)
        .map(|(i, _)| i);
    let resized = replay.meaning.size != was.header.size;
    match (changed.next(), changed.last()) {
        (None, _) => true,
        (Some(_), None) => !resized,
        (Some(first), Some(last)) => !resized && same_sector(offset, first, last),
    }
}

impl Chosen<'_> {
    /// Count what the old disk has reached down, and look which flags that changes.
    fn count_down(self) -> Result<Plan> {
        let Chosen { both, how } = self;
        let BothCounted {
            at: Sized { replay, dev, was },
            up,
            mut plan,
        } = both;
        let old_l1 = std::mem::take(&mut replay.l1);
        let mut down = replay.walk(dev, &old_l1, Tally::Down(1))?;
        // A table may have 32 MiB.
        drop((old_l1, std::mem::take(&mut down.l1)));
        check_after_resize(replay, dev)?;
        // A count of one after counting up was none before: only where counts lie, and now it is
        // none again.
        let ones = down.ones || up.ones;
        let last = if ones {
            replay.walk(dev, &up.l1, Tally::Look)?
        } else {
            Walked {
                l1: up.l1,
                ..Walked::default()
            }
        };
        replay.l1 = last.l1;

        plan.decisive = replay.refs.epoch();
        (plan.clear, plan.set) = (up.tables, merged(down.tables, last.tables)?);
        if !ones {
            let marked = plan.clear.iter_mut().chain(&mut plan.set);
            marked.for_each(|t: &mut Marked| t.flags = Flags::NoneIsOne);
        }
        plan.l1 = Some((place_l1(replay, dev, was, &how)?, how));
        if let Some((offset, after)) = replay.left_l1.take() {
            // Not where something else has taken its clusters.
            let bytes = after.len() as u64 * TABLE_ENTRY;
            let (first, n) = (replay.g.cluster_of(offset).0, replay.g.clusters_for(bytes));
            if !replay.refs.fates.any_taken(first, n) {
                plan.left = Some(Edit::new(offset, was.l1, &after)?);
            }
        }
        Ok(plan)
    }
}

/// Tables that the resize made are free again, with a hole where they were; none of the tables
/// that it emptied may have survived in a snapshot.
fn check_after_resize(replay: &mut Replay, dev: &mut Device) -> Result<()> {
    let temporary = std::mem::take(&mut replay.remade.temporary);
    for cluster in temporary.sorted()?.into_iter().map(HostCluster) {
        dev.progress.pass(TABLE_ENTRY)?;
        if replay.refs.get(dev, cluster)? == 0 {
            replay.refs.fates.punch(cluster.0)?;
        } else if replay
            .remade
            .is_zeros(replay.g, replay.g.offset_of(cluster))
        {
            return Err(shared_but_copied(replay.g.offset_of(cluster)));
        }
    }
    for offset in replay.remade.contents.sorted()? {
        let cluster = replay.g.cluster_of(offset);
        if replay.refs.get(dev, cluster)? != 0 {
            return Err(shared_but_copied(offset));
        }
    }
    Ok(())
}

/// Say where the new contents of the active L1 go.
fn place_l1(replay: &mut Replay, dev: &mut Device, was: Was, how: &How) -> Result<Rc<Edit>> {
    let mut before = was.l1;
    match how {
        How::Through(temporary) => {
            let (g, bytes) = (replay.g, replay.l1.len() as u64 * TABLE_ENTRY);
            let first = g.cluster_of(temporary.offset).0;
            for c in first..first.saturating_add(g.clusters_for(bytes)) {
                replay.refs.count_temporarily(HostCluster(c))?;
            }
            let longer = temporary.offset.saturating_add(bytes) > dev.length();
            // What is cut off then is the temporary table, and what was not there before it.
            if longer && replay.final_length() == dev.length() {
                replay.refs.reach = was.end;
            }
        }
        How::Moved => {
            // The table that the growth allocated takes the snapshot's contents at once.
            before = &[];
            let bare = room::collected(replay.l1.iter().map(|e| e & !COPIED))?;
            let bare = bytes_of(&bare)?;
            if let Some(grown) = replay.unpublished_l1() {
                grown.data.splice(..bare.len().min(grown.data.len()), bare);
            }
        }
        How::OneSector | How::InPlace | How::EachEntry => {}
    }
    Edit::new(replay.l1_place().offset, before, &replay.l1)
}

/// Do two entries of a table lie in the same 512-byte sector?
fn same_sector(offset: u64, first: u64, last: u64) -> bool {
    let sector = |i: u64| offset.saturating_add(i * TABLE_ENTRY) / 512;
    sector(first) == sector(last)
}
