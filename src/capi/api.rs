//! One table of all functions, for programs that load the library.

use std::ffi::{c_char, c_int, c_void};
use std::mem::size_of;

#[allow(clippy::wildcard_imports)] // all functions, and their types
use super::*;

/// All functions of the library, from qcow2_api(): for a program that loads the library with
/// dlopen() and wants one dlsym(), or that has functions of the same names itself. A member is called
/// like its function without "qcow2_"; the order is that of the header of version 0.2, and what later
/// versions bring comes at the end.
#[repr(C)]
pub struct Qcow2Api {
    /// Bytes of the table that the library has. A program compiled with a newer header looks here
    /// before it uses a member: offsetof(Qcow2Api, member) < size.
    pub size: usize,
    /// qcow2_version().
    pub version: Option<unsafe extern "C" fn() -> *const c_char>,
    /// qcow2_open().
    pub open: Option<
        unsafe extern "C" fn(
            filename: *const c_char,
            flags: c_int,
            pbs: *mut *mut Qcow2Image,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_open_fd().
    pub open_fd: Option<
        unsafe extern "C" fn(
            fd: c_int,
            flags: c_int,
            pbs: *mut *mut Qcow2Image,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_open_io().
    pub open_io: Option<
        unsafe extern "C" fn(
            ops: *const Qcow2IoOps,
            opaque: *mut c_void,
            flags: c_int,
            pbs: *mut *mut Qcow2Image,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_close().
    pub close: Option<unsafe extern "C" fn(bs: *mut Qcow2Image) -> c_int>,
    /// qcow2_read_snapshots().
    pub read_snapshots: Option<unsafe extern "C" fn(bs: *mut Qcow2Image) -> c_int>,
    /// qcow2_free_snapshots().
    pub free_snapshots: Option<unsafe extern "C" fn(bs: *mut Qcow2Image)>,
    /// qcow2_write_snapshots().
    pub write_snapshots: Option<unsafe extern "C" fn(bs: *mut Qcow2Image) -> c_int>,
    /// qcow2_snapshot_create().
    pub snapshot_create:
        Option<unsafe extern "C" fn(bs: *mut Qcow2Image, sn_info: *mut Qcow2SnapshotInfo) -> c_int>,
    /// qcow2_snapshot_goto().
    pub snapshot_goto:
        Option<unsafe extern "C" fn(bs: *mut Qcow2Image, snapshot_id: *const c_char) -> c_int>,
    /// qcow2_snapshot_delete().
    pub snapshot_delete: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            snapshot_id: *const c_char,
            name: *const c_char,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_snapshot_list().
    pub snapshot_list: Option<
        unsafe extern "C" fn(bs: *mut Qcow2Image, psn_tab: *mut *mut Qcow2SnapshotInfo) -> c_int,
    >,
    /// qcow2_snapshot_list_free().
    pub snapshot_list_free: Option<unsafe extern "C" fn(sn_tab: *mut Qcow2SnapshotInfo)>,
    /// qcow2_snapshot_load_tmp().
    pub snapshot_load_tmp: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            snapshot_id: *const c_char,
            name: *const c_char,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_getlength().
    pub getlength: Option<unsafe extern "C" fn(bs: *const Qcow2Image) -> i64>,
    /// qcow2_pread().
    pub pread: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            offset: i64,
            buf: *mut c_void,
            bytes: usize,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_block_status().
    pub block_status: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            offset: i64,
            bytes: i64,
            extent: *mut Qcow2Extent,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_load_vmstate().
    pub load_vmstate: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            pos: i64,
            buf: *mut c_void,
            bytes: usize,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_snapshot_next_change().
    pub snapshot_next_change: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            from: *const c_char,
            to: *const c_char,
            offset: i64,
            bytes: i64,
            flags: c_int,
            change: *mut Qcow2Change,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_snapshot_usage().
    pub snapshot_usage: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            snapshots: *const *const c_char,
            n: usize,
            usage: *mut Qcow2Usage,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_snapshot_delete_many().
    pub snapshot_delete_many: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            snapshots: *const *const c_char,
            n: usize,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_snapshot_rename().
    pub snapshot_rename: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            snapshot: *const c_char,
            new_name: *const c_char,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_flatten().
    pub flatten:
        Option<unsafe extern "C" fn(bs: *mut Qcow2Image, errp: *mut *mut Qcow2Error) -> c_int>,
    /// qcow2_flatten_estimate().
    pub flatten_estimate: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            bytes: *mut u64,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_set_progress().
    pub set_progress: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            func: Qcow2ProgressFunc,
            opaque: *mut c_void,
        ) -> c_int,
    >,
    /// qcow2_check().
    pub check: Option<
        unsafe extern "C" fn(
            bs: *mut Qcow2Image,
            fix: c_int,
            result: *mut Qcow2CheckResult,
            report: Qcow2CheckFunc,
            opaque: *mut c_void,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_snapshot_layout().
    pub snapshot_layout: Option<
        unsafe extern "C" fn(
            bs: *const Qcow2Image,
            index: usize,
            layout: *mut Qcow2SnapshotLayout,
            errp: *mut *mut Qcow2Error,
        ) -> c_int,
    >,
    /// qcow2_image_layout().
    pub image_layout:
        Option<unsafe extern "C" fn(bs: *const Qcow2Image, layout: *mut Qcow2ImageLayout) -> c_int>,
    /// qcow2_reload().
    pub reload:
        Option<unsafe extern "C" fn(bs: *mut Qcow2Image, errp: *mut *mut Qcow2Error) -> c_int>,
    /// qcow2_error_get_pretty().
    pub error_get_pretty: Option<unsafe extern "C" fn(err: *const Qcow2Error) -> *const c_char>,
    /// qcow2_error_free().
    pub error_free: Option<unsafe extern "C" fn(err: *mut Qcow2Error)>,
    /// qcow2_last_error().
    pub last_error: Option<unsafe extern "C" fn(bs: *const Qcow2Image) -> *const c_char>,
    /// qcow2_last_outcome().
    pub last_outcome: Option<unsafe extern "C" fn(bs: *const Qcow2Image) -> c_int>,
    /// qcow2_api().
    pub api: Option<unsafe extern "C" fn() -> *const Qcow2Api>,
}

static API: Qcow2Api = Qcow2Api {
    size: size_of::<Qcow2Api>(),
    version: Some(qcow2_version),
    open: Some(qcow2_open),
    open_fd: Some(qcow2_open_fd),
    open_io: Some(qcow2_open_io),
    close: Some(qcow2_close),
    read_snapshots: Some(qcow2_read_snapshots),
    free_snapshots: Some(qcow2_free_snapshots),
    write_snapshots: Some(qcow2_write_snapshots),
    snapshot_create: Some(qcow2_snapshot_create),
    snapshot_goto: Some(qcow2_snapshot_goto),
    snapshot_delete: Some(qcow2_snapshot_delete),
    snapshot_list: Some(qcow2_snapshot_list),
    snapshot_list_free: Some(qcow2_snapshot_list_free),
    snapshot_load_tmp: Some(qcow2_snapshot_load_tmp),
    getlength: Some(qcow2_getlength),
    pread: Some(qcow2_pread),
    block_status: Some(qcow2_block_status),
    load_vmstate: Some(qcow2_load_vmstate),
    snapshot_next_change: Some(qcow2_snapshot_next_change),
    snapshot_usage: Some(qcow2_snapshot_usage),
    snapshot_delete_many: Some(qcow2_snapshot_delete_many),
    snapshot_rename: Some(qcow2_snapshot_rename),
    flatten: Some(qcow2_flatten),
    flatten_estimate: Some(qcow2_flatten_estimate),
    set_progress: Some(qcow2_set_progress),
    check: Some(qcow2_check),
    snapshot_layout: Some(qcow2_snapshot_layout),
    image_layout: Some(qcow2_image_layout),
    reload: Some(qcow2_reload),
    error_get_pretty: Some(qcow2_error_get_pretty),
    error_free: Some(qcow2_error_free),
    last_error: Some(qcow2_last_error),
    last_outcome: Some(qcow2_last_outcome),
    api: Some(qcow2_api),
};

/// The table of all functions.
///
/// @return  a static table, good as long as the library is loaded
#[unsafe(no_mangle)]
pub extern "C" fn qcow2_api() -> *const Qcow2Api {
    &API
}
