//! The first bytes of a new qcow2 image.

use std::io;

use qcow2_snapshot::format::compress::Compression;
use qcow2_snapshot::format::geometry::Geometry;
use qcow2_snapshot::format::header::MAGIC;

/// Header bytes before the extensions.
const HEADER: u32 = 112;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_ZSTD: u64 = 1 << 3;
const FEATURE_EXTENDED_L2: u64 = 1 << 4;
/// QEMU's limit for a backing file's name.
const MOST_NAME: usize = 1023;

/// What a new image is to be.
pub(crate) struct Form<'a> {
    pub(crate) geometry: Geometry,
    pub(crate) compression: Compression,
    pub(crate) size: u64,
    /// Name and format.
    pub(crate) backing: Option<(&'a [u8], &'a str)>,
}

/// Everything of the first cluster but where the tables are.
pub(super) fn first(g: Geometry, form: &Form, l1_entries: u64) -> io::Result<Vec<u8>> {
    let zstd = form.compression == Compression::Zstd;
    let features = if zstd { FEATURE_ZSTD } else { 0 }
        | if g.extended_l2 {
            FEATURE_EXTENDED_L2
        } else {
            0
        };
    let mut extensions = Vec::new();
    let (name, format) = form.backing.unwrap_or_default();
    if !name.is_empty() {
        extensions.extend(BACKING_FORMAT.to_be_bytes());
        extensions.extend((format.len() as u32).to_be_bytes());
        extensions.extend(format.as_bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    // The end of the extensions.
    extensions.extend([0; 8]);
    let name_at = match name.len() {
        0 => 0,
        _ => u64::from(HEADER) + extensions.len() as u64,
    };
    if name.len() > MOST_NAME || name_at + name.len() as u64 > g.cluster_size() {
        return Err(io::Error::other("the backing file's name is too long"));
    }
    let mut out = Vec::new();
    let word = |out: &mut Vec<u8>, w: u32| out.extend(w.to_be_bytes());
    word(&mut out, MAGIC);
    word(&mut out, 3);
    out.extend(name_at.to_be_bytes());
    word(&mut out, name.len() as u32);
    word(&mut out, g.cluster_bits);
    out.extend(form.size.to_be_bytes());
    word(&mut out, 0); // not encrypted
    word(&mut out, l1_entries as u32);
    // Up to the features: the tables, and no snapshots.
    out.resize(72, 0);
    out.extend(features.to_be_bytes());
    out.extend([0; 16]); // no other features
    word(&mut out, g.refcount_order);
    word(&mut out, HEADER);
    out.push(u8::from(zstd));
    out.resize(HEADER as usize, 0);
    out.extend(extensions);
    out.extend(name);
    Ok(out)
}
