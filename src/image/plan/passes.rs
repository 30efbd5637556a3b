//! Passes over many tables: they are changed in the buffer that they were read into, and the changed
//! pieces are written from it.

use super::steps::{add_to, Pass};
use crate::error::Result;
use crate::format::geometry::{Geometry, HostCluster};
use crate::format::refblock;
use crate::image::device::{self, Device, DiscardKind};
use crate::image::refcount::{Block, Refcounts};
use crate::image::replay::walk::{set_copied, Flags, Marked};
use crate::image::tables::{changed_runs, read_refblock, Reader, Source, PIECE};
use crate::image::tables::{L2_TABLES, REFBLOCKS};
use crate::room;
use std::ops::Range;

impl Pass {
    /// Go through it all.
    pub(super) fn run(
        &self,
        dev: &mut Device,
        refs: &mut Refcounts,
        holes: &mut Holes,
    ) -> Result<()> {
        let g = refs.geometry();
        match self {
            Pass::Raise(blocks) => {
                rewrite_blocks(dev, refs, blocks, |_, block, old, new| {
                    block.peak_counts(g, old, new)
                })?;
                // Those that a resize drops, where a temporary table is counted in them.
                for dropped in refs.dropped() {
                    if let Some(peak) = &dropped.peak {
                        let at = [dropped.offset];
                        rewrite(dev, g, REFBLOCKS, &at, |_, _, old, changed| {
                            replace(g, old, peak, changed)
                        })?;
                    }
                }
                Ok(())
            }
            Pass::Lower(blocks, spare) => {
                (holes.spare.start, holes.spare.end) = (spare.start, spare.end);
                rewrite_blocks(dev, refs, blocks, |index, block, old, new| {
                    block.final_counts(g, new)?;
                    match block.frees() {
                        true => holes.add_freed(refs, index, old, new),
                        false => Ok(()),
                    }
                })?;
                lower_dropped(dev, refs, holes)
            }
            Pass::Clear(tables) => set_flags(dev, refs, tables, false),
            Pass::Set(tables) => set_flags(dev, refs, tables, true),
        }
    }
}

/// Go through these clusters of the file by the buffer. `change` changes one where it stands and says of
/// each piece of it whether it has changed; those are written, neighbours together.
fn rewrite(
    dev: &mut Device,
    g: Geometry,
    source: Source,
    offsets: &[u64],
    mut change: impl FnMut(&mut Device, usize, &mut [u8], &mut Vec<bool>) -> Result<()>,
) -> Result<()> {
    let mut reader = Reader::new(dev, g, source, offsets);
    let (mut changed, mut done) = (Vec::new(), 0);
    while let Some(first) = offsets.get(done) {
        let (n, buf) = reader.batch(dev, done)?;
        changed.clear();
        for (i, cluster) in (done..).zip(buf.chunks_mut(g.cluster_len())) {
            change(dev, i, cluster, &mut changed)?;
        }
        let is_changed = |i: usize| changed.get(i) == Some(&true);
        changed_runs(buf.len(), piece(g), is_changed, |run| {
            let at = first.saturating_add(run.start as u64);
            dev.write(source.label, at, buf.get(run).unwrap_or_default())
        })?;
        done += n;
    }
    reader.give_back(dev);
    Ok(())
}

/// Pieces of tables that may be smaller than one.
fn piece(g: Geometry) -> usize {
    g.cluster_len().min(PIECE)
}

/// Make the counts of a block, which are `old`, `new`.
fn replace(g: Geometry, old: &mut [u8], new: &[u8], changed: &mut Vec<bool>) -> Result<()> {
    for (old, new) in old.chunks_mut(piece(g)).zip(new.chunks(piece(g))) {
        room::push(changed, old != new)?;
        old.copy_from_slice(new);
    }
    Ok(())
}

/// Rewrite refcount blocks: `change` makes of the counts on the disk the new ones.
fn rewrite_blocks(
    dev: &mut Device,
    refs: &Refcounts,
    blocks: &[u64],
    mut change: impl FnMut(u64, &Block, &[u8], &mut [u8]) -> Result<()>,
) -> Result<()> {
    let g = refs.geometry();
    let blocks = blocks.iter().filter_map(|i| Some((*i, refs.block(*i)?)));
    let blocks = room::collected(blocks)?;
    let offsets = room::collected(blocks.iter().map(|(_, b)| b.offset))?;
    let mut new = device::zeroed(g.cluster_size())?;
    rewrite(dev, g, REFBLOCKS, &offsets, |dev, i, old, changed| {
        dev.progress.step(g.cluster_size())?;
        if let Some((index, block)) = blocks.get(i) {
            change(*index, block, old, &mut new)?;
        }
        replace(g, old, &new, changed)
    })
}

/// Write bit 63 of the entries of `tables` as they say, which looks at counts only where no walk has
/// said enough.
fn set_flags(dev: &mut Device, refs: &mut Refcounts, tables: &[Marked], set: bool) -> Result<()> {
    let g = refs.geometry();
    let offsets = room::collected(tables.iter().map(|t| t.offset))?;
    rewrite(dev, g, L2_TABLES, &offsets, |dev, i, table, changed| {
        dev.progress.step(g.cluster_size())?;
        let flags = tables.get(i).map_or(Flags::Final, |t| t.flags);
        for piece in table.chunks_mut(piece(g)) {
            room::push(changed, set_copied(refs, dev, piece, flags, set)?)?;
        }
        Ok(())
    })
}

/// What became free in the range of a block that a resize drops. The block itself goes later,
/// behind a barrier.
fn lower_dropped(dev: &mut Device, refs: &Refcounts, holes: &mut Holes) -> Result<()> {
    let g = refs.geometry();
    for dropped in refs.dropped() {
        if let Some(counts) = &dropped.counts {
            let mut old = read_refblock(dev, g, dropped.offset)?;
            let itself = g.cluster_of(dropped.offset);
            if g.reftable_index(itself) == dropped.index {
                refblock::set(g, &mut old, g.refblock_index(itself), 0);
            }
            holes.add_freed(refs, dropped.index, &old, &counts.bytes(g)?)?;
        }
    }
    Ok(())
}

/// Clusters to punch.
#[derive(Default)]
pub(super) struct Holes {
    /// First and number.
    ranges: Vec<(u64, u64)>,
    /// Clusters that are given back as they were.
    spare: Range<u64>,
}

impl Holes {
    /// Clusters whose count goes from something to nothing, but for those whose bytes QEMU keeps.
    fn add_freed(&mut self, refs: &Refcounts, index: u64, old: &[u8], new: &[u8]) -> Result<()> {
        let g = refs.geometry();
        let base = g.first_cluster_of_block(index).0;
        for i in 0..g.refblock_entries() as usize {
            if refblock::get(g, old, i) != 0 && refblock::get(g, new, i) == 0 {
                let c = base + i as u64;
                if !refs.fates.is_kept(c) && !self.spare.contains(&c) {
                    add_to(&mut self.ranges, c)?;
                }
            }
        }
        Ok(())
    }

    /// Punch all of them and `more`, in order, neighbours together: what an explicit free has punched
    /// became free in a block as well. `share`: what of the verb's progress all this is.
    pub(super) fn punch(
        &mut self,
        dev: &mut Device,
        g: Geometry,
        more: &[(u64, u64)],
        share: u64,
    ) -> Result<()> {
        let mut ranges = std::mem::take(&mut self.ranges);
        room::append(&mut ranges, more)?;
        ranges.sort_unstable();
        ranges.dedup_by(|next, last| {
            let (end, next_end) = (last.0 + last.1, next.0 + next.1);
            let touches = next.0 <= end;
            if touches {
                last.1 = end.max(next_end) - last.0;
            }
            touches
        });
        for (first, n) in &ranges {
            dev.progress.step(share / ranges.len() as u64)?;
            let (at, bytes) = (g.offset_of(HostCluster(*first)), n << g.cluster_bits);
            dev.discard(at, bytes, DiscardKind::Snapshot);
        }
        Ok(())
    }
}
