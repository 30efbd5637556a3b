//! Check and repair: what `qemu-img check` does, in an order that a power cut cannot break.
//!
//! ```text
//!   look: count every reference anew (tally.rs), compare with the refcount blocks (blocks.rs)
//!         and with the COPIED flags (check.rs)                       nothing is written
//!   then, for a repair (repair.rs):
//!         { counts up, COPIED cleared }  B  { counts down, COPIED set, holes }  B
//!         or, where the refcount structures are beyond mending:
//!         { new ones behind the end of the file }  B  { header 48..60 }  B  { holes, COPIED set }  B
//!   look again
//! ```

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

mod bitmaps;
mod blocks;
mod check;
#[cfg_attr(not(test), deny(clippy::disallowed_methods))]
mod flatten;
mod repair;
mod table;
mod tally;

use crate::error::Result;
use crate::image::progress::Stage;
use crate::image::Image;
use check::{Check, Mode, Noticed, Subject};
use table::Table;

/// What a check found (QEMU's `BdrvCheckResult`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckResult {
    /// Errors that harm data or would.
    pub corruptions: u64,
    /// Clusters whose count is too high: space that is lost.
    pub leaks: u64,
    /// What could not be checked.
    pub check_errors: u64,
    /// Corruptions that a repair has mended.
    pub corruptions_fixed: u64,
    /// Leaks that a repair has given back.
    pub leaks_fixed: u64,
    /// Where the last cluster in use ends.
    pub image_end_offset: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters of the disk that the image has.
    pub allocated_clusters: u64,
    /// Of these, clusters that do not follow the one before them.
    pub fragmented_clusters: u64,
    /// Of these, compressed clusters.
    pub compressed_clusters: u64,
}

/// What a check is to mend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fix(u32);

impl Fix {
    /// Nothing.
    pub const NONE: Fix = Fix(0);
    /// Counts that are too high (QEMU's `BDRV_FIX_LEAKS`).
    pub const LEAKS: Fix = Fix(1);
    /// Everything else (QEMU's `BDRV_FIX_ERRORS`).
    pub const ERRORS: Fix = Fix(2);
    /// Look at the snapshot table alone.
    pub const TABLE_ONLY: Fix = Fix(4);

    /// Check bits that come from a caller.
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Fix> {
        (bits & !7 == 0).then_some(Fix(bits))
    }

    /// Are all bits of `other` set?
    #[must_use]
    pub const fn has(self, other: Fix) -> bool {
        self.0 & other.0 == other.0
    }

    /// Is anything to be written?
    #[must_use]
    pub const fn writes(self) -> bool {
        self.0 & (Fix::LEAKS.0 | Fix::ERRORS.0) != 0
    }
}

impl std::ops::BitOr for Fix {
    type Output = Fix;
    fn bitor(self, rhs: Fix) -> Fix {
        Fix(self.0 | rhs.0)
    }
}

/// So many findings of one check are told; the others are only counted. A damaged image can make
/// billions.
const MOST_TOLD: u64 = 1 << 20;

/// Where what is found goes.
struct Findings<'a> {
    result: CheckResult,
    report: &'a mut dyn FnMut(&str),
    told: u64,
    /// Of all that was told.
    hash: DefaultHasher,
    /// Neither count nor tell.
    mute: bool,
    /// Tell what does not hang on a window of the file, too.
    first: bool,
}

impl<'a> Findings<'a> {
    fn new(report: &'a mut dyn FnMut(&str)) -> Findings<'a> {
        Findings {
            result: CheckResult::default(),
            report,
            told: 0,
            hash: DefaultHasher::new(),
            mute: false,
            first: true,
        }
    }

    /// One line, `n` times.
    fn tell(&mut self, n: u64, text: fmt::Arguments<'_>) {
        if self.mute || n == 0 {
            return;
        }
        let n = n.min(MOST_TOLD.saturating_sub(self.told));
        if n != 0 {
            let text = text.to_string();
            (n, &text).hash(&mut self.hash);
            for _ in 0..n {
                (self.report)(&text);
            }
            self.told = self.told.saturating_add(n);
            if self.told == MOST_TOLD {
                (self.report)("Further findings are counted, but not told");
            }
        }
    }

    /// A corruption that is found `n` times.
    fn corruption(&mut self, n: u64, text: fmt::Arguments<'_>) {
        if !self.mute {
            self.result.corruptions = self.result.corruptions.saturating_add(n);
            self.tell(n, text);
        }
    }

    /// A corruption that every window would find.
    fn corruption_once(&mut self, n: u64, text: fmt::Arguments<'_>) {
        if self.first {
            self.corruption(n, text);
        }
    }

    /// Something that could not be checked.
    fn error(&mut self, n: u64, text: fmt::Arguments<'_>) {
        if !self.mute {
            self.result.check_errors = self.result.check_errors.saturating_add(n);
            self.tell(n, text);
        }
    }

    /// The same, if every window would find it.
    fn error_once(&mut self, text: fmt::Arguments<'_>) {
        if self.first {
            self.error(1, text);
        }
    }

    fn leak(&mut self, text: fmt::Arguments<'_>) {
        if !self.mute {
            self.result.leaks = self.result.leaks.saturating_add(1);
            self.tell(1, text);
        }
    }
}

impl Image {
    /// Check the image, and mend what `fix` says; `report` is told each finding, in qemu-img's words.
    /// Without a fix nothing is written, and the numbers are those of `qemu-img check`; with one they
    /// are those of a second look.
    ///
    /// # Errors
    /// `TooBig` and `Invalid` for a snapshot table that cannot be read and is not to be mended; `Io`,
    /// `NoMemory`, `Cancelled`; for a fix `Access` as well.
    pub fn check(&mut self, fix: Fix, report: &mut dyn FnMut(&str)) -> Result<CheckResult> {
        if !fix.writes() {
            self.usable()?;
            return self.check_and_mend(fix, report);
        }
        self.begin_repair()?;
        let result = self.check_and_mend(fix, report);
        self.end_repair(result.is_ok());
        result
    }

    fn check_and_mend(&mut self, fix: Fix, report: &mut dyn FnMut(&str)) -> Result<CheckResult> {
        let mut found = Findings::new(report);
        let errors = fix.has(Fix::ERRORS);
        let word = errors.then_some("Repairing");
        let table = table::read(&mut self.dev, &self.header, word, &mut found)?;
        if fix.has(Fix::TABLE_ONLY) {
            let result = found.result;
            return self.mend_table_alone(table, errors, result);
        }
        let mode = Mode {
            stage: Some(Stage::Check),
            structures: true,
            overlaps: fix.writes(),
            strict: false,
        };
        let first = self.look(&table, found, mode)?;
        if !fix.writes() {
            self.dev.progress.end()?;
            return Ok(first.0);
        }
        self.repair(table, fix, first, report)
    }

    /// Look at everything but the snapshot table, which has been read.
    fn look(
        &mut self,
        table: &Table,
        found: Findings<'_>,
        mode: Mode,
    ) -> Result<(CheckResult, Noticed, Vec<u64>)> {
        let it = Subject {
            header: &self.header,
            extensions: &self.extensions,
            l1: &self.l1,
            table,
        };
        let mut check = Check::new(&mut self.dev, it, &self.reftable, found, mode)?;
        let windows = check.windows(self.refcount_memory);
        let overlapped = check.look(&windows)?;
        check.noticed.findings = check.found.hash.finish();
        Ok((check.found.result, check.noticed, overlapped))
    }
}
