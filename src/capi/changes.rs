//! What QEMU has no function for: which bytes changed between two states of a disk.

use std::ffi::{c_char, c_int};
use std::ptr::NonNull;

use super::error::Qcow2Error;
use super::guard::{guard_image, null, Entered, Kind, Qcow2Image};
use super::types::{
    Qcow2Change, QCOW2_BLOCK_ALLOCATED, QCOW2_BLOCK_BEYOND, QCOW2_BLOCK_COMPRESSED,
    QCOW2_BLOCK_DATA, QCOW2_BLOCK_ZERO, QCOW2_CHANGE_COMPARE,
};
use super::verbs::bytes as text;
use crate::error::{Error, Result};
use crate::read::Mapping;

/// Find the next run of bytes in which the disk in the state `to` differs, or may differ, from
/// the disk in the state `from`. To see all changes:
///
///   for (at = 0; ; at = c.start + c.length)
///       if (qcow2_snapshot_next_change(bs, from, to, at, INT64_MAX, 0, &c, NULL) < 0
///           || c.length == 0) break; else ...
///
/// What is in no run is equal for certain. Without QCOW2_CHANGE_COMPARE only tables are read: a
/// run is made of clusters (subclusters, with extended L2 entries) that the two states map
/// differently; the data in them may still be the same. Where both states have the same L2
/// table nothing is read, so that the cost follows the difference and not the disk. With
/// QCOW2_CHANGE_COMPARE the data of these clusters is read and compared, and runs are exact,
/// in sectors of 512 bytes.
///
/// Bytes past the end of `from` are changed (QCOW2_BLOCK_BEYOND in from_flags); what lies past
/// the end of `to` is never reported, nor is VM state. Zeros on both sides are equal: zero
/// clusters and, in an image without a backing file, what is not allocated. The flags hold for
/// a whole run: where they change a new one begins.
///
/// Any state can be asked for, whatever qcow2_snapshot_load_tmp() shows, and that stays as it
/// is. The handle keeps up to 4 MiB of tables of the two states, and their L1 tables, so that a
/// loop in order reads each once. A changing verb, qcow2_reload(), qcow2_read_snapshots() and a
/// call with other states drop them, and with QCOW2_O_FORCE_SHARE a change of the image file.
///
/// @param bs      the handle, read-only or not
/// @param from    the older state: the ID of a snapshot or, if none has this ID, its name (of
///                several the first); NULL for the active disk
/// @param to      the newer state, likewise. It need not be newer: the other way round the
///                call tells what going back would change.
/// @param offset  where to begin, in bytes from the start of the disk; any alignment. At the
///                end of `to` and past it there is no change.
/// @param bytes   look at no more than this many; INT64_MAX for as far as it goes. With
///                QCOW2_CHANGE_COMPARE a call reads until it finds a sector that differs: a
///                smaller number bounds how long it takes.
/// @param flags   0 or QCOW2_CHANGE_COMPARE, which opens backing files where their data shows
///                through in one of the two states only
/// @param change  where to put the answer: with a length of 0 (and start = offset) if there is
///                no change in the range; cleared if the call fails
/// @param errp    NULL, or where to put the error: must hold NULL on entry, set only on
///                failure, then owned by the caller (qcow2_error_free())
/// @return        0, also if there is no change, or -errno:
///                -EINVAL   bs or change is NULL; offset or bytes is negative; unknown flags;
///                          or a snapshot's L1 table is not where one can be
///                -ENOENT   no such snapshot; the message names it
///                -EFBIG    a snapshot's L1 table exceeds QEMU's limit
///                -ENOTSUP  QCOW2_CHANGE_COMPARE on an encrypted image, or with a backing
///                          file that cannot or must not be opened; an external data file
///                -EIO      the image is damaged there or cannot be read; or an earlier
///                          failure spent the handle
///                -ENOMEM, -EBUSY, and what the I/O functions and opening a backing file return
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_snapshot_next_change(
    bs: *mut Qcow2Image,
    from: *const c_char,
    to: *const c_char,
    offset: i64,
    bytes: i64,
    flags: c_int,
    change: *mut Qcow2Change,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let out = NonNull::new(change);
    if let Some(out) = out {
        // SAFETY: not null, and writable as the header demands. All zeros is a value.
        unsafe { out.write_bytes(0, 1) };
    }
    let body = |it: &mut Entered| {
        let out = out.ok_or_else(|| null("change"))?;
        let (start, max) = (
            not_negative("offset", offset)?,
            not_negative("number of bytes", bytes)?,
        );
        if flags & !QCOW2_CHANGE_COMPARE != 0 {
            return Err(Error::Invalid(format!("Unknown flags: {flags:#x}")));
        }
        let compare = flags & QCOW2_CHANGE_COMPARE != 0;
        // SAFETY: NULL or text, as the header demands.
        let (from, to) = unsafe { (text(from), text(to)) };
        let found = it
            .image()
            .snapshot_next_change(from, to, start, max, compare)?;
        let answer = match found {
            None => Qcow2Change {
                start,
                length: 0,
                from_flags: 0,
                to_flags: 0,
                reserved: [0; 4],
            },
            Some(found) => Qcow2Change {
                start: found.start,
                length: found.length,
                from_flags: flags_of(found.from),
                to_flags: flags_of(found.to),
                reserved: [0; 4],
            },
        };
        // SAFETY: as above.
        unsafe { out.write(answer) };
        Ok(0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, Kind::Reads, body) }
}

fn not_negative(what: &str, value: i64) -> Result<u64> {
    u64::try_from(value).map_err(|_| Error::Invalid(format!("The {what} is negative: {value}")))
}

fn flags_of(mapping: Mapping) -> u32 {
    let flags = match mapping {
        Mapping::Beyond => QCOW2_BLOCK_BEYOND,
        Mapping::Unallocated => 0,
        Mapping::Zero => QCOW2_BLOCK_ZERO | QCOW2_BLOCK_ALLOCATED,
        Mapping::Data => QCOW2_BLOCK_DATA | QCOW2_BLOCK_ALLOCATED,
        Mapping::Compressed => QCOW2_BLOCK_DATA | QCOW2_BLOCK_ALLOCATED | QCOW2_BLOCK_COMPRESSED,
    };
    flags as u32
}
