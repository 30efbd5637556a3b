//! The recorder for crash and fault tests.
