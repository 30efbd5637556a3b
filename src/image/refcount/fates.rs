//! What became of the clusters that a verb's explicit allocations and frees have touched.

use std::collections::BTreeMap;

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

/// What became of one cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Fate {
    /// An allocation of this verb has it.
    taken: bool,
    /// It held something before the verb, and was freed.
    forgotten: Option<Forgotten>,
    /// How its bytes ended up when it was last freed.
    bytes: Option<Freed>,
}

/// See the module's text.
#[derive(Default)]
pub(crate) struct Fates(BTreeMap<u64, Fate>);

impl Fates {
    fn fate(&mut self, cluster: u64) -> &mut Fate {
        self.0.entry(cluster).or_default()
    }

    fn of(&self, cluster: u64) -> Fate {
        self.0.get(&cluster).copied().unwrap_or_default()
    }

    /// An allocation takes the cluster.
    pub(super) fn take(&mut self, cluster: u64) {
        self.fate(cluster).taken = true;
    }

    /// The allocation is undone.
    pub(super) fn give_back(&mut self, cluster: u64) {
        self.fate(cluster).taken = false;
    }

    /// The last reference to the cluster is gone.
    pub(super) fn free(&mut self, cluster: u64, bytes: Freed, forgotten: Forgotten) {
        let fate = self.fate(cluster);
        if !std::mem::take(&mut fate.taken) {
            fate.forgotten = Some(forgotten);
        }
        fate.bytes = Some(bytes);
    }

    /// A hole is punched in a cluster that this verb has taken, and that is free again.
    pub(crate) fn punch(&mut self, cluster: u64) {
        self.fate(cluster).bytes = Some(Freed::Punched);
    }

    /// The cluster gets new contents: there is no hole in the end.
    pub(crate) fn rewrite(&mut self, cluster: u64) {
        if let Some(fate) = self.0.get_mut(&cluster) {
            fate.bytes = fate.bytes.filter(|b| *b != Freed::Punched);
        }
    }

    /// Has an allocation of this verb taken the cluster?
    pub(crate) fn is_taken(&self, cluster: u64) -> bool {
        self.of(cluster).taken
    }

    /// Has one taken any of `n` clusters from `first` on?
    pub(crate) fn any_taken(&self, first: u64, n: u64) -> bool {
        let mut touched = self.0.range(first..first.saturating_add(n));
        touched.any(|(_, fate)| fate.taken)
    }

    /// Has nothing happened to the cluster?
    pub(super) fn is_untouched(&self, cluster: u64) -> bool {
        self.of(cluster) == Fate::default()
    }

    /// Is there a hole in QEMU's sequence?
    pub(crate) fn is_punched(&self, cluster: u64) -> bool {
        self.of(cluster).bytes == Some(Freed::Punched)
    }

    /// Was it freed without a hole?
    pub(crate) fn is_kept(&self, cluster: u64) -> bool {
        self.of(cluster).bytes == Some(Freed::Kept)
    }

    /// When the disk forgets what was in a cluster that was in use before the verb.
    pub(super) fn forgotten(&self, cluster: u64) -> Forgotten {
        self.of(cluster).forgotten.unwrap_or(Forgotten::Never)
    }

    /// Clusters in which a hole is punched although they were free before the verb, or because an
    /// explicit free says so.
    pub(crate) fn punched(&self) -> impl Iterator<Item = u64> + '_ {
        let punched = self
            .0
            .iter()
            .filter(|(_, f)| f.bytes == Some(Freed::Punched));
        punched.map(|(cluster, _)| *cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_verb_takes_and_frees_again_was_nothing_to_the_disk() {
        let mut f = Fates::default();
        assert!(f.is_untouched(7));
        f.take(7);
        assert!(f.is_taken(7) && f.any_taken(0, 8) && !f.any_taken(8, 100));
        f.free(7, Freed::Kept, Forgotten::With(0));
        assert_eq!(f.forgotten(7), Forgotten::Never);
        assert!(f.is_kept(7) && !f.is_taken(7) && !f.is_untouched(7));
        f.take(8);
        f.give_back(8);
        assert!(f.is_untouched(8));
    }

    #[test]
    fn what_was_in_use_is_forgotten_with_an_epoch_or_never() {
        let mut f = Fates::default();
        f.free(3, Freed::Punched, Forgotten::With(1));
        assert_eq!(f.forgotten(3), Forgotten::With(1));
        assert!(Forgotten::With(usize::MAX) < Forgotten::Never);
        assert_eq!(f.punched().collect::<Vec<_>>(), [3]);
        // Taken again: the date stays, the hole stays until there are contents.
        f.take(3);
        assert!(f.is_punched(3) && f.is_taken(3));
        f.rewrite(3);
        assert!(!f.is_punched(3) && f.forgotten(3) == Forgotten::With(1));
        f.free(3, Freed::Kept, Forgotten::Never);
        assert_eq!(f.forgotten(3), Forgotten::With(1));
        f.rewrite(3);
        assert!(f.is_kept(3));
        f.punch(3);
        assert!(f.is_punched(3) && !f.is_kept(3));
    }
}
