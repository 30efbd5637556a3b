//! Which file a call means, and what is in it.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use qcow2_snapshot::format::probe::{probe, PROBE_BYTES};
use qcow2_snapshot::{printable, Error, Image, OpenFlags};

use crate::check;
use crate::cli::Request;
use crate::stop::{explained, force_remove, without_number, Stop};

/// The image that a call names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) path: PathBuf,
    /// `None`: look at the first bytes.
    driver: Option<Driver>,
    /// `None`: whatever the path leads to.
    protocol: Option<Protocol>,
    force_share: bool,
    no_lock: bool,
    /// How quietly, if first.
    repair: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    Qcow2,
    Raw,
}

/// QEMU's drivers for what is on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    File,
    HostDevice,
}

impl Protocol {
    /// Does it take what the path leads to? If not, in QEMU's words.
    fn check(self, path: &Path) -> Result<(), String> {
        let Ok(metadata) = std::fs::metadata(path) else {
            return Ok(()); // to be found again
        };
        let kind = metadata.file_type();
        let (driver, takes, what) = match self {
            Protocol::File => ("file", !kind.is_block_device(), "a regular file"),
            Protocol::HostDevice => (
                "host_device",
                kind.is_block_device() || kind.is_char_device(),
                "either a character or block device",
            ),
        };
        let name = printable(path.as_os_str().as_bytes());
        match takes {
            true => Ok(()),
            false => Err(format!("'{driver}' driver requires '{name}' to be {what}")),
        }
    }
}

/// An opened target.
pub(crate) enum Opened {
    Image(Box<Image>),
    /// A format that has no internal snapshots. `guessed`: nobody said so, and it may be raw.
    Other {
        guessed: bool,
    },
}

impl Target {
    /// Find out what a call means.
    pub(crate) fn of(request: &Request) -> Result<Target, Stop> {
        if request.object {
            return Err(not_served(
                "--object is not supported: there is no QEMU object system here",
            ));
        }
        let mut target = match (request.image_opts, request.format) {
            (true, Some(_)) => {
                return Err(Stop::failed(
                    "--image-opts and --format are mutually exclusive",
                ))
            }
            (true, None) => from_options(request.file)?,
            (false, format) => from_name(request.file, format)?,
        };
        target.force_share |= request.force_share;
        target.no_lock |= request.no_lock;
        target.repair = request.repair.then_some(request.quiet);
        Ok(target)
    }

    /// Open the image. Whatever is in the way, nothing has been changed.
    pub(crate) fn open(&self, shown: &OsStr, flags: OpenFlags) -> Result<Opened, Stop> {
        let write = flags.has(OpenFlags::RDWR);
        if write && self.force_share {
            let text = "force-share=on can only be used with read-only images";
            return Err(could_not_open(shown, text));
        }
        if let Some(Err(text)) = self.protocol.map(|p| p.check(&self.path)) {
            return Err(could_not_open(shown, &text));
        }
        let flags = match self.force_share {
            true => flags | OpenFlags::FORCE_SHARE,
            false => flags,
        };
        let flags = match self.no_lock {
            true => flags | OpenFlags::NO_LOCK,
            false => flags,
        };
        if let (true, Some(quiet)) = (write, self.repair) {
            check::repair_first(&self.path, flags, quiet)?;
        }
        let error = match Image::open(&self.path, flags) {
            Ok(image) if self.driver != Some(Driver::Raw) => {
                return Ok(Opened::Image(Box::new(image)))
            }
            Ok(_) => return Ok(Opened::Other { guessed: false }),
            Err(e) => e,
        };
        if let (Some(head), false) = (head(&self.path), is_about_the_file(&error)) {
            match self.driver {
                Some(Driver::Raw) => return Ok(Opened::Other { guessed: false }),
                None => match probe(&head, self.path.as_os_str().as_bytes()) {
                    "qcow2" => {}
                    format => {
                        let guessed = format == "raw";
                        return Ok(Opened::Other { guessed });
                    }
                },
                _ => {}
            }
        }
        let words = open_words(&error, &self.path);
        let line = not_opened(shown, &words);
        Err(Stop::NotServed(explained(&error, &words, line)))
    }
}

/// Why an image could not be opened, without the words that it could not, and in QEMU's where the
/// library says it in its own.
pub(crate) fn open_words(error: &Error, path: &Path) -> String {
    let text = error.to_string();
    let text = text
        .strip_prefix(&format!(
            "Could not open '{}': ",
            printable(path.as_os_str().as_bytes())
        ))
        .unwrap_or(&text);
    match error {
        Error::Os { context, source } if context.starts_with("Could not open '") => {
            if text.contains("Failed to lock byte") || text.contains("Failed to get ") {
                format!("{text}\nUse 'qcow2-snapshot --no-lock' if nobody else uses the image")
            } else if text.starts_with("The device is not writable") {
                text.to_owned()
            } else {
                without_number(source).into_owned()
            }
        }
        Error::InUse(_) => text
            .strip_prefix("The image is in use: ")
            .unwrap_or(text)
            .replacen(". Is another", "\nIs another", 1),
        // QEMU's hint, on a line of its own.
        _ if text.starts_with("Too much extra metadata") => {
            let hint = force_remove(text).unwrap_or_default();
            format!("{text}\n{hint}")
        }
        _ => text.to_owned(),
    }
}

/// `Could not open 'NAME': TEXT`
pub(crate) fn not_opened(name: &OsStr, text: &str) -> Vec<u8> {
    let before = b"Could not open '".as_slice();
    [before, name.as_bytes(), b"': ", text.as_bytes()].concat()
}

fn could_not_open(name: &OsStr, text: &str) -> Stop {
    Stop::not_served(not_opened(name, text))
}

fn not_served(text: &str) -> Stop {
    Stop::not_served(text)
}

/// A file name, perhaps with a protocol before it.
fn from_name(name: &OsStr, format: Option<&OsStr>) -> Result<Target, Stop> {
    let driver = match format.map(OsStr::as_bytes) {
        None => None,
        Some(b"qcow2") => Some(Driver::Qcow2),
        // All that a device holds is the disk then.
        Some(b"raw" | b"host_device") => Some(Driver::Raw),
        Some(other) => {
            let other = String::from_utf8_lossy(other);
            return Err(could_not_open(name, &format!("Unknown driver '{other}'")));
        }
    };
    let bytes = name.as_bytes();
    let mut protocol = None;
    let path = match bytes.iter().position(|b| matches!(b, b':' | b'/')) {
        Some(at) if bytes.get(at) == Some(&b':') => match bytes.split_at(at) {
            (b"file", path) => {
                protocol = Some(Protocol::File);
                path.get(1..).unwrap_or_default()
            }
            (b"host_device", path) => {
                protocol = Some(Protocol::HostDevice);
                path.get(1..).unwrap_or_default()
            }
            (other, _) => {
                let protocol = String::from_utf8_lossy(other);
                let text = format!("Unknown protocol '{protocol}'");
                return Err(could_not_open(name, &text));
            }
        },
        _ => bytes,
    };
    if path.is_empty() {
        return Err(could_not_open(
            name,
            "The 'file' block driver requires a file name",
        ));
    }
    Ok(Target {
        path: PathBuf::from(OsStr::from_bytes(path)),
        driver,
        protocol,
        force_share: false,
        no_lock: false,
        repair: None,
    })
}

/// An option string: the forms that name a qcow2 image in a file or on a block device.
fn from_options(text: &OsStr) -> Result<Target, Stop> {
    let mut target = Target {
        path: PathBuf::new(),
        driver: None,
        protocol: None,
        force_share: false,
        no_lock: false,
        repair: None,
    };
    for (key, value) in split_options(text.as_bytes()) {
        match (key.as_slice(), value.as_slice()) {
            (b"driver", b"qcow2") => target.driver = Some(Driver::Qcow2),
            (b"driver", b"raw") => target.driver = Some(Driver::Raw),
            (b"driver", other) => {
                let other = String::from_utf8_lossy(other);
                return Err(could_not_open(text, &format!("Unknown driver '{other}'")));
            }
            (b"file.driver", b"file") => target.protocol = Some(Protocol::File),
            (b"file.driver", b"host_device") => target.protocol = Some(Protocol::HostDevice),
            (b"file.filename", path) => target.path = OsString::from_vec(path.to_vec()).into(),
            (b"force-share", b"on") => target.force_share = true,
            (b"force-share", b"off") => target.force_share = false,
            (b"file.locking", b"off") => target.no_lock = true,
            (b"file.locking", b"auto") => target.no_lock = false,
            (key, value) => {
                let option = format!(
                    "{}={}",
                    String::from_utf8_lossy(key),
                    String::from_utf8_lossy(value)
                );
                let text = format!(
                    "--image-opts: '{option}' is not supported here, only driver=qcow2, file.driver=file or host_device, file.filename=PATH, file.locking=off and force-share=on"
                );
                return Err(not_served(&text));
            }
        }
    }
    if target.path.as_os_str().is_empty() {
        return Err(could_not_open(
            text,
            "A block device must be specified for \"file\"",
        ));
    }
    Ok(target)
}

/// QEMU's `key=value,key=value`; two commas stand for one. A first word without `=` is the value
/// of `file`, a later one is a key that is on.
fn split_options(text: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut words = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(b) = bytes.next() {
        if b == b',' && bytes.next_if_eq(&b',').is_none() {
            words.push(Vec::new());
        } else if let Some(word) = words.last_mut() {
            word.push(b);
        }
    }
    let mut first = true;
    words
        .into_iter()
        .filter(|w| !w.is_empty())
        .map(|word| {
            let is_first = std::mem::replace(&mut first, false);
            match word.iter().position(|b| *b == b'=') {
                Some(at) => {
                    let (key, value) = word.split_at(at);
                    (key.to_vec(), value.get(1..).unwrap_or_default().to_vec())
                }
                None if is_first => (b"file".to_vec(), word),
                None => (word, b"on".to_vec()),
            }
        })
        .collect()
}

/// Did it fail before the contents of the file mattered?
fn is_about_the_file(error: &Error) -> bool {
    matches!(error, Error::Os { .. } | Error::InUse(_))
}

/// The first bytes of a file or block device.
fn head(path: &Path) -> Option<Vec<u8>> {
    let kind = std::fs::metadata(path).ok()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return None;
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    file.take(PROBE_BYTES as u64).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// QEMU's words, for scripts that look for them.
pub(crate) fn warn_of_raw(name: &OsStr) {
    let text = [
        b"WARNING: Image format was not specified for '".as_slice(),
        name.as_bytes(),
        b"' and probing guessed raw.\n",
        b"         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n",
        b"         Specify the 'raw' format explicitly to remove the restrictions.\n",
    ]
    .concat();
    // There is nobody to tell when the standard error is closed.
    let _ = std::io::stderr().write_all(&text);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn two_commas_in_an_option_string_are_one() {
        let target = from_options(OsStr::new("driver=qcow2,file.filename=a,,b")).unwrap();
        assert_eq!(target.path, Path::new("a,b"));
        assert_eq!(target.driver, Some(Driver::Qcow2));
    }

    #[test]
    fn a_lock_that_is_refused_names_the_way_out() {
        let target = from_name(OsStr::new("a"), None).unwrap();
        let error = |errno| Error::Os {
            context: "Could not open 'a': Failed to lock byte 100".to_owned(),
            source: std::io::Error::from_raw_os_error(errno),
        };
        let text = open_words(&error(libc::EACCES), &target.path);
        assert!(text.ends_with(
            "Permission denied\nUse 'qcow2-snapshot --no-lock' if nobody else uses the image"
        ));
    }

    #[test]
    fn a_colon_behind_a_slash_is_no_protocol() {
        assert_eq!(
            from_name(OsStr::new("./a:b"), None).unwrap().path,
            Path::new("./a:b")
        );
        assert_eq!(
            from_name(OsStr::new("file:a:b"), None).unwrap().path,
            Path::new("a:b")
        );
        assert!(from_name(OsStr::new("nbd:a"), None).is_err());
        assert!(from_name(OsStr::new("json:{}"), None).is_err());
    }
}
