//! Bytes to types.
