//! What became of the clusters that a verb's explicit allocations and frees have touched.

use crate::error::Result;
use crate::image::room::{self, Known};

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

/// What became of 64 neighbours, a bit for each: a verb may take millions of clusters in a row.
#[derive(Clone, Copy, Default)]
struct Marks {
    /// An allocation of this verb has it.
    taken: u64,
    /// When it was last freed its bytes stayed, or a hole was punched.
    kept: u64,
    punched: u64,
}

/// See the module's text.
#[derive(Default)]
pub(crate) struct Fates {
    marks: Known<Marks>,
    /// Clusters that held something before the verb, and were freed.
    forgotten: Known<Forgotten>,
}

/// Which word a cluster's bit is in, and the bit.
fn place(cluster: u64) -> (u64, u64) {
    (cluster >> 6, 1 << (cluster & 63))
}

impl Fates {
    fn marks(&mut self, cluster: u64) -> Result<&mut Marks> {
        self.marks.or_default(place(cluster).0)
    }

    fn has(&self, cluster: u64, mark: impl Fn(&Marks) -> u64) -> bool {
        let (word, bit) = place(cluster);
        self.marks.get(word).is_some_and(|m| mark(m) & bit != 0)
    }

    /// An allocation takes the cluster.
    pub(super) fn take(&mut self, cluster: u64) -> Result<()> {
        self.marks(cluster)?.taken |= place(cluster).1;
        Ok(())
    }

    /// The allocation is undone.
    pub(super) fn give_back(&mut self, cluster: u64) -> Result<()> {
        self.marks(cluster)?.taken &= !place(cluster).1;
        Ok(())
    }

    /// The last reference to the cluster is gone.
    pub(super) fn free(&mut self, cluster: u64, bytes: Freed, forgotten: Forgotten) -> Result<()> {
        if !self.is_taken(cluster) {
            self.forgotten.insert(cluster, forgotten)?;
        }
        self.end_up(cluster, Some(bytes))?;
        self.give_back(cluster)
    }

    /// A hole is punched in a cluster that this verb has taken, and that is free again.
    pub(crate) fn punch(&mut self, cluster: u64) -> Result<()> {
        self.end_up(cluster, Some(Freed::Punched))
    }

    /// The cluster gets new contents: there is no hole in the end.
    pub(crate) fn rewrite(&mut self, cluster: u64) -> Result<()> {
        if self.is_punched(cluster) {
            self.end_up(cluster, None)?;
        }
        Ok(())
    }

    fn end_up(&mut self, cluster: u64, bytes: Option<Freed>) -> Result<()> {
        let (bit, marks) = (place(cluster).1, self.marks(cluster)?);
        (marks.kept, marks.punched) = (marks.kept & !bit, marks.punched & !bit);
        match bytes {
            Some(Freed::Kept) => marks.kept |= bit,
            Some(Freed::Punched) => marks.punched |= bit,
            None => {}
        }
        Ok(())
    }

    /// Has an allocation of this verb taken the cluster?
    pub(crate) fn is_taken(&self, cluster: u64) -> bool {
        self.has(cluster, |m| m.taken)
    }

    /// Has one taken any of `n` clusters from `first` on?
    pub(crate) fn any_taken(&self, first: u64, n: u64) -> bool {
        (first..first.saturating_add(n)).any(|c| self.is_taken(c))
    }

    /// Has nothing happened to the cluster?
    pub(super) fn is_untouched(&self, cluster: u64) -> bool {
        let touched = self.has(cluster, |m| m.taken | m.kept | m.punched);
        !touched && self.forgotten.get(cluster).is_none()
    }

    /// Is there a hole in QEMU's sequence?
    pub(crate) fn is_punched(&self, cluster: u64) -> bool {
        self.has(cluster, |m| m.punched)
    }

    /// Was it freed without a hole?
    pub(crate) fn is_kept(&self, cluster: u64) -> bool {
        self.has(cluster, |m| m.kept)
    }

    /// When the disk forgets what was in a cluster that was in use before the verb.
    pub(super) fn forgotten(&self, cluster: u64) -> Forgotten {
        let known = self.forgotten.get(cluster).copied();
        known.unwrap_or(Forgotten::Never)
    }

    /// Clusters in which a hole is punched although they were free before the verb, or because an
    /// explicit free says so; in order.
    pub(crate) fn punched(&self) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        for word in self.marks.sorted()? {
            let bits = self.marks.get(word).map_or(0, |m| m.punched);
            for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                room::push(&mut all, word << 6 | bit)?;
            }
        }
        Ok(all)
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
        f.give_back(8).unwrap();
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
        f.rewrite(300).unwrap();
        assert!(!f.is_punched(300) && f.forgotten(300) == Forgotten::With(1));
        f.free(300, Freed::Kept, Forgotten::Never).unwrap();
        assert_eq!(f.forgotten(300), Forgotten::With(1));
        f.rewrite(300).unwrap();
        assert!(f.is_kept(300));
        f.punch(300).unwrap();
        f.punch(3).unwrap();
        assert!(f.is_punched(300) && !f.is_kept(300));
        assert_eq!(f.punched().unwrap(), [3, 300]);
    }
}
