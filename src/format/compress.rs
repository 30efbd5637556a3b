//! Compressed clusters: raw deflate streams (zlib without header) or zstd frames.
//!
//! Both decoders are other people's; here are only QEMU's rules for what counts as good. The
//! output never exceeds one cluster, and neither does the input by more than a sector.

use crate::error::{Error, Result};
use miniz_oxide::inflate::core::{decompress, inflate_flags, DecompressorOxide};
use miniz_oxide::inflate::TINFLStatus;
use zstd_safe::{DCtx, InBuffer, OutBuffer, ResetDirective};

/// How compressed clusters of an image are packed (header byte 104).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// zstd.
    Zstd,
}

/// A decoder for one cluster after the other: its tables need not be made anew for each.
pub enum Unpacker {
    /// For [`Compression::Zlib`].
    Zlib(Box<DecompressorOxide>),
    /// For [`Compression::Zstd`].
    Zstd(DCtx<'static>),
}

/// About what libzstd takes for a decoder, in bytes.
const ZSTD_CONTEXT: u64 = 160 << 10;

impl Unpacker {
    /// A decoder for clusters that are packed in this way.
    ///
    /// # Errors
    /// `NoMemory`.
    pub fn new(kind: Compression) -> Result<Unpacker> {
        Ok(match kind {
            Compression::Zlib => Unpacker::Zlib(Box::default()),
            Compression::Zstd => {
                Unpacker::Zstd(DCtx::try_create().ok_or(Error::NoMemory(ZSTD_CONTEXT))?)
            }
        })
    }

    /// Fill `out` from `packed`, whose end is known to a sector only
    /// (`qcow2_zlib_decompress`, `qcow2_zstd_decompress`). Returns how many bytes of it were needed.
    ///
    /// # Errors
    /// `Corrupt` if the stream is damaged or ends before `out` is full.
    pub fn unpack(&mut self, packed: &[u8], out: &mut [u8]) -> Result<usize> {
        let used = match self {
            Unpacker::Zlib(state) => inflate(state, packed, out),
            Unpacker::Zstd(decoder) => unpack_zstd(decoder, packed, out),
        };
        used.ok_or_else(|| Error::Corrupt("A compressed cluster is damaged".into()))
    }
}

/// [`Unpacker::unpack`] for a single cluster.
///
/// # Errors
/// As there.
pub fn unpack(kind: Compression, packed: &[u8], out: &mut [u8]) -> Result<()> {
    Unpacker::new(kind)?.unpack(packed, out).map(|_| ())
}

fn inflate(state: &mut DecompressorOxide, packed: &[u8], out: &mut [u8]) -> Option<usize> {
    state.init();
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, used, written) = decompress(state, packed, out, 0, flags);
    match status {
        _ if written != out.len() => None,
        TINFLStatus::Done => Some(used),
        // Whatever of the rest it would need to end.
        TINFLStatus::HasMoreOutput => Some(packed.len()),
        _ => None,
    }
}

/// Frames one behind the other until `out` is full. As in QEMU the last one must end there: a
/// cluster never unpacks to more than a cluster. What a frame may claim for its window, and so
/// the memory for it, is limited to 128 MiB by libzstd.
fn unpack_zstd(decoder: &mut DCtx<'static>, packed: &[u8], out: &mut [u8]) -> Option<usize> {
    // What a damaged cluster has left behind is not the next one's.
    if decoder.reset(ResetDirective::SessionOnly).is_err() {
        return None;
    }
    let (mut input, wanted) = (InBuffer::around(packed), out.len());
    let mut output = OutBuffer::around(out);
    let mut open = 0;
    while output.pos() < wanted {
        let before = (input.pos(), output.pos());
        open = match decoder.decompress_stream(&mut output, &mut input) {
            Ok(open) => open,
            Err(_) => return None,
        };
        if (input.pos(), output.pos()) == before {
            return None; // it wants more than there is
        }
    }
    (open == 0).then_some(input.pos())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_deflate_stream_must_fill_the_cluster() {
        let data = vec![7u8; 65536];
        let packed = miniz_oxide::deflate::compress_to_vec(&data, 6);
        let mut out = vec![0u8; 65536];
        unpack(Compression::Zlib, &packed, &mut out).unwrap();
        assert_eq!(out, data);
        // What stands behind it in its last sector is not counted.
        let longer = [&packed[..], b"the next cluster's"].concat();
        let mut unpacker = Unpacker::new(Compression::Zlib).unwrap();
        assert_eq!(unpacker.unpack(&longer, &mut out).unwrap(), packed.len());
        assert!(unpack(Compression::Zlib, &packed[..packed.len() / 2], &mut out).is_err());
        let mut longer = vec![0u8; 65537];
        assert!(unpack(Compression::Zlib, &packed, &mut longer).is_err());
        // More data than the cluster holds is what QEMU accepts as well.
        let mut shorter = vec![0u8; 1000];
        unpack(Compression::Zlib, &packed, &mut shorter).unwrap();
    }

    /// What the message says where there is no memory for one.
    #[test]
    #[cfg_attr(miri, ignore = "zstd is C")]
    fn a_decoder_takes_about_what_is_said() {
        let takes = DCtx::create().sizeof() as u64;
        assert!((takes / 2..takes * 2).contains(&ZSTD_CONTEXT), "{takes}");
    }

    #[test]
    #[cfg_attr(miri, ignore = "zstd is C")]
    fn zstd_frames_must_fill_the_cluster_and_end_there() {
        let data: Vec<u8> = (0..65536u32).map(|i| ((i * i) >> 7) as u8).collect();
        let frame = |data: &[u8]| {
            let mut packed = vec![0; zstd_safe::compress_bound(data.len())];
            let n = zstd_safe::compress(&mut packed[..], data, 3).unwrap();
            packed.truncate(n);
            packed
        };
        let (whole, half) = (frame(&data), data.len() / 2);
        let two = [frame(&data[..half]), frame(&data[half..])].concat();
        let mut unpacker = Unpacker::new(Compression::Zstd).unwrap();
        for packed in [&whole, &two] {
            // What stands behind it in its last sector is not counted.
            let longer = [&packed[..], &[0x55; 300]].concat();
            for input in [packed, &longer] {
                let mut out = vec![0; data.len()];
                assert_eq!(unpacker.unpack(input, &mut out).unwrap(), packed.len());
                assert_eq!(out, data);
            }
            let mut out = vec![0; data.len()];
            // Cut off; not as long as the cluster; longer. The next one does not suffer.
            assert!(unpacker
                .unpack(&packed[..packed.len() - 1], &mut out)
                .is_err());
            assert!(unpacker.unpack(&frame(&data[1..]), &mut out).is_err());
            assert!(unpacker.unpack(packed, &mut out[1..]).is_err());
            assert!(unpacker.unpack(&[], &mut out).is_err());
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(packed in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut out = vec![0u8; 4096];
            let _ = unpack(Compression::Zlib, &packed, &mut out);
            if !cfg!(miri) {
                let _ = unpack(Compression::Zstd, &packed, &mut out);
            }
        }
    }
}
