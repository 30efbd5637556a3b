//! The files behind an image: its backing chain and its external data file.
//!
//! They are opened when guest data is first needed from them, never by a verb but a goto to a
//! larger disk. Names come from the image and are resolved as QEMU does; files are opened
//! read-only, with QEMU's locks.

use super::device::Device;
use super::Image;
use crate::error::{Error, Result};
use crate::flags::OpenFlags;
use crate::io::file::FileStorage;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Our limit for the length of a backing chain; QEMU has none but its stack.
pub(crate) const MAX_CHAIN: usize = 200;

/// One file of the chain behind the image.
pub(crate) enum Layer {
    Qcow2(Box<Image>),
    Raw(Device),
}

impl Layer {
    /// Bytes of the disk that this layer shows; raw files count in whole sectors, as in QEMU.
    pub(crate) fn length(&self) -> u64 {
        match self {
            Layer::Qcow2(image) => image.header.disk_size(),
            Layer::Raw(dev) => dev.length().div_ceil(512).saturating_mul(512),
        }
    }
}

impl Image {
    /// The layers behind this image, nearest first, opened on first use.
    pub(crate) fn open_chain(&mut self) -> Result<()> {
        if self.chain.is_some() {
            return Ok(());
        }
        let mut chain = Vec::new();
        let mut next = self.behind()?;
        while let Some((path, format)) = next {
            if chain.len() >= MAX_CHAIN {
                return Err(Error::Unsupported(format!(
                    "The backing chain is longer than {MAX_CHAIN} files"
                )));
            }
            let layer = self.open_layer(&path, &format)?;
            next = match &layer {
                Layer::Qcow2(image) => image.behind()?,
                Layer::Raw(_) => None,
            };
            chain.push(layer);
        }
        self.chain = Some(chain);
        Ok(())
    }

    /// Length of the disk that the backing file shows; 0 without one.
    pub(crate) fn backing_length(&mut self) -> Result<u64> {
        self.open_chain()?;
        Ok(self
            .chain
            .as_ref()
            .and_then(|c| c.first())
            .map_or(0, Layer::length))
    }

    /// Path and format of the backing file, if there is one.
    fn behind(&self) -> Result<Option<(PathBuf, Vec<u8>)>> {
        if self.backing_file.is_empty() {
            return Ok(None);
        }
        let path = self.resolve(&self.backing_file, "backing file")?;
        Ok(Some((path, self.extensions.backing_format.clone())))
    }

    /// A name from the image as a path: relative to the image's folder (`path_combine`).
    fn resolve(&self, name: &[u8], what: &str) -> Result<PathBuf> {
        let shown = String::from_utf8_lossy(name);
        if self.flags.has(OpenFlags::NO_BACKING) {
            return Err(Error::Unsupported(format!(
                "The {what} '{shown}' is needed, which QCOW2_O_NO_BACKING forbids"
            )));
        }
        let Some(own) = &self.path else {
            return Err(Error::Unsupported(format!(
                "The {what} '{shown}' is needed, which an image opened through callbacks cannot reach"
            )));
        };
        let plain = name.strip_prefix(b"file:").unwrap_or(name);
        let head = plain.split(|b| *b == b'/').next().unwrap_or_default();
        if head.contains(&b':') {
            return Err(Error::Unsupported(format!(
                "The {what} '{shown}' is not a plain file name"
            )));
        }
        let folder = own.parent().unwrap_or(Path::new(""));
        Ok(folder.join(OsStr::from_bytes(plain)))
    }

    fn open_layer(&self, path: &Path, format: &[u8]) -> Result<Layer> {
        let flags = self.flags.for_layers();
        let storage = FileStorage::open_path(path, &Image::file_options(flags))
            .map_err(|e| e.context("Could not open backing file"))?;
        let mut dev = Device::new(Box::new(storage))?;
        let qcow2 = match format {
            b"qcow2" => true,
            b"raw" | b"file" => false,
            b"" => {
                let magic = dev.read_vec("Could not read the backing file", 0, 4)?;
                magic == crate::format::header::MAGIC.to_be_bytes()
            }
            other => {
                return Err(Error::Unsupported(format!(
                    "Backing files of format '{}' are not supported",
                    String::from_utf8_lossy(other)
                )))
            }
        };
        if !qcow2 {
            return Ok(Layer::Raw(dev));
        }
        let mut image =
            Image::on_device(dev, flags).map_err(|e| e.context("Could not open backing file"))?;
        image.path = Some(path.to_owned());
        Ok(Layer::Qcow2(Box::new(image)))
    }

    /// The external data file, opened on first use.
    pub(crate) fn data_file(&mut self) -> Result<&mut Device> {
        if self.data_file.is_none() {
            if self.extensions.data_file.is_empty() {
                return Err(Error::Invalid(
                    "'data-file' is required for this image".into(),
                ));
            }
            let path = self.resolve(&self.extensions.data_file, "external data file")?;
            let storage =
                FileStorage::open_path(&path, &Image::file_options(self.flags.for_layers()))
                    .map_err(|e| e.context("Could not open the external data file"))?;
            self.data_file = Some(Device::new(Box::new(storage))?);
        }
        self.data_file
            .as_mut()
            .ok_or_else(|| Error::Invalid("'data-file' is required for this image".into()))
    }
}
