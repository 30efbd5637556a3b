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
use crate::words::printable;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Our limit for the length of a backing chain; QEMU has none but its stack.
pub(crate) const MAX_CHAIN: usize = 200;

/// Our limit for the L1 tables of all files behind an image together, in bytes. QEMU has none for
/// the chain, but 32 MiB for one table.
const MAX_CHAIN_L1: usize = 256 << 20;

/// One file of the chain behind the image.
pub(crate) enum Layer {
    Qcow2(Box<Image>),
    /// A raw file, and its path where it has one.
    Raw(Device, Option<PathBuf>),
}

impl Layer {
    /// Bytes of the disk that this layer shows; raw files count in whole sectors, as in QEMU.
    pub(crate) fn length(&self) -> u64 {
        match self {
            Layer::Qcow2(image) => image.header.disk_size(),
            Layer::Raw(dev, _) => dev.length().div_ceil(512).saturating_mul(512),
        }
    }
}

/// What an image names, in messages.
const BACKING_FILE: &str = "backing file";
const DATA_FILE: &str = "external data file";

impl Image {
    /// The layers behind this image, nearest first, opened on first use.
    pub(crate) fn open_chain(&mut self) -> Result<()> {
        if self.chain.is_some() {
            return Ok(());
        }
        let mut chain: Vec<Layer> = Vec::new();
        let mut seen: Vec<(u64, u64)> = self.dev.identity().into_iter().collect();
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
                    seen.push(id);
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
            chain.push(layer);
        }
        self.chain = Some(chain);
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
            .chain
            .as_ref()
            .and_then(|c| c.first())
            .map_or(0, Layer::length))
    }

    /// A name from the image as a path, relative to the folder that QEMU takes it from: a backing
    /// file's to the image's (`path_combine`), but to the current one with `file:` before it; a data
    /// file's always to the current one.
    fn resolve(&self, name: &[u8], what: &str) -> Result<PathBuf> {
        let shown = printable(name);
        let Some(own) = &self.path else {
            return Err(Error::Unsupported(format!(
                "The {what} '{shown}' is needed, which an image opened through callbacks without open_file cannot reach"
            )));
        };
        let plain = name.strip_prefix(b"file:").unwrap_or(name);
        let head = plain.split(|b| *b == b'/').next().unwrap_or_default();
        if head.contains(&b':') {
            return Err(Error::Unsupported(format!(
                "The {what} '{shown}' is not a plain file name"
            )));
        }
        let folder = match own.parent() {
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
        self.path.clone()
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
        let options = Image::file_options(self.flags.for_layers());
        let storage = FileStorage::open_path(&path, &options).map_err(|e| e.context(&context))?;
        Ok((Device::new(Box::new(storage))?, Some(path)))
    }

    /// Open the backing file that this image names.
    fn open_layer(&mut self) -> Result<Layer> {
        let name = self.backing_file.clone();
        let format = self.extensions.backing_format.clone();
        let known: [&[u8]; 4] = [b"qcow2", b"raw", b"file", b""];
        if !known.contains(&format.as_slice()) {
            return Err(Error::Unsupported(format!(
                "Backing files of format '{}' are not supported",
                printable(&format)
            )));
        }
        let (mut dev, path) = self.open_named(&name, &format, BACKING_FILE)?;
        let qcow2 = match format.as_slice() {
            b"qcow2" => true,
            b"" => {
                let magic = dev.read_vec("Could not read the backing file", 0, 4)?;
                magic == crate::format::header::MAGIC.to_be_bytes()
            }
            _ => false,
        };
        if !qcow2 {
            return Ok(Layer::Raw(dev, path));
        }
        let mut image = Image::on_device(dev, self.flags.for_layers())
            .map_err(|e| e.context("Could not open backing file"))?;
        image.path = path;
        Ok(Layer::Qcow2(Box::new(image)))
    }

    /// The external data file, opened on first use.
    pub(crate) fn data_file(&mut self) -> Result<&mut Device> {
        if self.data_file.is_none() {
            let name = self.extensions.data_file.clone();
            if name.is_empty() {
                return Err(Error::Invalid(
                    "'data-file' is required for this image".into(),
                ));
            }
            let (dev, _) = self.open_named(&name, b"raw", DATA_FILE)?;
            self.data_file = Some(dev);
        }
        self.data_file
            .as_mut()
            .ok_or_else(|| Error::Invalid("'data-file' is required for this image".into()))
    }
}
