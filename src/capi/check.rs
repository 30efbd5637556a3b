//! Check and repair.

use std::ffi::{c_char, c_int, c_void};
use std::ptr::NonNull;

use super::error::Qcow2Error;
use super::guard::{guard_image, null, to_c_text, Entered, Kind, Qcow2Image};
use crate::error::Error;
use crate::maintain::{CheckResult, Fix};

/// qcow2_check(): give back clusters whose count is too high (QEMU's BDRV_FIX_LEAKS).
pub const QCOW2_FIX_LEAKS: c_int = 0x1;
/// qcow2_check(): mend everything else (QEMU's BDRV_FIX_ERRORS).
pub const QCOW2_FIX_ERRORS: c_int = 0x2;
/// qcow2_check(): look at the snapshot table alone, and mend it with QCOW2_FIX_ERRORS.
pub const QCOW2_CHECK_TABLE_ONLY: c_int = 0x4;

/// What qcow2_check() found (QEMU's BdrvCheckResult), by the names of
/// "qemu-img check --output=json".
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Qcow2CheckResult {
    /// Errors that harm data, or would when the disk is written to.
    pub corruptions: u64,
    /// Clusters whose count is too high: space that is lost, nothing else.
    pub leaks: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Corruptions that this call has mended.
    pub corruptions_fixed: u64,
    /// Leaked clusters that this call has given back.
    pub leaks_fixed: u64,
    /// Where the last cluster in use ends, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Of these, clusters that the image has.
    pub allocated_clusters: u64,
    /// Of these, clusters that do not follow the one before them in the file.
    pub fragmented_clusters: u64,
    /// Of these, compressed clusters.
    pub compressed_clusters: u64,
    /// Zeros. Later versions of the library may tell more here.
    pub reserved: [u64; 6],
}

/// Told a finding of qcow2_check(), in the words of "qemu-img check": one line, without a
/// newline. The text is gone when the function returns. It must not throw, longjmp or call
/// back into the handle (-EBUSY).
pub type Qcow2CheckFunc = Option<unsafe extern "C" fn(opaque: *mut c_void, finding: *const c_char)>;

impl From<CheckResult> for Qcow2CheckResult {
    fn from(r: CheckResult) -> Qcow2CheckResult {
        Qcow2CheckResult {
            corruptions: r.corruptions,
            leaks: r.leaks,
            check_errors: r.check_errors,
            corruptions_fixed: r.corruptions_fixed,
            leaks_fixed: r.leaks_fixed,
            image_end_offset: r.image_end_offset,
            total_clusters: r.total_clusters,
            allocated_clusters: r.allocated_clusters,
            fragmented_clusters: r.fragmented_clusters,
            compressed_clusters: r.compressed_clusters,
            reserved: [0; 6],
        }
    }
}

/// Check the image, and mend it if asked to. Without a fix nothing is written, and the
/// numbers are those of "qemu-img check" for the same file; with one, corruptions and leaks
/// are what a second look finds.
///
/// A damaged image is opened with QCOW2_O_CHECK. When a repair has left nothing wrong (but
/// for leaks that were not to be mended), the dirty and the corrupt bit are cleared and the
/// handle is as any other. The dirty bit alone is also cleared by QCOW2_FIX_ERRORS where all
/// counts are right and what is left is a snapshot whose tables lead nowhere: it can then be
/// deleted by a new handle.
///
/// What a repair writes, it writes in this order: counts that are too low are raised and
/// flags that allow too much are cleared; when that is stable, counts that are too high are
/// lowered and clusters given back. So a power cut leaves an image that a second repair
/// finishes, and no disk or snapshot reads worse for it. While a table leads nowhere, a
/// repair lowers and frees nothing and says so: what it refers to is not known; while reading
/// one fails it writes nothing. Data of a cluster that was counted as free is kept. What
/// cannot be mended stays: entries that lead nowhere, reserved bits, counts that the refcount
/// width cannot hold.
///
/// qcow2_set_progress() works as for a verb: until counts are lowered a repair can be
/// cancelled.
///
/// @param bs      the handle; to mend, opened with QCOW2_O_RDWR
/// @param fix     0, or QCOW2_FIX values joined by "|", or QCOW2_CHECK_TABLE_ONLY with or
///                without QCOW2_FIX_ERRORS. QCOW2_FIX_LEAKS alone lowers nothing where the
///                refcount structures would have to be made anew.
/// @param result  where to put the numbers: set to zeros first, written on success only
/// @param report  NULL, or a function that is told each finding
/// @param opaque  handed to the function, otherwise not looked at
/// @param errp    NULL, or where to put the error: must hold NULL on entry, set only on
///                failure, then owned by the caller (qcow2_error_free())
/// @return        0 when the check has run to its end, whatever it found; or -errno; after a
///                fix see qcow2_last_outcome():
///                -EINVAL   bs or result is NULL, an unknown bit in fix, or the snapshot
///                          table's place is not valid (QCOW2_FIX_ERRORS does not help)
///                -EFBIG    the snapshot table exceeds QEMU's limits (QCOW2_FIX_ERRORS cuts
///                          it), or the file has more clusters than can be checked
///                -EACCES   a fix, and the handle is read-only
///                -ENOSPC   the disk is full
///                -EIO      the image cannot be read or written, or an earlier failure spent
///                          the handle
///                -ECANCELED  the progress function has cancelled it
///                -ENOMEM, -EBUSY, and what the I/O functions return
///
/// QEMU: bdrv_check()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_check(
    bs: *mut Qcow2Image,
    fix: c_int,
    result: *mut Qcow2CheckResult,
    report: Qcow2CheckFunc,
    opaque: *mut c_void,
    errp: *mut *mut Qcow2Error,
) -> c_int {
    let out = NonNull::new(result);
    if let Some(out) = out {
        // SAFETY: not null, and writable as the header demands.
        unsafe { out.write(Qcow2CheckResult::default()) };
    }
    let writes = fix & (QCOW2_FIX_LEAKS | QCOW2_FIX_ERRORS) != 0;
    let kind = if writes { Kind::Changes } else { Kind::Reads };
    let body = |it: &mut Entered| {
        let out = out.ok_or_else(|| null("result"))?;
        let fix = u32::try_from(fix)
            .ok()
            .and_then(Fix::from_bits)
            .ok_or_else(|| Error::Invalid(format!("Unknown bits in fix: {fix:#x}")))?;
        let mut tell = |finding: &str| {
            if let Some(report) = report {
                let text = to_c_text(finding);
                // SAFETY: the caller's function, called as the header says it will be.
                unsafe { report(opaque, text.as_ptr()) };
            }
        };
        let found = it.image().check(fix, &mut tell)?;
        // SAFETY: as above.
        unsafe { out.write(found.into()) };
        Ok(0)
    };
    // SAFETY: the header demands an open handle or NULL, and a writable errp or NULL.
    unsafe { guard_image(bs, errp, kind, body) }
}
