//! Compressed clusters: those behind one another in the file are read together, and unpacked on all
//! processors, or handed out as they are stored, for who writes them to another image.

use super::mapping::Extent;
use crate::error::{Error, Result};
use crate::format::compress::{Compression, Unpacker};
use crate::format::geometry::Geometry;
use crate::image::device::Device;
use crate::image::reading::Layer;
use crate::image::{device, Image};
use crate::io::lock;
use crate::room;
use std::ops::Range;
use std::sync::Mutex;

/// Compressed clusters are read in portions of this many bytes of the file, if one does not take
/// more, and this many clusters.
const PACKED: u64 = 2 << 20;
pub(super) const MOST_CLUSTERS: u64 = 1024;
/// To start a thread takes as long as unpacking some tens of KiB.
const WORTH_A_THREAD: u64 = 256 << 10;
/// Entries say how long a compressed cluster is in these.
const SECTOR: usize = 512;

/// Compressed clusters as they are stored.
#[derive(Default)]
pub struct PackedRun {
    /// The file's bytes.
    pub bytes: Vec<u8>,
    /// Guest clusters, one behind the other.
    pub clusters: Vec<PackedCluster>,
}

/// A compressed cluster of a [`PackedRun`].
pub struct PackedCluster {
    /// Where it stands in the run's bytes. Its own end lies in the last sector of this, which is the
    /// first one of the next cluster then; where no other follows there, it is the end itself.
    pub range: Range<usize>,
    /// It is known to hold nothing but zeros.
    pub zero: bool,
}

/// Where compressed clusters are in the file.
#[derive(Default)]
pub(super) struct Portion {
    /// Neighbours in one request: its offset, its place in what is read, how long it is.
    requests: Vec<(u64, usize, usize)>,
    /// Of each cluster the place in what is read.
    pub(super) clusters: Vec<Range<usize>>,
    total: usize,
}

impl Portion {
    /// Is there room for a cluster of so many bytes?
    pub(super) fn takes(&self, bytes: u64) -> bool {
        let n = self.clusters.len() as u64;
        n == 0 || n < MOST_CLUSTERS && self.total as u64 + bytes <= PACKED
    }

    pub(super) fn add(&mut self, offset: u64, bytes: u64) -> Result<()> {
        let bytes = bytes as usize;
        // The last sector of a cluster is often the first of the next one.
        if let Some((start, place, long)) = self.requests.last_mut() {
            let ahead = offset.checked_sub(*start).filter(|a| *a <= *long as u64);
            if let Some(ahead) = ahead {
                let first = *place + ahead as usize;
                *long = (*long).max(ahead as usize + bytes);
                self.total = *place + *long;
                return room::push(&mut self.clusters, first..first + bytes);
            }
        }
        room::push(&mut self.requests, (offset, self.total, bytes))?;
        room::push(&mut self.clusters, self.total..self.total + bytes)?;
        self.total += bytes;
        Ok(())
    }

    pub(super) fn read(&self, dev: &mut Device, bytes: &mut Vec<u8>) -> Result<()> {
        room::resize(bytes, self.total, 0)?;
        for (offset, place, long) in &self.requests {
            let part = bytes.get_mut(*place..place + long).unwrap_or_default();
            dev.read("Could not read a compressed cluster", *offset, part)?;
        }
        Ok(())
    }
}

/// A cluster to unpack.
pub(super) struct ToUnpack<'a> {
    pub(super) packed: &'a [u8],
    pub(super) out: &'a mut [u8],
    /// How many bytes it takes.
    pub(super) done: Result<usize>,
}

/// Unpack clusters, on all processors if they are worth it.
pub(super) fn unpack_all(kind: Compression, jobs: &mut [ToUnpack]) {
    let bytes: u64 = jobs.iter().map(|j| j.out.len() as u64).sum();
    let many = jobs.len() > 1 && bytes >= WORTH_A_THREAD;
    let left = Mutex::new(jobs.iter_mut());
    let work = || {
        let Ok(mut unpacker) = Unpacker::new(kind) else {
            return; // the others do it, or there is no memory for any
        };
        loop {
            let job = left.lock().ok().and_then(|mut jobs| jobs.next());
            let Some(job) = job else { break };
            job.done = unpacker.unpack(job.packed, job.out);
        }
    };
    match many {
        true => lock::together(&work),
        false => work(),
    }
}

impl Image {
    /// Sizes of clusters and tables.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// How compressed clusters are packed.
    #[must_use]
    pub fn compression(&self) -> Compression {
        self.header.compression
    }

    /// Open the files behind the image now, and not when they are first needed.
    ///
    /// # Errors
    /// Those of opening a backing file.
    pub fn open_backing_files(&mut self) -> Result<()> {
        self.begin_read()?;
        self.open_chain()
    }

    /// Whole compressed clusters that follow one another from `offset` of the disk now seen, in one file of
    /// the backing chain, as they are stored. Returns how many guest bytes that are, of `max` at most; 0 if
    /// there are none, or if that file has clusters of another size or kind than the image.
    ///
    /// Unpacked are only those whose end no other cluster shows, and small ones, which may be zeros; and the
    /// one in which the disk ends, which is left out if something else than zeros is behind that end.
    ///
    /// # Errors
    /// `EIO` for damaged tables, and for damaged clusters among those that are unpacked; those of opening
    /// a backing file.
    pub fn read_packed(&mut self, offset: u64, max: u64, run: &mut PackedRun) -> Result<u64> {
        self.begin_read()?;
        let (g, kind) = (self.header.geometry, self.header.compression);
        let (size, length) = (g.cluster_size(), self.length());
        let (mut depth, mut portion) = (None, Portion::default());
        run.clusters.clear();
        let mut at = offset;
        while g.in_cluster(at) == 0 && at < length {
            // The disk may end in it.
            let part = size.min(length - at);
            if at - offset + part > max {
                break;
            }
            let piece = self.piece_in_chain(0, at, part)?;
            let here = *depth.get_or_insert(piece.depth);
            if !piece.compressed || piece.length != part || piece.depth != here {
                break;
            }
            let Some(image) = self.packed_alike(here) else {
                break;
            };
            let (Extent::Compressed { entry, at: 0 }, _) = image.extent(None, at, size)? else {
                break;
            };
            let (host, bytes) = image.packed(entry)?;
            if !portion.takes(bytes) {
                break;
            }
            portion.add(host, bytes)?;
            at += part;
        }
        if let Some(image) = depth.and_then(|d| self.packed_alike(d)) {
            portion.read(&mut image.dev, &mut run.bytes)?;
        }
        let behind = g.in_cluster(at) as usize;
        let ends = run.find_ends(kind, g, offset, portion.clusters, behind)?;
        if !ends {
            run.clusters.pop();
            at -= behind as u64;
        }
        Ok(at - offset)
    }

    /// The image at this depth, if its clusters could be this one's.
    fn packed_alike(&mut self, depth: u32) -> Option<&mut Image> {
        let (g, kind) = (self.header.geometry, self.header.compression);
        let image = match depth.checked_sub(1) {
            None => self,
            Some(behind) => match self.behind.chain.as_mut()?.get_mut(behind as usize)? {
                Layer::Qcow2(image) => &mut **image,
                Layer::Raw(..) => return None,
            },
        };
        let header = &image.header;
        let alike = header.geometry.cluster_bits == g.cluster_bits && header.compression == kind;
        (alike && header.crypt_method == 0).then_some(image)
    }
}

impl PackedRun {
    /// These are the clusters, each up to the end of a sector: unpack those of which more must be known. The
    /// disk may end in the last one, behind so many bytes: false, if it holds something behind them.
    fn find_ends(
        &mut self,
        kind: Compression,
        g: Geometry,
        offset: u64,
        clusters: Vec<Range<usize>>,
        last: usize,
    ) -> Result<bool> {
        let size = g.cluster_len();
        // Zeros take a thousandth with zlib, and less with zstd.
        let small = (size >> 8) + 2 * SECTOR;
        for (n, range) in clusters.iter().enumerate() {
            let last_sector = range.end.saturating_sub(SECTOR).max(range.start) + 1..range.end;
            let shown = clusters
                .get(n + 1)
                .is_some_and(|next| last_sector.contains(&next.start));
            let cluster = PackedCluster {
                range: range.start..range.end,
                zero: !shown || range.len() <= small || range.len() >= size,
            };
            room::push(&mut self.clusters, cluster)?;
        }
        let unknown = self.clusters.iter().filter(|c| c.zero).count();
        let mut data = device::zeroed((unknown * size) as u64)?;
        let mut outs = data.chunks_exact_mut(size);
        let mut jobs = Vec::new();
        for cluster in self.clusters.iter().filter(|c| c.zero) {
            let job = ToUnpack {
                packed: self
                    .bytes
                    .get(cluster.range.start..cluster.range.end)
                    .unwrap_or_default(),
                out: outs.next().unwrap_or_default(),
                done: Err(Error::NoMemory(size as u64)),
            };
            room::push(&mut jobs, job)?;
        }
        unpack_all(kind, &mut jobs);
        let mut ends = true;
        let mut jobs = jobs.into_iter();
        for (n, cluster) in self.clusters.iter_mut().enumerate().filter(|(_, c)| c.zero) {
            let Some(job) = jobs.next() else { break };
            let used = job.done.map_err(|e| match e {
                Error::Corrupt(text) => {
                    let guest = offset + (n * size) as u64;
                    Error::Corrupt(format!("{text} (guest offset: {guest:#x})"))
                }
                other => other,
            })?;
            cluster.range.end = cluster.range.start + used;
            let (disk, behind) = job.out.split_at(match last {
                _ if n + 1 < clusters.len() => size,
                0 => size,
                last => last,
            });
            let zero = |bytes: &[u8]| bytes.iter().all(|b| *b == 0);
            (cluster.zero, ends) = (zero(disk), zero(behind));
        }
        Ok(ends)
    }
}
