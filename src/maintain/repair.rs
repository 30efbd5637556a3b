//! Mending, in the order of every change here: what must rise, a barrier, what may fall. A long file: its
//! phases and the rebuilding of refcount structures hold only together.
//!
//! Between two barriers any subset of the writes may reach the disk, torn at 512 bytes:
//!
//! * counts that rise and COPIED that is cleared: each of them alone makes the image safer;
//! * behind the barrier counts fall to what was counted, COPIED is set where that is one, and clusters
//!   that nothing refers to are punched: each of them alone is true already;
//! * new refcount structures stand behind the end of the file until one write of the header names them.
//!
//! So no state of the disk reads worse at any moment, and whatever a cut leaves, a second repair finishes.
//! Every phase counts the references again: that costs little, and nothing has to be kept in mind.

use byteorder::{BigEndian, ByteOrder};
use std::collections::BTreeSet;
use std::ops::Range;

use super::blocks::Described;
use super::check::{merge_ranges, Check, Mode, NamedTables, Noticed, Subject, MOST_BEHIND};
use super::table::Table;
use super::{CheckResult, Findings, Fix};
use crate::by_refcount_width;
use crate::error::{Error, Result};
use crate::format::entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use crate::format::features;
use crate::format::geometry::{
    Geometry, HostCluster, MAX_REFTABLE_BYTES, MAX_SNAPSHOT_TABLE_BYTES, TABLE_ENTRY,
};
use crate::format::header::{AT_AUTOCLEAR, AT_INCOMPATIBLE, AT_REFTABLE, AT_SNAPSHOTS};
use crate::format::refblock;
use crate::format::refblock::with_width;
use crate::image::device::{self, Device, DiscardKind};
use crate::image::progress::{Progress, Stage};
use crate::image::{Image, Outcome, SnapshotList};

/// Changes are written in pieces of this many bytes.
const PIECE: usize = 4096;

/// So often a repair mends what it finds, if it finds something else each time.
const ROUNDS: u32 = 8;

/// What a look has come to: numbers, what was noticed, and L2 tables that share a cluster.
pub(super) type Looked = (CheckResult, Noticed, Vec<u64>);

/// What a repair may do to counts and flags.
#[derive(Clone, Copy, Debug)]
struct Policy {
    raise: bool,
    lower: bool,
    /// COPIED of the active disk is brought to what the counts are in the end.
    flags: bool,
    /// COPIED may be set, too: every reference is known.
    set: bool,
}

impl Policy {
    /// What a count is in the end.
    #[inline(always)]
    fn last(self, on_disk: u64, references: u64) -> u64 {
        if on_disk < references {
            if self.raise {
                references
            } else {
                on_disk
            }
        } else if self.lower {
            references
        } else {
            on_disk
        }
    }
}

/// The two phases of counts and flags.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Raise,
    Lower,
}

impl Image {
    /// Mend what the first look has found, and look again, until that finds the same: new refcount
    /// structures make the file longer, and references that were wrong lead somewhere.
    pub(super) fn repair(
        &mut self,
        table: Table,
        fix: Fix,
        first: Looked,
        report: &mut dyn FnMut(&str),
    ) -> Result<CheckResult> {
        let left = |r: &CheckResult| r.corruptions + r.leaks + r.check_errors;
        let found = first.0;
        let (mut table, mut looked, mut failures) = (table, first, 0);
        if left(&found) != 0 {
            for round in 0..ROUNDS {
                let before = looked.1.findings;
                failures = self.mend(table, fix, looked, round == 0, report)?;
                (table, looked) = self.look_again(&mut |_| {}, true, failures != 0)?;
                if left(&looked.0) == 0 || looked.1.findings == before {
                    break;
                }
            }
            if left(&looked.0) != 0 {
                (table, looked) = self.look_again(report, false, failures != 0)?;
            }
        } else {
            self.dev.progress.end()?;
        }
        let (mut result, noticed, _) = looked;
        result.check_errors += failures;
        result.corruptions_fixed = found.corruptions.saturating_sub(result.corruptions);
        result.leaks_fixed = found.leaks.saturating_sub(result.leaks);
        self.adopt(table);
        if result.corruptions == 0 && result.check_errors == 0 {
            self.clear_marks(features::DIRTY | features::CORRUPT)?;
            self.found_good();
        } else if fix.has(Fix::ERRORS)
            && result.check_errors == 0
            && !self.header.has_data_file()
            && noticed.counts_hold()
        {
            // That counts may be too low is what the bit says. Now the snapshot that cannot be read can be deleted.
            self.clear_marks(features::DIRTY)?;
        }
        if left(&found) != 0 {
            self.dev.progress.end()?;
        }
        Ok(result)
    }

    /// One round of mending. Returns how many things failed that are no reason to give up.
    fn mend(
        &mut self,
        table: Table,
        fix: Fix,
        looked: Looked,
        first: bool,
        report: &mut dyn FnMut(&str),
    ) -> Result<u64> {
        let (found, mut noticed, mut overlapped) = looked;
        let errors = fix.has(Fix::ERRORS);
        if noticed.rebuild && !errors {
            report("ERROR need to rebuild refcount structures");
        }
        if noticed.unread {
            // What it names may be a refcount block, or where new structures would go.
            report("Nothing is freed or mended: reading a table fails. Copy the image to a sound disk first");
            return Ok(u64::from(errors && table.changed + table.dropped != 0));
        }
        if noticed.blind {
            report("Nothing is freed: tables cannot be read, and what they refer to is not known");
        }
        // What is not known may share a cluster with a table that would be written.
        let unknown = found.check_errors != 0;
        let policy = Policy {
            raise: errors,
            lower: fix.has(Fix::LEAKS) && !noticed.blind && (errors || !noticed.rebuild),
            // Flags may follow the counts only where these are right.
            flags: (errors && !unknown)
                || (!noticed.rebuild
                    && !unknown
                    && found.corruptions == noticed.wrong_flags + table.changed + table.dropped),
            set: !noticed.blind,
        };

        // What the first round is told of, the others are not.
        if first {
            self.dev.progress.end()?;
        }
        self.forget_unknown_features()?;
        if errors && table.dropped != 0 {
            self.drop_snapshots(&table)?;
        }
        let entries = errors && !unknown && (noticed.misplaced | noticed.compressed_flags) != 0;
        if entries {
            self.phase(&table, None, true, |check, _| {
                mend_entries(check, &overlapped).map(|()| Vec::new())
            })?;
            self.dev.barrier()?;
        }
        let end = self.dev.length();
        let mut rebuild = (noticed.rebuild || noticed.reftable_shared) && errors;
        let mut policy = policy;
        let mut hinders = match rebuild {
            true if noticed.table_in_header => Some("a table shares a cluster with the header"),
            true if noticed.block_in_cut => {
                Some("a refcount block lies in a table that the end of the file cuts off")
            }
            _ => None,
        };
        if !noticed.rebuild && hinders.take().is_some() {
            // They are good where they are.
            rebuild = false;
        }
        if let Some(why) = hinders {
            report(&format!("Refcount structures are left as they are: {why}"));
            // Nor can counts be written in blocks that may be something else.
            rebuild = false;
            (policy.raise, policy.lower, policy.flags) = (false, false, false);
        }
        if rebuild {
            report("Rebuilding refcount structure");
            self.rebuild(&table, &noticed, first)?;
        }
        if rebuild || entries {
            // References are gone that were of no use.
            (noticed.l1_shared, overlapped) = self.overlaps(&table)?;
        }
        if policy.flags && (noticed.l1_shared || !overlapped.is_empty()) {
            report(
                "COPIED flags are left alone in tables that share a cluster with something else",
            );
        }
        let mends = policy.raise || policy.flags;
        if first && !rebuild {
            self.dev.progress.begin(Stage::Prepare, || 0);
        }
        if mends {
            let stage = (first && !rebuild).then_some(Stage::Prepare);
            self.counts_and_flags(&table, policy, (Phase::Raise, stage), &overlapped, &noticed)?;
            self.dev.barrier()?;
        }
        if first && !rebuild {
            self.dev.progress.end()?;
        }
        if first {
            self.dev.progress.begin(Stage::Reclaim, || 0);
        }
        if rebuild && !noticed.blind {
            self.phase(&table, None, true, |check, windows| {
                punch_free(check, windows, end).map(|()| Vec::new())
            })?;
        }
        if policy.lower || policy.flags {
            let policy = Policy {
                lower: policy.lower && !rebuild,
                ..policy
            };
            let stage = first.then_some(Stage::Reclaim);
            self.counts_and_flags(&table, policy, (Phase::Lower, stage), &overlapped, &noticed)?;
        }
        self.dev.barrier()?;
        self.forget_reads();

        if errors && table.changed != 0 {
            // Where counts are not right a new table might land on anything.
            let failed = match hinders {
                Some(why) => Some(why.to_owned()),
                None => self.replace_table(table, &mut noticed.behind_end)?,
            };
            let Some(why) = failed else {
                return Ok(0);
            };
            report(&format!("ERROR failed to update snapshot table: {why}"));
            return Ok(1);
        }
        Ok(0)
    }

    /// Write the snapshot table anew. What failed before anything was written is returned in words.
    fn replace_table(
        &mut self,
        table: Table,
        behind: &mut Vec<Range<u64>>,
    ) -> Result<Option<String>> {
        let Some(from) = self.place_for(&table, behind) else {
            let why = "too much is referred to behind the end of the file";
            return Ok(Some(why.to_owned()));
        };
        self.dev.changed = false;
        let written = self.write_mended_table(table, Some(from));
        let begun = std::mem::replace(&mut self.dev.changed, true);
        match written {
            Err(e) if !begun => Ok(Some(e.to_string())),
            other => other.map(|()| None),
        }
    }

    /// From which cluster on a new snapshot table hits nothing that is referred to behind the end of the file.
    fn place_for(&self, table: &Table, behind: &mut Vec<Range<u64>>) -> Option<u64> {
        let g = self.header.geometry;
        if behind.is_empty() {
            return Some(0);
        }
        merge_ranges(behind);
        let file_end = g.clusters_for(self.dev.length());
        // The table, whose entries may get all of their extra data, and refcount structures: a larger refcount
        // table stands behind all that is described.
        let longest = table.bytes.saturating_add(table.entries.len() as u64 * 64);
        let clusters = g.clusters_for(longest);
        let blocks = clusters / g.refblock_entries() + 2;
        let reftable = 2 * u64::from(self.header.reftable_clusters) + blocks;
        let most = clusters.saturating_add(2 * blocks + reftable + g.refblock_entries());
        let start = apart(behind, file_end, most);
        let far = g.clusters_for(MAX_SNAPSHOT_TABLE_BYTES);
        (behind.len() < MOST_BEHIND && start - file_end <= far).then_some(start)
    }

    /// The snapshot table and nothing else.
    pub(super) fn mend_table_alone(
        &mut self,
        table: Table,
        errors: bool,
        mut result: CheckResult,
    ) -> Result<CheckResult> {
        if errors && table.dropped | table.changed != 0 {
            self.forget_unknown_features()?;
            if table.dropped != 0 {
                self.drop_snapshots(&table)?;
            }
            match table.changed {
                0 => self.adopt(table),
                _ => {
                    // Whoever asks for the table alone has mended the counts.
                    let end = self.header.snapshots_offset.saturating_add(table.bytes);
                    let frees = end <= self.dev.length();
                    self.write_mended_table(table, (!frees).then_some(0))?;
                }
            }
            (result.corruptions_fixed, result.corruptions) = (result.corruptions, 0);
        }
        Ok(result)
    }

    fn look_again(
        &mut self,
        report: &mut dyn FnMut(&str),
        overlaps: bool,
        table_left: bool,
    ) -> Result<(Table, Looked)> {
        // In a damaged image these tables may lie where something else was written.
        let bytes = self.l1.len() as u64 * TABLE_ENTRY;
        let op = "Could not read the L1 table";
        let l1 = self.dev.read_vec(op, self.header.l1_offset, bytes)?;
        self.l1 = device::words(&l1)?;
        let bytes = self.header.reftable_bytes();
        let op = "Could not read the refcount table";
        let reftable = self.dev.read_vec(op, self.header.reftable_offset, bytes)?;
        self.reftable = device::words(&reftable)?;
        let mut found = Findings::new(report);
        let table = super::table::read(
            &mut self.dev,
            &self.header,
            table_left.then_some("ERROR"),
            &mut found,
        )?;
        let mode = Mode {
            stage: None,
            structures: true,
            overlaps,
            strict: false,
        };
        let looked = self.look(&table, found, mode)?;
        Ok((table, looked))
    }

    /// Does the active L1 table share a cluster, and which L2 tables do?
    fn overlaps(&mut self, table: &Table) -> Result<(bool, Vec<u64>)> {
        let mut nobody = |_: &str| {};
        let mut found = Findings::new(&mut nobody);
        found.mute = true;
        let mode = Mode {
            stage: None,
            structures: true,
            overlaps: true,
            strict: true,
        };
        let (_, noticed, overlapped) = self.look(table, found, mode)?;
        Ok((noticed.l1_shared, overlapped))
    }

    /// The list in memory is what the table says.
    fn adopt(&mut self, table: Table) {
        self.snapshots = SnapshotList {
            entries: table.entries,
            size: table.bytes,
            loaded: true,
            ..SnapshotList::default()
        };
    }

    /// Unknown autoclear bits vouch for what is about to change.
    fn forget_unknown_features(&mut self) -> Result<()> {
        let known = self.header.autoclear & features::AUTOCLEAR_KNOWN;
        if known != self.header.autoclear {
            let bits = known.to_be_bytes();
            self.dev
                .write("header: autoclear features", AT_AUTOCLEAR, &bits)?;
            self.dev.barrier()?;
            self.header.autoclear = known;
        }
        Ok(())
    }

    /// Snapshots that cannot be listed go from the header, as by QEMU; what they hold is leaked by it.
    fn drop_snapshots(&mut self, table: &Table) -> Result<()> {
        self.table_apart_from_header()?;
        let nb = table.entries.len() as u32;
        self.repairing(Outcome::Unknown);
        self.dev
            .write("header: snapshots", AT_SNAPSHOTS, &nb.to_be_bytes())?;
        self.dev.barrier()?;
        self.repairing(Outcome::Unchanged);
        self.header.nb_snapshots = nb;
        Ok(())
    }

    /// Not where the header is: each field that is written there would make other snapshots of it.
    fn table_apart_from_header(&self) -> Result<()> {
        if self.header.snapshots_offset < self.header.geometry.cluster_size() {
            return Err(Error::Corrupt(
                "The snapshot table shares a cluster with the header: it is left as it is".into(),
            ));
        }
        Ok(())
    }

    /// What the image says of itself is not so any more.
    fn clear_marks(&mut self, marks: u64) -> Result<()> {
        let bits = self.header.incompatible & !marks;
        if bits != self.header.incompatible {
            let label = "header: incompatible features";
            self.dev
                .write(label, AT_INCOMPATIBLE, &bits.to_be_bytes())?;
            self.dev.barrier()?;
            self.header.incompatible = bits;
        }
        Ok(())
    }

    /// Write the snapshot table anew, as the verbs do: completed, and without what was cut off. A damaged
    /// entry may make the old one as long as it likes.
    pub(super) fn write_mended_table(&mut self, table: Table, from: Option<u64>) -> Result<()> {
        self.table_apart_from_header()?;
        self.adopt(table);
        // The progress of this repair is not that of a verb.
        let progress = std::mem::replace(&mut self.dev.progress, Progress::new(None));
        let flags = self.flags;
        self.found_good();
        let written = self.rewrite_table(from);
        self.flags = flags;
        self.dev.progress = progress;
        written
    }

    /// Count the references again, and let `work` do something about it in each window. What it returns
    /// for the active L1 table is taken over into memory.
    fn phase(
        &mut self,
        table: &Table,
        stage: Option<Stage>,
        structures: bool,
        work: impl FnOnce(&mut Check<'_, '_>, &[Range<u64>]) -> Result<Vec<(usize, u64)>>,
    ) -> Result<()> {
        let mut nobody = |_: &str| {};
        let mut found = Findings::new(&mut nobody);
        found.mute = true;
        let it = Subject {
            header: &self.header,
            extensions: &self.extensions,
            l1: &self.l1,
            table,
        };
        let mode = Mode {
            stage,
            structures,
            overlaps: false,
            strict: true,
        };
        let mut check = Check::new(&mut self.dev, it, &self.reftable, found, mode)?;
        let windows = check.windows(self.refcount_memory);
        let flags = work(&mut check, &windows)?;
        self.write_l1_flags(&flags)
    }

    /// Counts, and the flags that hang on them.
    fn counts_and_flags(
        &mut self,
        table: &Table,
        policy: Policy,
        (phase, stage): (Phase, Option<Stage>),
        overlapped: &[u64],
        noticed: &Noticed,
    ) -> Result<()> {
        self.phase(table, stage, true, |check, windows| {
            let mut l1 = Vec::new();
            for index in 0..windows.len() {
                check.enter(windows, index)?;
                mend_counts(check, policy, phase)?;
                if policy.flags {
                    mend_flags(check, policy, phase, overlapped)?;
                    if !noticed.l1_shared {
                        l1_flags(check, policy, phase, &mut l1)?;
                    }
                }
            }
            Ok(l1)
        })
    }

    /// Entries of the active L1 get these flags, on disk a sector at a time.
    fn write_l1_flags(&mut self, flags: &[(usize, u64)]) -> Result<()> {
        const PER_SECTOR: usize = 512 / TABLE_ENTRY as usize;
        for (index, word) in flags {
            if let Some(slot) = self.l1.get_mut(*index) {
                *slot = *word;
            }
        }
        let mut sectors: Vec<usize> = flags.iter().map(|(i, _)| i / PER_SECTOR).collect();
        sectors.sort_unstable();
        sectors.dedup();
        for sector in sectors {
            let first = sector * PER_SECTOR;
            let end = (first + PER_SECTOR).min(self.l1.len());
            let words = self.l1.get(first..end).unwrap_or_default();
            let at = self.header.l1_offset + first as u64 * TABLE_ENTRY;
            self.dev.write("L1 table", at, &device::bytes_of(words)?)?;
        }
        Ok(())
    }

    /// New refcount structures, from what was counted alone, behind the end of the file; then the header
    /// names them.
    fn rebuild(&mut self, table: &Table, noticed: &Noticed, first: bool) -> Result<()> {
        let (mut made, blind) = (None, noticed.blind);
        let stage = first.then_some(Stage::Prepare);
        // Where references may be missing, what the old structures say is kept.
        self.phase(table, stage, blind, |check, windows| {
            made = Some(build(check, windows, blind)?);
            Ok(Vec::new())
        })?;
        let Some(made) = made else {
            return Ok(());
        };
        let g = self.header.geometry;
        self.dev.write(
            "refcount table",
            made.offset,
            &device::bytes_of(&made.entries)?,
        )?;
        self.dev.barrier()?;
        if first {
            self.dev.progress.end()?;
        }
        let clusters = g.clusters_for(made.entries.len() as u64 * TABLE_ENTRY) as u32;
        let mut place = [0; 12];
        let (at, count) = place.split_at_mut(8);
        BigEndian::write_u64(at, made.offset);
        BigEndian::write_u32(count, clusters);
        self.repairing(Outcome::Unknown);
        self.dev
            .write("header: refcount table", AT_REFTABLE, &place)?;
        self.dev.barrier()?;
        self.repairing(Outcome::Unchanged);
        self.header.reftable_offset = made.offset;
        self.header.reftable_clusters = clusters;
        self.reftable = made.entries;
        Ok(())
    }
}

/// Write what differs between `old` and `new`, which stand at `offset`.
fn write_changes(
    dev: &mut Device,
    label: &'static str,
    offset: u64,
    old: &[u8],
    new: &[u8],
) -> Result<()> {
    let mut run: Option<Range<usize>> = None;
    let pieces = old.chunks(PIECE).zip(new.chunks(PIECE)).enumerate();
    let differ = pieces.map(|(i, (a, b))| (i * PIECE, a != b));
    for (at, differs) in differ.chain([(new.len(), false)]) {
        match (&mut run, differs) {
            (Some(run), true) => run.end = at + PIECE,
            (None, true) => run = Some(at..at + PIECE),
            (Some(done), false) => {
                // A last cluster that is there in part stays so where nothing changes behind.
                let end = done.end.min(new.len());
                let there = dev.length().saturating_sub(offset) as usize;
                let changed = (done.start..end).rev().find(|i| old.get(*i) != new.get(*i));
                let end = end.min(there.max(changed.map_or(0, |i| i + 1)));
                let part = new.get(done.start..end).unwrap_or_default();
                dev.write(label, offset + done.start as u64, part)?;
                run = None;
            }
            (None, false) => {}
        }
    }
    Ok(())
}

/// Bring the counts of the window to where they belong in this phase, and note which are one in the end.
fn mend_counts(check: &mut Check<'_, '_>, policy: Policy, phase: Phase) -> Result<()> {
    let g = check.g();
    let most = g.refcount_max();
    for (index, clusters) in check.blocks_of(check.window.clusters.clone()) {
        match check.blocks.load(check.dev, index)? {
            Described::Here => {}
            Described::Absent | Described::Bad(_) => {
                clusters.for_each(|c| check.window.set_one(c, false));
                continue;
            }
        }
        check.dev.progress.step(g.cluster_size())?;
        let old = check.blocks.bytes().to_vec();
        let mut new = old.clone();
        let mut freed = Vec::new();
        let window = &mut check.window;
        by_refcount_width!(g, W => {
            let w = with_width::<W>(g);
            for c in clusters {
                let i = w.refblock_index(HostCluster(c));
                let on_disk = refblock::get(w, &old, i);
                let references = window.tally.get(c);
                let last = policy.last(on_disk, references.min(most));
                // More references than can be counted are not one.
                window.set_one(c, last == 1 && references <= 1);
                let now = match phase {
                    Phase::Raise => on_disk.max(last),
                    Phase::Lower => last,
                };
                if now != on_disk {
                    refblock::set(w, &mut new, i, now);
                    if now == 0 {
                        freed.push(c);
                    }
                }
            }
        });
        let offset = check.blocks.offset(index);
        write_changes(check.dev, "refcount block", offset, &old, &new)?;
        check.blocks.forget();
        punch(check.dev, g, &freed);
    }
    Ok(())
}

/// Give back the space of clusters, neighbours together.
fn punch(dev: &mut Device, g: Geometry, freed: &[u64]) {
    let mut rest = freed;
    while let Some(first) = rest.first() {
        let next = (*first..).zip(rest).take_while(|(want, c)| want == *c);
        let n = next.count();
        let offset = g.offset_of(HostCluster(*first));
        dev.discard(offset, (n as u64) << g.cluster_bits, DiscardKind::Other);
        rest = rest.get(n..).unwrap_or_default();
    }
}

/// An entry with the flag that it gets in this phase, by what the count of its cluster is in the end. Where not
/// even this reference was counted, behind the end of the file, nothing is set whatever the image's count says.
fn flagged(check: &mut Check<'_, '_>, entry: u64, policy: Policy, phase: Phase) -> Result<u64> {
    let cluster = (entry & OFFSET_MASK) >> check.g().cluster_bits;
    let counted = check.window.tally.get(cluster) != 0;
    let one = if check.window.clusters.contains(&cluster) {
        check.window.is_one(cluster)
    } else {
        check.blocks.count(check.dev, cluster)? == Some(1)
    };
    Ok(match phase {
        Phase::Raise if !one => entry & !COPIED,
        Phase::Lower if one && counted && policy.set => entry | COPIED,
        _ => entry,
    })
}

/// COPIED in the active L2 tables, of clusters of this window.
fn mend_flags(
    check: &mut Check<'_, '_>,
    policy: Policy,
    phase: Phase,
    overlapped: &[u64],
) -> Result<()> {
    let g = check.g();
    let data_file = check.it.header.has_data_file();
    rewrite(check, overlapped, true, &mut |check, entry, bitmap| {
        let cluster = (entry & OFFSET_MASK) >> g.cluster_bits;
        let counted = entry & COMPRESSED == 0 && (entry & OFFSET_MASK != 0 || data_file);
        if !counted || !check.judged_here(cluster) || (data_file && entry & !COPIED == 0) {
            return Ok((entry, bitmap));
        }
        let new = match (data_file, phase) {
            (false, _) => flagged(check, entry, policy, phase)?,
            (true, Phase::Lower) if policy.set => entry | COPIED,
            (true, _) => entry,
        };
        Ok((new, bitmap))
    })
}

/// COPIED in the active L1 table.
fn l1_flags(
    check: &mut Check<'_, '_>,
    policy: Policy,
    phase: Phase,
    out: &mut Vec<(usize, u64)>,
) -> Result<()> {
    let g = check.g();
    for (index, entry) in check.it.l1.iter().enumerate() {
        let cluster = (entry & OFFSET_MASK) >> g.cluster_bits;
        if entry & OFFSET_MASK == 0 || !check.judged_here(cluster) {
            continue;
        }
        let new = flagged(check, *entry, policy, phase)?;
        if new != *entry {
            out.push((index, new));
        }
    }
    Ok(())
}

/// Entries whose meaning stays: COPIED goes from compressed clusters, and zeros let go of a preallocated
/// cluster that is not at a cluster's place.
fn mend_entries(check: &mut Check<'_, '_>, overlapped: &[u64]) -> Result<()> {
    let g = check.g();
    rewrite(check, overlapped, false, &mut |_, entry, bitmap| {
        if entry & COMPRESSED != 0 {
            return Ok((entry & !COPIED, bitmap));
        }
        let allocated = bitmap & 0xffff_ffff;
        let zero = if g.extended_l2 {
            allocated == 0
        } else {
            entry & ZERO != 0
        };
        if zero && g.in_cluster(entry & OFFSET_MASK) != 0 {
            return Ok((if g.extended_l2 { 0 } else { ZERO }, bitmap));
        }
        Ok((entry, bitmap))
    })
}

/// What becomes of an entry and its bitmap.
type Change<'c> = dyn FnMut(&mut Check<'_, '_>, u64, u64) -> Result<(u64, u64)> + 'c;

/// Let `change` see each entry of the L2 tables, and write what it changes. Tables whose clusters have
/// another use are left alone.
fn rewrite(
    check: &mut Check<'_, '_>,
    overlapped: &[u64],
    active_only: bool,
    change: &mut Change<'_>,
) -> Result<()> {
    let g = check.g();
    let size = g.l2_entry_size();
    check.each_batch(&mut |check, batch| {
        let tables: Vec<NamedTables> = batch
            .iter()
            .filter(|t| t.active != 0 || !active_only)
            .filter(|t| overlapped.binary_search(&t.offset).is_err())
            .copied()
            .collect();
        check.each_table(&tables, &mut |check, table, old| {
            let mut new: Option<Vec<u8>> = None;
            for (i, word) in old.chunks_exact(size).enumerate() {
                let entry = BigEndian::read_u64(word);
                if entry == 0 {
                    continue;
                }
                let bitmap = word.get(8..16).map_or(0, BigEndian::read_u64);
                let (e, b) = change(check, entry, bitmap)?;
                if (e, b) != (entry, bitmap) {
                    let new = new.get_or_insert_with(|| old.to_vec());
                    let slot = new.get_mut(i * size..(i + 1) * size).unwrap_or_default();
                    for (part, value) in slot.chunks_exact_mut(8).zip([e, b]) {
                        BigEndian::write_u64(part, value);
                    }
                }
            }
            match new {
                Some(new) => write_changes(check.dev, "L2 table", table.offset, old, &new),
                None => Ok(()),
            }
        })
    })
}

/// New refcount structures.
struct Made {
    offset: u64,
    entries: Vec<u64>,
}

/// Write refcount blocks for all that is counted, behind the end of the file, and lay out their table.
fn build(check: &mut Check<'_, '_>, windows: &[Range<u64>], blind: bool) -> Result<Made> {
    let g = check.g();
    let bits = g.refblock_bits();
    let mut needed = BTreeSet::new();
    for index in 0..windows.len() {
        check.enter(windows, index)?;
        for (index, clusters) in check.blocks_of(check.window.clusters.clone()) {
            let kept = blind && check.blocks.load(check.dev, index)? != Described::Absent;
            if kept || !check.window.tally.is_empty(clusters) {
                needed.insert(index);
            }
        }
    }
    let (start, end) = place(check, &mut needed)?;
    let entries = needed.last().map_or(0, |last| last + 1);
    let whole = g.clusters_for(entries * TABLE_ENTRY) << g.cluster_bits;
    let mut made = Made {
        offset: g.offset_of(HostCluster(start + needed.len() as u64)),
        entries: super::tally::zeros(whole / TABLE_ENTRY)?,
    };
    let mut places = needed.iter().zip(start..).peekable();
    for index in 0..windows.len() {
        if windows.len() > 1 {
            check.enter(windows, index)?;
        }
        let last = index + 1 == windows.len();
        while let Some((block, place)) = places.peek().copied() {
            let clusters = *block << bits..(*block + 1) << bits;
            if clusters.start >= check.window.clusters.end && !last {
                break;
            }
            places.next();
            check.dev.progress.step(g.cluster_size())?;
            let bytes = new_block(check, *block, clusters, start..end, blind)?;
            let offset = g.offset_of(HostCluster(place));
            check.dev.write("refcount block", offset, &bytes)?;
            if let Some(entry) = made.entries.get_mut(*block as usize) {
                *entry = offset;
            }
        }
    }
    Ok(made)
}

/// The first place from `start` on where `n` clusters hit none of these ranges, which are in order.
fn apart(ranges: &[Range<u64>], mut start: u64, n: u64) -> u64 {
    let from = ranges.partition_point(|r| r.end <= start);
    for range in ranges.get(from..).unwrap_or_default() {
        if range.start >= start.saturating_add(n) {
            break;
        }
        start = range.end;
    }
    start
}

/// Where new structures go that describe the blocks `needed` and themselves: behind the end of the file,
/// and nowhere where something refers to already.
fn place(check: &mut Check<'_, '_>, needed: &mut BTreeSet<u64>) -> Result<(u64, u64)> {
    let g = check.g();
    let bits = g.refblock_bits();
    let counted = needed.clone();
    let file_end = g.clusters_for(check.dev.length());
    let behind = &mut check.noticed.behind_end;
    if behind.len() >= MOST_BEHIND {
        return Err(Error::Corrupt(
            "Too much is referred to behind the end of the file to put anything there".into(),
        ));
    }
    merge_ranges(behind);
    // Something may reach into the cluster behind the end.
    let mut start = check.noticed.clusters.max(file_end);
    loop {
        let entries = needed.last().map_or(0, |last| last + 1);
        let table = g.clusters_for(entries * TABLE_ENTRY);
        if table << g.cluster_bits > MAX_REFTABLE_BYTES {
            return Err(Error::TooBig(
                "The refcount table would become too large".into(),
            ));
        }
        let n = needed.len() as u64 + table;
        let free = apart(behind, start, n);
        if free != start {
            start = free;
            needed.clone_from(&counted);
            continue;
        }
        let end = start + n;
        let before = needed.len();
        let last = (end - 1) >> bits;
        if last * TABLE_ENTRY > MAX_REFTABLE_BYTES {
            return Err(Error::TooBig(
                "The refcount table would become too large".into(),
            ));
        }
        // What lies between is referred to, if anything, from now on.
        needed.extend(file_end >> bits..=last);
        if needed.len() == before {
            return Ok((start, end));
        }
    }
}

/// The contents of a refcount block; `new` are the clusters of the new structures. Where references may be
/// missing no count falls, and a cluster whose count cannot be read has one.
fn new_block(
    check: &mut Check<'_, '_>,
    index: u64,
    clusters: Range<u64>,
    new: Range<u64>,
    blind: bool,
) -> Result<Vec<u8>> {
    let g = check.g();
    let mut bytes = device::zeroed(g.cluster_size())?;
    let file = check.noticed.clusters;
    let outside = g.cluster_of(check.blocks.offset(index)).0 >= file;
    let old = match blind {
        true if outside => Described::Bad(libc::EIO),
        true => check.blocks.load(check.dev, index)?,
        false => Described::Absent,
    };
    let (block, tally) = (check.blocks.bytes(), &check.window.tally);
    by_refcount_width!(g, W => {
        let w = with_width::<W>(g);
        for c in clusters {
            let i = w.refblock_index(HostCluster(c));
            let counted = if new.contains(&c) { 1 } else { tally.get(c).min(w.refcount_max()) };
            let kept = match old {
                Described::Absent => 0,
                Described::Here => refblock::get(w, block, i),
                Described::Bad(_) => u64::from(c < file),
            };
            match counted.max(kept) {
                0 => {}
                count => refblock::set(w, &mut bytes, i, count),
            }
        }
    });
    Ok(bytes)
}

/// Behind a rebuild: give back the space of what nothing refers to, up to where the file ended.
fn punch_free(check: &mut Check<'_, '_>, windows: &[Range<u64>], end: u64) -> Result<()> {
    let g = check.g();
    let all = g.clusters_for(end);
    for index in 0..windows.len() {
        check.enter(windows, index)?;
        let clusters = check.window.clusters.start..check.window.clusters.end.min(all);
        let mut free: Option<u64> = None;
        for c in clusters.clone().chain([clusters.end]) {
            let used = c == clusters.end || check.window.tally.get(c) != 0;
            match (free, used) {
                (None, false) => free = Some(c),
                (Some(first), true) => {
                    let from = g.offset_of(HostCluster(first));
                    let bytes = (c - first) << g.cluster_bits;
                    check.dev.discard(from, bytes, DiscardKind::Other);
                    free = None;
                }
                _ => {}
            }
        }
    }
    Ok(())
}
