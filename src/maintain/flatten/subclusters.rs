//! Filling subclusters of clusters that hold others already.

use super::generation::{patch, Generation, Lacking, L2};
use super::{Flatten, Lack, Node, Span, SUBCLUSTERS};
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, COPIED};
use crate::format::geometry::Geometry;
use crate::image::device::zeroed;
use crate::image::replay::NewData;
use crate::room;
use std::ops::Range;

impl Flatten<'_> {
    /// Fill subclusters of clusters that hold others already: in place, if no entry has them allocated
    /// there; else in new clusters, which take the other subclusters along.
    pub(super) fn fill_held(
        &mut self,
        generation: &mut Generation,
        span: &Span,
        nodes: &mut [Node],
        c: u64,
        bytes: &[u8],
        mut lacking: Vec<Lacking>,
    ) -> Result<()> {
        let g = self.g;
        lacking.sort_unstable_by_key(|(_, l)| (l.host, l.len, l.bitmap, l.missing));
        for same in lacking.chunk_by(|a, b| a.1.host == b.1.host) {
            let (host, len) = (same[0].1.host, same[0].1.len);
            let (mut named, mut allocated) = (0, 0);
            for node in nodes.iter().filter(|n| n.names(g, c, host)) {
                named += node.disks.len() as u64;
                allocated |= node.entry(g, c).1 as u32;
            }
            let missing = same.iter().fold(0, |all, (_, l)| all | l.missing);
            let cluster = g.cluster_of(host);
            let count = generation.replay.refs.get(&mut self.image.dev, cluster)?;
            if count < named {
                return Err(Error::Corrupt(format!(
                    "The cluster at {host:#x} is named {named} times, but its refcount is {count}"
                )));
            }
            let alike = same.iter().all(|(_, l)| l.len == len);
            if count != named || !alike || allocated & missing != 0 {
                self.take_along(generation, span, nodes, c, bytes, same)?;
                continue;
            }
            generation.fill_in_place(g, host, bytes.get(..len).unwrap_or_default(), missing)?;
            for (i, lack) in same {
                if let Some(node) = nodes.get_mut(*i) {
                    let bitmap = lack.bitmap | u64::from(lack.missing);
                    // What is COPIED stays so.
                    let one = if lack.word & COPIED != 0 { 1 } else { 2 };
                    self.enter(generation, span, node, c, host, one, bitmap)?;
                }
            }
        }
        Ok(())
    }

    /// Nodes leave a cluster, in which others have what they lack: for new ones with the subclusters that
    /// they have there.
    fn take_along(
        &mut self,
        generation: &mut Generation,
        span: &Span,
        nodes: &mut [Node],
        c: u64,
        bytes: &[u8],
        same: &[Lacking],
    ) -> Result<()> {
        let g = self.g;
        let host = same[0].1.host;
        let cluster = g.cluster_of(host);
        let dev = &mut self.image.dev;
        let mut left = generation.replay.refs.get(dev, cluster)?;
        let old = dev.read_vec("Could not read guest data", host, g.cluster_size())?;
        let key = |l: &Lack| (l.len, l.bitmap, l.missing);
        for group in same.chunk_by(|a, b| key(&a.1) == key(&b.1)) {
            let lack = group[0].1;
            let mut contents = zeroed(g.cluster_size())?;
            take(g, &mut contents, &old, lack.bitmap as u32);
            let new = bytes.get(..lack.len).unwrap_or_default();
            take(g, &mut contents, new, lack.missing);
            let these = group.iter().filter_map(|(i, _)| nodes.get(*i));
            let n = these.map(|n| n.disks.len() as u64).sum();
            let to = self.allocate(generation, 1)?;
            let (replay, dev) = (&mut generation.replay, &mut self.image.dev);
            replay.refs.count_as(g.cluster_of(to), n)?;
            replay.write_new(dev, "guest data", to, contents)?;
            for (i, _) in group {
                if let Some(node) = nodes.get_mut(*i) {
                    let bitmap = lack.bitmap | u64::from(lack.missing);
                    self.enter(generation, span, node, c, to, n, bitmap)?;
                }
            }
            room::push(&mut generation.lower, (cluster, n))?;
            left -= n;
        }
        // Who is left alone with the old cluster may write to it.
        let mut rest = nodes.iter().filter(|n| n.names(g, c, host));
        if let (1, Some(node), None) = (left, rest.next(), rest.next()) {
            if node.active {
                let at = node.table + (span.first + c) * g.l2_entry_size() as u64;
                generation.check_table(g, node.table)?;
                room::push(&mut generation.flags, patch(at, host | COPIED, L2))?;
            }
        }
        Ok(())
    }
}

impl Node {
    /// Does its entry for a cluster of the span name this host cluster?
    fn names(&self, g: Geometry, c: u64, host: u64) -> bool {
        entry::cluster(g, self.entry(g, c).0) == Cluster::Standard(host)
    }
}

impl Generation {
    /// New contents for subclusters of a cluster that is in use: no entry reads them.
    fn fill_in_place(&mut self, g: Geometry, host: u64, bytes: &[u8], missing: u32) -> Result<()> {
        let replay = &mut self.replay;
        replay.check_new(host, g.cluster_size())?;
        let mut contents = zeroed(g.cluster_size())?;
        take(g, &mut contents, bytes, missing);
        for run in runs(g, missing) {
            let offset = host + run.start as u64;
            let data = room::copy_of(contents.get(run).unwrap_or_default())?;
            self.bytes += data.len() as u64;
            replay.refs.reach_to(offset + data.len() as u64);
            let new = NewData {
                label: "guest data",
                offset,
                data,
                epoch: replay.refs.epoch(),
            };
            room::push(&mut replay.new_data, new)?;
        }
        Ok(())
    }
}

/// Runs of subclusters, as bytes of the cluster.
fn runs(g: Geometry, bits: u32) -> impl Iterator<Item = Range<usize>> {
    let size = (g.cluster_size() / SUBCLUSTERS) as usize;
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = u64::from(bits) >> at;
        if rest == 0 {
            return None;
        }
        let start = at + rest.trailing_zeros() as usize;
        let n = (u64::from(bits) >> start).trailing_ones() as usize;
        at = start + n;
        Some(start * size..at * size)
    })
}

/// Take these subclusters of `from`, as far as it goes.
fn take(g: Geometry, to: &mut [u8], from: &[u8], bits: u32) {
    for run in runs(g, bits) {
        let parts = to.get_mut(run.start..).zip(from.get(run.start..));
        if let Some((to, from)) = parts {
            let pairs = to.iter_mut().zip(from).take(run.len());
            pairs.for_each(|(to, from)| *to = *from);
        }
    }
}
