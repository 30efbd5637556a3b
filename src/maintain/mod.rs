//! What keeps an image in order, and is not QEMU's snapshot code.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

mod flatten;
