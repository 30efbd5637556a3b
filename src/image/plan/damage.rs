//! What a verb must not do to an image whose counts lie: after it, each cluster that holds the header, an
//! L1 table, the refcount table, a refcount block or the snapshot table has a count and lies within the
//! file, and the verb writes there as into that structure only.
//!
//! QEMU checks what it writes against the structures that it knows (`overlap`), but frees whatever
//! reaches a count of zero, and punches it: an L2 entry that names the cluster of the snapshot
//! table, with a count of one, costs it every snapshot. In an image without damage nothing here
//! ever fails.

use super::Plan;
use crate::error::{Error, Result};
use crate::format::geometry::{HostCluster, TABLE_ENTRY};
use crate::image::replay::overlap::Protected;
use crate::image::replay::Replay;
use crate::image::Image;
use crate::room;
use crate::snapshot::Snapshot;

impl Image {
    /// Will the structures that the image needs after the verb still be there? Called when the
    /// replay is over and nothing is written.
    pub(in crate::image) fn check_damage(
        &mut self,
        replay: &mut Replay,
        plan: &Plan,
        list: &[Snapshot],
        table_size: u64,
    ) -> Result<()> {
        let g = replay.g;
        let own = self.header.l1_offset;
        for edit in &plan.copied {
            let kind = if edit.offset == own {
                Protected::ActiveL1
            } else {
                Protected::InactiveL1
            };
            replay
                .overlap
                .check(edit.offset, edit.bytes(), Some(kind))?;
        }
        // QEMU enters what it makes for a resize in the table that it leaves in the end.
        if let Some(edit) = &plan.left {
            let mut checked = None;
            for (i, _) in (0u64..)
                .zip(edit.before.iter().zip(&edit.after))
                .filter(|(_, (b, a))| b != a)
            {
                let at = edit.offset.saturating_add(i * TABLE_ENTRY);
                // Whole clusters are checked.
                if checked.replace(g.cluster_of(at)) == Some(g.cluster_of(at)) {
                    continue;
                }
                replay
                    .overlap
                    .check(at, TABLE_ENTRY, Some(Protected::ActiveL1))?;
            }
        }
        for offset in plan.clear.iter().chain(&plan.set).map(|t| &t.offset) {
            if replay.refs.fates.is_taken(g.cluster_of(*offset).0) {
                return Err(Error::Corrupt(format!(
                    "L2 table {offset:#x} is in use but counted as free"
                )));
            }
        }

        let (l1, meaning, was) = (replay.l1_place(), replay.meaning, &self.header);
        let table = replay.refs.table();
        let born = replay.refs.loaded().filter(|(_, b)| b.born.is_some());
        let dropped = replay.refs.dropped().iter().map(|d| d.index);
        for index in born.map(|(index, _)| index).chain(dropped) {
            let at = table.offset.saturating_add(index * TABLE_ENTRY);
            replay
                .overlap
                .check(at, TABLE_ENTRY, Some(Protected::Reftable))?;
        }
        let mut needed = vec![
            (0, 1, false),
            (
                l1.offset,
                u64::from(l1.entries) * TABLE_ENTRY,
                l1.offset != was.l1_offset,
            ),
            (
                meaning.snapshots_offset,
                table_size,
                meaning.snapshots_offset != was.snapshots_offset,
            ),
            (
                table.offset,
                table.clusters << g.cluster_bits,
                table.born.is_some(),
            ),
        ];
        let old = self.snapshots.entries.len();
        room::reserve(&mut needed, list.len())?;
        let placed = |(_, s): &(usize, &Snapshot)| s.has_a_place_for_l1(g);
        for (i, s) in list.iter().enumerate().filter(placed) {
            let bytes = u64::from(s.l1_size) * TABLE_ENTRY;
            room::push(&mut needed, (s.l1_table_offset, bytes, i >= old))?;
        }
        for i in (0..table.entries.len() as u64).filter(|i| table.entry(*i) != 0) {
            let born = replay.refs.block(i).is_some_and(|b| b.born.is_some());
            room::push(&mut needed, (replay.refs.entry(i), 1, born))?;
        }
        self.check_kept(replay, needed)
    }

    /// No cluster of these ranges (offset, bytes, new) may lose its last count in this verb, and
    /// those of new ranges must have one.
    fn check_kept(&mut self, replay: &mut Replay, mut ranges: Vec<(u64, u64, bool)>) -> Result<()> {
        let g = replay.g;
        ranges.retain(|(_, bytes, _)| *bytes != 0);
        // What a shrink cuts off holds nothing, say the counts.
        let (cut, end) = (replay.final_length(), self.dev.length());
        let lost = |(offset, bytes, _): &&(u64, u64, bool)| {
            cut.max(*offset) < end.min(offset.saturating_add(*bytes))
        };
        if let Some((offset, ..)) = ranges.iter().find(lost) {
            return Err(Error::Corrupt(format!(
                "The table at {offset:#x} would be cut off with the end of the file"
            )));
        }
        // Ranges of damaged images overlap: each cluster is looked at once, and once if new.
        ranges.sort_unstable_by_key(|(offset, _, new)| (!*new, *offset));
        let blocks = replay.refs.table().entries.len() as u64;
        let counted = g.first_cluster_of_block(blocks).0;
        let (mut next, mut were_new) = (0, true);
        for (offset, bytes, new) in ranges {
            if new != were_new {
                (next, were_new) = (0, new);
            }
            // A snapshot's L1 may be said to be gigabytes long: only what has counts is looked at.
            let end = (g.cluster_of(offset.saturating_add(bytes - 1)).0 + 1).min(counted);
            next = next.max(g.cluster_of(offset).0);
            while next < end {
                self.dev.progress.pass(TABLE_ENTRY)?;
                let index = g.reftable_index(HostCluster(next));
                if !replay.refs.may_lose(index) {
                    next = g.first_cluster_of_block(index + 1).0;
                    continue;
                }
                if replay
                    .refs
                    .loses_last(&mut self.dev, HostCluster(next), new)?
                {
                    return Err(Error::Corrupt(format!(
                        "The cluster at {:#x} would be freed, but a table of the image is in it",
                        g.offset_of(HostCluster(next))
                    )));
                }
                next += 1;
            }
        }
        Ok(())
    }
}
