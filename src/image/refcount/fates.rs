//! What became of the clusters that a verb's explicit allocations and frees have touched.

use crate::error::Result;
use crate::image::room::{Clusters, Known};

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

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
}
