//! The L2 tables in which two states of a disk differ: read in large requests, and kept as long as
//! somebody who goes through the disk in order needs them.

use super::changes::State;
use crate::error::Result;
use crate::format::entry::OFFSET_MASK;
use crate::format::geometry::Geometry;
use crate::image::device::{zeroed, Device};
use crate::room;
use std::ops::Range;

/// Bytes of tables in memory. The two largest tables need as much.
const WINDOW: usize = 4 << 20;

impl State {
    /// Where the L2 table of an L1 index is; 0: there is none.
    pub(super) fn table(&self, index: u64) -> u64 {
        self.l1.get(index as usize).map_or(0, |e| e & OFFSET_MASK)
    }
}

/// The tables of two states for a range of L1 indices, as far as they must be looked at.
#[derive(Default)]
pub(super) struct StateTables {
    covered: Range<u64>,
    held: Vec<KeptTable>,
    bytes: Vec<u8>,
}

struct KeptTable {
    index: u64,
    /// Where in the buffer the tables of the two states begin.
    places: [Option<usize>; 2],
}

impl StateTables {
    /// The tables of the two states for `index`: `None` where all is unallocated, and where both are
    /// the same table of which nothing is asked. Reads them if need be, and others below `until` along
    /// with them.
    pub(super) fn get(
        &mut self,
        dev: &mut Device,
        g: Geometry,
        states: [&State; 2],
        index: u64,
        until: u64,
    ) -> Result<[Option<&[u8]>; 2]> {
        if !self.covered.contains(&index) {
            self.read(dev, g, states, index..until.max(index.saturating_add(1)))?;
        }
        Ok(self.held(g, index))
    }

    /// The tables for `index` that are in memory.
    pub(super) fn held(&self, g: Geometry, index: u64) -> [Option<&[u8]>; 2] {
        let found = self.held.binary_search_by_key(&index, |h| h.index);
        let places = found
            .ok()
            .and_then(|i| self.held.get(i))
            .map_or([None; 2], |h| h.places);
        places.map(|p| self.bytes.get(p?..p?.saturating_add(g.cluster_len())))
    }

    /// Which tables must be looked at for `index`: those that differ, and of the newer state what
    /// stands behind the end of the older one.
    fn needed(g: Geometry, [from, to]: [&State; 2], index: u64) -> [u64; 2] {
        let starts = g.guest_of_l1(index).unwrap_or(u64::MAX);
        let ends = g.guest_of_l1(index.saturating_add(1)).unwrap_or(u64::MAX);
        let differ = from.table(index) != to.table(index);
        [
            (differ && starts < from.size, from),
            (differ || ends > from.size, to),
        ]
        .map(|(needed, state)| if needed { state.table(index) } else { 0 })
    }

    /// Read the tables from `range.start` on that fit, each once, neighbours in the file in one request.
    fn read(
        &mut self,
        dev: &mut Device,
        g: Geometry,
        states: [&State; 2],
        range: Range<u64>,
    ) -> Result<()> {
        self.covered = 0..0;
        self.held.clear();
        let most = (WINDOW / g.cluster_len()).max(2);
        // StateTables to read: (where it is, and for whom).
        let mut wanted: Vec<(u64, usize, usize)> = Vec::new();
        let behind = states.map(|s| s.l1.len() as u64);
        let mut next = range.start;
        while next < range.end && wanted.len() + 2 <= most {
            if next >= behind[0].max(behind[1]) {
                next = range.end;
                break;
            }
            let needed = StateTables::needed(g, states, next);
            if needed != [0; 2] {
                for (side, offset) in needed.into_iter().enumerate() {
                    // One that is not at a cluster boundary is refused when it is come to.
                    if offset != 0 && g.in_cluster(offset) == 0 {
                        room::push(&mut wanted, (offset, self.held.len(), side))?;
                    }
                }
                let held = KeptTable {
                    index: next,
                    places: [None; 2],
                };
                room::push(&mut self.held, held)?;
            }
            next += 1;
        }
        // Nothing is stored behind the end of the file, however much the L1 tables name there.
        wanted.sort_unstable();
        if let Some((last, ..)) = wanted.last() {
            dev.ends_before(*last)?;
        }
        wanted.retain(|(offset, ..)| *offset < dev.length());

        let mut tables = room::collected(wanted.iter().map(|w| w.0))?;
        tables.dedup();
        for (offset, held, side) in wanted {
            let place = tables.binary_search(&offset).ok();
            if let Some(held) = self.held.get_mut(held) {
                held.places[side] = place.map(|p| p * g.cluster_len());
            }
        }
        if self.bytes.len() < tables.len() * g.cluster_len() {
            self.bytes = zeroed((tables.len() * g.cluster_len()) as u64)?;
        }
        let runs = || tables.chunk_by(|a, b| a + g.cluster_size() == *b);
        // Disks serve many requests at once.
        for run in runs().skip(1) {
            dev.will_read(run[0], run.len() as u64 * g.cluster_size());
        }
        let mut rest = self.bytes.as_mut_slice();
        for run in runs() {
            let (part, behind) = rest.split_at_mut(run.len() * g.cluster_len());
            dev.read("Could not read an L2 table", run[0], part)?;
            rest = behind;
        }
        self.covered = range.start..next;
        Ok(())
    }
}
