//! The C surface: every function of `include/qcow2_snapshot.h`.
//!
//! The doc comments of the `qcow2_*` items in this module are the manual for C
//! programmers: cbindgen copies them into the header (see `build.rs`), so they speak C
//! and say nothing of Rust. What they have in common stands once, in the header's opening
//! comment (`cbindgen.toml`).
//!
//! Three rules keep the functions short and alike:
//!
//! * Every body runs inside `guard`: it turns NULL, re-entrancy, errors and panics into
//!   an errno, an error object and the text of `qcow2_last_error()`.
//! * Out-pointers are cleared before anything else and set only on success.
//! * The handle is never behind a `&mut`: a caller's I/O or progress function may
//!   hold the same pointer and call back while a verb runs. It then finds the busy flag set and gets
//!   -EBUSY, without a second reference to the image having existed.
//!
//! Unsafe code lives here and in the system call layer of `io`, nowhere else.

// This is the border to C: the pointers come from there.
#![allow(unsafe_code)]
// The contract with the caller is in the C documentation of each function.
#![allow(clippy::missing_safety_doc)]

mod api;
mod cancel;
mod changes;
mod check;
mod error;
mod flatten;
mod guard;
mod last;
mod layout;
mod open;
mod progress;
mod space;
mod types;
mod verbs;

pub use api::*;
pub use changes::*;
pub use check::*;
pub use error::*;
pub use flatten::*;
pub use guard::Qcow2Image;
pub use last::*;
pub use layout::*;
pub use open::*;
pub use progress::*;
pub use space::*;
pub use types::*;
pub use verbs::*;
