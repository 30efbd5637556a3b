//! An open image: its state in memory, and what every verb shares.

use crate::error::{Error, Result};
use crate::flags::OpenFlags;
use crate::format::features;
use crate::format::geometry::{MAX_L1_BYTES, TABLE_ENTRY};
use crate::format::header::{Extensions, Header, HEADER_BYTES};
use crate::io::file::{FileOptions, FileStorage, LockMode};
use crate::io::Storage;
use crate::snapshot::Snapshot;
use device::Device;
use overlap::{Kind, Overlap};
use progress::Progress;
use replay::Replay;
use update::{Plan, Update};

mod chain;
mod counts;
mod damage;
pub(crate) mod device;
mod mapping;
pub(crate) mod overlap;
pub(crate) mod progress;
pub(crate) mod refcount;
pub(crate) mod replay;
pub(crate) mod resize;
mod status;
pub(crate) mod update;
pub(crate) mod walk;

pub use progress::{ProgressHook, Stage};
pub use status::BlockStatus;

/// What the last changing verb did to the image (`qcow2_last_outcome()`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Outcome {
    /// No verb has run yet.
    None = 0,
    /// The image means what it meant before.
    Unchanged = 1,
    /// The verb is done (perhaps with leaked clusters).
    Done = 2,
    /// Old or new state: open the image again to know.
    Unknown = 3,
}

/// What may still be done with a handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Good,
    /// A write failed: only reading goes on.
    NoChanges,
    /// The state of the image is not known any more, or a panic was caught.
    Spent,
}

/// What `load_tmp` put in front of the active disk.
pub(crate) struct View {
    pub(crate) l1: Vec<u64>,
    pub(crate) size: u64,
}

/// The snapshot table in memory.
#[derive(Default)]
pub(crate) struct SnapshotList {
    pub(crate) entries: Vec<Snapshot>,
    /// Bytes of the table on disk.
    pub(crate) size: u64,
    /// False after `free_snapshots`: every verb loads the table again first.
    pub(crate) loaded: bool,
}

/// One open image.
pub struct Image {
    pub(crate) dev: Device,
    pub(crate) flags: OpenFlags,
    pub(crate) header: Header,
    pub(crate) extensions: Extensions,
    pub(crate) backing_file: Vec<u8>,
    pub(crate) l1: Vec<u64>,
    pub(crate) reftable: Vec<u64>,
    pub(crate) snapshots: SnapshotList,
    pub(crate) view: Option<View>,
    l2_cache: mapping::L2Cache,
    unpacked: Option<mapping::Unpacked>,
    /// Where the image is, for names in it that are relative; unknown behind callbacks.
    path: Option<std::path::PathBuf>,
    chain: Option<Vec<chain::Layer>>,
    data_file: Option<Device>,
    /// Names of the files of the chain for C callers, made when first asked for.
    host_names: Vec<Option<std::ffi::CString>>,
    /// Were clusters allocated ahead? Found out on first use.
    preallocated: Option<bool>,
    standing: Standing,
    outcome: Outcome,
    remark: Option<String>,
    /// Bytes that refcounts may take in memory.
    pub(crate) refcount_memory: u64,
    /// Opened to be checked, and not found good yet: no verb may change it.
    pub(crate) unchecked: bool,
}

impl Image {
    /// Open an image by path. QEMU's locks are taken before the header is read, unless the flags
    /// say otherwise.
    ///
    /// # Errors
    /// The system's, `InUse` when a guest, qemu-img or another handle has the image open, and those
    /// of [`Image::open_storage`].
    pub fn open(path: &std::path::Path, flags: OpenFlags) -> Result<Image> {
        let storage = FileStorage::open_path(path, &Image::file_options(flags))?;
        let mut image = Image::open_storage(Box::new(storage), flags)?;
        image.path = Some(path.to_owned());
        Ok(image)
    }

    /// Open the image that a descriptor refers to; the descriptor stays the caller's.
    ///
    /// # Errors
    /// Those of [`FileStorage::open_fd`] and [`Image::open_storage`].
    pub fn open_fd(fd: std::os::fd::RawFd, flags: OpenFlags) -> Result<Image> {
        let storage = FileStorage::open_fd(fd, &Image::file_options(flags))?;
        let mut image = Image::open_storage(Box::new(storage), flags)?;
        // Names in the image are relative to the folder that the file is in, if it still has one.
        image.path = std::fs::read_link(format!("/proc/self/fd/{fd}"))
            .ok()
            .filter(|p| p.is_absolute());
        Ok(image)
    }

    /// How a file is to be opened for these flags.
    pub fn file_options(flags: OpenFlags) -> FileOptions {
        FileOptions {
            write: flags.has(OpenFlags::RDWR),
            no_flush: flags.has(OpenFlags::NO_FLUSH),
            no_discard: flags.has(OpenFlags::NO_DISCARD),
            lock: if flags.has(OpenFlags::NO_LOCK) {
                LockMode::None
            } else if flags.has(OpenFlags::FORCE_SHARE) {
                LockMode::ForceShare
            } else if flags.has(OpenFlags::RDWR) {
                LockMode::ReadWrite
            } else {
                LockMode::ReadOnly
            },
        }
    }

    /// Open an image on any storage (`qcow2_do_open`). No lock is taken here and nothing is written.
    /// When this fails the storage is dropped without [`Storage::close`].
    ///
    /// # Errors
    /// `Invalid`, `TooBig` and `Corrupt` for damaged images, as QEMU answers; `Unsupported` for
    /// features that are not known, and for the dirty bit read-write; `Access` for the corrupt bit
    /// read-write.
    pub fn open_storage(storage: Box<dyn Storage>, flags: OpenFlags) -> Result<Image> {
        Image::on_device(Device::new(storage)?, flags)
    }

    fn on_device(mut dev: Device, flags: OpenFlags) -> Result<Image> {
        let read_write = flags.has(OpenFlags::RDWR);
        let mut first = dev.read_vec("Could not read qcow2 header", 0, HEADER_BYTES as u64)?;
        // The extensions may fill the first cluster, whose size the header says.
        let bits = first.get(20..24).map_or(0, byteorder::BigEndian::read_u32);
        if (9..=21).contains(&bits) {
            first = dev.read_vec("Could not read qcow2 header", 0, 1 << bits)?;
        }
        let check = flags.has(OpenFlags::CHECK);
        let header = if check {
            Header::parse_to_check(&first)?
        } else {
            Header::parse(&first, read_write)?
        };
        let l1 = dev.read_vec(
            "Could not read L1 table",
            header.l1_offset,
            u64::from(header.l1_size) * TABLE_ENTRY,
        )?;
        let l1 = device::words(&l1)?;
        debug_assert!(l1.len() as u64 * TABLE_ENTRY <= MAX_L1_BYTES);
        let g = header.geometry;
        let reftable = dev.read_vec(
            "Could not read the refcount table",
            header.reftable_offset,
            u64::from(header.reftable_clusters) << g.cluster_bits,
        )?;
        let reftable = device::words(&reftable)?;
        let extensions = header.extensions(&first)?;
        let backing_file = header.backing_file(&first)?.to_vec();
        let mut image = Image {
            dev,
            flags,
            header,
            extensions,
            backing_file,
            l1,
            reftable,
            snapshots: SnapshotList::default(),
            view: None,
            l2_cache: mapping::L2Cache::default(),
            unpacked: None,
            path: None,
            chain: None,
            data_file: None,
            host_names: Vec::new(),
            preallocated: None,
            standing: Standing::Good,
            outcome: Outcome::None,
            remark: None,
            refcount_memory: counts::MOST,
            unchecked: check,
        };
        match image.load_snapshots() {
            Ok(()) => {}
            Err(e @ Error::Io { .. }) => return Err(e),
            Err(_) if check => image.snapshots = SnapshotList::default(),
            Err(e) => return Err(e),
        }
        if read_write && !check && image.header.incompatible & features::DIRTY != 0 {
            return Err(Error::Unsupported(
                "qcow2: Image was not closed properly (dirty bit set); repair it first with 'qcow2-snapshot check -r all'"
                    .into(),
            ));
        }
        Ok(image)
    }

    /// Close the image. Nothing is written.
    ///
    /// # Errors
    /// Those of closing or unlocking the file only; the handle is gone in any case.
    pub fn close(self) -> Result<()> {
        self.dev.close()
    }

    /// Virtual size of the disk now seen, in bytes (whole 512-byte sectors).
    pub fn length(&self) -> u64 {
        self.view
            .as_ref()
            .map_or(self.header.disk_size(), |v| v.size)
    }

    /// What the last changing verb did.
    pub fn last_outcome(&self) -> Outcome {
        self.outcome
    }

    /// A remark on the last verb that succeeded.
    pub fn remark(&self) -> Option<&str> {
        self.remark.as_deref()
    }

    pub(crate) fn set_remark(&mut self, text: &str) {
        self.remark = Some(text.to_owned());
    }

    /// Tell `hook` how far a changing verb is, and let it cancel the verb; `None` takes it away.
    pub fn set_progress(&mut self, hook: Option<Box<ProgressHook>>) {
        self.dev.progress = Progress::new(hook);
    }

    /// Make the handle refuse everything but close, after a panic in the middle of a call.
    pub fn poison(&mut self) {
        if self.outcome != Outcome::None {
            self.outcome = Outcome::Unknown;
        }
        self.standing = Standing::Spent;
    }

    /// The flags given at open.
    pub fn flags(&self) -> OpenFlags {
        self.flags
    }

    pub(crate) fn compat_2_1(&self) -> bool {
        self.flags.has(OpenFlags::COMPAT_2_1)
    }

    /// May the handle still be used to read?
    pub(crate) fn usable(&self) -> Result<()> {
        if self.standing == Standing::Spent {
            return Err(Error::Spent(
                "An earlier failure left the state of the image unknown; close the handle and open it again".into(),
            ));
        }
        Ok(())
    }

    /// Begin a changing verb: may this handle change the image at all?
    pub(crate) fn begin_change(&mut self) -> Result<()> {
        self.usable()?;
        self.remark = None;
        self.outcome = Outcome::Unchanged;
        if !self.flags.has(OpenFlags::RDWR) {
            return Err(Error::Access("The image is opened read-only".into()));
        }
        if self.standing == Standing::NoChanges {
            return Err(Error::Spent(
                "An earlier write failed; the image can be read but not changed until it is opened again".into(),
            ));
        }
        if self.unchecked {
            return Err(Error::NotPermitted(
                "The image is opened to be checked; repair it first, or open it without that flag"
                    .into(),
            ));
        }
        if self.header.has_data_file() {
            return Err(Error::Unsupported(
                "Internal snapshots are not supported on images with an external data file".into(),
            ));
        }
        if !self.snapshots.loaded {
            self.load_snapshots()?;
        }
        Ok(())
    }

    /// Begin a repair: as a verb, but whatever is wrong with the image.
    pub(crate) fn begin_repair(&mut self) -> Result<()> {
        self.usable()?;
        self.remark = None;
        self.outcome = Outcome::Unchanged;
        if !self.flags.has(OpenFlags::RDWR) {
            return Err(Error::Access("The image is opened read-only".into()));
        }
        if self.standing == Standing::NoChanges {
            return Err(Error::Spent(
                "An earlier write failed; the image can be read but not changed until it is opened again".into(),
            ));
        }
        self.dev.changed = false;
        Ok(())
    }

    /// What is true of the image should the next request of a repair fail.
    pub(crate) fn repairing(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }

    /// A repair is over.
    pub(crate) fn end_repair(&mut self, ended: bool) {
        self.forget_reads();
        if ended {
            self.outcome = Outcome::Done;
        } else if self.outcome == Outcome::Unknown {
            self.standing = Standing::Spent;
        } else if self.dev.changed && self.standing == Standing::Good {
            self.standing = Standing::NoChanges;
        }
    }

    /// Let refcounts take that many bytes of memory in a verb; the others go to a temporary file.
    #[doc(hidden)]
    pub fn limit_refcount_memory(&mut self, bytes: u64) {
        self.refcount_memory = bytes;
    }

    /// The state that a verb replays on.
    pub(crate) fn replay(&self) -> Result<Replay> {
        let h = &self.header;
        let mut overlap = Overlap::new(h.geometry, &self.l1, &self.reftable);
        overlap.check_refblocks()?;
        overlap.protect(
            Kind::ActiveL1,
            h.l1_offset,
            u64::from(h.l1_size) * TABLE_ENTRY,
        );
        overlap.protect(
            Kind::Reftable,
            h.reftable_offset,
            u64::from(h.reftable_clusters) << h.geometry.cluster_bits,
        );
        overlap.protect(Kind::SnapshotTable, h.snapshots_offset, self.snapshots.size);
        for s in &self.snapshots.entries {
            overlap.protect(
                Kind::InactiveL1,
                s.l1_table_offset,
                u64::from(s.l1_size) * TABLE_ENTRY,
            );
        }
        if let Some((offset, bytes)) = self.extensions.bitmap_directory {
            overlap.protect(Kind::BitmapDirectory, offset, bytes);
        }
        Ok(Replay::new(
            h,
            self.l1.clone(),
            self.reftable.clone(),
            overlap,
            !self.backing_file.is_empty(),
            self.dev.length(),
            self.refcount_memory,
        ))
    }

    /// Write what a verb has found out, and make memory say what the disk says.
    pub(crate) fn commit(
        &mut self,
        mut replay: Replay,
        plan: &Plan,
        list: Vec<Snapshot>,
        table_size: u64,
    ) -> Result<()> {
        self.check_damage(&mut replay, plan, &list, table_size)?;
        replay.refs.check_overwrites()?;
        let unknown = self.header.autoclear & !features::AUTOCLEAR_KNOWN;
        let autoclear = (unknown != 0).then_some(self.header.autoclear & features::AUTOCLEAR_KNOWN);
        self.dev.changed = false;
        let mut update = Update {
            dev: &mut self.dev,
            outcome: Outcome::Unchanged,
        };
        let result = update.commit(&mut replay, plan, autoclear);
        let (outcome, started) = (update.outcome, self.dev.changed);
        self.outcome = outcome;
        self.forget_reads();
        if result.is_err() {
            self.standing = match (outcome, started) {
                (Outcome::Unknown, _) => Standing::Spent,
                (_, true) => Standing::NoChanges,
                _ => self.standing,
            };
        }
        if outcome == Outcome::Done {
            let h = &mut self.header;
            h.size = replay.header.size;
            h.l1_size = replay.header.l1_size;
            h.l1_offset = replay.header.l1_offset;
            h.nb_snapshots = replay.header.nb_snapshots;
            h.snapshots_offset = replay.header.snapshots_offset;
            let table = replay.refs.table();
            h.reftable_offset = table.offset;
            h.reftable_clusters = table.clusters as u32;
            if let Some(bits) = autoclear {
                h.autoclear = bits;
            }
            self.reftable = table.entries.clone();
            self.l1 = replay.l1;
            self.snapshots = crate::image::SnapshotList {
                entries: list,
                size: table_size,
                loaded: true,
            };
        }
        result
    }

    /// Drop what was cached of the disk seen so far.
    pub(crate) fn forget_reads(&mut self) {
        (self.l2_cache, self.unpacked) = (mapping::L2Cache::default(), None);
        self.preallocated = None;
    }

    /// Does the image have valid persistent bitmaps?
    pub(crate) fn active_bitmaps(&self) -> bool {
        Replay::active_bitmaps(&self.header, self.extensions.has_bitmaps)
    }
}

use byteorder::ByteOrder;
