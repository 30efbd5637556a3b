//! What a handle keeps for guest reads, which are done in `read`: the files behind the image, and caches.

use super::device::Device;
use super::Image;
use std::any::Any;
use std::path::{Path, PathBuf};

/// The files behind an image, opened when something is first needed from them.
#[derive(Default)]
pub(crate) struct Behind {
    pub(crate) chain: Option<Chain>,
    /// The external data file.
    pub(crate) data_file: Option<Device>,
    /// Where the image is, for names in it that are relative; unknown behind callbacks.
    pub(crate) place: Option<Place>,
    /// Names of the files of the chain that C callers were given.
    pub(crate) host_names: Vec<std::ffi::CString>,
}

/// What has been read, and is forgotten when the image changes.
#[derive(Default)]
pub(crate) struct Caches {
    pub(crate) l2: L2Cache,
    pub(crate) unpacked: Option<Unpacked>,
    /// The two states last compared: what they are is the business of those who compare.
    pub(crate) compared: Option<Box<dyn Any>>,
    /// Were clusters allocated ahead? Found out on first use.
    pub(crate) preallocated: Option<bool>,
}

/// Where an image is, and what names in it are relative to.
pub(crate) struct Place {
    /// As it was given; for messages, and for the names that `qemu-img map` shows.
    pub(crate) name: PathBuf,
    /// The current folder when the image was opened, if there was one. QEMU opens all files then; here a
    /// program may have changed its folder when they are first needed.
    pub(crate) current: Option<PathBuf>,
}

impl Place {
    pub(crate) fn new(name: PathBuf) -> Place {
        let current = std::env::current_dir().ok();
        Place { name, current }
    }

    /// The path that `name` meant when the image was opened.
    pub(crate) fn absolute(&self, name: &Path) -> Option<PathBuf> {
        let path = match &self.current {
            Some(current) => current.join(name),
            #[allow(clippy::disallowed_methods)] // as long as a path may be
            None => name.to_owned(),
        };
        path.is_absolute().then_some(path)
    }
}

/// The layers behind an image, nearest first.
pub(crate) struct Chain(pub(crate) Vec<Layer>);

impl std::ops::Deref for Chain {
    type Target = Vec<Layer>;
    fn deref(&self) -> &Vec<Layer> {
        &self.0
    }
}

impl std::ops::DerefMut for Chain {
    fn deref_mut(&mut self) -> &mut Vec<Layer> {
        &mut self.0
    }
}

impl Drop for Chain {
    /// From the far end: a caller's functions that opened a file are there until it is closed.
    fn drop(&mut self) {
        while self.0.pop().is_some() {}
    }
}

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

/// Parts of L2 tables in memory: at most [`SLOTS`] of at most [`L2Cache::SLICE`] bytes, each with one place
/// where it can be.
#[derive(Default)]
pub(crate) struct L2Cache(Vec<(u64, Vec<u8>)>);

const SLOTS: u64 = 16;

impl L2Cache {
    /// Bytes of a part, at most.
    pub(crate) const SLICE: u64 = 64 << 10;

    fn slot(offset: u64) -> usize {
        // Neighbours go to different slots, whatever the size of a slice.
        ((offset >> 9 ^ offset >> 12 ^ offset >> 16) % SLOTS) as usize
    }

    pub(crate) fn get(&self, offset: u64) -> Option<&[u8]> {
        let (held, bytes) = self.0.get(L2Cache::slot(offset))?;
        (*held == offset && !bytes.is_empty()).then_some(bytes)
    }

    pub(crate) fn put(&mut self, offset: u64, bytes: Vec<u8>) {
        #[allow(clippy::disallowed_methods)] // 16 of them
        self.0.resize_with(SLOTS as usize, Default::default);
        if let Some(slot) = self.0.get_mut(L2Cache::slot(offset)) {
            *slot = (offset, bytes);
        }
    }
}

/// An unpacked compressed cluster.
pub(crate) struct Unpacked {
    pub(crate) entry: u64,
    pub(crate) bytes: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_there_until_another_takes_its_place() {
        for size in [512, 4096, L2Cache::SLICE] {
            let mut cache = L2Cache::default();
            assert_eq!(cache.get(0), None);
            // Neighbours are kept together, and no offset is taken for another.
            let parts = |n: std::ops::Range<u64>| n.map(|i| (i * size, vec![i as u8; 8]));
            parts(0..SLOTS).for_each(|(at, bytes)| cache.put(at, bytes));
            for (at, bytes) in parts(0..SLOTS) {
                assert_eq!(cache.get(at), Some(bytes.as_slice()), "{at:#x}");
            }
            parts(SLOTS..2 * SLOTS).for_each(|(at, bytes)| cache.put(at, bytes));
            for (at, bytes) in parts(0..2 * SLOTS) {
                let kept = at >= SLOTS * size;
                assert_eq!(cache.get(at), kept.then_some(bytes.as_slice()), "{at:#x}");
            }
        }
        assert_eq!(L2Cache::SLICE, 65536);
    }
}
