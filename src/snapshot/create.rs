//! `qcow2_snapshot_create`.

use super::{copies, NewSnapshot, Snapshot};
use crate::error::{Error, Result};
use crate::format::entry::{self, Cluster, COPIED, OFFSET_MASK};
use crate::format::geometry::{MAX_SNAPSHOTS, TABLE_ENTRY};
use crate::format::record::{EXTRA_2014, KNOWN_EXTRA};
use crate::format::run::Tally;
use crate::image::device::bytes_of;
use crate::image::plan::{Edit, How, Plan};
use crate::image::progress::{table_bytes, Stage};
use crate::image::replay::resize::shared_but_copied;
use crate::image::replay::walk::{set_copied, Flags};
use crate::image::replay::Replay;
use crate::image::Image;
use crate::room;
use crate::words::printable;
use byteorder::{BigEndian, ByteOrder};

impl Image {
    /// Create a snapshot of the active disk. Returns its ID.
    ///
    /// ```text
    /// prepare  L1 copy; counts of all that the L1 reaches + 1; COPIED cleared there; new table
    /// publish  header bytes 60..72
    /// reclaim  old table freed
    /// ```
    /// VM state, if any, is then taken out of the active L1, as QEMU does: the snapshot keeps it.
    ///
    /// # Errors
    /// `TooBig` at 65536 snapshots, `Exists` for an ID in use, `Invalid` for refcounts that would
    /// overflow and for VM state that the L1 table does not cover, `Corrupt` for damaged tables.
    /// None of these changes a byte.
    pub fn snapshot_create(&mut self, new: &NewSnapshot) -> Result<Vec<u8>> {
        self.begin_change()?;
        let id = self.check_new_snapshot(new)?;

        let (mut replay, mut plan) = (self.replay()?, Plan::default());
        let tables = || table_bytes(replay.g, &[&self.l1]);
        self.dev.progress.begin(Stage::Check, tables);
        let l1_bytes = self.l1.len() as u64 * TABLE_ENTRY;
        let l1_copy = replay.refs.alloc(&mut self.dev, l1_bytes)?;
        replay.check_new(l1_copy, l1_bytes)?;
        // The copy keeps the COPIED flags of the moment, which are stale in it; so does QEMU's.
        replay.write_new(
            &mut self.dev,
            "snapshot L1 table",
            l1_copy,
            bytes_of(&self.l1)?,
        )?;
        let walked = replay.walk(&mut self.dev, &self.l1, Tally::Up)?;
        plan.flag(&mut replay, self.header.l1_offset, &self.l1, &walked)?;
        replay.l1 = walked.l1;
        plan.clear = walked.tables;
        let flags = if walked.ones {
            Flags::Published
        } else {
            Flags::NoneIsOne
        };
        plan.clear.iter_mut().for_each(|t| t.flags = flags);
        if walked.ones {
            plan.set = room::copy_of(&plan.clear)?;
        }
        let mut list = copies(&self.snapshots.entries)?;
        room::push(&mut list, self.new_entry(new, &id, l1_copy)?)?;
        let table_size = self.replay_table(&mut replay, &mut plan, &list)?;
        self.replay_release_of_vm_state(&mut replay, &mut plan, new.vm_state_size)?;

        let list = self.as_written(list);
        self.commit(replay, plan, list, table_size)?;
        Ok(id)
    }

    /// The checks that need no allocation. Returns the ID to use.
    fn check_new_snapshot(&self, new: &NewSnapshot) -> Result<Vec<u8>> {
        let entries = &self.snapshots.entries;
        if entries.len() as u64 >= MAX_SNAPSHOTS {
            return Err(Error::TooBig(format!(
                "The image has {MAX_SNAPSHOTS} snapshots already; delete one first"
            )));
        }
        if new.id.len() > usize::from(u16::MAX) || new.name.len() > usize::from(u16::MAX) {
            return Err(Error::Invalid(
                "The snapshot's ID or name is longer than 65535 bytes".into(),
            ));
        }
        if new.id.contains(&0) || new.name.contains(&0) {
            return Err(Error::Invalid(
                "The snapshot's ID or name contains a NUL byte".into(),
            ));
        }
        let id = if new.id.is_empty() {
            // May be in use already where the number wraps around; QEMU does not look either.
            next_id(entries)
        } else if entries.iter().any(|s| s.id == new.id) {
            return Err(Error::Exists(format!(
                "A snapshot with the ID '{}' exists already",
                printable(&new.id)
            )));
        } else {
            room::copy_of(&new.id)?
        };
        let g = self.header.geometry;
        let first = g.l1_entries_for(self.header.size);
        let room = (self.l1.len() as u64)
            .saturating_sub(first)
            .saturating_mul(g.l2_entries());
        if g.clusters_for(new.vm_state_size) > room {
            return Err(Error::Invalid(format!(
                "The VM state of {} bytes is not in the active L1 table",
                new.vm_state_size
            )));
        }
        Ok(id)
    }

    fn new_entry(&self, new: &NewSnapshot, id: &[u8], l1_table_offset: u64) -> Result<Snapshot> {
        Ok(Snapshot {
            l1_table_offset,
            l1_size: self.header.l1_size,
            id: room::copy_of(id)?,
            name: room::copy_of(&new.name)?,
            date_sec: new.date_sec,
            date_nsec: new.date_nsec,
            vm_clock_nsec: new.vm_clock_nsec,
            vm_state_size: new.vm_state_size,
            disk_size: self.header.disk_size(),
            icount: new.icount,
            extra_data_size: if self.compat_2_1() {
                EXTRA_2014
            } else {
                KNOWN_EXTRA
            },
            unknown_extra_data: Vec::new(),
        })
    }

    /// QEMU's `qcow2_cluster_discard(NEVER)` over the VM state: in an epoch of its own, since the
    /// snapshot must have been published before the active L1 lets go.
    fn replay_release_of_vm_state(
        &mut self,
        replay: &mut Replay,
        plan: &mut Plan,
        bytes: u64,
    ) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let g = self.header.geometry;
        replay.refs.next_epoch()?;
        let before = room::copy_of(&replay.l1)?;
        let mut index = g.l1_entries_for(self.header.size);
        let mut left = g.clusters_for(bytes);
        while left > 0 {
            let n = left.min(g.l2_entries());
            let made = replay
                .l1
                .get(index as usize)
                .is_some_and(|e| e & COPIED == 0);
            let (offset, table) =
                replay.own_table(&mut self.dev, index, replay.refs.forgotten_now())?;
            if !made {
                return Err(shared_but_copied(offset));
            }
            let mut table = table.whole(g)?;
            set_copied(
                &mut replay.refs,
                &mut self.dev,
                &mut table,
                Flags::Published,
                true,
            )?;
            for word in table.chunks_exact_mut(g.l2_entry_size()).take(n as usize) {
                if let Some(new) = self.zeroed_entry(word) {
                    replay.forget_cluster(&mut self.dev, word, replay.refs.forgotten_now())?;
                    word.copy_from_slice(new.get(..word.len()).unwrap_or_default());
                }
            }
            debug_assert_eq!(offset & !OFFSET_MASK, 0);
            replay.write_new(&mut self.dev, "L2 table", offset, table)?;
            (index, left) = (index + 1, left - n);
        }
        let edit = Edit::new(replay.l1_place().offset, &before, &replay.l1)?;
        plan.l1 = Some((edit, How::EachEntry));
        Ok(())
    }

    /// The L2 entry that QEMU leaves where a cluster is discarded so that it reads as zeros
    /// (`discard_in_l2_slice`, not full). `None`: it stays as it is.
    fn zeroed_entry(&self, word: &[u8]) -> Option<[u8; 16]> {
        let (g, old) = (self.header.geometry, BigEndian::read_u64(word));
        let allocated = !matches!(
            entry::cluster(g, old),
            Cluster::Unallocated | Cluster::ZeroPlain
        );
        if self.backing_file.is_empty() && !allocated {
            return None;
        }
        let mut new = [0u8; 16];
        if g.extended_l2 {
            BigEndian::write_u64(&mut new[8..], entry::SUBCLUSTERS_ALL_ZERO);
        } else if self.header.version >= 3 {
            BigEndian::write_u64(&mut new[..8], entry::ZERO);
        }
        (new.get(..word.len()) != Some(word)).then_some(new)
    }
}

/// One more than the highest ID that is a number (`find_new_snapshot_id`).
fn next_id(entries: &[Snapshot]) -> Vec<u8> {
    let highest = entries.iter().map(|s| strtoul(&s.id)).max().unwrap_or(0);
    highest.wrapping_add(1).to_string().into_bytes()
}

/// C's `strtoul(text, NULL, 10)` where `unsigned long` has 64 bits.
fn strtoul(text: &[u8]) -> u64 {
    let blank = |b: &u8| matches!(b, b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r');
    let start = text.iter().position(|b| !blank(b)).unwrap_or(text.len());
    let text = text.get(start..).unwrap_or_default();
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        _ => (false, text),
    };
    let mut value = 0u64;
    for d in digits.iter().take_while(|b| b.is_ascii_digit()) {
        let next = value
            .checked_mul(10)
            .and_then(|v| v.checked_add(u64::from(d - b'0')));
        match next {
            Some(v) => value = v,
            None => return u64::MAX, // overflow saturates, with either sign
        }
    }
    if negative {
        value.wrapping_neg()
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::strtoul;

    #[test]
    fn ids_are_read_as_c_reads_numbers() {
        let cases: &[(&[u8], u64)] = &[
            (b"", 0),
            (b"7", 7),
            (b" \t+12abc", 12),
            (b"-1", u64::MAX),
            (b"-3x", u64::MAX - 2),
            (b"abc", 0),
            (b"18446744073709551615", u64::MAX),
            (b"18446744073709551616", u64::MAX),
            (b"-99999999999999999999999", u64::MAX),
            (b"+-1", 0),
        ];
        for (text, value) in cases {
            assert_eq!(strtoul(text), *value, "{:?}", String::from_utf8_lossy(text));
        }
    }
}
