//! Faults planted.
