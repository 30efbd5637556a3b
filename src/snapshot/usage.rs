//! `qcow2_snapshot_usage`.
//!
//! A delete that is not written: the references of the states are taken from the counts in memory,
//! first those of their disks and then those of what stands behind the disks (VM state). A cluster whose
//! count has changed is one that they refer to; if the count is zero, nothing else does.

use super::held::held;
use super::table::L1Table;
use crate::error::{Error, Result};
use crate::format::features;
use crate::format::geometry::{Geometry, HostCluster};
use crate::format::run::Tally;
use crate::image::device::Device;
use crate::image::progress::{table_bytes, Stage};
use crate::image::refcount::Freed;
use crate::image::replay::named::{Naming, Part};
use crate::image::replay::Replay;
use crate::image::Image;
use crate::room;
use std::ops::Range;

/// What a set of states of the disk holds, in bytes of clusters of the image file, each counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// What the set refers to, its L1 and L2 tables included.
    pub referenced: u64,
    /// Of these, what nothing outside of the set refers to: what deleting the set would free.
    pub exclusive: u64,
    /// Of `exclusive`: L1 and L2 tables.
    pub tables: u64,
    /// Of `referenced`: what only VM state occupies.
    pub vm_state: u64,
    /// Of `referenced`: what the host's file system has stored, as far as it tells (no holes).
    pub allocated: u64,
}

/// The L2 tables of a set of states.
#[derive(Default)]
struct Sums {
    disks: Naming,
    behind: Naming,
}

impl Image {
    /// What these states hold together: snapshots by their IDs, else names; `None`, and without any,
    /// the active disk. Not the sum of what each holds. The snapshot table is left out. Nothing is written.
    ///
    /// # Errors
    /// `NotFound` with the name; `Unsupported` for the dirty bit, with which counts may not be right;
    /// those of looking in [`Image::snapshot_delete`] for damaged images.
    pub fn snapshot_usage(&mut self, states: &[Option<&[u8]>]) -> Result<Usage> {
        self.begin_look()?;
        if self.header.has_data_file() {
            return Err(Error::Unsupported(
                "Internal snapshots are not supported on images with an external data file".into(),
            ));
        }
        if self.header.incompatible & features::DIRTY != 0 {
            return Err(Error::Unsupported(
                "The refcounts of an image that was not closed properly (dirty bit set) say nothing; repair it first with 'qcow2-snapshot check -r all'"
                    .into(),
            ));
        }
        if !self.snapshots.loaded {
            self.load_snapshots()?;
        }
        let (found, active) = self.find_all(states)?;
        let mut l1_tables = self.l1_tables_of(&found)?;
        let mut held_by = Sums::default();
        for table in &l1_tables {
            let l1 = self.checked_l1(*table)?;
            held_by.add(self.header.geometry, &l1, table.disk_size)?;
        }
        if active || states.is_empty() {
            held_by.add(self.header.geometry, &self.l1, self.header.size)?;
            room::push(&mut l1_tables, self.active_l1_table())?;
        }

        let mut replay = self.replay()?;
        let (disks, behind) = (held_by.disks.named()?, held_by.behind.named()?);
        let words = [&disks.words[..], &behind.words];
        let bytes = || table_bytes(replay.g, &words);
        self.dev.progress.begin(Stage::Check, bytes);
        let down = Tally::Down(1);
        let walked = replay.walk_tables(&mut self.dev, &disks, down, &[])?;
        let mut tables = walked.freed;
        for table in l1_tables {
            tables += self.take_l1(&mut replay, table)?;
        }
        let of_disks = match behind.words.is_empty() {
            true => None,
            false => Some(held(&mut self.dev, &replay.refs)?.bytes),
        };
        tables += replay.walk_tables(&mut self.dev, &behind, down, &[])?.freed;
        let all = held(&mut self.dev, &replay.refs)?;
        self.dev.progress.end()?;
        Ok(Usage {
            referenced: all.bytes,
            exclusive: all.freed,
            tables: (tables << replay.g.cluster_bits).min(all.freed),
            vm_state: all.bytes.saturating_sub(of_disks.unwrap_or(all.bytes)),
            allocated: all.allocated,
        })
    }

    /// Take a reference from the clusters of an L1 table; for how many was it the last one?
    fn take_l1(&mut self, replay: &mut Replay, table: L1Table) -> Result<u64> {
        let g = replay.g;
        let first = g.cluster_of(table.offset).0;
        let end = first.saturating_add(g.clusters_for(table.bytes()));
        let before = in_use(&mut self.dev, replay, first..end)?;
        let epoch = replay.refs.forgotten_now();
        let (at, bytes) = (table.offset, table.bytes());
        let refs = &mut replay.refs;
        refs.free(&mut self.dev, at, bytes, Freed::Punched, epoch)?;
        Ok(before.saturating_sub(in_use(&mut self.dev, replay, first..end)?))
    }
}

/// How many of these clusters have a count?
fn in_use(dev: &mut Device, replay: &mut Replay, clusters: Range<u64>) -> Result<u64> {
    let mut n = 0;
    for cluster in clusters {
        n += u64::from(replay.refs.get(dev, HostCluster(cluster))? != 0);
    }
    Ok(n)
}

impl Sums {
    /// What an L1 table names for a disk of this size, and what it names behind it.
    fn add(&mut self, g: Geometry, l1: &[u64], disk_size: u64) -> Result<()> {
        let clusters = g.clusters_for(disk_size & !511);
        for (index, word) in l1.iter().enumerate().filter(|(_, w)| **w != 0) {
            let before = (index as u64).saturating_mul(g.l2_entries());
            match clusters.saturating_sub(before).min(g.l2_entries()) {
                0 => self.behind.add(g, *word, index, Part::All)?,
                n if n == g.l2_entries() => self.disks.add(g, *word, index, Part::All)?,
                n => {
                    self.disks.add(g, *word, index, Part::Before(n as u32))?;
                    self.behind.add(g, *word, index, Part::Behind(n as u32))?;
                }
            }
        }
        Ok(())
    }
}
