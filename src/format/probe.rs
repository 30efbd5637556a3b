//! Which format a file is in, where nobody says so: QEMU's `bdrv_probe_all`.

/// Bytes from the start of a file that [`probe`] looks at.
pub const PROBE_BYTES: usize = 512;

/// Formats that are known by fixed bytes: name, and what must stand where.
type Magic = (&'static str, &'static [(usize, &'static [u8])]);
const MAGICS: [Magic; 13] = [
    ("qcow", &[(0, b"QFI\xfb\0\0\0\x01")]),
    ("qed", &[(0, b"QED\0")]),
    ("vmdk", &[(0, b"KDMV")]),
    ("vmdk", &[(0, b"COWD")]),
    ("vhdx", &[(0, b"vhdxfile")]),
    // Dynamic images begin with a copy of their footer. Fixed ones have nothing but the footer,
    // and QEMU too takes them for raw.
    ("vpc", &[(0, b"conectix")]),
    ("vdi", &[(64, b"\x7f\x10\xda\xbe")]),
    ("luks", &[(0, b"LUKS\xba\xbe\0\x01")]),
    (
        "parallels",
        &[(0, b"WithoutFreeSpace"), (16, b"\x02\0\0\0")],
    ),
    (
        "parallels",
        &[(0, b"WithouFreSpacExt"), (16, b"\x02\0\0\0")],
    ),
    ("bochs", &BOCHS_1),
    ("bochs", &BOCHS_2),
    (
        "cloop",
        &[(
            0,
            b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n",
        )],
    ),
];
const BOCHS_1: [(usize, &[u8]); 4] = bochs(b"\0\0\x01\0");
const BOCHS_2: [(usize, &[u8]); 4] = bochs(b"\0\0\x02\0");

const fn bochs(version: &[u8]) -> [(usize, &[u8]); 4] {
    [
        (0, b"Bochs Virtual HD Image\0"),
        (32, b"Redolog\0"),
        (48, b"Growing\0"),
        (64, version),
    ]
}

/// QEMU's name for the format of a file that begins with `head` (its first [`PROBE_BYTES`], or all of a shorter
/// file) and is called `name`: `"raw"` if it is in no format that QEMU would recognise.
pub fn probe(head: &[u8], name: &[u8]) -> &'static str {
    // QEMU reads a short file with zeros behind it, an empty one not at all.
    let mut bytes = [0; PROBE_BYTES];
    for (to, from) in bytes.iter_mut().zip(head) {
        *to = *from;
    }
    let stands =
        |(at, magic): &(usize, &[u8])| bytes.get(*at..).is_some_and(|b| b.starts_with(magic));
    if stands(&(0, b"QFI\xfb")) && bytes.get(4..8) >= Some([0, 0, 0, 2].as_slice()) {
        return "qcow2";
    }
    if let Some((format, _)) = MAGICS.iter().find(|(_, magic)| magic.iter().all(stands)) {
        return format;
    }
    if is_vmdk_text(&bytes) {
        return "vmdk";
    }
    // The mark of this format is at the end of the file: QEMU goes by the name.
    if name.len() > 4 && name.ends_with(b".dmg") {
        return "dmg";
    }
    "raw"
}

/// A VMDK descriptor: its version, and nothing before it but comments and lines of blanks.
fn is_vmdk_text(text: &[u8]) -> bool {
    let mut rest = text;
    loop {
        rest = match rest.first() {
            Some(b'#') => match rest.iter().position(|b| *b == b'\n') {
                Some(end) => rest.get(end..).and_then(|r| r.get(1..)).unwrap_or_default(),
                None => return false,
            },
            Some(b' ') => {
                let blank = rest.iter().take_while(|b| **b == b' ').count();
                let line = rest.get(blank..).unwrap_or_default();
                match line.strip_prefix(b"\r").unwrap_or(line).strip_prefix(b"\n") {
                    Some(next) => next,
                    None => return false,
                }
            }
            _ => break,
        };
    }
    let version = rest.strip_prefix(b"version=");
    let version = version.and_then(|v| v.split_first());
    matches!(version, Some((b'1'..=b'3', end)) if end.starts_with(b"\n") || end.starts_with(b"\r\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_counts_where_qemu_compares_it() {
        for (head, format) in [
            (b"QFI\xfb\0\0\0\0".as_slice(), "raw"),
            (b"QFI\xfb\0\0\0\x01", "qcow"),
            (b"QFI\xfb\0\0\0\x02", "qcow2"),
            (b"QFI\xfb\x01\0\0\0", "qcow2"),
            (b"WithoutFreeSpace\x02\0\0\0", "parallels"),
            (b"WithoutFreeSpace\x03\0\0\0", "raw"),
            (b"LUKS\xba\xbe\0\x02", "raw"),
            (b"#!/bin/sh\n#V2.0 Format\n", "raw"),
            (b"", "raw"),
        ] {
            assert_eq!(probe(head, b"a"), format, "{head:?}");
        }
    }

    #[test]
    fn a_vmdk_descriptor_is_known_by_its_version_line() {
        for (text, is_one) in [
            ("# Disk DescriptorFile\nversion=1\n", true),
            ("# Disk DescriptorFile\nversion=4\n", false),
            ("# Disk DescriptorFile\n", false),
            ("# no end", false),
            ("version=3\r\n", true),
            ("version=3", false),
            ("#\n  \n \r\n#\nversion=2\n", true),
            ("\nversion=1\n", false),
            ("  x\nversion=1\n", false),
        ] {
            let format = if is_one { "vmdk" } else { "raw" };
            assert_eq!(probe(text.as_bytes(), b"a"), format, "{text:?}");
        }
    }

    #[test]
    fn only_one_format_is_known_by_its_name() {
        assert_eq!(probe(&[0; 512], b"a.dmg"), "dmg");
        assert_eq!(probe(&[0; 512], b".dmg"), "raw");
        assert_eq!(probe(b"conectix", b"a.dmg"), "vpc");
    }
}
