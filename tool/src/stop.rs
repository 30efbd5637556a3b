//! Why the program ends without having done its work, and how it speaks.

use std::io::Write;

use qcow2_snapshot::Error;
/// The English words for an errno, and for a failed request.
pub(crate) use qcow2_snapshot::{os_words as without_number, strerror};

/// The way out of damage, in one place.
const REPAIR: &str =
    "The image is damaged: 'qcow2-snapshot check' says where, 'qcow2-snapshot check -r all' repairs what it can";
/// The way out where bitmaps are in the way.
const REMOVE_BITMAPS: &str =
    "'qemu-img bitmap --remove FILE BITMAP' removes a bitmap; 'qemu-img info FILE' names them";

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
    NotServed(Vec<Vec<u8>>),
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

    /// One line of text.
    pub(crate) fn not_served(text: impl Into<Vec<u8>>) -> Stop {
        Stop::NotServed(vec![text.into()])
    }
}

impl From<clap::Error> for Stop {
    fn from(e: clap::Error) -> Stop {
        Stop::Clap(e)
    }
}

/// What the library says of `error`, the way out where there is one, and `line`, for which
/// scripts look. What is in `line` anyway is not said twice.
pub(crate) fn explained(error: &Error, sentence: &str, line: Vec<u8>) -> Vec<Vec<u8>> {
    let mut lines = Vec::new();
    if !line.ends_with(format!(": {sentence}").as_bytes()) {
        lines.push(sentence.into());
    }
    if sentence.contains("bitmap") {
        lines.push(REMOVE_BITMAPS.into());
    } else if !sentence.contains("qcow2-snapshot check") {
        let damaged = is_damage(error).then_some(REPAIR);
        lines.extend(force_remove(sentence).or(damaged).map(Vec::from));
    }
    lines.push(line);
    lines
}

/// The way out where a snapshot table has too much of something, in QEMU's words.
pub(crate) fn force_remove(text: &str) -> Option<&'static str> {
    if text.contains("Too much extra metadata in snapshot table entry") {
        Some("You can force-remove this extra metadata with qcow2-snapshot check -r all")
    } else if ["napshot table too large", "napshot table is too big"]
        .iter()
        .any(|words| text.contains(words))
    {
        Some(
            "You can force-remove the snapshots that are too many with qcow2-snapshot check -r all",
        )
    } else {
        None
    }
}

/// Does the image contradict itself? Else it is the call, the disk or a limit.
fn is_damage(error: &Error) -> bool {
    match error {
        Error::Corrupt(_) => true,
        // The corrupt bit.
        Error::Access(text) => text.contains("corrupt"),
        // QEMU's errno for these is that of a bad argument.
        Error::Invalid(text) | Error::TooBig(text) => ["Snapshot L1 table", "which is in use"]
            .iter()
            .any(|part| text.contains(part)),
        _ => false,
    }
}

/// Say lines on the standard error, each behind the program's name, in one write, so that
/// messages of programs that run side by side do not mix.
pub(crate) fn say(prefix: &str, lines: &[Vec<u8>]) {
    let mut text = Vec::new();
    for line in lines {
        text.extend_from_slice(&[prefix.as_bytes(), b": ", line, b"\n"].concat());
    }
    // There is nobody to tell when the standard error is closed.
    let _ = std::io::stderr().write_all(&text);
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
