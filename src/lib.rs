//! Internal snapshots of qcow2 images, in-process and byte for byte as QEMU makes them.
//!
//! This is the library behind `qcow2_snapshot.h` ([README](https://crates.io/crates/qcow2-snapshot)): C programs have
//! the header and `man libqcow2_snapshot`, Rust programs this page. An [`Image`] is one open file; the verbs are its methods.
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
//! # Opening
//!
//! [`Image::open`] takes a path, [`Image::open_fd`] a descriptor that stays yours, [`Image::open_storage`] whatever
//! implements [`io::Storage`] (memory, a device of your own; no locks are taken then). [`OpenFlags`] are those of the header:
//! `RDWR` to change the image, `NO_BACKING` for images that are not trusted. An image that a guest or qemu-img has open is
//! [`Error::InUse`], and theirs is refused while yours is open. Dropping an `Image` closes it; [`Image::close`] says
//! what went wrong then.
//!
//! # The verbs
//!
//! | method | qemu-img | what it does |
//! |---|---|---|
//! | [`Image::snapshot_create`] | `snapshot -c` | keeps the disk as it is now; returns the ID |
//! | [`Image::snapshot_list`] | `snapshot -l` | the snapshots, in the order of the table |
//! | [`Image::snapshot_goto`] | `snapshot -a` | makes the disk what it was |
//! | [`Image::snapshot_delete`] | `snapshot -d` | by ID, name or both |
//! | [`Image::snapshot_delete_many`] | | several at the price of little more than one |
//! | [`Image::snapshot_rename`] | | gives another name |
//! | [`Image::snapshot_load_tmp`] | `convert -l` | shows a snapshot to the readers below; nothing is written |
//! | [`Image::flatten`] | `rebase -b ""` | lets go of the backing file, and every snapshot keeps its bytes |
//! | [`Image::check`] | `check`, `check -r` | looks for damage and leaks, and mends what [`Fix`] says |
//!
//! Names and IDs are bytes, not text. Those that take one word look for an ID first, then for a name. The library does not
//! ask the clock: [`NewSnapshot::date_sec`] is yours.
//!
//! # Reading
//!
//! [`Image::read`] reads the disk now seen, [`Image::block_status`] says which parts of it are data, zeros or a file behind it,
//! [`Image::load_vmstate`] reads what stands behind the disk. [`Image::snapshot_changes`] iterates over what changed between two
//! states, at the price of what changed; [`Image::snapshot_usage`] says what states occupy and what deleting them would free.
//!
//! ```no_run
//! # fn main() -> qcow2_snapshot::Result<()> {
//! use qcow2_snapshot::{Image, OpenFlags};
//!
//! let mut image = Image::open("disk.qcow2".as_ref(), OpenFlags::read_only())?;
//! for change in image.snapshot_changes(Some(b"monday"), None, false) {
//!     let change = change?;
//!     println!("{} bytes from {}", change.length, change.start);
//! }
//! let monday = image.snapshot_usage(&[Some(b"monday")])?;
//! println!("deleting monday frees {} bytes", monday.exclusive);
//!
//! image.snapshot_load_tmp(None, Some(b"monday"))?;
//! let mut boot_sector = [0; 512];
//! image.read(0, &mut boot_sector)?;
//! # image.close()
//! # }
//! ```
//!
//! An `Image` stays in the thread that opened it; to read in parallel open one in each thread. `FORCE_SHARE` reads beside a
//! writer, and looks again when the file has changed; with `NO_LOCK` that is [`Image::reload`], and yours to call.
//!
//! # When something fails
//!
//! Every [`Error`] has words for people, in one line, and an [`errno`](Error::errno). [`Image::last_outcome`] says what is true
//! of the image after a verb: unchanged, done, or (after a failing disk) one of both. A power cut at any moment leaves the
//! old state or the new one. With [`Image::set_progress`] a hook is told how far a verb is, and may cancel it until
//! it takes effect; [`Image::remark`] is what is worth knowing of a verb that succeeded. Nothing is printed, nothing panics on
//! the bytes of an image, and there is no global state.
//!
//! # The map of the sources
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
#[cfg(test)]
mod golden;
pub mod image;
pub mod io;
mod maintain;
pub mod read;
mod room;
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
