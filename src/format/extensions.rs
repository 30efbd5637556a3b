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
        for_each_extension(cluster, header_length, end, |magic, body| {
            let len = body.len();
            match magic {
                EXT_BACKING_FORMAT if len >= 16 => {
                    return Err(Error::Invalid(format!(
                        "ERROR: ext_backing_format: len={len} too large (>=16)"
                    )));
                }
                EXT_BACKING_FORMAT => ext.backing_format = body.to_vec(),
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
                EXT_BITMAPS if len != 24 => {
                    return Err(Error::Invalid(
                        "bitmaps_ext: Invalid extension length".into(),
                    ));
                }
                EXT_BITMAPS => {
                    ext.has_bitmaps = true;
                    ext.nb_bitmaps = u32_at(body, 0);
                    ext.bitmap_directory = Some((u64_at(body, 16), u64_at(body, 8)));
                }
                EXT_DATA_FILE => ext.data_file = body.to_vec(),
                _ => {}
            }
            Ok(())
        })?;
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

/// Call `f` with the magic number and the body of each, up to the one that ends them.
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
        if at > end || len > end.saturating_sub(at) {
            return Err(Error::Invalid("Header extension too large".into()));
        }
        if magic == EXT_END {
            break;
        }
        let body = cluster.get(at as usize..at.saturating_add(len) as usize);
        f(magic, body.unwrap_or_default())?;
        // Each extension is padded to a multiple of 8 bytes.
        at = at.saturating_add(len.saturating_add(7) & !7);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    /// A header of 8 bytes, and extensions behind it.
    fn area(extensions: &[(u32, &[u8])]) -> Vec<u8> {
        let mut out = vec![0xff; 8];
        for (magic, body) in extensions {
            out.extend(magic.to_be_bytes());
            out.extend((body.len() as u32).to_be_bytes());
            out.extend(*body);
            out.resize(out.len().next_multiple_of(8), 0xee);
        }
        out
    }

    fn parsed(area: &[u8]) -> Result<Extensions> {
        Extensions::parse_area(area, 8, area.len() as u64)
    }

    fn refused(extensions: &[(u32, &[u8])], says: &str) {
        let error = parsed(&area(extensions)).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    fn bitmaps(nb: u32, reserved: u32, bytes: u64, offset: u64) -> Vec<u8> {
        let words = [&nb.to_be_bytes()[..], &reserved.to_be_bytes()];
        [
            words.concat(),
            bytes.to_be_bytes().into(),
            offset.to_be_bytes().into(),
        ]
        .concat()
    }

    #[test]
    fn each_extension_is_read_up_to_the_end() {
        let mut features = vec![0; 96];
        features[..9].copy_from_slice(b"\0\x01corrupt");
        features[48..57].copy_from_slice(b"\x02\0bitmaps");
        let bitmaps = bitmaps(7, 0, 4096, 0x30000);
        let all: &[(u32, &[u8])] = &[
            (EXT_BACKING_FORMAT, b"fifteen letters"),
            (0x1234_5678, b"?"),
            (EXT_FEATURE_TABLE, &features),
            (EXT_CRYPTO, &[0; 16]),
            (EXT_BITMAPS, &bitmaps),
            (EXT_DATA_FILE, b"data"),
            (EXT_END, b""),
            (EXT_DATA_FILE, b"not this one"),
        ];
        let want = Extensions {
            backing_format: b"fifteen letters".to_vec(),
            bitmap_directory: Some((0x30000, 4096)),
            has_bitmaps: true,
            nb_bitmaps: 7,
            data_file: b"data".to_vec(),
            feature_names: vec![(0, 1, b"corrupt".to_vec()), (2, 0, b"bitmaps".to_vec())],
            ..Extensions::default()
        };
        assert_eq!(parsed(&area(all)).unwrap(), want);
        // Without one that ends them they end with the area.
        assert_eq!(parsed(&area(&all[..6])).unwrap(), want);
        assert_eq!(parsed(&area(&[])).unwrap(), Extensions::default());
    }

    #[test]
    fn lengths_are_what_they_must_be() {
        refused(
            &[(EXT_BACKING_FORMAT, b"sixteen letters!")],
            "len=16 too large",
        );
        for len in [0, 15, 17, 24] {
            refused(&[(EXT_CRYPTO, &[0; 24][..len])], "expected size 16");
        }
        for len in [0, 23, 25, 32] {
            refused(
                &[(EXT_BITMAPS, &[0; 32][..len])],
                "Invalid extension length",
            );
        }
        let good = area(&[(EXT_DATA_FILE, b"8 bytes.")]);
        assert_eq!(parsed(&good).unwrap().data_file, b"8 bytes.");
        // The area ends in the body, in the length, in the magic number.
        for end in 9..good.len() {
            let error = parsed(&good[..end]).unwrap_err().to_string();
            assert_eq!(error, "Header extension too large", "{end}");
        }
    }

    fn owner(crypt_method: u32, autoclear: u64, data_file: bool, area: &[u8]) -> Owner {
        Owner {
            geometry: Geometry::new(16, 4, false),
            crypt_method,
            autoclear,
            data_file,
            area: (8, area.len() as u64),
        }
    }

    fn checked(
        extensions: &[(u32, &[u8])],
        crypt_method: u32,
        autoclear: u64,
        data_file: bool,
    ) -> Result<Extensions> {
        let area = area(extensions);
        parsed(&area)?.check(&owner(crypt_method, autoclear, data_file, &area), &area)
    }

    fn wrong(result: Result<Extensions>, says: &str) {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn luks_has_a_header_and_nothing_else_has() {
        let place = [0x30000u64.to_be_bytes(), 600u64.to_be_bytes()].concat();
        let luks: &[(u32, &[u8])] = &[(EXT_DATA_FILE, b"x"), (EXT_CRYPTO, &place)];
        let header = checked(luks, 2, 0, false).unwrap().crypto_header;
        assert_eq!(header, Some((0x30000, 600)));
        assert_eq!(checked(&[], 0, 0, false).unwrap(), Extensions::default());
        checked(&[], 1, 0, false).unwrap();
        for method in [0, 1, 3] {
            wrong(checked(luks, method, 0, false), "only expected with LUKS");
        }
        for method in [2, 3] {
            wrong(
                checked(&[], method, 0, false),
                &format!("crypt method {method}"),
            );
        }
        let odd = [0x30200u64.to_be_bytes(), 600u64.to_be_bytes()].concat();
        wrong(
            checked(&[(EXT_CRYPTO, &odd)], 2, 0, false),
            "offset '197120'",
        );
    }

    #[test]
    fn bitmaps_are_looked_at_where_they_are_valid() {
        let one = |nb, reserved, bytes, offset, autoclear| {
            checked(
                &[(EXT_BITMAPS, &bitmaps(nb, reserved, bytes, offset))],
                0,
                autoclear,
                false,
            )
        };
        let most = MAX_BITMAP_DIRECTORY;
        assert_eq!(most, 67_107_840);
        for nb in [1, 65_535] {
            let ext = one(nb, 0, most, 0x10000, features::BITMAPS).unwrap();
            assert_eq!(ext.bitmap_directory, Some((0x10000, most)));
        }
        wrong(one(1, 1, 8, 0x10000, features::BITMAPS), "Reserved field");
        wrong(
            one(65_536, 0, 8, 0x10000, features::BITMAPS),
            "has 65536 bitmaps",
        );
        wrong(one(0, 0, 8, 0x10000, features::BITMAPS), "zero bitmaps");
        wrong(one(1, 0, 8, 0x10200, features::BITMAPS), "directory offset");
        wrong(
            one(1, 0, most + 1, 0x10000, features::BITMAPS),
            "(67107841)",
        );
        // Not valid: whatever stands there.
        let ext = one(0, 1, most + 1, 0x10200, 0).unwrap();
        assert_eq!((ext.bitmap_directory, ext.has_bitmaps), (None, true));
    }

    #[test]
    fn a_raw_data_file_is_a_data_file() {
        wrong(
            checked(&[], 0, features::DATA_FILE_RAW, false),
            "requires a data file",
        );
        checked(&[], 0, features::DATA_FILE_RAW, true).unwrap();
        checked(&[], 0, features::BITMAPS, false).unwrap();
    }
}
