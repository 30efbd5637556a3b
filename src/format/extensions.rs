//! The header's extensions (`qcow2_read_extensions`).

use super::features;
use super::geometry::Geometry;
use super::{u32_at, u64_at};
use crate::error::{Error, Result};

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_TABLE: u32 = 0x6803_f857;
const EXT_CRYPTO: u32 = 0x0537_be77;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_DATA_FILE: u32 = 0x4441_5441;

const CRYPT_LUKS: u32 = 2;
const MAX_BITMAPS: u32 = 65_535;
const MAX_BITMAP_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;

/// What the header extensions say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Format name of the backing file.
    pub backing_format: Vec<u8>,
    /// The bitmap directory (offset, bytes), where the extension is valid (autoclear bit 0).
    pub bitmap_directory: Option<(u64, u64)>,
    /// A bitmaps extension is there, valid or not.
    pub has_bitmaps: bool,
    /// Bitmaps in the directory, as the extension says.
    pub nb_bitmaps: u32,
    /// Where the LUKS header is (offset, bytes).
    pub crypto_header: Option<(u64, u64)>,
    /// Name of the external data file.
    pub data_file: Vec<u8>,
    /// Names of feature bits: (type, bit, name), for error messages.
    pub feature_names: Vec<(u8, u8, Vec<u8>)>,
}

/// What the header itself says of them.
pub(super) struct Owner {
    pub(super) geometry: Geometry,
    pub(super) crypt_method: u32,
    pub(super) autoclear: u64,
    pub(super) data_file: bool,
    /// Where they begin, and where they end at the latest.
    pub(super) area: (u32, u64),
}

impl Extensions {
    /// Walk the area between `header_length` and `end`. Only lengths are checked here.
    pub(super) fn parse_area(cluster: &[u8], header_length: u32, end: u64) -> Result<Extensions> {
        let mut ext = Extensions::default();
        let mut at = u64::from(header_length);
        while at < end {
            let magic = u32_at(cluster, at as usize);
            let len = u64::from(u32_at(cluster, at.saturating_add(4) as usize));
            at = at.saturating_add(8);
            if at > end || len > end.saturating_sub(at) {
                return Err(Error::Invalid("Header extension too large".into()));
            }
            let body = cluster
                .get(at as usize..at.saturating_add(len) as usize)
                .unwrap_or_default();
            match magic {
                EXT_END => break,
                EXT_BACKING_FORMAT => {
                    if len >= 16 {
                        return Err(Error::Invalid(format!(
                            "ERROR: ext_backing_format: len={len} too large (>=16)"
                        )));
                    }
                    ext.backing_format = body.to_vec();
                }
                EXT_FEATURE_TABLE => {
                    for entry in body.chunks_exact(48) {
                        if let [kind, bit, name @ ..] = entry {
                            let name = name.split(|b| *b == 0).next().unwrap_or_default();
                            ext.feature_names.push((*kind, *bit, name.to_vec()));
                        }
                    }
                }
                EXT_CRYPTO if len != 16 => {
                    return Err(Error::Invalid(format!(
                        "CRYPTO header extension size {len}, but expected size 16"
                    )));
                }
                EXT_BITMAPS => {
                    if len != 24 {
                        return Err(Error::Invalid(
                            "bitmaps_ext: Invalid extension length".into(),
                        ));
                    }
                    ext.has_bitmaps = true;
                    ext.nb_bitmaps = u32_at(body, 0);
                    ext.bitmap_directory = Some((u64_at(body, 16), u64_at(body, 8)));
                }
                EXT_DATA_FILE => ext.data_file = body.to_vec(),
                _ => {}
            }
            // Each extension is padded to a multiple of 8 bytes.
            at = at.saturating_add(len.saturating_add(7) & !7);
        }
        Ok(ext)
    }

    /// Checks that need the header's other fields.
    pub(super) fn check(mut self, header: &Owner, cluster: &[u8]) -> Result<Extensions> {
        let g = header.geometry;
        let mut luks = false;
        for_each_extension(cluster, header.area.0, header.area.1, |magic, body| {
            match magic {
                EXT_CRYPTO => {
                    if header.crypt_method != CRYPT_LUKS {
                        return Err(Error::Invalid(
                            "CRYPTO header extension only expected with LUKS encryption method"
                                .into(),
                        ));
                    }
                    let offset = u64_at(body, 0);
                    if g.in_cluster(offset) != 0 {
                        return Err(Error::Invalid(format!(
                            "Encryption header offset '{offset}' is not a multiple of cluster size '{}'",
                            g.cluster_size()
                        )));
                    }
                    self.crypto_header = Some((offset, u64_at(body, 8)));
                    luks = true;
                }
                EXT_BITMAPS if header.autoclear & features::BITMAPS != 0 => check_bitmaps(g, body)?,
                _ => {}
            }
            Ok(())
        })?;
        if header.autoclear & features::BITMAPS == 0 {
            self.bitmap_directory = None;
        }
        if header.crypt_method > CRYPT_LUKS || (header.crypt_method == CRYPT_LUKS && !luks) {
            return Err(Error::Invalid(format!(
                "Missing CRYPTO header for crypt method {}",
                header.crypt_method
            )));
        }
        if header.autoclear & features::DATA_FILE_RAW != 0 && !header.data_file {
            return Err(Error::Invalid("data-file-raw requires a data file".into()));
        }
        Ok(self)
    }
}

fn check_bitmaps(g: Geometry, body: &[u8]) -> Result<()> {
    let nb = u32_at(body, 0);
    let problem = if u32_at(body, 4) != 0 {
        "bitmaps_ext: Reserved field is not zero".to_owned()
    } else if nb > MAX_BITMAPS {
        format!("bitmaps_ext: Image has {nb} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}")
    } else if nb == 0 {
        "found bitmaps extension with zero bitmaps".to_owned()
    } else if g.in_cluster(u64_at(body, 16)) != 0 {
        "bitmaps_ext: invalid bitmap directory offset".to_owned()
    } else if u64_at(body, 8) > MAX_BITMAP_DIRECTORY {
        format!(
            "bitmaps_ext: bitmap directory size ({}) exceeds the maximum supported size",
            u64_at(body, 8)
        )
    } else {
        return Ok(());
    };
    Err(Error::Invalid(problem))
}

fn for_each_extension(
    cluster: &[u8],
    header_length: u32,
    end: u64,
    mut f: impl FnMut(u32, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut at = u64::from(header_length);
    while at < end {
        let magic = u32_at(cluster, at as usize);
        let len = u64::from(u32_at(cluster, at.saturating_add(4) as usize));
        at = at.saturating_add(8);
        if magic == EXT_END || at > end || len > end.saturating_sub(at) {
            break;
        }
        f(
            magic,
            cluster
                .get(at as usize..at.saturating_add(len) as usize)
                .unwrap_or_default(),
        )?;
        at = at.saturating_add(len.saturating_add(7) & !7);
    }
    Ok(())
}
