//! What can go wrong, and the one table that maps it to an errno.

use std::fmt::{self, Write};
use std::io;

use crate::words::{os_words, OneLine};

/// The result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation failed.
///
/// The variant decides the errno ([`Error::errno`]); the text is for people and is
/// what `qcow2_error_get_pretty()` returns.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request to the storage failed.
    Io {
        /// What was being done, in the words of the format.
        op: &'static str,
        /// Byte offset in the image file.
        offset: u64,
        /// The failure of the request itself.
        source: io::Error,
    },
    /// The image is damaged: a structure contradicts the format (-EIO).
    Corrupt(String),
    /// An argument or a field of the image is not acceptable (-EINVAL).
    Invalid(String),
    /// A table exceeds QEMU's limit for it (-EFBIG).
    TooBig(String),
    /// No such snapshot or file (-ENOENT).
    NotFound(String),
    /// A snapshot with this ID exists already (-EEXIST).
    Exists(String),
    /// A feature that cannot be served (-ENOTSUP).
    Unsupported(String),
    /// The handle or the image does not allow changes (-EACCES).
    Access(String),
    /// The handle is there to check the image, and the image is not good yet (-EPERM).
    NotPermitted(String),
    /// The image is in use by somebody else (-EAGAIN).
    InUse(String),
    /// The handle is busy, or dirty bitmaps are active (-EBUSY).
    Busy(String),
    /// The caller's progress hook stopped a verb (-ECANCELED).
    Cancelled(String),
    /// Memory for a table could not be had (-ENOMEM).
    NoMemory(u64),
    /// An earlier failure left the handle unable to change the image (-EIO).
    Spent(String),
    /// A system call on the image file failed before anything was read.
    Os {
        /// What was being done.
        context: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// One line of English: whatever stands in an image is escaped, here and nowhere else.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = OneLine(f);
        match self {
            Error::Io { op, offset, source } => {
                write!(line, "{op} at offset {offset:#x}: {}", os_words(source))
            }
            Error::Os { context, source } => write!(line, "{context}: {}", os_words(source)),
            Error::NoMemory(bytes) => write!(line, "cannot allocate {bytes} bytes of memory"),
            Error::Corrupt(text)
            | Error::Invalid(text)
            | Error::TooBig(text)
            | Error::NotFound(text)
            | Error::Exists(text)
            | Error::Unsupported(text)
            | Error::Access(text)
            | Error::NotPermitted(text)
            | Error::InUse(text)
            | Error::Busy(text)
            | Error::Cancelled(text)
            | Error::Spent(text) => line.write_str(text),
        }
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
