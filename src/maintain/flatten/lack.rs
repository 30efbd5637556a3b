//! What the states of a disk leave to the backing file, and whether it can be copied.

use super::{is_zero, used, Flatten, Lack, Node, Span, Work, SUBCLUSTERS};
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster};
use crate::format::geometry::Geometry;
use crate::image::device::zeroed;
use crate::room;
use std::ops::Range;

impl Flatten<'_> {
    /// The most bytes that a guest cluster takes in the file; 0: no state lacks anything of it.
    pub(super) fn need(&self, span: &Span, nodes: &[Node], c: u64) -> Result<u64> {
        let at = span.start + (c << self.g.cluster_bits);
        // Those without a cluster share one, but for those that end in it.
        let behind = at + self.g.cluster_size();
        let (mut own, mut ends) = (0, Vec::new());
        for node in nodes {
            let Some(lack) = self.lack(node, span, c)? else {
                continue;
            };
            own += u64::from(lack.host != 0);
            if node.ends.0 >= behind {
                room::push(&mut ends, behind)?;
                continue;
            }
            for disk in node.disks.iter().filter_map(|d| self.disks.get(*d)) {
                if disk.end > at {
                    room::push(&mut ends, disk.end.min(behind))?;
                }
            }
        }
        ends.sort_unstable();
        ends.dedup();
        Ok((own + ends.len() as u64) << self.g.cluster_bits)
    }

    /// What is missing in a node's entry for a cluster of the span.
    pub(super) fn lack(&self, node: &Node, span: &Span, c: u64) -> Result<Option<Lack>> {
        let g = self.g;
        let at = span.start + (c << g.cluster_bits);
        let inside = node.ends.1.saturating_sub(at).min(g.cluster_size());
        if inside == 0 {
            return Ok(None);
        }
        let (word, bitmap) = node.entry(g, c);
        let mut lack = Lack {
            word,
            bitmap,
            host: 0,
            missing: u32::MAX,
            len: inside as usize,
        };
        match entry::cluster(g, word) {
            Cluster::Unallocated => {}
            Cluster::Standard(host) if g.extended_l2 => lack.host = host,
            _ => return Ok(None),
        }
        if !g.extended_l2 {
            return Ok(Some(lack));
        }
        let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        let damaged = allocated & zero != 0 || lack.host == 0 && allocated != 0;
        if damaged || g.in_cluster(lack.host) != 0 {
            return Err(Error::Corrupt(format!(
                "Invalid L2 entry {word:#x}, subcluster bitmap {bitmap:#x} (L2 offset: {:#x}, L2 index: {:#x})",
                node.table,
                span.first + c
            )));
        }
        lack.missing =
            !(allocated | zero) & first_bits(inside.div_ceil(g.cluster_size() / SUBCLUSTERS));
        Ok((lack.missing != 0).then_some(lack))
    }

    /// Can these clusters be copied, as far as that can be known before anything is written?
    pub(super) fn look_at_run(
        &mut self,
        span: &Span,
        nodes: &[Node],
        run: Range<u64>,
    ) -> Result<()> {
        let g = self.g;
        let encrypted = self.image.header.crypt_method != 0;
        let states = nodes.iter().map(|n| n.disks.len() as u64).sum::<u64>();
        if self.work == Work::Estimate || states <= g.refcount_max() && !encrypted {
            return Ok(());
        }
        for c in run {
            let at = span.start + (c << g.cluster_bits);
            let mut ends = Vec::new();
            for node in nodes {
                if self
                    .lack(node, span, c)?
                    .is_some_and(|l| encrypted || l.host == 0)
                {
                    for disk in node.disks.iter().filter_map(|d| self.disks.get(*d)) {
                        room::push(&mut ends, disk.end.saturating_sub(at))?;
                    }
                }
            }
            if ends.len() as u64 <= g.refcount_max() && !encrypted {
                continue;
            }
            let shown = ends
                .iter()
                .max()
                .copied()
                .unwrap_or(0)
                .min(g.cluster_size());
            let mut data = zeroed(shown)?;
            self.image.read_backing(at, &mut data)?;
            let len = used(&data) as u64;
            if len != 0 && encrypted {
                return Err(Error::Unsupported(
                    "Data of the backing file would have to be encrypted, which is not supported"
                        .into(),
                ));
            }
            ends.iter_mut().for_each(|e| *e = len.min(*e));
            ends.retain(|e| *e != 0);
            ends.sort_unstable();
            let shares = ends.chunk_by(|a, b| a == b).map(<[u64]>::len).max();
            let shares = shares.unwrap_or(0);
            if shares as u64 > g.refcount_max() {
                return Err(Error::Invalid(format!(
                    "{shares} states of the disk would share a cluster, which refcounts of {} bits cannot count; delete snapshots first",
                    g.refcount_bits()
                )));
            }
        }
        Ok(())
    }
}

/// The first `n` bits.
fn first_bits(n: u64) -> u32 {
    ((1u64 << n.min(32)) - 1) as u32
}

/// The subclusters in which these bytes of a cluster are not all zeros.
pub(super) fn subclusters_with_data(g: Geometry, bytes: &[u8]) -> u32 {
    let size = (g.cluster_size() / SUBCLUSTERS) as usize;
    let subclusters = bytes.chunks(size).enumerate();
    subclusters.fold(0, |all, (i, part)| all | u32::from(!is_zero(part)) << i)
}
