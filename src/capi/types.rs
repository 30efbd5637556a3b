//! Constants and public structs.

use std::ffi::{c_char, c_int, c_void, CStr};

/// Open for reading and changing (QEMU's BDRV_O_RDWR). Without it: read-only.
pub const QCOW2_O_RDWR: c_int = 0x0002;
/// Never wait for stable storage (QEMU's BDRV_O_NO_FLUSH). Faster; a power cut may then
/// cost anything, including every snapshot.
pub const QCOW2_O_NO_FLUSH: c_int = 0x0200;
/// Open an image to check it, however damaged (QEMU's BDRV_O_CHECK): the dirty bit, the
/// corrupt bit and a snapshot table that cannot be read are accepted. On such a handle every
/// function that changes the image is -EPERM, but for qcow2_check(), until a repair has left
/// nothing wrong. Listing and reading work where the tables can be read.
pub const QCOW2_O_CHECK: c_int = 0x1000;
/// Read beside a running guest, as "qemu-img -U": read-only opens only, claims nothing
/// exclusive. What is read while the guest writes may be torn. When the image file was changed
/// a call that reads looks at header, tables and list of snapshots again first (not behind the
/// caller's own I/O functions: there qcow2_reload() does it); if the snapshot that
/// qcow2_snapshot_load_tmp() shows is gone then, reading is -ENOENT until another is shown.
pub const QCOW2_O_FORCE_SHARE: c_int = 0x0100_0000;
/// Take no image lock at all: keeping others out is then the caller's duty. For file systems that
/// refuse locks (where they have none at all, none are taken without this flag either).
pub const QCOW2_O_NO_LOCK: c_int = 0x0200_0000;
/// Do not punch holes into the image file where clusters are freed: they keep their bytes.
pub const QCOW2_O_NO_DISCARD: c_int = 0x0400_0000;
/// Behave as the code of QEMU 2.1 did, in exactly three things: the struct of 408 bytes
/// without `icount`; 16 bytes of extra data for each snapshot table entry written; reverting
/// to a snapshot of another disk size is -ENOTSUP. Programs do not pass it: they define
/// QCOW2_SNAPSHOT_COMPAT_2_1 before the include, so that struct and handle agree.
pub const QCOW2_O_COMPAT_2_1: c_int = 0x0800_0000;
/// Never open a backing file or an external data file; a read that would need one is
/// -ENOTSUP. For images from a source that is not trusted: their names may say anything.
pub const QCOW2_O_NO_BACKING: c_int = 0x2000_0000;

/// Qcow2Extent.flags: bytes are stored for it (QEMU's BDRV_BLOCK_DATA). Without it: a hole,
/// which is what an NBD server reports as NBD_STATE_HOLE (and QCOW2_BLOCK_ZERO as
/// NBD_STATE_ZERO).
pub const QCOW2_BLOCK_DATA: c_int = 0x01;
/// Qcow2Extent.flags: it reads as zeros (QEMU's BDRV_BLOCK_ZERO). Together with
/// QCOW2_BLOCK_DATA: allocated ahead, and still a hole of the file. That is the one answer
/// that rests on holes, discarded ranges among them, reading as zeros; the others come from the
/// tables of the image.
pub const QCOW2_BLOCK_ZERO: c_int = 0x02;
/// Qcow2Extent.flags: `host_offset` is valid (QEMU's BDRV_BLOCK_OFFSET_VALID).
pub const QCOW2_BLOCK_OFFSET_VALID: c_int = 0x04;
/// Qcow2Extent.flags: the file at `depth` has it, as data or as zeros, and nothing shows
/// through from behind that file (QEMU's BDRV_BLOCK_ALLOCATED; "present" in qemu-img map).
pub const QCOW2_BLOCK_ALLOCATED: c_int = 0x10;
/// Qcow2Extent.flags: the bytes are stored compressed (QEMU's BDRV_BLOCK_COMPRESSED).
pub const QCOW2_BLOCK_COMPRESSED: c_int = 0x80;
/// Qcow2Change.from_flags: the older state of the disk ends before.
pub const QCOW2_BLOCK_BEYOND: c_int = 0x100;

/// qcow2_snapshot_next_change(): read what may differ, and report what does, to a sector of 512
/// bytes.
pub const QCOW2_CHANGE_COMPARE: c_int = 0x1;

/// Qcow2IoOps.discard_kind: what snapshots or the disk held and a verb no longer needs, and old
/// snapshot tables (what QEMU's pass-discard-snapshot is for).
pub const QCOW2_DISCARD_KIND_SNAPSHOT: c_int = 1;
/// Qcow2IoOps.discard_kind: anything else: what a repair frees, refcount blocks that a shrinking
/// goto drops, a temporary table.
pub const QCOW2_DISCARD_KIND_OTHER: c_int = 2;

/// qcow2_last_outcome(): no changing verb was called yet.
pub const QCOW2_OUTCOME_NONE: c_int = 0;
/// qcow2_last_outcome(): disk and snapshots are what they were before the verb.
pub const QCOW2_OUTCOME_UNCHANGED: c_int = 1;
/// qcow2_last_outcome(): the verb took effect.
pub const QCOW2_OUTCOME_DONE: c_int = 2;
/// qcow2_last_outcome(): the image holds either the state before or the state after the
/// verb. Close the handle, open the image again and list the snapshots to know which.
pub const QCOW2_OUTCOME_UNKNOWN: c_int = 3;

/// Qcow2ProgressFunc: the verb looks; nothing has been written. Cancelling leaves every byte as
/// it was, and the handle good.
pub const QCOW2_PROGRESS_CHECK: c_int = 1;
/// Qcow2ProgressFunc: the verb writes what nothing refers to yet. Cancelling leaves disk and
/// snapshots as they were, perhaps with leaked clusters, and ends changes by this handle.
pub const QCOW2_PROGRESS_PREPARE: c_int = 2;
/// Qcow2ProgressFunc: the verb has taken effect and frees what is not needed any more. It
/// cannot be cancelled.
pub const QCOW2_PROGRESS_RECLAIM: c_int = 3;

/// What a caller sees of a snapshot and says of a new one (QEMU's QEMUSnapshotInfo, same
/// field names and offsets). 416 bytes; 408 with QCOW2_SNAPSHOT_COMPAT_2_1.
#[repr(C)]
pub struct Qcow2SnapshotInfo {
    /// Unique ID, text ending in NUL, usually a decimal number. An image may hold
    /// longer ones: cut to 127 bytes here.
    pub id_str: [c_char; 128],
    /// Name, text ending in NUL, may be empty and need not be unique. An image may
    /// hold longer ones: cut to 255 bytes here.
    pub name: [c_char; 256],
    /// Size of the VM state in bytes; 0: a snapshot of the disk only.
    pub vm_state_size: u64,
    /// When it was taken: seconds since the epoch, UTC.
    pub date_sec: u32,
    /// Nanoseconds within that second.
    pub date_nsec: u32,
    /// Time on the guest's clock, in nanoseconds since the guest was started.
    pub vm_clock_nsec: u64,
    /// Instructions executed by the guest under record/replay; UINT64_MAX for none.
    #[cfg(not(qcow2_compat_2_1))]
    pub icount: u64,
}

/// A run of a disk's bytes that are all of one kind, from qcow2_block_status(): one entry of
/// "qemu-img map --output=json".
#[repr(C)]
pub struct Qcow2Extent {
    /// First byte, from the start of the disk: the offset that was asked for.
    pub start: u64,
    /// Bytes; 0 only at the end of the disk or if none were asked for.
    pub length: u64,
    /// Where the first byte stands in the file `filename`, if `flags` has
    /// QCOW2_BLOCK_OFFSET_VALID; else 0. Not for encrypted or compressed data.
    pub host_offset: u64,
    /// QCOW2_BLOCK values joined by "|".
    pub flags: u32,
    /// The file that has it: 0 the image, 1 its backing file, and so on.
    pub depth: u32,
    /// The file that host_offset refers to: of that depth the image or backing file itself,
    /// or its external data file. A relative name is relative to the folder that was the current
    /// one at open. NULL without QCOW2_BLOCK_OFFSET_VALID, and where the name is
    /// not known (the caller's own I/O functions). Belongs to the handle, lives as long as it.
    pub filename: *const c_char,
    /// Zeros. Later versions of the library may tell more here.
    pub reserved: [u64; 3],
}

/// A run of a disk's bytes that changed between two states, or may have changed, from
/// qcow2_snapshot_next_change().
#[repr(C)]
pub struct Qcow2Change {
    /// First byte, from the start of the disk.
    pub start: u64,
    /// Bytes; 0: there is no (further) change in the range that was asked for.
    pub length: u64,
    /// What the older state has there: QCOW2_BLOCK values joined by "|", as the image itself
    /// maps it in the whole run: DATA, ZERO, COMPRESSED, ALLOCATED; 0 where nothing is allocated
    /// and the backing file shows through, or zeros; BEYOND past the end of that disk.
    pub from_flags: u32,
    /// What the newer state has there, never BEYOND.
    pub to_flags: u32,
    /// Zeros. Later versions of the library may tell more here.
    pub reserved: [u64; 4],
}

/// What a set of states of the disk holds, from qcow2_snapshot_usage(): bytes of whole clusters of
/// the image file, each counted once however many of the set refer to it.
#[repr(C)]
pub struct Qcow2Usage {
    /// What the set refers to: data, VM state, and its L1 and L2 tables.
    pub referenced: u64,
    /// Of `referenced`: what nothing outside of the set refers to, which is what deleting the
    /// set would free.
    pub exclusive: u64,
    /// Of `exclusive`: L1 and L2 tables.
    pub tables: u64,
    /// Of `referenced`: data and L2 tables that are reached only behind the end of the disk, as
    /// each state has it.
    pub vm_state: u64,
    /// Of `referenced`: what the host's file system has really stored; holes are left out.
    /// Where it does not tell (block devices, the caller's I/O functions): all.
    pub allocated: u64,
    /// Zeros. Later versions of the library may tell more here.
    pub reserved: [u64; 3],
}

/// The caller's I/O functions, for qcow2_open_io(). The library copies the table; it calls
/// one function at a time, on the thread of the caller, with the `opaque` pointer given at
/// open. A function returns 0 (getlength: a length) or -errno; anything else counts as -EIO.
/// It must not throw, longjmp, end its thread or call back into the handle (-EBUSY).
#[repr(C)]
pub struct Qcow2IoOps {
    /// sizeof(Qcow2IoOps). New members come at the end only, so a table compiled against an
    /// older header keeps working; members past `size` count as NULL.
    pub size: usize,
    /// Read exactly `bytes` bytes (at most 2 MiB) at byte `offset`. What lies past the end
    /// reads as zeros.
    pub pread: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            offset: u64,
            buf: *mut c_void,
            bytes: usize,
        ) -> c_int,
    >,
    /// Write exactly `bytes` bytes (at most 2 MiB) at byte `offset`. A write past the end
    /// extends the file, with zeros between.
    pub pwrite: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            offset: u64,
            buf: *const c_void,
            bytes: usize,
        ) -> c_int,
    >,
    /// A barrier: when it returns 0, earlier writes, truncates and discards are on stable
    /// storage.
    pub flush: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// The length in bytes, or -errno. It may be rounded up to whole sectors of 512 bytes.
    pub getlength: Option<unsafe extern "C" fn(opaque: *mut c_void) -> i64>,
    /// Set the length to `length` bytes; growing adds zeros.
    pub truncate: Option<unsafe extern "C" fn(opaque: *mut c_void, length: u64) -> c_int>,
    /// Give back the space of `bytes` bytes (at most 2 MiB) at `offset`, which read as zeros from
    /// then on; the length stays. May be NULL: nothing is given back. A hint: freed clusters
    /// equal those that qemu-img leaves only if they read as zeros, and the meaning of the image
    /// does not depend on it (what does is read back, and written where it is not zeros). A
    /// caller with a cache of what is in the file drops the range from it.
    pub discard:
        Option<unsafe extern "C" fn(opaque: *mut c_void, offset: u64, bytes: u64) -> c_int>,
    /// The handle is closed: the last call, exactly once, after those of the files that open_file
    /// opened, the last of a chain first. Not called if qcow2_open_io() failed. May be NULL.
    pub close: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
    /// Open, for reading, another file that this one names: a backing file or an external
    /// data file, when data is first needed from it. May be NULL: then what needs such a
    /// file is -ENOTSUP. Without it no name in an image leads anywhere, and with it only
    /// where the caller lets it lead.
    ///
    /// `name` is as it stands in the image: whatever somebody wrote there, relative to the
    /// file of `opaque`. `format` is "qcow2", "raw" or "", which stands for not known. On
    /// success `*ops` is set to functions for that file (copied at once; of these pwrite,
    /// flush, truncate and discard are never called, but must be there as in any table) and
    /// `*file_opaque` to what they are called with; `ops->close` is then called exactly once,
    /// also if the file turns out to be of no use. A backing file of that file is asked for by
    /// its own open_file. Not called with QCOW2_O_NO_BACKING.
    pub open_file: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            name: *const c_char,
            format: *const c_char,
            ops: *mut *const Qcow2IoOps,
            file_opaque: *mut *mut c_void,
        ) -> c_int,
    >,
    /// Since 0.2. Called before each write, barrier and discard of the image, for tests and traces:
    /// `label` says what comes, and lives as long as the call: "header", "header: autoclear features",
    /// "L1 table", "temporary L1 table", "snapshot L1 table", "L2 table", "snapshot table",
    /// "refcount table", "refcount table entry", "refcount block", "free clusters" (bytes put back
    /// where a temporary table was); "barrier"; "discard". Later versions may have more. May be NULL.
    pub event: Option<unsafe extern "C" fn(opaque: *mut c_void, label: *const c_char)>,
    /// Since 0.2. The length in bytes of what the image's backing file shows, or -errno: asked when
    /// a revert makes the disk larger, in the place of opening the backing file. May be NULL.
    pub backing_length: Option<unsafe extern "C" fn(opaque: *mut c_void) -> i64>,
    /// Since 0.2. In the place of `discard`: a range of any length, and its `kind`, one of the
    /// QCOW2_DISCARD_KIND values. May be NULL: then `discard` is called.
    pub discard_kind: Option<
        unsafe extern "C" fn(opaque: *mut c_void, offset: u64, bytes: u64, kind: c_int) -> c_int,
    >,
}

const VERSION: &CStr =
    match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(text) => text,
        Err(_) => c"",
    };

/// The version of the library that the program runs with, as "1.2.3". The one it was
/// compiled with is QCOW2_SNAPSHOT_VERSION.
///
/// @return  a static string
#[unsafe(no_mangle)]
pub extern "C" fn qcow2_version() -> *const c_char {
    VERSION.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::OpenFlags;
    use crate::image::{Outcome, Stage};
    use crate::io::DiscardKind;

    #[test]
    fn the_flags_of_the_header_are_those_of_the_library() {
        let pairs = [
            (QCOW2_O_RDWR, OpenFlags::RDWR),
            (QCOW2_O_NO_FLUSH, OpenFlags::NO_FLUSH),
            (QCOW2_O_CHECK, OpenFlags::CHECK),
            (QCOW2_O_NO_LOCK, OpenFlags::NO_LOCK),
            (QCOW2_O_FORCE_SHARE, OpenFlags::FORCE_SHARE),
            (QCOW2_O_NO_DISCARD, OpenFlags::NO_DISCARD),
            (QCOW2_O_COMPAT_2_1, OpenFlags::COMPAT_2_1),
            (QCOW2_O_NO_BACKING, OpenFlags::NO_BACKING),
        ];
        for (bits, flag) in pairs {
            assert_eq!(OpenFlags::from_bits(bits).expect("a known flag"), flag);
        }
    }

    #[test]
    fn the_kinds_of_discards_of_the_header_are_those_of_the_library() {
        assert_eq!(QCOW2_DISCARD_KIND_SNAPSHOT, DiscardKind::Snapshot as c_int);
        assert_eq!(QCOW2_DISCARD_KIND_OTHER, DiscardKind::Other as c_int);
    }

    #[test]
    fn the_outcomes_of_the_header_are_those_of_the_library() {
        assert_eq!(QCOW2_OUTCOME_NONE, Outcome::None as c_int);
        assert_eq!(QCOW2_OUTCOME_UNCHANGED, Outcome::Unchanged as c_int);
        assert_eq!(QCOW2_OUTCOME_DONE, Outcome::Done as c_int);
        assert_eq!(QCOW2_OUTCOME_UNKNOWN, Outcome::Unknown as c_int);
    }

    #[test]
    fn the_stages_of_the_header_are_those_of_the_library() {
        assert_eq!(QCOW2_PROGRESS_CHECK, Stage::Check as c_int);
        assert_eq!(QCOW2_PROGRESS_PREPARE, Stage::Prepare as c_int);
        assert_eq!(QCOW2_PROGRESS_RECLAIM, Stage::Reclaim as c_int);
    }
}
