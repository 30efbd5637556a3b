//! `qcow2_snapshot_delete`.

use super::copies;
use super::table::L1Table;
use super::Snapshot;
use crate::error::{Error, Result};
use crate::format::entry::OFFSET_MASK;
use crate::format::run::Tally;
use crate::image::plan::Plan;
use crate::image::progress::{table_bytes, Stage};
use crate::image::refcount::Freed;
use crate::image::replay::named::{check_l2_offset, Named, Naming, Part};
use crate::image::replay::overlap::Protected;
use crate::image::replay::walk::Marked;
use crate::image::replay::Replay;
use crate::image::Image;
use crate::room;

/// What a replay has come to.
type Replayed = (Replay, Plan, Vec<Snapshot>, u64);

impl Image {
    /// Delete the snapshot with this ID, this name, or both.
    ///
    /// ```text
    /// prepare  new table
    /// publish  header bytes 60..72
    /// reclaim  counts of all that the snapshot's L1 reaches - 1; its L1 and the old table freed;
    ///          COPIED set where the active disk is now the only user
    /// ```
    ///
    /// Of a snapshot with an L1 or L2 table that cannot be read, or is not in the file, the entry goes and
    /// nothing is freed: what it holds is not known. A check with `Fix::LEAKS` gives the space back.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for counts that contradict their use, `Corrupt` for other damaged tables.
    pub fn snapshot_delete(&mut self, id: Option<&[u8]>, name: Option<&[u8]>) -> Result<()> {
        self.begin_change()?;
        let index = self
            .find(id, name)
            .ok_or_else(|| Error::NotFound("Can't find the snapshot".into()))?;
        self.delete_those(&[index])
    }

    /// Delete the snapshots at these places of the list, which are in order.
    pub(super) fn delete_those(&mut self, gone: &[usize]) -> Result<()> {
        let (replayed, followed) = match self.replay_delete(gone, false) {
            // Is it a table of theirs that cannot be read, now and again?
            Err(e @ (Error::Io { .. } | Error::Os { .. })) => {
                match self.replay_delete(gone, true) {
                    Ok((replayed, n)) if n < gone.len() => (replayed, n),
                    _ => return Err(e),
                }
            }
            replayed => replayed?,
        };
        let (replay, plan, list, table_size) = replayed;
        self.commit(replay, plan, list, table_size)?;
        if followed < gone.len() {
            self.set_remark(
                "Tables of a snapshot cannot be read: it is gone, and nothing of it was freed; 'qcow2-snapshot check -r leaks' gives the space back",
            );
        }
        Ok(())
    }

    /// The L1 table of a snapshot that is to go. None, if it or an L2 table that it names is not where one
    /// can be, or behind the end of the file, or, with `read`, cannot be read: it is not to be followed then.
    fn whole_l1(&mut self, l1_table: L1Table, read: bool) -> Result<Option<Vec<u64>>> {
        let l1 = self.checked_l1(l1_table);
        match l1.and_then(|l1| self.check_l2_tables(&l1, read).map(|()| l1)) {
            Err(e @ Error::Io { .. }) if !read => Err(e),
            whole => unless_damaged(whole),
        }
    }

    fn check_l2_tables(&mut self, l1: &[u64], read: bool) -> Result<()> {
        let g = self.header.geometry;
        let mut table = room::filled(if read { g.cluster_len() } else { 0 }, 0)?;
        for (index, word) in l1.iter().enumerate().filter(|(_, word)| **word != 0) {
            let offset = word & OFFSET_MASK;
            check_l2_offset(g, offset, index)?;
            // The file may end in its last table, where that ends in zeros.
            self.dev
                .check_inside(format_args!("An L2 table"), offset, 1)?;
            self.dev
                .read("Could not read an L2 table", offset, &mut table)?;
        }
        Ok(())
    }

    /// Replay it. Of how many of them has what they hold been followed? Of the others only the entry goes.
    fn replay_delete(&mut self, gone: &[usize], read: bool) -> Result<(Replayed, usize)> {
        let entries = self.snapshots.entries.iter().enumerate();
        let stay = entries.filter(|(i, _)| gone.binary_search(i).is_err());
        let list = copies(stay.map(|(_, s)| s))?;
        let mut placed = Vec::new();
        for place in gone {
            let entry = self.snapshots.entries.get(*place).map(Snapshot::l1_table);
            let checked = entry.map_or(Ok(()), |l1_table| self.check_l1_table(l1_table));
            if unless_damaged(checked)?.is_some() {
                room::push(&mut placed, *place)?;
            }
        }
        let (mut l1_tables, mut naming, mut alone) = (Vec::new(), Naming::default(), None);
        for l1_table in self.l1_tables_of(&placed)? {
            let Some(l1) = self.whole_l1(l1_table, read)? else {
                continue;
            };
            room::push(&mut l1_tables, l1_table)?;
            if placed.len() == 1 {
                alone = Some(Named::of(l1));
                break;
            }
            for (index, word) in l1.iter().enumerate().filter(|(_, w)| **w != 0) {
                naming.add(self.header.geometry, *word, index, Part::All)?;
            }
        }
        let named = alone.map_or_else(|| naming.named(), Ok)?;

        let (mut replay, mut plan) = (self.replay_without(gone)?, Plan::default());
        let tables = || table_bytes(replay.g, &[&named.words, &self.l1]);
        self.dev.progress.begin(Stage::Check, tables);
        let entries = gone.iter().filter_map(|i| self.snapshots.entries.get(*i));
        let mut offsets = room::collected(entries.map(|s| s.l1_table_offset))?;
        offsets.sort_unstable();
        replay.overlap.release(Protected::InactiveL1, &offsets);
        let table_size = self
            .replay_table(&mut replay, &mut plan, &list)
            .map_err(|e| e.context("Failed to remove snapshot from snapshot list"))?;
        let dropped = replay
            .walk_tables(&mut self.dev, &named, Tally::Down(1), &[])
            .map_err(|e| e.context("Failed to free the cluster and L1 table"))?;
        let epoch = replay.refs.forgotten_now();
        for l1_table in &l1_tables {
            let (at, bytes) = (l1_table.offset, l1_table.bytes());
            replay
                .refs
                .free(&mut self.dev, at, bytes, Freed::Punched, epoch)?;
        }
        let active = replay
            .walk_tables(
                &mut self.dev,
                &Named::of(&self.l1),
                Tally::Look,
                &named.words,
            )
            .map_err(|e| e.context("Failed to update snapshot status in disk"))?;
        plan.flag(&mut replay, self.header.l1_offset, &self.l1, &active)?;
        replay.l1 = active.l1;
        plan.set = merged(dropped.tables, active.tables)?;

        let followed = l1_tables.len();
        Ok(((replay, plan, self.as_written(list), table_size), followed))
    }
}

/// None for what the image's damage is the reason of.
fn unless_damaged<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(Error::Corrupt(_) | Error::Invalid(_) | Error::TooBig(_) | Error::Io { .. }) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Tables of both walks, each once, with what is known of it.
pub(super) fn merged(mut a: Vec<Marked>, b: Vec<Marked>) -> Result<Vec<Marked>> {
    room::append(&mut a, &b)?;
    // By offset, and of the same table first the one that says most.
    a.sort_unstable();
    a.dedup_by_key(|t| t.offset);
    Ok(a)
}
