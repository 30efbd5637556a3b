//! A verb in memory: what QEMU would do to the image, before a byte of it is written.

pub(crate) mod named;
pub(crate) mod overlap;
mod remade;
pub(crate) mod resize;
pub(crate) mod walk;

use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, COPIED, OFFSET_MASK};
use crate::format::geometry::{Geometry, MAX_L1_BYTES, TABLE_ENTRY};
use crate::format::header::{Header, Meaning, Places};
use crate::image::device::{self, Device};
use crate::image::refcount::{Forgotten, Freed, Refcounts};
use crate::room;
use byteorder::{BigEndian, ByteOrder};
use overlap::{Overlap, Protected};
pub(crate) use remade::{Contents, Remade};

/// One place where the active L1 table has been during the verb.
#[derive(Clone, Copy, Debug)]
pub(crate) struct L1Place {
    pub(crate) offset: u64,
    pub(crate) entries: u32,
    /// `None`: where it was before the verb; else the epoch that made it.
    pub(crate) born: Option<usize>,
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
    /// What the image means in the end, as far as the replay has come.
    pub(crate) meaning: Meaning,
    /// Places of the active L1 table, the current one last.
    pub(crate) l1_places: Vec<L1Place>,
    /// The active L1 in memory.
    pub(crate) l1: Vec<u64>,
    pub(crate) remade: Remade,
    /// The first L1 table's place and last contents, once it has moved. QEMU leaves them there.
    pub(crate) left_l1: Option<(u64, Vec<u64>)>,
    /// Contents for new clusters.
    pub(crate) new_data: Vec<NewData>,
    /// QEMU has set the file's length.
    pub(crate) truncated: bool,
}

impl Replay {
    pub(crate) fn new(
        header: &Header,
        l1: Vec<u64>,
        reftable: Vec<u64>,
        mut overlap: Overlap,
        length: u64,
        memory: u64,
    ) -> Replay {
        let g = header.geometry;
        overlap.seal();
        Replay {
            g,
            refs: Refcounts::new(g, header.places(), reftable, length, memory),
            overlap,
            meaning: header.meaning(),
            l1_places: vec![L1Place {
                offset: header.l1_offset,
                entries: header.l1_size,
                born: None,
            }],
            l1,
            remade: Remade::default(),
            left_l1: None,
            new_data: Vec::new(),
            truncated: false,
        }
    }

    /// Where the active L1 table is now.
    pub(crate) fn l1_place(&self) -> L1Place {
        // `l1_places` is never empty: made with one, only pushed to.
        self.l1_places[self.l1_places.len() - 1]
    }

    /// Contents of the active L1 table, if it was made in the epoch that is not over: the header
    /// names it when all of that is written.
    pub(crate) fn unpublished_l1(&mut self) -> Option<&mut NewData> {
        let (place, epoch) = (self.l1_place(), self.refs.epoch());
        let mut made = self.new_data.iter_mut();
        made.find(|w| place.born == Some(epoch) && w.offset == place.offset && w.epoch == epoch)
    }

    /// May `bytes` at `offset` get new contents?
    pub(crate) fn check_new(&mut self, offset: u64, bytes: u64) -> Result<()> {
        // QEMU protects the refcount table where it is now.
        let table = self.refs.table();
        let bytes_of_table = table.entries.len() as u64 * TABLE_ENTRY;
        self.overlap.follow_reftable(table.offset, bytes_of_table)?;
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
        let last = g.cluster_of(end - 1).0;
        if self.refs.fates.is_punched(last) {
            let zeros_end = g.round_up(end).min(self.refs.reach.max(end));
            room::resize(&mut data, (zeros_end - offset) as usize, 0)?;
        }
        for c in g.cluster_of(offset).0..=last {
            self.refs.fates.rewrite(c);
        }
        self.refs.reach_to(end);
        let epoch = self.refs.epoch();
        let new = NewData {
            label,
            offset,
            data,
            epoch,
        };
        room::push(&mut self.new_data, new)
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

        // What a resize has entered in the table since stays in it when it is left. A table that an
        // epoch before this one publishes is the old disk's until then.
        let (old_offset, old_bytes) = (self.l1_place().offset, self.l1.len() as u64 * TABLE_ENTRY);
        let left = device::bytes_of(&self.l1)?;
        match self.unpublished_l1() {
            Some(made) => made
                .data
                .splice(..left.len().min(made.data.len()), left)
                .for_each(drop),
            None => self.left_l1 = Some((old_offset, room::copy_of(&self.l1)?)),
        }
        let epoch = self.refs.epoch();
        let place = L1Place {
            offset,
            entries: entries as u32,
            born: Some(epoch),
        };
        room::push(&mut self.l1_places, place)?;
        self.refs.free(
            dev,
            old_offset,
            old_bytes,
            Freed::Kept,
            Forgotten::With(epoch),
        )?;
        self.overlap.release(Protected::ActiveL1, &[old_offset]);
        self.overlap.protect(Protected::ActiveL1, offset, bytes)?;
        self.overlap.seal();
        self.l1 = l1;
        Ok(())
    }

    /// The contents of an L2 table at this point of the replay.
    fn read_table(&self, dev: &mut Device, offset: u64) -> Result<Contents> {
        let bytes = match self.remade.get(self.g, offset) {
            Some([]) => return Ok(Contents::Zeros),
            Some(table) => room::copy_of(table)?,
            None if dev.ends_before(offset)? => return Ok(Contents::Zeros),
            None => dev.read_vec("Could not read an L2 table", offset, self.g.cluster_size())?,
        };
        Ok(Contents::Bytes(bytes))
    }

    /// QEMU's `get_cluster_table`: the active L2 table at `l1_index`, made or copied if the L1 does
    /// not own it. Returns its offset and contents.
    /// `forgotten`: the epoch whose publish makes the disk forget the table that is left.
    pub(crate) fn own_table(
        &mut self,
        dev: &mut Device,
        l1_index: u64,
        forgotten: Forgotten,
    ) -> Result<(u64, Contents)> {
        let g = self.g;
        let old = self.l1.get(l1_index as usize).copied().unwrap_or(0);
        let offset = old & OFFSET_MASK;
        if offset != 0 || old & COPIED != 0 {
            named::check_l2_offset(g, offset, l1_index as usize)?;
        }
        if old & COPIED != 0 {
            return Ok((offset, self.read_table(dev, offset)?));
        }
        let new = self.refs.alloc(dev, g.cluster_size())?;
        if new == 0 {
            return Err(Error::Corrupt(
                "Preventing invalid allocation of L2 table at offset 0".into(),
            ));
        }
        self.refs.reach_to(new.saturating_add(g.cluster_size()));
        let table = if offset == 0 {
            Contents::Zeros
        } else {
            self.read_table(dev, offset)?
        };
        if let Some(slot) = self.l1.get_mut(l1_index as usize) {
            *slot = new | COPIED;
        }
        if offset != 0 {
            self.refs
                .free(dev, offset, g.cluster_size(), Freed::Kept, forgotten)?;
        }
        Ok((new, table))
    }

    /// Take the active disk's reference from what an L2 entry refers to; the bytes stay (QEMU's
    /// `qcow2_free_any_cluster(NEVER)`), as the publish of epoch `forgotten` makes the disk do.
    pub(crate) fn forget_cluster(
        &mut self,
        dev: &mut Device,
        word: &[u8],
        forgotten: Forgotten,
    ) -> Result<()> {
        let g = self.g;
        match entry::cluster(g, BigEndian::read_u64(word)) {
            Cluster::Standard(at) | Cluster::ZeroAllocated(at) if g.in_cluster(at) == 0 => self
                .refs
                .free(dev, at, g.cluster_size(), Freed::Kept, forgotten),
            Cluster::Compressed { offset, length } => {
                self.refs.free(dev, offset, length, Freed::Kept, forgotten)
            }
            _ => Ok(()),
        }
    }

    /// Set the length that QEMU's own truncate leaves.
    pub(crate) fn truncate(&mut self, length: u64) {
        (self.refs.reach, self.truncated) = (length, true);
    }

    /// Where the tables stand when this epoch is published.
    pub(crate) fn places_at(&self, epoch: usize) -> Places {
        let by_now = |born: Option<usize>| born.is_none_or(|e| e <= epoch);
        let table = self.refs.tables().iter().rfind(|t| by_now(t.born));
        let l1 = self.l1_places.iter().rfind(|p| by_now(p.born)).copied();
        // Both have a place that they had before the verb.
        let (table, l1) = (
            table.unwrap_or(self.refs.table()),
            l1.unwrap_or(self.l1_place()),
        );
        Places {
            l1_offset: l1.offset,
            l1_size: l1.entries,
            reftable_offset: table.offset,
            reftable_clusters: table.clusters as u32,
        }
    }

    /// The file's length in the end.
    pub(crate) fn final_length(&self) -> u64 {
        let blocks = self.refs.loaded().filter(|(_, b)| b.is_qemus());
        let end = blocks
            .map(|(_, b)| b.offset.saturating_add(self.g.cluster_size()))
            .max()
            .unwrap_or(0);
        self.refs.reach.max(end)
    }
}
