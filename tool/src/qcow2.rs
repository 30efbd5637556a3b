//! A new qcow2 image, written from its first cluster to its last.
//!
//! ```text
//!   | header | refcount block | data ... | L2 table | data ... | L2 table | ... | refcount block | data ... | L1 table | refcount table |
//!              of this range               of the data before                    of the next range
//! ```
//! Guest clusters come in order. An L2 table goes out when the next one begins, a refcount block
//! when the clusters that it counts are full, the header at the very end. In memory are the L1 table,
//! one L2 table, one refcount block, and what makes one large write.

mod header;

use std::io;

use qcow2_snapshot::format::entry::{COMPRESSED, COPIED, ZERO};
use qcow2_snapshot::format::geometry::{
    Geometry, HostCluster, MAX_CLUSTER_OFFSET, MAX_L1_BYTES, MAX_REFTABLE_BYTES,
};

use crate::output::{Output, CHUNK};
pub(crate) use header::Form;

/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;
/// The image in the making.
pub(crate) struct NewImage {
    out: Output,
    g: Geometry,
    header: Vec<u8>,
    l1: Vec<u64>,
    /// The L2 table in the making, for this index of the L1 table.
    table: Vec<u8>,
    table_index: u64,
    table_used: bool,
    /// The cluster whose subclusters are being put in, and which of them are data, and zeros.
    open: Option<u64>,
    cluster: Vec<u8>,
    data: u64,
    zero: u64,
    /// Whole clusters that are not written yet, from this offset on.
    pending: Vec<u8>,
    pending_at: u64,
    /// Clusters in use, all before this one.
    next: u64,
    /// The refcount blocks, and the one of the range that is being filled.
    blocks: Vec<u64>,
    block: Vec<u8>,
    /// Room for compressed data at the end of its last cluster.
    room: std::ops::Range<u64>,
}

fn too_large() -> io::Error {
    io::Error::from_raw_os_error(libc::EFBIG)
}

impl NewImage {
    pub(crate) fn new(out: Output, form: &Form) -> io::Result<NewImage> {
        let g = Geometry::new(form.geometry.cluster_bits, 4, form.geometry.extended_l2);
        let entries = g.l1_entries_for(form.size);
        if entries * 8 > MAX_L1_BYTES {
            return Err(too_large());
        }
        let mut image = NewImage {
            out,
            g,
            header: header::first(g, form, entries)?,
            l1: vec![0; entries as usize],
            table: vec![0; g.cluster_len()],
            table_index: 0,
            table_used: false,
            open: None,
            cluster: Vec::new(),
            data: 0,
            zero: 0,
            pending: Vec::new(),
            pending_at: g.cluster_size(),
            next: 1,
            blocks: Vec::new(),
            block: vec![0; g.cluster_len()],
            room: 0..0,
        };
        image.count(0);
        image.begin_block()?;
        Ok(image)
    }

    /// Bytes of guest data that are mapped together: a subcluster, else a cluster.
    pub(crate) fn unit(&self) -> u64 {
        match self.g.extended_l2 {
            true => self.g.cluster_size() / SUBCLUSTERS,
            false => self.g.cluster_size(),
        }
    }

    /// A unit of data at a guest offset behind all before.
    pub(crate) fn put_data(&mut self, guest: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.g.extended_l2 {
            let at = self.add_cluster(bytes)?;
            return self.set_entry(guest, at | COPIED, 0);
        }
        let place = self.open_cluster(guest)?;
        if let Some(part) = self.cluster.get_mut(place..place + bytes.len()) {
            part.copy_from_slice(bytes);
        }
        self.data |= 1 << (place as u64 / self.unit());
        Ok(())
    }

    /// Many clusters of data at once, without copying them: the buffer is given away for another one. False: they
    /// go the other way.
    pub(crate) fn put_clusters(&mut self, guest: u64, bytes: &mut Vec<u8>) -> io::Result<bool> {
        let (g, n) = (self.g, (bytes.len() / self.g.cluster_len()) as u64);
        if g.extended_l2 || bytes.len() < CHUNK {
            return Ok(false);
        }
        let last = guest + ((n - 1) << g.cluster_bits);
        let one_table =
            g.l1_index(guest) == self.table_index && g.l1_index(last) == self.table_index;
        let end = self.next + n;
        let counted = g.reftable_index(HostCluster(end - 1)) < self.blocks.len() as u64;
        if !one_table || !counted || end << g.cluster_bits > MAX_CLUSTER_OFFSET {
            return Ok(false);
        }
        self.send(0)?;
        let full = std::mem::replace(bytes, self.out.buffer());
        for k in 0..n {
            let at = self.next << g.cluster_bits;
            self.count(self.next);
            self.set_entry(guest + (k << g.cluster_bits), at | COPIED, 0)?;
            self.next += 1;
        }
        let at = self.pending_at;
        self.pending_at += full.len() as u64;
        self.out.write(at, full)?;
        Ok(true)
    }

    /// A unit of zeros that a backing file must not show through.
    pub(crate) fn put_zero(&mut self, guest: u64) -> io::Result<()> {
        if !self.g.extended_l2 {
            return self.set_entry(guest, ZERO, 0);
        }
        let place = self.open_cluster(guest)?;
        self.zero |= 1 << (place as u64 / self.unit());
        Ok(())
    }

    /// A cluster as it is stored elsewhere. Its first bytes, so many, are the last of the one that was put
    /// before. False: it takes too much room for that.
    pub(crate) fn put_packed(
        &mut self,
        guest: u64,
        packed: &[u8],
        shared: usize,
    ) -> io::Result<bool> {
        if packed.is_empty() || packed.len() >= self.g.cluster_len() {
            return Ok(false);
        }
        self.close_cluster()?;
        let length = packed.len() as u64;
        let behind = self.place_for(length, shared as u64);
        let at = match behind {
            Some(at) => at,
            None => {
                self.begin_block()?;
                self.room = 0..0;
                self.next << self.g.cluster_bits
            }
        };
        let end = at + length;
        let have = (at - self.pending_at) as usize;
        let whole = self.g.round_up(end);
        if self.next << self.g.cluster_bits < whole {
            self.next = whole >> self.g.cluster_bits;
            self.pending.resize((whole - self.pending_at) as usize, 0);
        }
        if let Some(part) = self.pending.get_mut(have..have + packed.len()) {
            part.copy_from_slice(packed);
        }
        for cluster in self.g.cluster_of(at).0..=self.g.cluster_of(end - 1).0 {
            self.count(cluster);
        }
        self.room = end.max(self.room.start)..whole.max(self.room.end);

        let shift = 62 - (self.g.cluster_bits - 8);
        if at >> shift != 0 {
            return Err(too_large());
        }
        let sectors = ((end - 1) >> 9) - (at >> 9);
        self.set_entry(guest, COMPRESSED | sectors << shift | at, 0)?;
        self.send(CHUNK)?;
        Ok(true)
    }

    /// Where compressed data fits behind other such data, of which the last bytes are its first: within
    /// the clusters that are there, or on into the next one if that is free and counted by the same block.
    fn place_for(&self, length: u64, shared: u64) -> Option<u64> {
        let (g, at) = (self.g, self.room.start.checked_sub(shared)?);
        if at < self.pending_at || at == self.room.end {
            return None;
        }
        let (first, last) = (g.cluster_of(at), g.cluster_of(at + length - 1));
        let counted_here = g.reftable_index(first) + 1 == self.blocks.len() as u64;
        let goes_on = self.room.end == self.next << g.cluster_bits
            && g.reftable_index(HostCluster(self.next)) < self.blocks.len() as u64;
        let fits = goes_on || at + length <= self.room.end;
        let countable = |c: u64| c >= self.next || self.count_of(c << g.cluster_bits) < u16::MAX;
        (counted_here && fits && (first.0..=last.0).all(countable)).then_some(at)
    }

    /// All is there. Returns the file's length.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.close_cluster()?;
        self.close_table()?;
        let (g, first) = (self.g, self.next);
        let placed = self.blocks.len() as u64;
        let l1_clusters = g.clusters_for(self.l1.len() as u64 * 8);
        // The blocks that are missing count themselves and the tables behind them.
        let (mut blocks, mut table) = (placed, 1);
        let total = loop {
            let total = first + (blocks - placed) + l1_clusters + table;
            let needed = total.div_ceil(g.refblock_entries());
            let bytes = needed * 8;
            if needed <= blocks && g.clusters_for(bytes) <= table {
                break total;
            }
            (blocks, table) = (needed.max(blocks), g.clusters_for(bytes).max(table));
        };
        if table << g.cluster_bits > MAX_REFTABLE_BYTES {
            return Err(too_large());
        }
        let ends = |block: u64| total.min((block + 1) * g.refblock_entries());
        (first..ends(placed - 1)).for_each(|c| self.count(c));
        self.write_block()?;
        for index in placed..blocks {
            self.block.fill(0);
            (index * g.refblock_entries()..ends(index)).for_each(|c| self.count(c));
            self.blocks.push(self.next << g.cluster_bits);
            let block = std::mem::take(&mut self.block);
            self.append(&block)?;
            self.block = block;
        }
        let l1_at = self.next << g.cluster_bits;
        self.append_words(true)?;
        let table_at = self.next << g.cluster_bits;
        self.append_words(false)?;
        self.send(0)?;

        let mut header = std::mem::take(&mut self.header);
        let mut set = |at: usize, word: u64| {
            if let Some(place) = header.get_mut(at..at + 8) {
                place.copy_from_slice(&word.to_be_bytes());
            }
        };
        set(40, if l1_clusters == 0 { 0 } else { l1_at });
        set(48, table_at);
        // Clusters of the refcount table, and no snapshots.
        set(56, table << 32);
        self.out.write(0, header)?;
        self.out.finish()?;
        Ok(total << g.cluster_bits)
    }

    /// The L1 table, or the refcount table.
    fn append_words(&mut self, l1: bool) -> io::Result<()> {
        let words = std::mem::take(if l1 { &mut self.l1 } else { &mut self.blocks });
        for part in words.chunks(self.g.cluster_len() / 8) {
            let bytes: Vec<u8> = part.iter().flat_map(|w| w.to_be_bytes()).collect();
            self.append(&bytes)?;
        }
        Ok(())
    }

    /// The place of a guest offset in the cluster that is being put together.
    fn open_cluster(&mut self, guest: u64) -> io::Result<usize> {
        let within = self.g.in_cluster(guest);
        if self.open != Some(guest - within) {
            self.close_cluster()?;
            self.open = Some(guest - within);
            self.cluster.clear();
            self.cluster.resize(self.g.cluster_len(), 0);
        }
        Ok(within as usize)
    }

    fn close_cluster(&mut self) -> io::Result<()> {
        let Some(guest) = self.open.take() else {
            return Ok(());
        };
        let (data, zero) = (
            std::mem::take(&mut self.data),
            std::mem::take(&mut self.zero),
        );
        let mut word = 0;
        if data != 0 {
            let bytes = std::mem::take(&mut self.cluster);
            word = self.add_cluster(&bytes)? | COPIED;
            self.cluster = bytes;
        }
        self.set_entry(guest, word, zero << SUBCLUSTERS | data)
    }

    fn set_entry(&mut self, guest: u64, word: u64, bitmap: u64) -> io::Result<()> {
        let index = self.g.l1_index(guest);
        if index != self.table_index {
            self.close_table()?;
            self.table_index = index;
        }
        let at = self.g.l2_index(guest) as usize * self.g.l2_entry_size();
        let entry = [word.to_be_bytes(), bitmap.to_be_bytes()].concat();
        let entry = entry.get(..self.g.l2_entry_size()).unwrap_or_default();
        if let Some(place) = self.table.get_mut(at..at + entry.len()) {
            place.copy_from_slice(entry);
        }
        self.table_used = true;
        Ok(())
    }

    fn close_table(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.table_used) {
            return Ok(());
        }
        let mut table = std::mem::take(&mut self.table);
        let at = self.add_cluster(&table)?;
        if let Some(entry) = self.l1.get_mut(self.table_index as usize) {
            *entry = at | COPIED;
        }
        table.fill(0);
        self.table = table;
        Ok(())
    }

    /// A new cluster behind all others.
    fn add_cluster(&mut self, bytes: &[u8]) -> io::Result<u64> {
        self.begin_block()?;
        let at = self.next << self.g.cluster_bits;
        if at > MAX_CLUSTER_OFFSET {
            return Err(too_large());
        }
        self.count(self.next);
        self.append(bytes)?;
        Ok(at)
    }

    /// If the next cluster is the first of a range, the block that counts the range stands there. Its
    /// place is left free until it is full.
    fn begin_block(&mut self) -> io::Result<()> {
        let index = self.g.reftable_index(HostCluster(self.next));
        if index < self.blocks.len() as u64 {
            return Ok(());
        }
        if (index + 1) * 8 > MAX_REFTABLE_BYTES {
            return Err(too_large());
        }
        if index > 0 {
            self.write_block()?;
            self.block.fill(0);
        }
        self.blocks.push(self.next << self.g.cluster_bits);
        self.count(self.next);
        self.append(&[])
    }

    /// Write the block of the range that is being filled to its place.
    fn write_block(&mut self) -> io::Result<()> {
        let Some(at) = self.blocks.last().copied() else {
            return Ok(());
        };
        if let Some(from) = at.checked_sub(self.pending_at) {
            let place = from as usize..from as usize + self.block.len();
            if let Some(place) = self.pending.get_mut(place) {
                place.copy_from_slice(&self.block);
            }
            return Ok(());
        }
        let mut bytes = self.out.buffer();
        bytes.clear();
        bytes.extend_from_slice(&self.block);
        self.out.write(at, bytes)
    }

    /// One more reference to a cluster of the range that is being filled.
    fn count(&mut self, cluster: u64) {
        let at = self.g.refblock_index(HostCluster(cluster)) * 2;
        let count = self.count_of(cluster << self.g.cluster_bits) + 1;
        if let Some(place) = self.block.get_mut(at..at + 2) {
            place.copy_from_slice(&count.to_be_bytes());
        }
    }

    fn count_of(&self, offset: u64) -> u16 {
        let at = self.g.refblock_index(self.g.cluster_of(offset)) * 2;
        let word = self.block.get(at..at + 2).unwrap_or_default();
        word.try_into().map_or(0, u16::from_be_bytes)
    }

    /// Put a cluster, filled up with zeros, behind what is to be written.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.pending.extend_from_slice(bytes);
        self.next += 1;
        let end = (self.next << self.g.cluster_bits) - self.pending_at;
        self.pending.resize(end as usize, 0);
        self.send(CHUNK)
    }

    /// Write what is pending if it is so much; the last two clusters only when nothing can come into them.
    fn send(&mut self, enough: usize) -> io::Result<()> {
        if self.pending.len() < enough.max(1) {
            return Ok(());
        }
        let open = self.room.end == self.next << self.g.cluster_bits;
        let kept = if open && enough > 0 {
            2 * self.g.cluster_len()
        } else {
            0
        };
        let until = self.pending.len().saturating_sub(kept);
        if until == 0 {
            return Ok(());
        }
        let mut next = self.out.buffer();
        next.clear();
        next.extend_from_slice(self.pending.get(until..).unwrap_or_default());
        let mut full = std::mem::replace(&mut self.pending, next);
        full.truncate(until);
        let at = self.pending_at;
        self.pending_at += until as u64;
        self.out.write(at, full)
    }
}
