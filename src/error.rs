//! What can go wrong, and the one table that maps it to an errno.

use std::io;

/// The result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation failed.
///
/// The variant decides the errno ([`Error::errno`]); the text is for people and is
/// what `qcow2_error_get_pretty()` returns.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request to the storage failed.
    #[error("{op} at offset {offset:#x}: {}", strerror(.source))]
    Io {
        /// What was being done, in the words of the format.
        op: &'static str,
        /// Byte offset in the image file.
        offset: u64,
        /// The failure of the request itself.
        source: io::Error,
    },
    /// The image is damaged: a structure contradicts the format (-EIO).
    #[error("{0}")]
    Corrupt(String),
    /// An argument or a field of the image is not acceptable (-EINVAL).
    #[error("{0}")]
    Invalid(String),
    /// A table exceeds QEMU's limit for it (-EFBIG).
    #[error("{0}")]
    TooBig(String),
    /// No such snapshot or file (-ENOENT).
    #[error("{0}")]
    NotFound(String),
    /// A snapshot with this ID exists already (-EEXIST).
    #[error("{0}")]
    Exists(String),
    /// A feature that cannot be served (-ENOTSUP).
    #[error("{0}")]
    Unsupported(String),
    /// The handle or the image does not allow changes (-EACCES).
    #[error("{0}")]
    Access(String),
    /// The handle is there to check the image, and the image is not good yet (-EPERM).
    #[error("{0}")]
    NotPermitted(String),
    /// The image is in use by somebody else (-EAGAIN).
    #[error("{0}")]
    InUse(String),
    /// The handle is busy, or dirty bitmaps are active (-EBUSY).
    #[error("{0}")]
    Busy(String),
    /// The caller's progress hook stopped a verb (-ECANCELED).
    #[error("{0}")]
    Cancelled(String),
    /// Memory for a table could not be had (-ENOMEM).
    #[error("cannot allocate {0} bytes of memory")]
    NoMemory(u64),
    /// An earlier failure left the handle unable to change the image (-EIO).
    #[error("{0}")]
    Spent(String),
    /// A system call on the image file failed before anything was read.
    #[error("{context}: {}", strerror(.source))]
    Os {
        /// What was being done.
        context: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// The system's words for an errno, without Rust's "(os error N)".
fn strerror(e: &io::Error) -> String {
    let text = e.to_string();
    match text.rfind(" (os error ") {
        Some(at) => text.get(..at).unwrap_or_default().to_owned(),
        None => text,
    }
}

impl Error {
    /// The positive errno that a C caller gets, negated, for this error.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Io { source, .. } | Error::Os { source, .. } => match source.raw_os_error() {
                Some(n) if n > 0 => n,
                _ => libc::EIO,
            },
            Error::Corrupt(_) | Error::Spent(_) => libc::EIO,
            Error::Invalid(_) => libc::EINVAL,
            Error::TooBig(_) => libc::EFBIG,
            Error::NotFound(_) => libc::ENOENT,
            Error::Exists(_) => libc::EEXIST,
            Error::Unsupported(_) => libc::ENOTSUP,
            Error::Access(_) => libc::EACCES,
            Error::NotPermitted(_) => libc::EPERM,
            Error::InUse(_) => libc::EAGAIN,
            Error::Busy(_) => libc::EBUSY,
            Error::Cancelled(_) => libc::ECANCELED,
            Error::NoMemory(_) => libc::ENOMEM,
        }
    }

    /// Put words in front of the message, keeping the errno.
    #[must_use]
    pub fn context(self, prefix: &str) -> Error {
        let source = io::Error::from_raw_os_error(self.errno());
        let text = format!("{prefix}: {self}");
        match self {
            Error::Io { .. } | Error::NoMemory(_) => Error::Os {
                context: prefix.to_owned(),
                source,
            },
            Error::Os { source, context } => Error::Os {
                context: format!("{prefix}: {context}"),
                source,
            },
            Error::Corrupt(_) => Error::Corrupt(text),
            Error::Invalid(_) => Error::Invalid(text),
            Error::TooBig(_) => Error::TooBig(text),
            Error::NotFound(_) => Error::NotFound(text),
            Error::Exists(_) => Error::Exists(text),
            Error::Unsupported(_) => Error::Unsupported(text),
            Error::Access(_) => Error::Access(text),
            Error::NotPermitted(_) => Error::NotPermitted(text),
            Error::InUse(_) => Error::InUse(text),
            Error::Busy(_) => Error::Busy(text),
            Error::Spent(_) => Error::Spent(text),
            // No step has failed.
            Error::Cancelled(_) => self,
        }
    }
}
