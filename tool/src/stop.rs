//! Why the program ends without having done its work, and how it speaks.

use std::io::Write;

/// Every way out but success.
#[derive(Debug)]
pub(crate) enum Stop {
    /// `--help` was asked for: the page.
    Help(String),
    /// getopt's complaint, complete but for the last line.
    Options(Vec<u8>),
    /// A complaint about the options that follows the program's name.
    Usage(String),
    /// It did not work. Each line follows the program's name.
    Failed(Vec<Vec<u8>>),
    /// Nothing was changed, and qemu-img might be able to do it.
    NotServed(Vec<u8>),
    /// With this exit code. The line, if there is one, follows the program's name.
    Code(u8, String),
    /// clap's complaint, or its help.
    Clap(clap::Error),
    /// By this signal. The line follows the program's name.
    Interrupted(u8, Vec<u8>),
}

impl Stop {
    /// One line of text.
    pub(crate) fn failed(text: impl Into<Vec<u8>>) -> Stop {
        Stop::Failed(vec![text.into()])
    }
}

impl From<clap::Error> for Stop {
    fn from(e: clap::Error) -> Stop {
        Stop::Clap(e)
    }
}

/// The system's words for an errno.
pub(crate) fn strerror(errno: i32) -> String {
    without_number(&std::io::Error::from_raw_os_error(errno))
}

/// The system's words without Rust's "(os error N)".
pub(crate) fn without_number(e: &std::io::Error) -> String {
    let text = e.to_string();
    match text.rfind(" (os error ") {
        Some(at) => text.get(..at).unwrap_or_default().to_owned(),
        None => text,
    }
}

/// Write to the standard output. A reader that went away is not an error.
pub(crate) fn print(bytes: &[u8]) -> Result<(), Stop> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Stop::failed(format!(
            "Could not write the output: {}",
            without_number(&e)
        ))),
        _ => Ok(()),
    }
}
