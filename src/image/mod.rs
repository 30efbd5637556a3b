//! An open image: its state in memory, and what every verb shares.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

use crate::error::{Error, Result};
use crate::flags::OpenFlags;
use crate::format::extensions::Extensions;
use crate::format::features;
use crate::format::geometry::{MAX_L1_BYTES, TABLE_ENTRY};
use crate::format::header::{Header, HEADER_BYTES};
use crate::io::file::{FileOptions, FileStorage, LockMode};
use crate::io::{Stamp, Storage};
use crate::room;
use crate::snapshot::{copies, Snapshot};
use device::Device;
use plan::Plan;
use progress::Progress;
use reading::{Behind, Caches, Place};
use replay::overlap::{Overlap, Protected};
use replay::Replay;
use standing::{Last, Standing};

pub(crate) mod device;
mod layout;
pub(crate) mod plan;
pub(crate) mod progress;
pub(crate) mod reading;
pub(crate) mod refcount;
pub(crate) mod replay;
mod standing;
pub(crate) mod tables;

pub use layout::{Changed, ImageLayout};
pub use progress::{ProgressHook, Stage};
pub use standing::Outcome;

/// What `load_tmp` put in front of the active disk.
pub(crate) struct View {
    pub(crate) l1: Vec<u64>,
    pub(crate) size: u64,
    pub(crate) of: Snapshot,
    /// It was deleted by somebody else.
    pub(crate) gone: bool,
}

/// The snapshot table in memory.
#[derive(Default)]
pub(crate) struct SnapshotList {
    pub(crate) entries: Vec<Snapshot>,
    /// Bytes of the table on disk.
    pub(crate) size: u64,
    /// False after `free_snapshots`: every verb loads the table again first.
    pub(crate) loaded: bool,
    /// IDs and names for C callers, made when first asked for.
    pub(crate) texts: std::collections::BTreeMap<usize, [std::ffi::CString; 2]>,
}

/// One open image.
///
/// The order of the first two members is that of dropping them: what was opened through a caller's
/// functions is closed before these are.
pub struct Image {
    pub(crate) behind: Behind,
    pub(crate) dev: Device,
    pub(crate) flags: OpenFlags,
    pub(crate) header: Header,
    pub(crate) extensions: Extensions,
    pub(crate) backing_file: Vec<u8>,
    pub(crate) l1: Vec<u64>,
    pub(crate) reftable: Vec<u64>,
    pub(crate) snapshots: SnapshotList,
    pub(crate) view: Option<View>,
    pub(crate) caches: Caches,
    /// What the file's stamp was when header and tables were read, if a later change shows in it.
    seen: Option<Stamp>,
    last: Last,
    /// Bytes that refcounts may take in memory.
    pub(crate) refcount_memory: u64,
    /// The steps of the last verb, as text.
    #[cfg(test)]
    pub(crate) steps: String,
}

/// What an image says of itself, as it is on the disk.
type Loaded = (Header, Extensions, Vec<u8>, Vec<u64>, Vec<u64>);

/// Read header, extensions, backing file's name, L1 table and refcount table.
fn read_tables(dev: &mut Device, flags: OpenFlags) -> Result<Loaded> {
    let mut first = dev.read_vec("Could not read qcow2 header", 0, HEADER_BYTES as u64)?;
    // The extensions may fill the first cluster, whose size the header says.
    let bits = first.get(20..24).map_or(0, byteorder::BigEndian::read_u32);
    if (9..=21).contains(&bits) {
        first = dev.read_vec("Could not read qcow2 header", 0, 1 << bits)?;
    }
    let header = match flags.has(OpenFlags::CHECK) {
        true => Header::parse_to_check(&first)?,
        false => Header::parse(&first, flags.has(OpenFlags::RDWR))?,
    };
    let (l1, reftable) = (header.l1_bytes(), header.reftable_bytes());
    debug_assert!(l1 <= MAX_L1_BYTES);
    let l1 = dev.read_vec("Could not read L1 table", header.l1_offset, l1)?;
    let reftable = dev.read_vec(
        "Could not read the refcount table",
        header.reftable_offset,
        reftable,
    )?;
    let extensions = header.extensions(&first)?;
    let backing_file = room::copy_of(header.backing_file(&first)?)?;
    let (l1, reftable) = (device::words(&l1)?, device::words(&reftable)?);
    Ok((header, extensions, backing_file, l1, reftable))
}

impl Image {
    /// Open an image by path. QEMU's locks are taken before the header is read, unless the flags
    /// say otherwise.
    ///
    /// # Errors
    /// The system's, `InUse` when a guest, qemu-img or another handle has the image open, and those
    /// of [`Image::open_storage`].
    #[allow(clippy::disallowed_methods)] // one box
    pub fn open(path: &std::path::Path, flags: OpenFlags) -> Result<Image> {
        let place = Place::new(path.to_owned());
        let storage = FileStorage::open_path(path, &Image::file_options(flags))?;
        let mut image = Image::open_storage(Box::new(storage), flags)?;
        image.behind.place = Some(place);
        Ok(image)
    }

    /// Open the image that a descriptor refers to; the descriptor stays the caller's.
    ///
    /// # Errors
    /// Those of [`FileStorage::open_fd`] and [`Image::open_storage`].
    #[allow(clippy::disallowed_methods)] // one box
    pub fn open_fd(fd: std::os::fd::RawFd, flags: OpenFlags) -> Result<Image> {
        let storage = FileStorage::open_fd(fd, &Image::file_options(flags))?;
        let mut image = Image::open_storage(Box::new(storage), flags)?;
        // Names in the image are relative to the folder that the file is in, if it still has one.
        image.behind.place = std::fs::read_link(format!("/proc/thread-self/fd/{fd}"))
            .ok()
            .filter(|p| p.is_absolute())
            .map(Place::new);
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

    pub(crate) fn on_device(mut dev: Device, flags: OpenFlags) -> Result<Image> {
        let seen = dev.stamp().filter(Stamp::is_settled);
        let (header, extensions, backing_file, l1, reftable) = read_tables(&mut dev, flags)?;
        let mut image = Image {
            behind: Behind::default(),
            dev,
            flags,
            header,
            extensions,
            backing_file,
            l1,
            reftable,
            snapshots: SnapshotList::default(),
            view: None,
            caches: Caches::default(),
            seen,
            last: Last {
                standing: Standing::Good,
                outcome: Outcome::None,
                changed: Changed::default(),
                remark: None,
            },
            refcount_memory: refcount::counts::MOST,
            #[cfg(test)]
            steps: String::new(),
        };
        image.load_what_is_good()?;
        Ok(image)
    }

    /// Read header and tables into memory again, and forget what was read by the old ones.
    fn load(&mut self) -> Result<()> {
        // Until all is read nothing is known.
        self.seen = None;
        let stamp = self.dev.stamp();
        let tables = read_tables(&mut self.dev, self.flags)?;
        (
            self.header,
            self.extensions,
            self.backing_file,
            self.l1,
            self.reftable,
        ) = tables;
        self.forget_reads();
        (self.view, self.behind.chain, self.behind.data_file) = (None, None, None);
        self.load_what_is_good()?;
        self.seen = stamp.filter(Stamp::is_settled);
        Ok(())
    }

    /// Load the snapshot table; of an image that is going to be checked it may be damaged.
    fn load_what_is_good(&mut self) -> Result<()> {
        match self.load_snapshots() {
            Err(Error::TooBig(_) | Error::Invalid(_) | Error::Corrupt(_)) if self.unchecked() => {
                self.snapshots = SnapshotList::default();
            }
            loaded => loaded?,
        }
        let dirty = self.header.incompatible & features::DIRTY != 0;
        if dirty && self.flags.has(OpenFlags::RDWR) && !self.unchecked() {
            return Err(Error::Unsupported(
                "qcow2: Image was not closed properly (dirty bit set); repair it first with 'qcow2-snapshot check -r all'"
                    .into(),
            ));
        }
        Ok(())
    }

    /// Close the image. Nothing is written.
    ///
    /// # Errors
    /// Those of closing or unlocking the file only; the handle is gone in any case.
    pub fn close(mut self) -> Result<()> {
        self.behind.chain = None;
        self.behind.data_file = None;
        self.dev.close()
    }

    /// Virtual size of the disk now seen, in bytes (whole 512-byte sectors).
    pub fn length(&self) -> u64 {
        self.view
            .as_ref()
            .map_or(self.header.disk_size(), |v| v.size)
    }

    /// Tell `hook` how far a changing verb or [`Image::snapshot_usage`] is, and let it cancel that; `None`
    /// takes it away.
    pub fn set_progress(&mut self, hook: Option<Box<ProgressHook>>) {
        self.dev.progress = Progress::new(hook);
    }

    /// The flags given at open.
    pub fn flags(&self) -> OpenFlags {
        self.flags
    }

    pub(crate) fn compat_2_1(&self) -> bool {
        self.flags.has(OpenFlags::COMPAT_2_1)
    }

    /// Begin a call that reads what is seen of the disk.
    pub(crate) fn begin_read(&mut self) -> Result<()> {
        self.begin_look()?;
        if self.view.as_ref().is_some_and(|v| v.gone) {
            return Err(Error::NotFound(
                "The snapshot that is read from was deleted by somebody else".into(),
            ));
        }
        Ok(())
    }

    /// Begin a call that looks at the image. Where others may change it meanwhile (`FORCE_SHARE`), and have,
    /// everything is read again: by the tables of before, bytes of another place would be found.
    pub(crate) fn begin_look(&mut self) -> Result<()> {
        self.usable()?;
        if !self.flags.has(OpenFlags::FORCE_SHARE) {
            return Ok(());
        }
        let mut changed = self.has_changed();
        for layer in self.behind.chain.iter_mut().flat_map(|c| c.iter_mut()) {
            if let reading::Layer::Qcow2(image) = layer {
                changed |= image.has_changed();
            }
        }
        if changed {
            self.load_again()?;
        }
        Ok(())
    }

    /// May somebody have changed the file since its tables were read?
    fn has_changed(&mut self) -> bool {
        let stamp = self.dev.stamp();
        stamp.is_some() && stamp != self.seen
    }

    fn load_again(&mut self) -> Result<()> {
        let (view, wanted) = (self.view.take(), self.snapshots.loaded);
        let loaded = self.dev.length_now().and_then(|_| self.load());
        // An ID is given again when it is free; a moment is not.
        let same = |s: &Snapshot, of: &Snapshot| {
            (&s.id, s.l1_table_offset) == (&of.id, of.l1_table_offset)
                && (s.date_sec, s.date_nsec) == (of.date_sec, of.date_nsec)
        };
        self.view = view.map(|mut view| {
            let entries = &self.snapshots.entries;
            view.gone = !entries.iter().any(|s| same(s, &view.of));
            view
        });
        if !wanted {
            self.free_snapshots();
        }
        loaded
    }

    /// Let refcounts take that many bytes of memory in a verb; the others go to a temporary file.
    #[doc(hidden)]
    pub fn limit_refcount_memory(&mut self, bytes: u64) {
        self.refcount_memory = bytes;
    }

    /// The state that a verb replays on.
    pub(crate) fn replay(&mut self) -> Result<Replay> {
        self.replay_without(&[])
    }

    /// The same for a delete, after which the snapshots at these places of the list are `gone`. Others whose
    /// L1 table is not where one can be are not in its way: they wait for theirs.
    pub(crate) fn replay_without(&mut self, gone: &[usize]) -> Result<Replay> {
        self.check_snapshots_inside(gone)?;
        let placed = |s: &Snapshot| gone.is_empty() || s.has_a_place_for_l1(self.header.geometry);
        let h = &self.header;
        let mut overlap = Overlap::new(h.geometry, &self.l1, &self.reftable)?;
        overlap.check_refblocks()?;
        overlap.protect(Protected::ActiveL1, h.l1_offset, h.l1_bytes())?;
        overlap.protect(Protected::Reftable, h.reftable_offset, h.reftable_bytes())?;
        let (list, list_bytes) = (h.snapshots_offset, self.snapshots.size);
        overlap.protect(Protected::SnapshotTable, list, list_bytes)?;
        for s in self.snapshots.entries.iter().filter(|s| placed(s)) {
            let bytes = u64::from(s.l1_size) * TABLE_ENTRY;
            overlap.protect(Protected::InactiveL1, s.l1_table_offset, bytes)?;
        }
        if let Some((offset, bytes)) = self.extensions.bitmap_directory {
            overlap.protect(Protected::BitmapDirectory, offset, bytes)?;
        }
        Ok(Replay::new(
            h,
            room::copy_of(&self.l1)?,
            room::copy_of(&self.reftable)?,
            overlap,
            self.dev.length(),
            self.refcount_memory,
        ))
    }

    /// Write what a verb has found out, and make memory say what the disk says.
    pub(crate) fn commit(
        &mut self,
        mut replay: Replay,
        plan: Plan,
        list: Vec<Snapshot>,
        table_size: u64,
    ) -> Result<()> {
        self.check_damage(&mut replay, &plan, &list, table_size)?;
        replay.refs.check_overwrites()?;
        self.dev.check_room(replay.final_length())?;
        let unknown = self.header.autoclear & !features::AUTOCLEAR_KNOWN;
        let autoclear = (unknown != 0).then_some(self.header.autoclear & features::AUTOCLEAR_KNOWN);
        self.dev.changed = false;
        let (outcome, result) = plan.carry_out(&mut self.dev, &self.header, autoclear, &mut replay);
        self.last.outcome = outcome;
        self.forget_reads();
        if result.is_err() {
            self.last.standing = match (outcome, self.dev.changed) {
                (Outcome::Unknown, _) => Standing::Spent,
                (_, true) => Standing::NoChanges,
                _ => self.last.standing,
            };
        } else {
            // A verb that had to begin anew is done after all.
            self.last.standing = Standing::Good;
        }
        if outcome == Outcome::Done {
            let (was, places, meaning) = (
                &self.header,
                replay.places_at(replay.refs.epoch()),
                replay.meaning,
            );
            let table = replay.refs.take_table();
            self.last.changed = Changed {
                size: meaning.size != was.size,
                l1: places.l1_offset != was.l1_offset || self.l1 != replay.l1,
                reftable: places.reftable_offset != was.reftable_offset || self.reftable != table,
                snapshots: meaning.snapshots_offset != was.snapshots_offset,
            };
            self.header.switch(places, meaning);
            if let Some(bits) = autoclear {
                self.header.autoclear = bits;
            }
            self.reftable = table;
            self.l1 = replay.l1;
            self.snapshots = SnapshotList {
                entries: list,
                size: table_size,
                loaded: true,
                texts: Default::default(),
            };
        }
        #[cfg(test)]
        if let Ok(steps) = &result {
            self.steps = plan::text(steps);
        }
        result.map(drop)
    }

    /// [`Image::commit`] for a part of a verb. All parts but the last leave the image meaning what it
    /// meant. The verb's progress is told by the verb.
    pub(crate) fn commit_part(&mut self, replay: Replay, plan: Plan, last: bool) -> Result<()> {
        let (before, size) = (self.last.changed, self.snapshots.size);
        let list = copies(&self.snapshots.entries)?;
        let progress = std::mem::replace(&mut self.dev.progress, Progress::new(None));
        let result = self.commit(replay, plan, list, size);
        self.dev.progress = progress;
        if self.last.outcome == Outcome::Done {
            if !last {
                self.last.outcome = Outcome::Unchanged;
            }
            self.last.changed.size |= before.size;
            self.last.changed.l1 |= before.l1;
            self.last.changed.reftable |= before.reftable;
            self.last.changed.snapshots |= before.snapshots;
        }
        result
    }

    /// Write contents of new clusters at once, of which the plan that counts them knows only the end of the
    /// file: nothing refers to them until it is carried out. False: they must be a part of the plan.
    pub(crate) fn write_ahead(
        &mut self,
        replay: &mut Replay,
        offset: u64,
        data: &[u8],
    ) -> Result<bool> {
        let bytes = data.len() as u64;
        replay
            .refs
            .forget_before_writing(&mut self.dev, offset, bytes)?;
        let unknown = self.header.autoclear & !features::AUTOCLEAR_KNOWN;
        if replay.refs.epoch() != 0 || unknown != 0 {
            return Ok(false);
        }
        replay.refs.reach_to(offset.saturating_add(bytes));
        let written = plan::write_ahead(&mut self.dev, "guest data", offset, data);
        if written.is_err() {
            self.last.standing = Standing::NoChanges;
        }
        written.map(|()| true)
    }

    /// Drop what was cached of the disk seen so far.
    pub(crate) fn forget_reads(&mut self) {
        self.caches = Caches::default();
    }

    /// Does the image have valid persistent bitmaps?
    pub(crate) fn active_bitmaps(&self) -> bool {
        self.header.autoclear & features::BITMAPS != 0 && self.extensions.has_bitmaps
    }
}

use byteorder::ByteOrder;
