//! When the disk has forgotten what was in a cluster.
//!
//! New contents may go to a cluster that this verb itself has freed: then the write that makes the
//! disk forget what was there must be published first. What is published together is an *epoch*.

use super::fates::Forgotten;
use super::Refcounts;
use crate::error::{Error, Result};
use crate::format::geometry::HostCluster;
use crate::format::refblock;
use crate::image::device::Device;

/// See the module's text.
#[derive(Default)]
pub(super) struct Dates {
    /// The epoch that new structures belong to.
    epoch: usize,
    /// The last block read for its counts before the verb.
    before: Option<(u64, Vec<u8>)>,
    /// New contents would go to clusters that the image uses until the verb's last publish.
    overwrites: bool,
}

impl Refcounts {
    /// The epoch that new structures belong to.
    pub(crate) fn epoch(&self) -> usize {
        self.dates.epoch
    }

    /// Does any loaded block have a peak?
    pub(crate) fn has_peaks(&self) -> bool {
        self.dates.epoch != 0
    }

    /// That the disk forgets with the publish of this epoch.
    pub(crate) fn forgotten_now(&self) -> Forgotten {
        Forgotten::With(self.dates.epoch)
    }

    /// What follows is written after the current epoch has been published.
    pub(crate) fn next_epoch(&mut self) -> Result<()> {
        self.mark_published()?;
        self.dates.epoch += 1;
        Ok(())
    }

    /// Make sure that the disk has forgotten what was in clusters that are about to get new
    /// contents: if the write that forgets belongs to this epoch, a new epoch begins. Where no epoch
    /// can do that the verb is replayed to its end all the same, for the errors that QEMU would give
    /// on the way, and [`Refcounts::check_overwrites`] refuses it.
    pub(crate) fn forget_before_writing(
        &mut self,
        dev: &mut Device,
        offset: u64,
        bytes: u64,
    ) -> Result<()> {
        if bytes == 0 || self.dates.overwrites {
            return Ok(());
        }
        let first = self.g.cluster_of(offset).0;
        let last = self.g.cluster_of(offset.saturating_add(bytes - 1)).0;
        let mut wait_for = None;
        for c in first..=last {
            if self.count_before(dev, HostCluster(c))? != 0 {
                wait_for = wait_for.max(Some(self.fates.forgotten(c)));
            }
        }
        match wait_for {
            Some(Forgotten::Never) => self.dates.overwrites = true,
            Some(Forgotten::With(epoch)) if epoch >= self.epoch() => self.next_epoch()?,
            _ => {}
        }
        Ok(())
    }

    /// May what the replay leaves behind be written? Asked when nothing is yet.
    pub(crate) fn check_overwrites(&self) -> Result<()> {
        // A block in the place of one that a resize drops would go with that one's table entry.
        let again = self
            .structure
            .dropped
            .iter()
            .any(|d| self.block(d.index).is_some());
        if self.dates.overwrites || again {
            return Err(Error::Unsupported(
                "The verb would have to write to clusters that the image still uses".into(),
            ));
        }
        Ok(())
    }

    /// The count that a cluster had before the verb.
    pub(super) fn count_before(&mut self, dev: &mut Device, cluster: HostCluster) -> Result<u64> {
        let g = self.g;
        let index = g.reftable_index(cluster);
        if self.dates.before.as_ref().is_none_or(|(i, _)| *i != index) {
            let made = self.block(index).is_some_and(|b| b.born.is_some());
            let table = self.structure.tables.first().filter(|_| !made);
            let offset = table.map_or(0, |t| t.entry(index));
            let mut counts = Vec::new();
            if offset != 0 {
                dev.progress.pass(g.cluster_size())?;
                counts =
                    dev.read_vec("Could not read a refcount block", offset, g.cluster_size())?;
            }
            self.dates.before = Some((index, counts));
        }
        let counts = self.dates.before.as_ref().map(|(_, counts)| counts);
        Ok(counts.map_or(0, |c| refblock::get(g, c, g.refblock_index(cluster))))
    }
}
