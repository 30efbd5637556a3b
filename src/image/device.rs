//! The storage under an image, with errors that say what was being done and where.

use crate::error::{Error, Result};
use crate::image::progress::Progress;
pub(crate) use crate::io::{DiscardKind, Run, MAX_REQUEST};
use crate::io::{Stamp, Storage};
use crate::room;

/// A [`Storage`] whose length is known and whose errors carry context. What changes it stands in
/// `plan::execute`.
pub(crate) struct Device {
    pub(in crate::image) storage: Box<dyn Storage>,
    pub(in crate::image) length: u64,
    fixed_length: bool,
    /// A change has been asked for since this was last set to false.
    pub(crate) changed: bool,
    /// What tables are read into, between two readers.
    pub(super) buffer: Vec<u8>,
    /// It is here because whatever takes time has the device at hand.
    pub(crate) progress: Progress,
}

impl Device {
    pub(crate) fn new(storage: Box<dyn Storage>) -> Result<Device> {
        let mut dev = Device {
            fixed_length: storage.fixed_length(),
            storage,
            length: 0,
            changed: false,
            buffer: Vec::new(),
            progress: Progress::new(None),
        };
        dev.length_now()?;
        Ok(dev)
    }

    /// [`Device::length`], asked again.
    pub(crate) fn length_now(&mut self) -> Result<u64> {
        let length = self.storage.length();
        self.length = length.map_err(failed("Could not get the length of the image", 0))?;
        Ok(self.length)
    }

    /// Length of the file in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Does the length stay as it is?
    pub(crate) fn fixed_length(&self) -> bool {
        self.fixed_length
    }

    /// May the length be rounded up to whole sectors?
    pub(crate) fn length_in_sectors(&self) -> bool {
        self.storage.length_in_sectors()
    }

    /// Is there room for all that will be written up to `end`?
    pub(crate) fn check_room(&mut self, end: u64) -> Result<()> {
        if !self.fixed_length || end <= self.length || end <= self.length_now()? {
            return Ok(());
        }
        Err(Error::Os {
            context: format!(
                "The image would have to grow to {end} bytes, but its block device ends at {}",
                self.length
            ),
            source: std::io::Error::from_raw_os_error(libc::ENOSPC),
        })
    }

    /// Is there nothing at `offset` and behind it?
    pub(crate) fn ends_before(&mut self, offset: u64) -> Result<bool> {
        // Somebody else may have made the file longer, where no lock keeps them out.
        Ok(offset >= self.length && offset >= self.length_now()?)
    }

    /// Is all of this table in the file? Zeros read from behind its end would pass for contents, and
    /// would be holes like others as soon as something else makes the file longer.
    ///
    /// # Errors
    /// `Corrupt`, if not; `what` names the table.
    pub(crate) fn check_inside(
        &mut self,
        what: std::fmt::Arguments<'_>,
        offset: u64,
        bytes: u64,
    ) -> Result<()> {
        let end = offset.saturating_add(bytes);
        if bytes == 0 || !self.ends_before(end - 1)? {
            return Ok(());
        }
        Err(Error::Corrupt(format!(
            "{what} (bytes {offset:#x} to {end:#x}) is cut off: the file ends at {:#x}. Copy the image again from where it is whole; 'qemu-img convert' saves what is left of the active disk",
            self.length
        )))
    }

    /// Fill `buf` from `offset`, zeros past the end.
    pub(crate) fn read(&mut self, op: &'static str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut at = offset;
        for part in buf.chunks_mut(MAX_REQUEST) {
            if self.ends_before(at)? {
                part.fill(0);
            } else {
                self.storage.read(at, part).map_err(failed(op, at))?;
            }
            at = at.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    /// Read `bytes` into a new buffer.
    pub(crate) fn read_vec(
        &mut self,
        op: &'static str,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>> {
        let mut buf = zeroed(bytes)?;
        self.read(op, offset, &mut buf)?;
        Ok(buf)
    }

    /// These bytes will be read soon.
    pub(crate) fn will_read(&mut self, offset: u64, bytes: u64) {
        if offset < self.length {
            self.storage.will_read(offset, bytes);
        }
    }

    /// Is there data or a hole at `offset`? Where the storage cannot tell: data.
    pub(crate) fn run(&mut self, offset: u64) -> Run {
        self.storage.run(offset).unwrap_or(Run::Data(u64::MAX))
    }

    /// Bytes that the file takes, holes left out, where the storage can tell.
    pub(crate) fn allocated(&mut self) -> Option<u64> {
        self.storage.allocated()
    }

    /// What tells this file from every other, where the storage can tell.
    pub(crate) fn host_file(&self) -> Option<std::fs::File> {
        self.storage.host_file()
    }

    pub(crate) fn identity(&mut self) -> Option<(u64, u64)> {
        self.storage.identity()
    }

    /// What tells whether somebody has changed the file, where the storage can tell.
    pub(crate) fn stamp(&mut self) -> Option<Stamp> {
        self.storage.stamp()
    }

    /// Open another file through this one's storage; `None` if names are paths.
    pub(crate) fn open_named(
        &mut self,
        name: &[u8],
        format: &[u8],
    ) -> Option<std::io::Result<Box<dyn Storage>>> {
        self.storage.open_named(name, format)
    }

    /// The length of what the backing file shows, where the storage's owner says it.
    pub(crate) fn backing_length(&mut self) -> Result<Option<u64>> {
        let told = self.storage.backing_length().transpose();
        told.map_err(|source| Error::Os {
            context: "Could not get the length of the backing file".into(),
            source,
        })
    }

    pub(crate) fn close(self) -> Result<()> {
        self.storage.close().map_err(|source| Error::Os {
            context: "Could not close the image file".into(),
            source,
        })
    }
}

/// What was being done, and where, when a request failed.
pub(super) fn failed(op: &'static str, offset: u64) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Io { op, offset, source }
}

/// A zeroed buffer whose allocation may fail.
pub(crate) fn zeroed(bytes: u64) -> Result<Vec<u8>> {
    let len = usize::try_from(bytes).map_err(|_| Error::NoMemory(bytes))?;
    room::filled(len, 0)
}

/// Big-endian words of a table.
pub(crate) fn words(bytes: &[u8]) -> Result<Vec<u64>> {
    room::collected(bytes.chunks_exact(8).map(byteorder::BigEndian::read_u64))
}

/// Bytes of a table of words.
pub(crate) fn bytes_of(words: &[u64]) -> Result<Vec<u8>> {
    let mut out = zeroed(words.len() as u64 * 8)?;
    byteorder::BigEndian::write_u64_into(words, &mut out);
    Ok(out)
}

use byteorder::ByteOrder;
