//! The storage under an image, with errors that say what was being done and where.

use crate::error::{Error, Result};
use crate::image::progress::Progress;
use crate::image::room;
use crate::io::{Run, Stamp, Storage, MAX_REQUEST};

/// A [`Storage`] whose length is known and whose errors carry context.
pub(crate) struct Device {
    storage: Box<dyn Storage>,
    length: u64,
    /// A change has been asked for since this was last set to false.
    pub(crate) changed: bool,
    /// It is here because whatever takes time has the device at hand.
    pub(crate) progress: Progress,
}

impl Device {
    pub(crate) fn new(storage: Box<dyn Storage>) -> Result<Device> {
        let mut dev = Device {
            storage,
            length: 0,
            changed: false,
            progress: Progress::new(None),
        };
        dev.length_now()?;
        Ok(dev)
    }

    /// [`Device::length`], asked again.
    pub(crate) fn length_now(&mut self) -> Result<u64> {
        self.length = self.storage.length().map_err(|source| Error::Io {
            op: "Could not get the length of the image",
            offset: 0,
            source,
        })?;
        Ok(self.length)
    }

    /// Length of the file in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
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
                self.storage.read(at, part).map_err(|source| Error::Io {
                    op,
                    offset: at,
                    source,
                })?;
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

    /// Write `data` at `offset`. `label` says which structure it is.
    pub(crate) fn write(&mut self, label: &'static str, offset: u64, data: &[u8]) -> Result<()> {
        let mut at = offset;
        self.changed = true;
        for part in data.chunks(MAX_REQUEST) {
            self.storage
                .write(label, at, part)
                .map_err(|source| Error::Io {
                    op: label,
                    offset: at,
                    source,
                })?;
            at = at.saturating_add(part.len() as u64);
            self.length = self.length.max(at);
        }
        Ok(())
    }

    /// Set the file's length.
    pub(crate) fn truncate(&mut self, length: u64) -> Result<()> {
        self.changed = true;
        self.storage.truncate(length).map_err(|source| Error::Io {
            op: "Could not resize the image file",
            offset: length,
            source,
        })?;
        self.length = length;
        Ok(())
    }

    /// Punch a hole; failures cost space only and are ignored, as QEMU does.
    pub(crate) fn discard(&mut self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes).min(self.length);
        if offset < end {
            self.changed = true;
            let _ = self.storage.discard(offset, end - offset);
        }
    }

    /// Wait until everything before is stable.
    pub(crate) fn barrier(&mut self) -> Result<()> {
        self.changed = true;
        self.storage.barrier().map_err(|source| Error::Io {
            op: "Could not flush the image file",
            offset: 0,
            source,
        })
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

    /// Where a hole is in this range, write what it reads as: a later write here needs no space.
    pub(crate) fn fill_holes(&mut self, offset: u64, bytes: u64) -> Result<()> {
        let end = offset.saturating_add(bytes);
        let mut at = offset;
        while at < end {
            let (hole, n) = match self.run(at) {
                Run::Data(n) => (false, n),
                Run::Hole(n) => (true, n.unwrap_or(u64::MAX)),
            };
            let n = n.clamp(1, end - at);
            if hole {
                let there = self.read_vec("Could not read a hole", at, n)?;
                self.write("hole", at, &there)?;
            }
            at += n;
        }
        Ok(())
    }

    /// Bytes that the file takes, holes left out, where the storage can tell.
    pub(crate) fn allocated(&mut self) -> Option<u64> {
        self.storage.allocated()
    }

    /// What tells this file from every other, where the storage can tell.
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
