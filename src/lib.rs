//! Internal snapshots of qcow2 images, in-process and byte for byte as QEMU makes them.
//!
//! This is the library behind `qcow2_snapshot.h`: the functions of QEMU's `qcow2-snapshot.c`
//! with their signatures, over an opaque handle. Rust programs can use the same machinery
//! directly:
//!
//! ```no_run
//! use qcow2_snapshot::{Image, NewSnapshot, OpenFlags};
//!
//! fn main() -> qcow2_snapshot::Result<()> {
//!     let mut image = Image::open("disk.qcow2".as_ref(), OpenFlags::RDWR)?;
//!     let new = NewSnapshot { name: b"before-upgrade".to_vec(), ..NewSnapshot::default() };
//!     image.snapshot_create(&new)?;
//!     for s in image.snapshot_list()? {
//!         println!("{} {}", String::from_utf8_lossy(&s.id), String::from_utf8_lossy(&s.name));
//!     }
//!     image.close()
//! }
//! ```
//!
//! The same in C:
//!
//! ```c
//! #include <qcow2_snapshot.h>
//! #include <stdio.h>
//! #include <string.h>
//!
//! int main(void) {
//!     BlockDriverState *bs; Error *err = NULL; QEMUSnapshotInfo sn, *tab;
//!     if (qcow2_open("disk.qcow2", QCOW2_O_RDWR, &bs, &err) < 0)
//!         return fprintf(stderr, "%s\n", qcow2_error_get_pretty(err)), 1;
//!     memset(&sn, 0, sizeof(sn));
//!     strcpy(sn.name, "before-upgrade");
//!     if (qcow2_snapshot_create(bs, &sn) < 0)
//!         return fprintf(stderr, "%s\n", qcow2_last_error(bs)), 1;
//!     int n = qcow2_snapshot_list(bs, &tab);
//!     for (int i = 0; i < n; i++) printf("%s %s\n", tab[i].id_str, tab[i].name);
//!     qcow2_snapshot_list_free(tab);
//!     return qcow2_close(bs);
//! }
//! ```
//!
//! # The map
//!
//! Arrows only point down; `tests/layers.rs` keeps them so.
//!
//! ```text
//!    C caller -> include/qcow2_snapshot.h <- cbindgen - capi      extern "C"; unsafe lives here
//!                                                        |
//!                                                    snapshot     the verbs, in QEMU's words
//!                                                        |
//!                                                      image      state, replay, write order
//!                                                     /     \
//!                                                format      io   bytes <-> types | bytes <-> device
//! ```
//!
//! Begin with `snapshot/create.rs`: a verb checks, replays QEMU's code path in memory
//! (`image/replay/`, `image/refcount/`), and hands the result to
//! `image/plan/`, which writes it in the one order that a power cut cannot break.

mod error;
mod flags;
pub mod format;
pub mod image;
pub mod io;
mod maintain;
pub mod read;
pub mod snapshot;
mod words;

#[doc(hidden)]
pub mod capi;

pub use error::{Error, Result};
pub use flags::OpenFlags;
pub use image::{Changed, Image, ImageLayout, Outcome, ProgressHook, Stage};
pub use maintain::{CheckResult, Fix};
pub use read::{BlockStatus, Change, Changes, Mapping, PackedCluster, PackedRun};
pub use snapshot::{NewSnapshot, Snapshot, Usage};
pub use words::{os_words, printable, strerror};
