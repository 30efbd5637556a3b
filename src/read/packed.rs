//! Compressed clusters as they are stored, for who writes them to another image.

use super::mapping::Extent;
use crate::error::{Error, Result};
use crate::format::compress::{Compression, Unpacker};
use crate::format::geometry::Geometry;
use crate::image::reading::Layer;
use crate::image::{device, Image};

/// A compressed cluster as it is stored, and what it holds.
#[derive(Default)]
pub struct PackedCluster {
    /// The compressed bytes, up to their own end and no further.
    pub packed: Vec<u8>,
    /// A cluster of guest data.
    pub data: Vec<u8>,
}

impl Image {
    /// Sizes of clusters and tables.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// How compressed clusters are packed.
    #[must_use]
    pub fn compression(&self) -> Compression {
        self.header.compression
    }

    /// Open the files behind the image now, and not when they are first needed.
    ///
    /// # Errors
    /// Those of opening a backing file.
    pub fn open_backing_files(&mut self) -> Result<()> {
        self.begin_read()?;
        self.open_chain()
    }

    /// The compressed cluster that begins at `offset` of the disk now seen, in the file at `depth` of the
    /// backing chain ([`crate::BlockStatus::depth`]); unpacked too, so that it is known to be
    /// sound. False: there is none, or that file has clusters of another size or kind than the image.
    ///
    /// # Errors
    /// `EIO` for damaged tables and clusters; those of opening a backing file.
    pub fn read_packed(
        &mut self,
        offset: u64,
        depth: u32,
        cluster: &mut PackedCluster,
    ) -> Result<bool> {
        self.begin_read()?;
        let (g, kind) = (self.header.geometry, self.header.compression);
        let image = match depth.checked_sub(1) {
            None => self,
            Some(behind) => {
                self.open_chain()?;
                let layer = self
                    .behind
                    .chain
                    .as_mut()
                    .and_then(|c| c.get_mut(behind as usize));
                match layer {
                    Some(Layer::Qcow2(image)) => &mut **image,
                    _ => return Ok(false),
                }
            }
        };
        let header = &image.header;
        let alike = header.geometry.cluster_bits == g.cluster_bits && header.compression == kind;
        if !alike || header.crypt_method != 0 {
            return Ok(false);
        }
        let (extent, _) = image.extent(None, offset, g.cluster_size())?;
        let Extent::Compressed { entry, at: 0 } = extent else {
            return Ok(false);
        };
        let (host, length) = image.packed(entry)?;
        let PackedCluster { packed, data } = cluster;
        if packed.len() as u64 != length {
            *packed = device::zeroed(length)?;
        }
        if data.len() as u64 != g.cluster_size() {
            *data = device::zeroed(g.cluster_size())?;
        }
        let what = "Could not read a compressed cluster";
        image.dev.read(what, host, packed)?;
        let used = Unpacker::new(kind)?
            .unpack(packed, data)
            .map_err(|e| match e {
                Error::Corrupt(text) => {
                    Error::Corrupt(format!("{text} (guest offset: {offset:#x})"))
                }
                other => other,
            })?;
        packed.truncate(used);
        Ok(true)
    }
}
