#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
use super::*;
use byteorder::{BigEndian, ByteOrder};

fn v3() -> Vec<u8> {
    let mut b = vec![0u8; 65536];
    BigEndian::write_u32(&mut b[0..], MAGIC);
    BigEndian::write_u32(&mut b[4..], 3);
    BigEndian::write_u32(&mut b[20..], 16);
    BigEndian::write_u64(&mut b[24..], 1 << 20);
    BigEndian::write_u32(&mut b[36..], 1);
    BigEndian::write_u64(&mut b[40..], 0x30000);
    BigEndian::write_u64(&mut b[48..], 0x10000);
    BigEndian::write_u32(&mut b[56..], 1);
    BigEndian::write_u32(&mut b[96..], 4);
    BigEndian::write_u32(&mut b[100..], 112);
    b
}

#[test]
fn a_plain_header_is_accepted() {
    let h = Header::parse(&v3(), true).unwrap();
    assert_eq!((h.size, h.l1_size, h.reftable_clusters), (1 << 20, 1, 1));
    assert!(!h.extensions(&v3()).unwrap().has_bitmaps);
}

#[test]
fn what_a_publish_writes_is_what_a_header_says() {
    let h = Header::parse(&v3(), true).unwrap();
    let bytes = encode_switched(h.places(), h.meaning(), h.crypt_method);
    assert_eq!(bytes, v3()[24..72]);
    let (mut places, mut meaning) = (h.places(), h.meaning());
    (places.l1_offset, places.l1_size, places.reftable_clusters) = (0x50000, 7, 2);
    (meaning.size, meaning.nb_snapshots, meaning.snapshots_offset) = (2 << 20, 1, 0x60000);
    let mut b = v3();
    b[24..72].copy_from_slice(&encode_switched(places, meaning, 0));
    let again = Header::parse(&b, true).unwrap();
    let mut switched = h;
    switched.switch(places, meaning);
    assert_eq!(again, switched);
}

#[test]
fn each_bad_field_gets_qemus_errno() {
    let cases: &[(usize, u32, i32)] = &[
        (0, 0, libc::EINVAL),
        (4, 4, libc::ENOTSUP),
        (20, 8, libc::EINVAL),
        (20, 22, libc::EINVAL),
        (100, 64, libc::EINVAL),
        (100, 70000, libc::EINVAL),
        (96, 7, libc::EINVAL),
        (56, 0, libc::EINVAL),
        (56, 1000, libc::EFBIG),
        (60, 65537, libc::EFBIG),
        (36, 0, libc::EINVAL),
        (36, 5_000_000, libc::EFBIG),
        (44, 0x30001, libc::EINVAL),
        (76, 1 << 7, libc::ENOTSUP),
        (76, 2, libc::EACCES),
    ];
    for (at, value, errno) in cases {
        let mut b = v3();
        BigEndian::write_u32(&mut b[*at..], *value);
        assert_eq!(
            Header::parse(&b, true).unwrap_err().errno(),
            *errno,
            "field at {at}"
        );
    }
}

#[test]
fn unknown_features_are_named() {
    let mut b = v3();
    BigEndian::write_u64(&mut b[72..], (1 << 7) | (1 << 9));
    BigEndian::write_u32(&mut b[112..], 0x6803_f857);
    BigEndian::write_u32(&mut b[116..], 48);
    b[121] = 7;
    b[122..127].copy_from_slice(b"bells");
    // A compatible bit of that number has nothing to do with it.
    (b[168], b[169], b[170]) = (1, 9, b'x');
    BigEndian::write_u32(&mut b[116..], 96);
    assert_eq!(
        Header::parse(&b, false).unwrap_err().to_string(),
        "Unsupported qcow2 feature(s): bells, Unknown incompatible feature: 200"
    );
}

/// `v3` with these 32-bit fields.
fn with(fields: &[(usize, u32)]) -> Vec<u8> {
    let mut b = v3();
    for (at, value) in fields {
        BigEndian::write_u32(&mut b[*at..], *value);
    }
    b
}

#[test]
fn each_bound_is_qemus_to_the_last_value() {
    let ok = 0;
    let cases: &[(&[(usize, u32)], i32)] = &[
        (&[(100, 104)], ok),
        (&[(100, 103)], libc::EINVAL),
        (&[(100, 65536)], ok),
        (&[(100, 65537)], libc::EINVAL),
        (&[(12, 65536)], ok),
        (&[(12, 65537)], libc::EINVAL),
        (&[(8, 1)], libc::EINVAL),
        (&[(96, 6)], ok),
        (&[(56, 128)], ok),
        (&[(56, 129)], libc::EFBIG),
        (&[(60, 65536)], ok),
        (&[(36, 4_194_304)], ok),
        (&[(36, 4_194_305)], libc::EFBIG),
        // A table of 64 KiB that ends at, and behind, what an off_t holds.
        (&[(40, 0x7fff_ffff), (44, 0xffff_0000)], ok),
        (
            &[(36, 8192), (40, 0x7fff_ffff), (44, 0xffff_0000)],
            libc::EINVAL,
        ),
        (&[(40, 0x8000_0000), (44, 0)], libc::EINVAL),
        // A table maps 512 MiB.
        (&[(28, 512 << 20)], ok),
        (&[(28, (512 << 20) + 1)], libc::EINVAL),
        // Clusters of 512 bytes, 32 KiB for a table: 2^31 - 1 tables, and one more.
        (&[(20, 9), (24, 0x3fff), (28, 0xffff_8000)], libc::EINVAL),
        (&[(20, 9), (24, 0x3fff), (28, 0xffff_8001)], libc::EFBIG),
        // Extended L2 entries want clusters of 16 KiB.
        (&[(76, 16), (20, 14)], ok),
        (&[(76, 16), (20, 13)], libc::EINVAL),
        // The compression type and its bit agree.
        (&[(104, 1 << 24), (76, 8)], ok),
        (&[(104, 1 << 24)], libc::EINVAL),
        (&[(76, 8)], libc::EINVAL),
        (&[(104, 2 << 24), (76, 8)], libc::ENOTSUP),
        (&[(100, 104), (104, 1 << 24)], ok),
    ];
    for (fields, errno) in cases {
        let found = Header::parse(&with(fields), true);
        assert_eq!(
            found.map_or_else(|e| e.errno(), |_| ok),
            *errno,
            "{fields:?}"
        );
    }
    // What is damaged may be read.
    assert!(Header::parse(&with(&[(76, 2)]), false).is_ok());
    let zstd = Header::parse(&with(&[(104, 1 << 24), (76, 8)]), true).unwrap();
    let zlib = Header::parse(&with(&[(100, 104), (104, 1 << 24)]), true).unwrap();
    assert_eq!(zstd.compression, Compression::Zstd);
    assert_eq!(zlib.compression, Compression::Zlib);
    assert!(!zlib.has_data_file());
    assert!(Header::parse(&with(&[(76, 4)]), true)
        .unwrap()
        .has_data_file());
}

#[test]
fn extensions_end_where_the_backing_file_s_name_begins() {
    // One that says it has 200 bytes.
    let b = with(&[(112, 0x1234_5678), (116, 200)]);
    let h = Header::parse(&b, true).unwrap();
    assert_eq!(h.extension_end(), 65536);
    assert!(h.extensions(&b).is_ok());
    let b = with(&[(112, 0x1234_5678), (116, 200), (12, 319)]);
    let h = Header::parse(&b, true).unwrap();
    assert_eq!(h.extension_end(), 319);
    assert_eq!(h.extensions(&b).unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn a_backing_file_s_name_has_1023_bytes_and_ends_in_the_cluster() {
    let name = |offset: u32, length: u32| {
        let mut b = with(&[(12, offset), (16, length)]);
        b[300..].fill(b'n');
        let h = Header::parse(&b, true).unwrap();
        h.backing_file(&b).map(<[u8]>::len)
    };
    assert_eq!(name(0, 5).unwrap(), 0);
    assert_eq!(name(300, 1023).unwrap(), 1023);
    assert_eq!(name(300, 1024).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(name(65531, 5).unwrap(), 5);
    assert_eq!(name(65531, 6).unwrap_err().errno(), libc::EINVAL);
    // It is a C string.
    let mut b = with(&[(12, 300), (16, 9)]);
    b[300..303].copy_from_slice(b"abc");
    let h = Header::parse(&b, true).unwrap();
    assert_eq!(h.backing_file(&b).unwrap(), b"abc");
}

#[test]
fn number_and_place_of_the_snapshots_are_taken_or_refused() {
    let mut h = Header::parse(&v3(), true).unwrap();
    let was = h.clone();
    let words = |nb: u32, offset: u64| [&nb.to_be_bytes()[..], &offset.to_be_bytes()].concat();
    assert!(h.set_snapshots(&words(65537, 0x50000)).is_err());
    assert!(h.set_snapshots(&words(1, 0x50001)).is_err());
    assert_eq!(h, was);
    h.set_snapshots(&words(2, 0x50000)).unwrap();
    assert_eq!((h.nb_snapshots, h.snapshots_offset), (2, 0x50000));
}
