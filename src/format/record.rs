//! One entry of the snapshot table.
//!
//! ```text
//!  0 L1 offset (u64)    8 L1 entries (u32)   12 ID length (u16)   14 name length (u16)
//! 16 date_sec (u32)    20 date_nsec (u32)    24 vm_clock_nsec (u64)
//! 32 vm_state_size (u32, 0 where it does not fit)                 36 extra_data_size (u32)
//! 40 extra data: +0 vm_state_size (u64)  +8 disk size (u64)  +16 icount (u64)  +24 unknown
//!    ID, name (no terminators); the next entry starts at a multiple of 8
//! ```

use super::geometry::MAX_EXTRA_DATA;
use crate::error::{Error, Result};
use crate::snapshot::Snapshot;
use byteorder::{BigEndian, ByteOrder};

/// Bytes in front of the extra data (QEMU's `QCowSnapshotHeader`).
pub const FIXED_BYTES: u64 = 40;
/// Bytes of extra data that are known today (QEMU's `QCowSnapshotExtraData`).
pub const KNOWN_EXTRA: u32 = 24;
/// Bytes of extra data that the 2014 code writes.
pub const EXTRA_2014: u32 = 16;
/// Entries start at multiples of this.
const ALIGN: u64 = 8;

/// Round up to the place of the next entry.
pub fn align(offset: u64) -> u64 {
    offset.saturating_add(ALIGN.saturating_sub(1)) & !ALIGN.saturating_sub(1)
}

/// Decode the entry at the start of `bytes`, which may be longer. `Ok(None)`: more bytes are
/// needed. `index` names the entry in errors; `disk_size` serves entries that store none.
pub fn decode(bytes: &[u8], index: u64, disk_size: u64) -> Result<Option<(Snapshot, u64)>> {
    let Some(fixed) = bytes.get(..FIXED_BYTES as usize) else {
        return Ok(None);
    };
    let u16_at = |at: usize| fixed.get(at..).map_or(0, BigEndian::read_u16);
    let u32_at = |at: usize| fixed.get(at..).map_or(0, BigEndian::read_u32);
    let u64_at = |at: usize| fixed.get(at..).map_or(0, BigEndian::read_u64);
    let extra_len = u32_at(36);
    if extra_len > MAX_EXTRA_DATA {
        return Err(Error::TooBig(format!(
            "Too much extra metadata in snapshot table entry {index}"
        )));
    }
    let extra_end = FIXED_BYTES.saturating_add(extra_len.into());
    let id_end = extra_end.saturating_add(u16_at(12).into());
    let end = id_end.saturating_add(u16_at(14).into());
    let part = |from: u64, to: u64| bytes.get(from as usize..to as usize);
    let (Some(extra), Some(id), Some(name)) = (
        part(FIXED_BYTES, extra_end),
        part(extra_end, id_end),
        part(id_end, end),
    ) else {
        return Ok(None);
    };
    let known = |at: usize| {
        at.checked_add(8)
            .and_then(|to| extra.get(at..to))
            .map(BigEndian::read_u64)
    };
    let snapshot = Snapshot {
        l1_table_offset: u64_at(0),
        l1_size: u32_at(8),
        id: copy_of(c_string(id))?,
        name: copy_of(c_string(name))?,
        date_sec: u32_at(16),
        date_nsec: u32_at(20),
        vm_clock_nsec: u64_at(24),
        vm_state_size: known(0).unwrap_or(u32_at(32).into()),
        disk_size: known(8).unwrap_or(disk_size),
        icount: known(16).unwrap_or(u64::MAX),
        extra_data_size: extra_len,
        unknown_extra_data: copy_of(extra.get(KNOWN_EXTRA as usize..).unwrap_or_default())?,
    };
    Ok(Some((snapshot, end)))
}

/// Lengths of the parts of an entry, as its fixed part says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Bytes of extra data.
    pub extra: u32,
    /// Bytes of the ID.
    pub id: u16,
    /// Bytes of the name.
    pub name: u16,
}

impl Lengths {
    /// Those of an entry's fixed part.
    pub fn of(fixed: &[u8]) -> Lengths {
        let u16_at = |at: usize| {
            fixed
                .get(at..at.saturating_add(2))
                .map_or(0, BigEndian::read_u16)
        };
        Lengths {
            extra: fixed.get(36..40).map_or(0, BigEndian::read_u32),
            id: u16_at(12),
            name: u16_at(14),
        }
    }

    /// The fixed part with another length of extra data.
    pub fn into_fixed(self, fixed: &[u8]) -> Vec<u8> {
        let mut fixed = fixed.to_vec();
        if let Some(slot) = fixed.get_mut(36..40) {
            BigEndian::write_u32(slot, self.extra);
        }
        fixed
    }
}

/// QEMU keeps IDs and names as C strings: what follows a NUL is lost at the next write.
fn c_string(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

/// All of a table together has up to 64 MiB.
fn copy_of(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(bytes.len())
        .map_err(|_| Error::NoMemory(bytes.len() as u64))?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

/// Bytes of the entry on disk, without alignment.
pub fn encoded_len(s: &Snapshot, compat_2_1: bool) -> u64 {
    FIXED_BYTES
        .saturating_add(extra_len(s, compat_2_1).into())
        .saturating_add(s.id.len() as u64)
        .saturating_add(s.name.len() as u64)
}

fn extra_len(s: &Snapshot, compat_2_1: bool) -> u32 {
    if compat_2_1 {
        EXTRA_2014
    } else {
        s.extra_data_size.max(KNOWN_EXTRA)
    }
}

/// Append the entry to `out` (no alignment). IDs and names are at most 65535 bytes each, which
/// the callers ensure.
pub fn encode(s: &Snapshot, compat_2_1: bool, out: &mut Vec<u8>) {
    let mut fixed = [0u8; FIXED_BYTES as usize];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(slot) = at
            .checked_add(bytes.len())
            .and_then(|end| fixed.get_mut(at..end))
        {
            slot.copy_from_slice(bytes);
        }
    };
    let small_size = u32::try_from(s.vm_state_size).unwrap_or(0);
    put(0, &s.l1_table_offset.to_be_bytes());
    put(8, &s.l1_size.to_be_bytes());
    put(12, &(s.id.len() as u16).to_be_bytes());
    put(14, &(s.name.len() as u16).to_be_bytes());
    put(16, &s.date_sec.to_be_bytes());
    put(20, &s.date_nsec.to_be_bytes());
    put(24, &s.vm_clock_nsec.to_be_bytes());
    put(32, &small_size.to_be_bytes());
    put(36, &extra_len(s, compat_2_1).to_be_bytes());
    out.extend_from_slice(&fixed);
    out.extend_from_slice(&s.vm_state_size.to_be_bytes());
    out.extend_from_slice(&s.disk_size.to_be_bytes());
    if !compat_2_1 {
        out.extend_from_slice(&s.icount.to_be_bytes());
        out.extend_from_slice(&s.unknown_extra_data);
    }
    out.extend_from_slice(&s.id);
    out.extend_from_slice(&s.name);
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )]
    use super::*;
    use proptest::prelude::*;

    fn any_snapshot() -> impl Strategy<Value = Snapshot> {
        let text = || proptest::collection::vec(1u8..=255, 0..300);
        (
            any::<[u64; 4]>(),
            any::<[u32; 3]>(),
            text(),
            text(),
            proptest::collection::vec(any::<u8>(), 0..1000),
        )
            .prop_map(|(q, w, id, name, unknown)| Snapshot {
                l1_table_offset: q[0],
                l1_size: w[0],
                id,
                name,
                date_sec: w[1],
                date_nsec: w[2],
                vm_clock_nsec: q[1],
                vm_state_size: q[2],
                disk_size: q[3],
                icount: q[0] ^ q[3],
                extra_data_size: KNOWN_EXTRA + unknown.len() as u32,
                unknown_extra_data: unknown,
            })
    }

    proptest! {
        #[test]
        fn an_entry_survives_encoding_and_decoding(s in any_snapshot()) {
            let mut bytes = Vec::new();
            encode(&s, false, &mut bytes);
            prop_assert_eq!(bytes.len() as u64, encoded_len(&s, false));
            let (back, end) = decode(&bytes, 0, 7).unwrap().unwrap();
            prop_assert_eq!(end, bytes.len() as u64);
            prop_assert_eq!(back, s);
            for cut in 0..bytes.len().min(60) {
                prop_assert!(decode(&bytes[..cut], 0, 7).unwrap().is_none());
            }
        }

        #[test]
        fn no_bytes_make_decoding_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes, 3, 0);
        }
    }

    #[test]
    fn extra_data_has_up_to_1024_bytes() {
        let mut bytes = vec![0; 2000];
        for (extra, good) in [(1024, true), (1025, false)] {
            BigEndian::write_u32(&mut bytes[36..], extra);
            assert_eq!(decode(&bytes, 0, 7).is_ok(), good);
        }
    }

    #[test]
    fn short_extra_data_falls_back_field_by_field() {
        let s = Snapshot {
            l1_table_offset: 0,
            l1_size: 0,
            id: b"1".to_vec(),
            name: b"n".to_vec(),
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
            vm_state_size: 5,
            disk_size: 512,
            icount: 9,
            extra_data_size: 16,
            unknown_extra_data: vec![],
        };
        let mut bytes = Vec::new();
        encode(&s, true, &mut bytes);
        let (back, _) = decode(&bytes, 0, 7).unwrap().unwrap();
        assert_eq!(
            (
                back.vm_state_size,
                back.disk_size,
                back.icount,
                back.extra_data_size
            ),
            (5, 512, u64::MAX, 16)
        );
    }
}
