//! Tables and refcount blocks by the buffer: read in the order of a list, neighbours in the file in
//! one request, to be looked at or changed where they stand.

use super::device::{self, Device};
use crate::error::Result;
use crate::format::entry::OFFSET_MASK;
use crate::format::geometry::Geometry;
use crate::io::MAX_REQUEST;
use std::ops::Range;

/// Changed tables are written in pieces of this many bytes, so that a flag does not cost a cluster.
pub(crate) const PIECE: usize = 4096;

/// What is asked for ahead of the table that is read, in bytes: disks serve many requests at once.
const AHEAD: usize = 4 << 20;

/// Reads the clusters that a list names.
pub(crate) struct Reader<'a> {
    g: Geometry,
    source: Source,
    list: &'a [u64],
    /// These of the list are in `buf`, one behind the other.
    held: Range<usize>,
    buf: Vec<u8>,
    /// Those before this one of the list have been asked for.
    asked: usize,
}

/// What is read.
#[derive(Clone, Copy)]
pub(crate) struct Source {
    /// What of a word of the list is the offset.
    mask: u64,
    /// What a read and a write of it are called.
    action: &'static str,
    pub(crate) label: &'static str,
    /// Are the next ones asked for ahead?
    ahead: bool,
}

/// As the words of an L1 table name them.
pub(crate) const L2_TABLES: Source = Source {
    mask: OFFSET_MASK,
    action: "Could not read an L2 table",
    label: "L2 table",
    ahead: true,
};

/// All of which a walk has read a while ago.
pub(crate) const REFBLOCKS: Source = Source {
    mask: u64::MAX,
    action: "Could not read a refcount block",
    label: "refcount block",
    ahead: false,
};

/// A whole refcount block.
pub(crate) fn read_refblock(dev: &mut Device, g: Geometry, offset: u64) -> Result<Vec<u8>> {
    dev.read_vec(REFBLOCKS.action, offset, g.cluster_size())
}

impl<'a> Reader<'a> {
    pub(crate) fn new(
        dev: &mut Device,
        g: Geometry,
        source: Source,
        list: &'a [u64],
    ) -> Reader<'a> {
        Reader {
            g,
            source,
            list,
            held: 0..0,
            buf: std::mem::take(&mut dev.buffer),
            asked: 0,
        }
    }

    /// The next reader begins with this one's buffer.
    pub(crate) fn give_back(self, dev: &mut Device) {
        dev.buffer = self.buf;
    }

    /// Let the storage begin to fetch those from `end` on, each once. Between two tables lie the
    /// data of half a gigabyte, so the system does not see a reader in sequence.
    fn ask_ahead(&mut self, dev: &mut Device, end: usize) {
        let cs = self.g.cluster_size();
        self.asked = self.asked.max(end);
        let until = end.saturating_add(AHEAD / self.g.cluster_len());
        let (mut from, mut bytes) = (0, 0);
        let next = self.list.iter().take(until).skip(self.asked);
        for offset in next.map(|w| w & self.source.mask).filter(|o| *o != 0) {
            if bytes != 0 && (from + bytes != offset || bytes >= 1 << 20) {
                dev.will_read(from, bytes);
                bytes = 0;
            }
            if bytes == 0 {
                from = offset;
            }
            bytes += cs;
        }
        if bytes != 0 {
            dev.will_read(from, bytes);
        }
        self.asked = self.asked.max(until);
    }

    /// How many from `index` on are neighbours, as far as one request goes.
    fn neighbours(&self, index: usize) -> usize {
        let most = (MAX_REQUEST / self.g.cluster_len()).max(1);
        let mut ahead = self.list.iter().skip(index).take(most);
        let mut next = ahead.next().map_or(0, |w| w & self.source.mask);
        let more = ahead.take_while(|w| {
            next = next.saturating_add(self.g.cluster_size());
            *w & self.source.mask == next
        });
        1 + more.count()
    }

    /// Read what the list names at `index`, and its neighbours. How many that is, and their bytes.
    pub(crate) fn batch(&mut self, dev: &mut Device, index: usize) -> Result<(usize, &mut [u8])> {
        let n = self.neighbours(index);
        let bytes = n * self.g.cluster_len();
        if self.buf.len() < bytes {
            self.buf = device::zeroed(bytes as u64)?;
        }
        self.held = 0..0;
        if self.source.ahead {
            self.ask_ahead(dev, index + n);
        }
        let offset = self.list.get(index).map_or(0, |w| w & self.source.mask);
        let buf = self.buf.get_mut(..bytes).unwrap_or_default();
        dev.read(self.source.action, offset, buf)?;
        self.held = index..index + n;
        Ok((n, buf))
    }

    /// The cluster that the list names at `index`.
    pub(crate) fn get(&mut self, dev: &mut Device, index: usize) -> Result<&[u8]> {
        if !self.held.contains(&index) {
            self.batch(dev, index)?;
        }
        let at = (index - self.held.start) * self.g.cluster_len();
        Ok(self
            .buf
            .get(at..at + self.g.cluster_len())
            .unwrap_or_default())
    }
}

/// Ranges of `bytes` bytes that cover the pieces which have changed, as `changed` says of each piece
/// of `piece` bytes; neighbours together, as far as one request goes.
pub(crate) fn changed_runs(
    bytes: usize,
    piece: usize,
    mut changed: impl FnMut(usize) -> bool,
    mut run: impl FnMut(Range<usize>) -> Result<()>,
) -> Result<()> {
    let mut from = None;
    for at in (0..bytes).step_by(piece) {
        let goes_on = changed(at / piece);
        match from {
            Some(start) if !goes_on || at + piece - start > MAX_REQUEST => {
                run(start..at)?;
                from = goes_on.then_some(at);
            }
            None if goes_on => from = Some(at),
            _ => {}
        }
    }
    match from {
        Some(start) => run(start..bytes),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::room;

    #[test]
    fn runs_cover_the_changed_pieces_and_no_others() {
        let runs = |bytes: usize, changed: &[usize]| {
            let mut out = Vec::new();
            let run = |r: Range<usize>| room::push(&mut out, (r.start, r.end));
            changed_runs(bytes, PIECE, |i| changed.contains(&i), run).unwrap();
            out
        };
        assert_eq!(runs(512, &[0]), [(0, 512)]);
        assert_eq!(runs(5 * PIECE, &[]), []);
        let three = [(0, 2), (3, 4), (5, 6)].map(|(a, b)| (a * PIECE, b * PIECE - b / 6 * 8));
        assert_eq!(runs(6 * PIECE - 8, &[0, 1, 3, 5]), three);
        let all: Vec<usize> = (0..1000).collect();
        let long = runs(1000 * PIECE, &all);
        assert_eq!(long[..2], [(0, MAX_REQUEST), (MAX_REQUEST, 1000 * PIECE)]);
    }
}
