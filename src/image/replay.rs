//! A verb in memory: what QEMU would do to the image, before a byte of it is written.

use super::device::{self, Device};
use super::overlap::{Kind, Overlap};
use super::refcount::{Freed, Refcounts};
use super::room::{self, Clusters, Known};
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, COPIED, OFFSET_MASK};
use crate::format::geometry::{Geometry, MAX_L1_BYTES, TABLE_ENTRY};
use crate::format::{features, header::Header};
use byteorder::{BigEndian, ByteOrder};

/// The fields in bytes 24 to 71 of the header that verbs switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Switched {
    pub(crate) size: u64,
    pub(crate) l1_size: u32,
    pub(crate) l1_offset: u64,
    pub(crate) nb_snapshots: u32,
    pub(crate) snapshots_offset: u64,
}

/// New contents for clusters that nothing published refers to.
#[derive(Debug)]
pub(crate) struct NewData {
    pub(crate) label: &'static str,
    pub(crate) offset: u64,
    pub(crate) data: Vec<u8>,
    /// It may be written when this many epochs are published.
    pub(crate) epoch: usize,
}

/// What the look-first half of a verb finds out.
pub(crate) struct Replay {
    pub(crate) g: Geometry,
    pub(crate) refs: Refcounts,
    pub(crate) overlap: Overlap,
    /// The header before the verb.
    pub(crate) before: Switched,
    /// The header as it is at this point of the replay.
    pub(crate) header: Switched,
    /// The header at the end of each finished epoch.
    pub(crate) epoch_headers: Vec<Switched>,
    /// The active L1 in memory.
    pub(crate) l1: Vec<u64>,
    /// L2 tables whose contents the replay has changed, by offset. An empty one is all zeros.
    pub(crate) tables: Known<Vec<u8>>,
    /// Clusters that a resize takes and the goto that follows frees again.
    pub(crate) temporary: Clusters,
    /// Those of them that are L2 tables of zeros. A resize may make millions, so they are not in
    /// `tables`.
    pub(crate) zero_tables: Clusters,
    /// The first L1 table's place and last contents, once it has moved. QEMU leaves them there.
    pub(crate) left_l1: Option<(u64, Vec<u64>)>,
    /// Contents for new clusters.
    pub(crate) new_data: Vec<NewData>,
    /// The length that QEMU's writes and truncates give the file, up to this point.
    pub(crate) reach: u64,
    /// The image is of version 3.
    v3: bool,
    /// A backing file shows through unallocated clusters.
    has_backing: bool,
    /// Where the refcount table was when `overlap` was last brought up to date.
    protected_table: u64,
}

/// The contents of an L2 table where they differ from the disk's, none for zeros, in a replay's
/// `tables` and `zero_tables`.
pub(super) fn changed_table<'a>(
    g: Geometry,
    tables: &'a Known<Vec<u8>>,
    zero_tables: &Clusters,
    offset: u64,
) -> Option<&'a [u8]> {
    let zeros = || zero_tables.contains(g.cluster_of(offset).0);
    match tables.get(offset) {
        Some(table) => Some(table),
        None => zeros().then_some(&[]),
    }
}

impl Replay {
    pub(crate) fn new(
        header: &Header,
        l1: Vec<u64>,
        reftable: Vec<u64>,
        mut overlap: Overlap,
        has_backing: bool,
        length: u64,
        memory: u64,
    ) -> Replay {
        let g = header.geometry;
        let before = Switched {
            size: header.size,
            l1_size: header.l1_size,
            l1_offset: header.l1_offset,
            nb_snapshots: header.nb_snapshots,
            snapshots_offset: header.snapshots_offset,
        };
        overlap.seal();
        Replay {
            g,
            refs: Refcounts::new(
                g,
                header.reftable_offset,
                header.reftable_clusters.into(),
                reftable,
                memory,
            ),
            overlap,
            before,
            header: before,
            epoch_headers: Vec::new(),
            l1,
            tables: Known::default(),
            temporary: Clusters::default(),
            zero_tables: Clusters::default(),
            left_l1: None,
            new_data: Vec::new(),
            reach: length,
            v3: header.version >= 3,
            has_backing,
            protected_table: header.reftable_offset,
        }
    }

    /// Change header fields; they become visible with the publish of the current epoch.
    pub(crate) fn switch(&mut self, change: impl FnOnce(&mut Switched)) {
        self.close_epochs();
        change(&mut self.header);
    }

    /// Keep the header of epochs that have ended.
    #[allow(clippy::disallowed_methods)] // a verb has a handful of epochs
    pub(crate) fn close_epochs(&mut self) {
        while self.epoch_headers.len() < self.refs.epoch {
            self.epoch_headers.push(self.header);
        }
    }

    /// What follows is written after everything so far is published.
    pub(crate) fn next_epoch(&mut self) -> Result<()> {
        self.refs.next_epoch()?;
        self.close_epochs();
        Ok(())
    }

    /// QEMU protects the refcount table where it is now.
    fn follow_table(&mut self) -> Result<()> {
        let table = self.refs.table();
        if table.offset != self.protected_table {
            let (offset, bytes) = (table.offset, table.entries.len() as u64 * TABLE_ENTRY);
            self.overlap.release(Kind::Reftable, self.protected_table);
            self.overlap.protect(Kind::Reftable, offset, bytes)?;
            self.overlap.seal();
            self.protected_table = offset;
        }
        Ok(())
    }

    /// May `bytes` at `offset` get new contents?
    pub(crate) fn check_new(&mut self, offset: u64, bytes: u64) -> Result<()> {
        self.follow_table()?;
        self.overlap.check(offset, bytes, None)
    }

    /// Contents for clusters that were allocated for it. What QEMU punched before shows zeros
    /// behind the data.
    pub(crate) fn write_new(
        &mut self,
        dev: &mut Device,
        label: &'static str,
        offset: u64,
        mut data: Vec<u8>,
    ) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let g = self.g;
        let end = offset.saturating_add(data.len() as u64);
        self.refs
            .forget_before_writing(dev, offset, data.len() as u64)?;
        self.close_epochs();
        let last = g.cluster_of(end - 1).0;
        if self.refs.punched.contains(last) {
            let zeros_end = g.round_up(end).min(self.reach.max(end));
            room::resize(&mut data, (zeros_end - offset) as usize, 0)?;
        }
        for c in g.cluster_of(offset).0..=last {
            self.refs.punched.remove(c);
        }
        self.reach = self.reach.max(end);
        let epoch = self.refs.epoch;
        let new = NewData {
            label,
            offset,
            data,
            epoch,
        };
        room::push(&mut self.new_data, new)
    }

    /// Has QEMU punched the cluster at `offset` in this verb?
    pub(crate) fn is_punched(&self, offset: u64) -> bool {
        self.refs.punched.contains(self.g.cluster_of(offset).0)
    }

    /// QEMU's `qcow2_grow_l1_table(exact)`: the L1 table moves to a place with room for `entries`.
    pub(crate) fn grow_l1(&mut self, dev: &mut Device, entries: u64) -> Result<()> {
        if entries <= self.l1.len() as u64 {
            return Ok(());
        }
        if entries > MAX_L1_BYTES / TABLE_ENTRY {
            return Err(Error::TooBig("L1 table would become too large".into()));
        }
        let zeros = std::iter::repeat(0);
        let all = self.l1.iter().copied().chain(zeros);
        let l1 = room::collected(all.take(entries as usize))?;

        let bytes = entries * TABLE_ENTRY;
        let offset = self.refs.alloc(dev, bytes)?;
        self.check_new(offset, bytes)?;
        self.write_new(dev, "L1 table", offset, device::bytes_of(&l1)?)?;

        let (old_offset, old_bytes) = (self.header.l1_offset, self.l1.len() as u64 * TABLE_ENTRY);
        // What a resize has entered in the table since stays in it when it is left. A table that an
        // epoch before this one publishes is the old disk's until then.
        let left = device::bytes_of(&self.l1)?;
        let epoch = self.refs.epoch;
        let unpublished = |w: &&mut NewData| w.offset == old_offset && w.epoch == epoch;
        match self.new_data.iter_mut().find(unpublished) {
            Some(made) => made
                .data
                .splice(..left.len().min(made.data.len()), left)
                .for_each(drop),
            None => self.left_l1 = Some((old_offset, room::copy_of(&self.l1)?)),
        }
        self.switch(|h| (h.l1_offset, h.l1_size) = (offset, entries as u32));
        self.refs
            .free(dev, old_offset, old_bytes, Freed::Kept, epoch)?;
        self.overlap.release(Kind::ActiveL1, old_offset);
        self.overlap.protect(Kind::ActiveL1, offset, bytes)?;
        self.overlap.seal();
        self.l1 = l1;
        Ok(())
    }

    /// The cluster at `offset` is taken for a while only; `zeros`: as an L2 table of zeros.
    pub(crate) fn take_for_a_while(&mut self, offset: u64, zeros: bool) -> Result<()> {
        let cluster = self.g.cluster_of(offset).0;
        if zeros {
            self.zero_tables.insert(cluster)?;
        } else {
            self.zero_tables.remove(cluster);
        }
        self.temporary.insert(cluster)
    }

    /// The active L1 table, if it is made in the last epoch: the header names it when all is done.
    pub(crate) fn grown_l1(&mut self) -> Option<&mut NewData> {
        let (offset, epoch) = (self.header.l1_offset, self.refs.epoch);
        let mut made = self.new_data.iter_mut();
        made.find(|w| w.offset == offset && w.epoch == epoch)
    }

    /// The contents of an L2 table at this point of the replay; none for zeros.
    fn read_table(&self, dev: &mut Device, offset: u64) -> Result<Vec<u8>> {
        match changed_table(self.g, &self.tables, &self.zero_tables, offset) {
            Some(table) => room::copy_of(table),
            None if dev.ends_before(offset)? => Ok(Vec::new()),
            None => dev.read_vec("Could not read an L2 table", offset, self.g.cluster_size()),
        }
    }

    /// QEMU's `get_cluster_table`: the active L2 table at `l1_index`, made or copied if the L1 does
    /// not own it. Returns its offset and contents, none for zeros: millions of tables may be made.
    /// `forgotten_in`: the epoch whose publish makes the disk forget the table that is left.
    pub(crate) fn own_table(
        &mut self,
        dev: &mut Device,
        l1_index: u64,
        forgotten_in: usize,
    ) -> Result<(u64, Vec<u8>)> {
        let g = self.g;
        let old = self.l1.get(l1_index as usize).copied().unwrap_or(0);
        let offset = old & OFFSET_MASK;
        if g.in_cluster(offset) != 0 {
            return Err(Error::Corrupt(format!(
                "L2 table offset {offset:#x} unaligned (L1 index: {l1_index:#x})"
            )));
        }
        if old & COPIED != 0 && offset != 0 {
            return Ok((offset, self.read_table(dev, offset)?));
        }
        if old & COPIED != 0 {
            return Err(Error::Corrupt(format!(
                "L1 entry {l1_index:#x} has flags but no offset"
            )));
        }
        let new = self.refs.alloc(dev, g.cluster_size())?;
        if new == 0 {
            return Err(Error::Corrupt(
                "Preventing invalid allocation of L2 table at offset 0".into(),
            ));
        }
        self.reach = self.reach.max(new.saturating_add(g.cluster_size()));
        let table = if offset == 0 {
            Vec::new()
        } else {
            self.read_table(dev, offset)?
        };
        if let Some(slot) = self.l1.get_mut(l1_index as usize) {
            *slot = new | COPIED;
        }
        if offset != 0 {
            self.refs
                .free(dev, offset, g.cluster_size(), Freed::Kept, forgotten_in)?;
        }
        Ok((new, table))
    }

    /// The L2 entry that QEMU leaves where a cluster is discarded so that it reads as zeros
    /// (`discard_in_l2_slice`, not full). `None`: it stays as it is.
    pub(crate) fn zeroed_entry(&self, word: &[u8]) -> Option<[u8; 16]> {
        let old = BigEndian::read_u64(word);
        let allocated = !matches!(
            entry::cluster(self.g, old),
            Cluster::Unallocated | Cluster::ZeroPlain
        );
        if !self.has_backing && !allocated {
            return None;
        }
        let mut new = [0u8; 16];
        if self.g.extended_l2 {
            BigEndian::write_u64(&mut new[8..], entry::SUBCLUSTERS_ALL_ZERO);
        } else if self.v3 {
            BigEndian::write_u64(&mut new[..8], entry::ZERO);
        }
        (new.get(..word.len()) != Some(word)).then_some(new)
    }

    /// Take the active disk's reference from what an L2 entry refers to; the bytes stay (QEMU's
    /// `qcow2_free_any_cluster(NEVER)`), as the publish of epoch `forgotten_in` makes the disk do.
    pub(crate) fn forget_cluster(
        &mut self,
        dev: &mut Device,
        word: &[u8],
        forgotten_in: usize,
    ) -> Result<()> {
        let g = self.g;
        match entry::cluster(g, BigEndian::read_u64(word)) {
            Cluster::Standard(at) | Cluster::ZeroAllocated(at) if g.in_cluster(at) == 0 => self
                .refs
                .free(dev, at, g.cluster_size(), Freed::Kept, forgotten_in),
            Cluster::Compressed { offset, length } => {
                self.refs
                    .free(dev, offset, length, Freed::Kept, forgotten_in)
            }
            _ => Ok(()),
        }
    }

    /// Set the length that QEMU's own truncate leaves.
    pub(crate) fn truncate(&mut self, length: u64) {
        self.reach = length;
        self.refs.reach = 0;
    }

    /// The file's length so far, refcount structures included.
    pub(crate) fn length(&self) -> u64 {
        self.reach.max(self.refs.reach)
    }

    /// Does the image have valid bitmaps, which a change of the guest's data would break?
    pub(crate) fn active_bitmaps(header: &Header, has_bitmaps: bool) -> bool {
        header.autoclear & features::BITMAPS != 0 && has_bitmaps
    }
}
