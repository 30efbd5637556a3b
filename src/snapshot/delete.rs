//! `qcow2_snapshot_delete`.

use super::copies;
use crate::error::{Error, Result};
use crate::format::geometry::TABLE_ENTRY;
use crate::format::run::Tally;
use crate::image::plan::{Edit, Plan};
use crate::image::progress::{table_bytes, Stage};
use crate::image::refcount::Freed;
use crate::image::replay::walk::Marked;
use crate::image::room;
use crate::image::Image;
use std::rc::Rc;

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
    /// # Errors
    /// `NotFound`; `TooBig` or `Invalid` for an L1 table out of bounds, `Corrupt` for damaged tables.
    pub fn snapshot_delete(&mut self, id: Option<&[u8]>, name: Option<&[u8]>) -> Result<()> {
        self.begin_change()?;
        let index = self
            .find(id, name)
            .ok_or_else(|| Error::NotFound("Can't find the snapshot".into()))?;
        let mut list = copies(&self.snapshots.entries)?;
        let gone = list.remove(index);
        let l1 = self.snapshot_l1(gone.l1_table_offset, gone.l1_size)?;
        self.check_apart_from_active(&gone)?;

        let (mut replay, mut plan) = (self.replay()?, Plan::new());
        let tables = || table_bytes(replay.g, &[&l1, &self.l1]);
        self.dev.progress.begin(Stage::Check, tables);
        replay.overlap.release(
            crate::image::replay::overlap::Protected::InactiveL1,
            gone.l1_table_offset,
        );
        let table_size = self
            .replay_table(&mut replay, &mut plan, &list)
            .map_err(|e| e.context("Failed to remove snapshot from snapshot list"))?;
        let dropped = replay
            .walk(&mut self.dev, &l1, Tally::Down)
            .map_err(|e| e.context("Failed to free the cluster and L1 table"))?;
        let (l1_bytes, epoch) = (l1.len() as u64 * TABLE_ENTRY, replay.refs.forgotten_now());
        replay.refs.free(
            &mut self.dev,
            gone.l1_table_offset,
            l1_bytes,
            Freed::Punched,
            epoch,
        )?;
        let active = replay
            .look(&mut self.dev, &self.l1, &l1)
            .map_err(|e| e.context("Failed to update snapshot status in disk"))?;
        if active.l1_changed {
            let end = self
                .header
                .l1_offset
                .saturating_add(self.l1.len() as u64 * TABLE_ENTRY);
            replay.reach = replay.reach.max(end);
            let edit = Edit {
                offset: self.header.l1_offset,
                before: room::copy_of(&self.l1)?,
                after: room::copy_of(&active.l1)?,
            };
            room::push(&mut plan.copied, Rc::new(edit))?;
        }
        replay.l1 = active.l1;
        plan.set = merged(dropped.tables, active.tables)?;

        let list = self.as_written(list);
        self.commit(replay, plan, list, table_size)
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
