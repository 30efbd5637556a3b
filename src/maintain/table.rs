//! The snapshot table as a check reads it (`qcow2_check_read_snapshot_table`).

use super::blocks::MAX_LENGTH;
use super::Findings;
use crate::error::{Error, Result};
use crate::format::geometry::{MAX_EXTRA_DATA, MAX_SNAPSHOTS, MAX_SNAPSHOT_TABLE_BYTES};
use crate::format::header::{validate_table, Header};
use crate::format::record::{self, Lengths, FIXED_BYTES, KNOWN_EXTRA};
use crate::image::device::Device;
use crate::room;
use crate::snapshot::Snapshot;
use std::ops::Range;

/// The table is read in requests of this size.
const READ_AHEAD: u64 = 1 << 20;
/// A v3 entry has at least this much extra data: VM state size and disk size.
const COMPLETE: u32 = 16;
/// QEMU counts the bytes of a table in an `int`.
const INT_MAX: u64 = i32::MAX as u64;

/// What the table holds.
pub(super) struct Table {
    pub(super) entries: Vec<Snapshot>,
    /// Bytes of it on disk.
    pub(super) bytes: u64,
    /// So far from its start on something of it is kept that is in the file.
    pub(super) kept: u64,
    /// Clusters in extra data that is not kept, in order. Whatever else has them, nothing of the table is lost there.
    pub(super) discarded: Vec<Range<u64>>,
    /// Snapshots at the end that a repair drops: the header is to name fewer.
    pub(super) dropped: u64,
    /// Entries that are to be written anew: with extra data cut off, or completed.
    pub(super) changed: u64,
}

/// Reads forward.
struct Records<'a> {
    dev: &'a mut Device,
    at: u64,
    buf: Vec<u8>,
}

impl Records<'_> {
    fn get(&mut self, offset: u64, bytes: u64) -> Result<&[u8]> {
        let end = self.at.saturating_add(self.buf.len() as u64);
        if offset < self.at || offset.saturating_add(bytes) > end {
            let want = READ_AHEAD.min(self.dev.length().saturating_sub(offset));
            let op = "Failed to read snapshot table";
            if offset > MAX_LENGTH.saturating_sub(bytes) {
                let source = std::io::Error::from_raw_os_error(libc::EIO);
                return Err(Error::Io { op, offset, source });
            }
            let read = self.dev.read_vec(op, offset, want.max(bytes));
            // Something behind the table may be what cannot be read.
            self.buf = match read {
                Err(Error::Io { .. }) if want > bytes => self.dev.read_vec(op, offset, bytes)?,
                other => other?,
            };
            self.at = offset;
        }
        let from = offset.saturating_sub(self.at) as usize;
        let part = self.buf.get(from..).and_then(|b| b.get(..bytes as usize));
        Ok(part.unwrap_or_default())
    }
}

/// Read the table that the header names. With `repair`, what QEMU would remove from it is left out; it is the
/// word for an entry that is not complete.
///
/// # Errors
/// `TooBig` and `Invalid` for a table that cannot be read (and is not to be repaired), `Io`.
pub(super) fn read(
    dev: &mut Device,
    header: &Header,
    repair: Option<&str>,
    found: &mut Findings<'_>,
) -> Result<Table> {
    let (repair, word) = (repair.is_some(), repair.unwrap_or("ERROR"));
    let mut table = Table {
        entries: Vec::new(),
        bytes: 0,
        kept: 0,
        discarded: Vec::new(),
        dropped: 0,
        changed: 0,
    };
    let mut nb = u64::from(header.nb_snapshots);
    if nb > MAX_SNAPSHOTS && repair {
        table.dropped = nb - MAX_SNAPSHOTS;
        nb = MAX_SNAPSHOTS;
        found.tell(
            1,
            format_args!("Discarding {} overhanging snapshots", table.dropped),
        );
    }
    let most = FIXED_BYTES * MAX_SNAPSHOTS;
    let g = header.geometry;
    let start = header.snapshots_offset;
    validate_table(g, start, nb, FIXED_BYTES, most, "snapshot table").inspect_err(|e| {
        found.error(1, format_args!("ERROR {e}"));
    })?;
    let read = entries(dev, header, nb, repair, &mut table, found);
    read.inspect_err(|e| {
        found.error(
            1,
            format_args!("ERROR failed to read the snapshot table: {e}"),
        );
    })?;
    found.result.corruptions += table.dropped + table.changed;
    if header.version >= 3 {
        for (i, s) in table.entries.iter().enumerate() {
            if s.extra_data_size < COMPLETE {
                table.changed += 1;
                // One expression: Rust 1.85 ends the life of format_args! at the semicolon.
                found.corruption(
                    1,
                    format_args!("{word} snapshot table entry {i} is incomplete"),
                );
            }
        }
    }
    Ok(table)
}

fn entries(
    dev: &mut Device,
    header: &Header,
    nb: u64,
    repair: bool,
    table: &mut Table,
    found: &mut Findings<'_>,
) -> Result<()> {
    let (start, g) = (header.snapshots_offset, header.geometry);
    let mut reader = Records {
        dev,
        at: 0,
        buf: Vec::new(),
    };
    // `size`: what the table would have if it were written as it is kept.
    let (mut at, mut size) = (start, 0);
    for index in 0..nb {
        let before = at;
        at = record::align(at);
        let entry_start = at;
        size = record::align(size);
        let fixed = reader.get(at, FIXED_BYTES)?.to_vec();
        let lengths = Lengths::of(&fixed);
        let extra = u64::from(lengths.extra);
        let kept = extra.min(MAX_EXTRA_DATA.into());
        let cut = kept != extra;
        if cut && !repair {
            return Err(Error::TooBig(format!(
                "Too much extra metadata in snapshot table entry {index}"
            )));
        }
        if cut {
            found.tell(1, format_args!(
                "Discarding too much extra metadata in snapshot table entry {index} ({extra} > {MAX_EXTRA_DATA})"
            ));
        }
        let mut bytes = Lengths {
            extra: kept as u32,
            ..lengths
        }
        .into_fixed(&fixed);
        at += FIXED_BYTES;
        bytes.extend_from_slice(reader.get(at, kept)?);
        // Of what is cut off only what is known has a meaning, and of what is not in the file nothing.
        let known = if cut { KNOWN_EXTRA.into() } else { kept };
        let (known_end, extra_end) = (at + known, at + extra);
        let names = u64::from(lengths.id) + u64::from(lengths.name);
        bytes.extend_from_slice(reader.get(extra_end, names)?);
        at = extra_end + names;
        size += bytes.len() as u64;
        if size > MAX_SNAPSHOT_TABLE_BYTES || at - start > INT_MAX {
            if !repair {
                return Err(Error::TooBig("Snapshot table is too big".into()));
            }
            let rest = nb - index;
            found.tell(
                1,
                format_args!("Discarding {rest} overhanging snapshots (snapshot table is too big)"),
            );
            table.dropped += rest;
            at = before;
            break;
        }
        let Some((snapshot, _)) = record::decode(&bytes, index, header.disk_size())? else {
            return Err(Error::Corrupt(format!(
                "Snapshot table entry {index} cannot be read"
            )));
        };
        let length = reader.dev.length();
        if entry_start < length {
            table.kept = known_end - start;
        }
        if names != 0 && extra_end < length {
            table.kept = at - start;
        }
        let part = g.clusters_for(known_end)..g.cluster_of(extra_end).0;
        if cut && !part.is_empty() {
            room::push(&mut table.discarded, part)?;
        }
        table.changed += u64::from(cut);
        table
            .entries
            .try_reserve(1)
            .map_err(|_| Error::NoMemory(size))?;
        table.entries.push(snapshot);
    }
    table.bytes = at - start;
    Ok(())
}
