//! `qcow2_snapshot_delete`.

use super::copies;
use crate::error::{Error, Result};
use crate::format::geometry::TABLE_ENTRY;
use crate::format::run::Tally;
use crate::image::named::{Named, Naming};
use crate::image::plan::{Edit, Plan};
use crate::image::progress::{table_bytes, Stage};
use crate::image::refcount::Freed;
use crate::image::replay::overlap::Protected;
use crate::image::replay::walk::{Marked, Part};
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
        self.delete_those(&[index])
    }

    /// Delete the snapshots at these places of the list, which are in order.
    pub(super) fn delete_those(&mut self, gone: &[usize]) -> Result<()> {
        let entries = self.snapshots.entries.iter().enumerate();
        let stay = entries.filter(|(i, _)| gone.binary_search(i).is_err());
        let list = copies(stay.map(|(_, s)| s))?;
        let l1_tables = self.l1_tables_of(gone)?;
        let named = match *l1_tables.as_slice() {
            [only] => Named::by(self.checked_l1(only)?),
            _ => {
                let mut naming = Naming::default();
                for l1_table in &l1_tables {
                    let l1 = self.checked_l1(*l1_table)?;
                    for (index, word) in l1.iter().enumerate().filter(|(_, w)| **w != 0) {
                        naming.add(self.header.geometry, *word, index, Part::All)?;
                    }
                }
                naming.named()?
            }
        };

        let (mut replay, mut plan) = (self.replay()?, Plan::new());
        let tables = || table_bytes(replay.g, &[named.tables().words, &self.l1]);
        self.dev.progress.begin(Stage::Check, tables);
        let offsets = room::collected(l1_tables.iter().map(|t| t.offset))?;
        replay.overlap.release_all(Protected::InactiveL1, &offsets);
        let table_size = self
            .replay_table(&mut replay, &mut plan, &list)
            .map_err(|e| e.context("Failed to remove snapshot from snapshot list"))?;
        let dropped = replay
            .walk_tables(&mut self.dev, named.tables(), Tally::Down(1))
            .map_err(|e| e.context("Failed to free the cluster and L1 table"))?;
        let epoch = replay.refs.forgotten_now();
        for l1_table in &l1_tables {
            let (at, bytes) = (l1_table.offset, l1_table.bytes());
            replay
                .refs
                .free(&mut self.dev, at, bytes, Freed::Punched, epoch)?;
        }
        let active = replay
            .look(&mut self.dev, &self.l1, named.tables().words)
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
