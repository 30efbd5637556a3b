//! What became of the clusters that a verb's explicit allocations and frees have touched, and when the
//! disk has forgotten what was in them.
//!
//! New contents may go to a cluster that this verb itself has freed: then the write that makes the
//! disk forget what was there must be published first. What is published together is an *epoch*.

use super::Refcounts;
use crate::error::{Error, Result};
use crate::format::geometry::HostCluster;
use crate::format::refblock;
use crate::image::device::Device;
use crate::image::tables::read_refblock;
use crate::room::{Clusters, Known};

/// How a freed cluster's bytes end up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freed {
    /// A hole is punched (QEMU's discard types ALWAYS and SNAPSHOT).
    Punched,
    /// The bytes stay (QEMU's discard types OTHER and NEVER).
    Kept,
}

/// Which publish makes the disk forget what was in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Forgotten {
    /// That of this epoch.
    With(usize),
    /// None: the image uses it until the verb's last publish, so this verb may not write to it.
    Never,
}

/// See the module's text.
#[derive(Default)]
pub(crate) struct Fates {
    /// An allocation of this verb has them.
    taken: Clusters,
    /// When they were last freed their bytes stayed, or a hole was punched.
    kept: Clusters,
    punched: Clusters,
    /// Those that held something before the verb, and were freed.
    forgotten: Known<Forgotten>,
    /// The epoch that new structures belong to.
    epoch: usize,
    /// The last block read for its counts before the verb.
    before: Option<(u64, Vec<u8>)>,
    /// New contents would go to clusters that the image uses until the verb's last publish.
    overwrites: bool,
}

impl Fates {
    /// An allocation takes the cluster.
    pub(super) fn take(&mut self, cluster: u64) -> Result<()> {
        self.taken.insert(cluster)
    }

    /// The allocation is undone.
    pub(super) fn give_back(&mut self, cluster: u64) {
        self.taken.remove(cluster);
    }

    /// The last reference to the cluster is gone.
    pub(super) fn free(&mut self, cluster: u64, bytes: Freed, forgotten: Forgotten) -> Result<()> {
        if !self.taken.remove(cluster) {
            self.forgotten.insert(cluster, forgotten)?;
        }
        match bytes {
            Freed::Punched => self.punch(cluster),
            Freed::Kept => {
                self.punched.remove(cluster);
                self.kept.insert(cluster)
            }
        }
    }

    /// A hole is punched in a cluster that is free.
    pub(crate) fn punch(&mut self, cluster: u64) -> Result<()> {
        self.kept.remove(cluster);
        self.punched.insert(cluster)
    }

    /// The cluster gets new contents: there is no hole in the end.
    pub(crate) fn rewrite(&mut self, cluster: u64) {
        self.punched.remove(cluster);
    }

    /// Has an allocation of this verb taken the cluster?
    pub(crate) fn is_taken(&self, cluster: u64) -> bool {
        self.taken.contains(cluster)
    }

    /// Has one taken any of `n` clusters from `first` on?
    pub(crate) fn any_taken(&self, first: u64, n: u64) -> bool {
        (first..first.saturating_add(n)).any(|c| self.is_taken(c))
    }

    /// Has nothing happened to the cluster?
    pub(super) fn is_untouched(&self, cluster: u64) -> bool {
        let touched = self.is_taken(cluster) || self.is_kept(cluster) || self.is_punched(cluster);
        !touched && self.forgotten.get(cluster).is_none()
    }

    /// Is there a hole in QEMU's sequence?
    pub(crate) fn is_punched(&self, cluster: u64) -> bool {
        self.punched.contains(cluster)
    }

    /// Was it freed without a hole?
    pub(crate) fn is_kept(&self, cluster: u64) -> bool {
        self.kept.contains(cluster)
    }

    /// When the disk forgets what was in a cluster that was in use before the verb.
    pub(super) fn forgotten(&self, cluster: u64) -> Forgotten {
        let known = self.forgotten.get(cluster).copied();
        known.unwrap_or(Forgotten::Never)
    }

    /// Clusters in which a hole is punched although they were free before the verb, or because an
    /// explicit free says so; in order.
    pub(crate) fn punched(&self) -> Result<Vec<u64>> {
        self.punched.sorted()
    }
}

impl Refcounts {
    /// The epoch that new structures belong to.
    pub(crate) fn epoch(&self) -> usize {
        self.fates.epoch
    }

    /// That the disk forgets with the publish of this epoch.
    pub(crate) fn forgotten_now(&self) -> Forgotten {
        Forgotten::With(self.fates.epoch)
    }

    /// What follows is written after the current epoch has been published.
    pub(crate) fn next_epoch(&mut self) -> Result<()> {
        self.mark_published()?;
        self.fates.epoch += 1;
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
        if bytes == 0 || self.fates.overwrites {
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
            Some(Forgotten::Never) => self.fates.overwrites = true,
            Some(Forgotten::With(epoch)) if epoch >= self.epoch() => self.next_epoch()?,
            _ => {}
        }
        Ok(())
    }

    /// May what the replay leaves behind be written? Asked when nothing is yet.
    pub(crate) fn check_overwrites(&self) -> Result<()> {
        // A block in the place of one that a resize drops would go with that one's table entry.
        let again = self.dropped.iter().any(|d| self.block(d.index).is_some());
        if self.fates.overwrites || again {
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
        if self.fates.before.as_ref().is_none_or(|(i, _)| *i != index) {
            let made = self.block(index).is_some_and(|b| b.born.is_some());
            let table = self.tables.first().filter(|_| !made);
            let offset = table.map_or(0, |t| t.entry(index));
            let mut counts = Vec::new();
            if offset != 0 {
                dev.progress.pass(g.cluster_size())?;
                counts = read_refblock(dev, g, offset)?;
            }
            self.fates.before = Some((index, counts));
        }
        let counts = self.fates.before.as_ref().map(|(_, counts)| counts);
        Ok(counts.map_or(0, |c| refblock::get(g, c, g.refblock_index(cluster))))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_was_in_use_is_forgotten_with_an_epoch_or_never() {
        let mut f = Fates::default();
        f.free(300, Freed::Punched, Forgotten::With(1)).unwrap();
        assert_eq!(f.forgotten(300), Forgotten::With(1));
        assert!(Forgotten::With(usize::MAX) < Forgotten::Never);
        assert_eq!(f.punched().unwrap(), [300]);
        // Taken again: the date stays, the hole stays until there are contents.
        f.take(300).unwrap();
        assert!(f.is_punched(300) && f.is_taken(300));
        f.rewrite(300);
        assert!(!f.is_punched(300) && f.forgotten(300) == Forgotten::With(1));
        f.free(300, Freed::Kept, Forgotten::Never).unwrap();
        assert_eq!(f.forgotten(300), Forgotten::With(1));
        f.rewrite(300);
        assert!(f.is_kept(300));
        f.punch(300).unwrap();
        f.punch(3).unwrap();
        assert!(f.is_punched(300) && !f.is_kept(300));
        assert_eq!(f.punched().unwrap(), [3, 300]);
    }

    #[test]
    fn what_a_verb_takes_and_frees_again_was_nothing_to_the_disk() {
        let mut f = Fates::default();
        assert!(f.is_untouched(7));
        f.take(7).unwrap();
        assert!(f.is_taken(7) && f.any_taken(0, 8) && !f.any_taken(8, 100));
        f.free(7, Freed::Kept, Forgotten::With(0)).unwrap();
        assert_eq!(f.forgotten(7), Forgotten::Never);
        assert!(f.is_kept(7) && !f.is_taken(7) && !f.is_untouched(7));
        f.take(8).unwrap();
        f.give_back(8);
        assert!(f.is_untouched(8));
    }
}
