//! The files behind an image: its backing chain and its external data file.
//!
//! They are opened when guest data is first needed from them, never by a verb but a goto to a
//! larger disk. Names come from the image and are resolved as QEMU does; files are opened
//! read-only, with QEMU's locks.

use crate::error::{Error, Result};
use crate::flags::OpenFlags;
use crate::format::probe::{probe, PROBE_BYTES};
use crate::image::device::Device;
use crate::image::reading::{Chain, Layer, Place};
use crate::image::Image;
use crate::io::file::FileStorage;
use crate::room;
use crate::words::printable;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Our limit for the length of a backing chain; QEMU has none but its stack.
pub(crate) const MAX_CHAIN: usize = 200;

/// Our limit for the L1 tables of all files behind an image together, in bytes. QEMU has none for
/// the chain, but 32 MiB for one table.
const MAX_CHAIN_L1: usize = 256 << 20;

/// What an image names, in messages.
const BACKING_FILE: &str = "backing file";
const DATA_FILE: &str = "external data file";

impl Image {
    /// The layers behind this image, nearest first, opened on first use.
    pub(crate) fn open_chain(&mut self) -> Result<()> {
        if self.behind.chain.is_some() {
            return Ok(());
        }
        let mut chain = Chain(Vec::new());
        let mut seen = room::collected(self.dev.identity().into_iter())?;
        let mut tables = 0;
        loop {
            let last = chain.len() >= MAX_CHAIN;
            let namer = match chain.last_mut() {
                None => &mut *self,
                Some(Layer::Qcow2(image)) => image,
                Some(Layer::Raw(..)) => break,
            };
            if namer.backing_file.is_empty() {
                break;
            }
            if last {
                return Err(Error::Unsupported(format!(
                    "The backing chain is longer than {MAX_CHAIN} files"
                )));
            }
            let mut layer = namer.open_layer()?;
            if let Layer::Qcow2(image) = &mut layer {
                if let Some(id) = image.dev.identity() {
                    if seen.contains(&id) {
                        return Err(Error::Invalid(format!(
                            "The backing chain is a loop: '{}' stands in it twice",
                            printable(&namer.backing_file)
                        )));
                    }
                    room::push(&mut seen, id)?;
                }
                tables += size_of_val(image.l1.as_slice());
                if tables > MAX_CHAIN_L1 {
                    return Err(Error::Unsupported(
                        "The L1 tables of the backing chain take more than 256 MiB".into(),
                    ));
                }
                // Only what reading needs is kept.
                image.reftable = Vec::new();
                image.free_snapshots();
            }
            room::push(&mut chain, layer)?;
        }
        self.behind.chain = Some(chain);
        Ok(())
    }

    /// Length of the disk that the backing file shows; 0 without one.
    pub(crate) fn backing_length(&mut self) -> Result<u64> {
        if self.backing_file.is_empty() {
            return Ok(0);
        }
        if let Some(told) = self.dev.backing_length()? {
            return Ok(told);
        }
        self.open_chain()?;
        Ok(self
            .behind
            .chain
            .as_ref()
            .and_then(|c| c.first())
            .map_or(0, Layer::length))
    }

    /// Open the files behind the image, and say how long each is, nearest first; and how much of a disk
    /// the nearest one shows.
    ///
    /// # Errors
    /// Those of opening them; `Invalid` if one of them is the image itself.
    pub(crate) fn lengths_behind(&mut self) -> Result<(Vec<u64>, u64)> {
        self.open_chain()?;
        let own = self.dev.identity();
        let mut lengths = Vec::new();
        for layer in self.behind.chain.iter_mut().flat_map(|c| c.iter_mut()) {
            let dev = match layer {
                Layer::Qcow2(image) => &mut image.dev,
                Layer::Raw(dev, _) => dev,
            };
            if own.is_some() && dev.identity() == own {
                return Err(Error::Invalid(format!(
                    "The image stands in its own backing chain: it is the backing file '{}', or one of that file's",
                    printable(&self.backing_file)
                )));
            }
            room::push(&mut lengths, dev.length_now()?)?;
        }
        let first = self.behind.chain.as_ref().and_then(|c| c.first());
        Ok((lengths, first.map_or(0, Layer::length)))
    }

    /// The image names no backing file any more.
    pub(crate) fn let_go_of_chain(&mut self) {
        (self.behind.chain, self.header.backing_name) = (None, (0, 0));
        self.backing_file.clear();
        self.forget_reads();
    }

    /// A name from the image as a path, relative to the folder that QEMU takes it from: a backing
    /// file's to the image's (`path_combine`), but to the current one with a protocol before it; a data
    /// file's always to the current one.
    fn resolve(&self, name: &[u8], what: &str) -> Result<PathBuf> {
        let shown = printable(name);
        let Some(place) = &self.behind.place else {
            return Err(Error::Unsupported(format!(
                "The {what} '{shown}' is needed, which an image opened through callbacks without open_file cannot reach"
            )));
        };
        let plain = [&b"file:"[..], b"host_device:"]
            .into_iter()
            .find_map(|protocol| name.strip_prefix(protocol))
            .unwrap_or(name);
        let head = plain.split(|b| *b == b'/').next().unwrap_or_default();
        if head.contains(&b':') {
            return Err(Error::Unsupported(format!(
                "The {what} '{shown}' is not a plain file name"
            )));
        }
        let folder = match place.name.parent() {
            Some(folder) if what == BACKING_FILE && plain.len() == name.len() => folder,
            _ => Path::new(""),
        };
        Ok(folder.join(OsStr::from_bytes(plain)))
    }

    /// Path of the file that this image's data is in.
    pub(crate) fn data_path(&self) -> Option<PathBuf> {
        if self.header.has_data_file() {
            return self.resolve(&self.extensions.data_file, DATA_FILE).ok();
        }
        #[allow(clippy::disallowed_methods)] // as long as a path may be
        self.behind.place.as_ref().map(|place| place.name.clone())
    }

    /// Open a file that this image names, for reading.
    fn open_named(
        &mut self,
        name: &[u8],
        format: &[u8],
        what: &str,
    ) -> Result<(Device, Option<PathBuf>)> {
        let context = format!("Could not open {what}");
        let shown = printable(name);
        if self.flags.has(OpenFlags::NO_BACKING) {
            return Err(Error::Unsupported(format!(
                "The {what} '{shown}' is needed, which QCOW2_O_NO_BACKING forbids"
            )));
        }
        if let Some(opened) = self.dev.open_named(name, format) {
            let storage = opened.map_err(|source| Error::Os {
                context: format!("{context} '{shown}'"),
                source,
            })?;
            return Ok((Device::new(storage)?, None));
        }
        let path = self.resolve(name, what)?;
        let absolute = self
            .behind
            .place
            .as_ref()
            .and_then(|place| place.absolute(&path));
        let absolute = absolute.ok_or_else(|| {
            Error::Unsupported(format!(
                "{context} '{shown}': the name is relative, and there was no current folder when the image was opened"
            ))
        })?;
        let options = Image::file_options(self.flags.for_layers());
        let storage = FileStorage::open_path_as(&absolute, &path, &options)
            .map_err(|e| e.context(&context))?;
        #[allow(clippy::disallowed_methods)] // a hundred bytes, for each of 200 files at most
        let storage = Box::new(storage);
        Ok((Device::new(storage)?, Some(path)))
    }

    /// Open the backing file that this image names.
    fn open_layer(&mut self) -> Result<Layer> {
        let name = room::copy_of(&self.backing_file)?;
        let format = room::copy_of(&self.extensions.backing_format)?;
        if !format.is_empty() {
            self.require_readable(&format)?;
        }
        let (mut dev, path) = self.open_named(&name, &format, BACKING_FILE)?;
        let found = if format.is_empty() {
            let head = dev.read_vec("Could not read the backing file", 0, PROBE_BYTES as u64)?;
            probe(&head, &name).as_bytes()
        } else {
            format.as_slice()
        };
        self.require_readable(found)?;
        if found != b"qcow2" {
            return Ok(Layer::Raw(dev, path));
        }
        let mut image = Image::on_device(dev, self.flags.for_layers())
            .map_err(|e| e.context("Could not open backing file"))?;
        // What it names was relative to the same current folder.
        #[allow(clippy::disallowed_methods)] // as long as a path may be
        let current = self
            .behind
            .place
            .as_ref()
            .and_then(|place| place.current.clone());
        image.behind.place = path.map(|name| Place { name, current });
        #[allow(clippy::disallowed_methods)] // one for each of 200 files at most
        let image = Box::new(image);
        Ok(Layer::Qcow2(image))
    }

    /// Can a backing file in this format be read here?
    fn require_readable(&self, format: &[u8]) -> Result<()> {
        match format {
            b"qcow2" | b"raw" | b"file" | b"host_device" => Ok(()),
            _ => Err(Error::Unsupported(format!(
                "The backing file '{}' is in format '{}', which is not supported: only qcow2 and raw are",
                printable(&self.backing_file),
                printable(format)
            ))),
        }
    }

    /// The external data file, opened on first use.
    pub(crate) fn data_file(&mut self) -> Result<&mut Device> {
        if self.behind.data_file.is_none() {
            let name = room::copy_of(&self.extensions.data_file)?;
            if name.is_empty() {
                return Err(Error::Invalid(
                    "'data-file' is required for this image".into(),
                ));
            }
            let (dev, _) = self.open_named(&name, b"raw", DATA_FILE)?;
            self.behind.data_file = Some(dev);
        }
        self.behind
            .data_file
            .as_mut()
            .ok_or_else(|| Error::Invalid("'data-file' is required for this image".into()))
    }
}
