//! How far a verb is, for whoever wants to know; and the one way to stop it.
//!
//! ```text
//!   check ─────────────┤ prepare ───────────────┤ publish ┤ reclaim ──────────┤ Ok
//!   cancelled: not a   │ cancelled: as an I/O    │ nobody  │ nobody can stop   │
//!   byte has changed   │ error before the publish│ is asked│ it any more       │
//! ```

use std::ops::ControlFlow;

use crate::error::{Error, Result};
use crate::format::geometry::Geometry;

/// So many bytes of tables are gone through between two calls of the hook, at most.
const STRIDE: u64 = 1 << 20;
/// In small images the hook is called so often in each stage.
const CALLS: u64 = 16;

/// What a verb is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Stage {
    /// Looking. Nothing has been written.
    Check = 1,
    /// Writing what nothing published refers to.
    Prepare = 2,
    /// The verb has taken effect and frees what it has left behind.
    Reclaim = 3,
}

/// Told the stage, and how much of how much of it is done, in bytes of L2 tables and refcount
/// blocks; `Break` cancels the verb, but for [`Stage::Reclaim`].
///
/// Within a stage `total` stays the same and is not 0, `done` never goes down, and the last call
/// says `done == total`. The last calls of the first two stages are the last moments at which
/// nothing has been written and at which the verb can be cancelled. There is a call for each MiB
/// of tables, in small images for each sixteenth of them, and always that last one.
pub type ProgressHook = dyn FnMut(Stage, u64, u64) -> ControlFlow<()>;

/// Counts what a verb has gone through and calls the hook now and then.
pub(crate) struct Progress {
    hook: Option<Box<ProgressHook>>,
    stage: Stage,
    done: u64,
    total: u64,
    /// Done between two calls of the hook, at least.
    stride: u64,
    /// Where the hook is called next: never, without one or outside of a stage.
    next: u64,
    /// Bytes gone through that `total` does not have, since the hook was last asked about these.
    passed: u64,
    /// The verb looks again, in the middle of its second stage.
    again: bool,
}

impl Progress {
    pub(crate) fn new(hook: Option<Box<ProgressHook>>) -> Progress {
        Progress {
            hook,
            stage: Stage::Check,
            done: 0,
            total: 1,
            stride: STRIDE,
            next: u64::MAX,
            passed: 0,
            again: false,
        }
    }

    /// The verb begins anew where it was about to write: what it looks at until then is told as a
    /// part of what it has to do in the second stage.
    pub(crate) fn again(&mut self) {
        self.again = true;
    }

    /// A stage begins. What it has to do is only worked out if somebody wants to know.
    pub(crate) fn begin(&mut self, stage: Stage, total: impl FnOnce() -> u64) {
        if self.again {
            self.again = stage == Stage::Check;
        } else if self.hook.is_some() {
            (self.stage, self.done, self.total) = (stage, 0, total().max(1));
            self.stride = (self.total / CALLS).clamp(1, STRIDE);
            (self.next, self.passed) = (self.stride, 0);
        }
    }

    /// So many more bytes are done.
    ///
    /// # Errors
    /// `Cancelled`.
    #[inline]
    pub(crate) fn step(&mut self, bytes: u64) -> Result<()> {
        self.done = self.done.saturating_add(bytes);
        if self.done < self.next {
            return Ok(());
        }
        self.next = self.done.saturating_add(self.stride);
        // A resize does more than could be seen before: the end is where the stage ends.
        self.ask(self.done.min(self.total - 1))
    }

    /// So many bytes are gone through that nobody foresaw: the hook can cancel there too. For loops
    /// over what an image can make as long as it likes.
    ///
    /// # Errors
    /// `Cancelled`.
    #[inline]
    pub(crate) fn pass(&mut self, bytes: u64) -> Result<()> {
        self.passed = self.passed.saturating_add(bytes);
        if self.passed < STRIDE || self.next == u64::MAX {
            return Ok(());
        }
        self.passed = 0;
        self.ask(self.done.min(self.total - 1))
    }

    /// The stage is over.
    ///
    /// # Errors
    /// `Cancelled`.
    pub(crate) fn end(&mut self) -> Result<()> {
        if self.again {
            return Ok(());
        }
        (self.done, self.next) = (0, u64::MAX);
        self.ask(self.total)
    }

    fn ask(&mut self, done: u64) -> Result<()> {
        let Some(hook) = &mut self.hook else {
            return Ok(());
        };
        let text = match (hook(self.stage, done, self.total), self.stage) {
            (ControlFlow::Continue(()), _) | (_, Stage::Reclaim) => return Ok(()),
            (_, Stage::Check) => "Cancelled before anything was written",
            (_, Stage::Prepare) => "Cancelled before it took effect; clusters may have leaked ('qcow2-snapshot check -r leaks' frees them)",
        };
        Err(Error::Cancelled(text.into()))
    }
}

/// Bytes of the L2 tables that L1 tables name.
pub(crate) fn table_bytes(g: Geometry, l1_tables: &[&[u64]]) -> u64 {
    let named = |l1: &&[u64]| l1.iter().filter(|e| **e != 0).count() as u64;
    l1_tables.iter().map(named).sum::<u64>() << g.cluster_bits
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    #[test]
    fn done_never_passes_total_and_ends_there() {
        let calls = Rc::new(RefCell::new(Vec::new()));
        let seen = Rc::clone(&calls);
        let mut progress = Progress::new(Some(Box::new(move |stage, done, total| {
            seen.borrow_mut().push((stage, done, total));
            ControlFlow::Continue(())
        })));
        progress.begin(Stage::Check, || 17 * STRIDE);
        for _ in 0..38 {
            progress.step(STRIDE / 2).unwrap();
        }
        progress.end().unwrap();
        // Between stages nobody is asked.
        progress.step(STRIDE).unwrap();
        progress.begin(Stage::Reclaim, || 0);
        progress.end().unwrap();
        let total = 17 * STRIDE;
        let mut wanted: Vec<_> = (1..17).map(|i| (Stage::Check, i * STRIDE, total)).collect();
        // More was done than foreseen.
        wanted.extend([(Stage::Check, total - 1, total); 3]);
        wanted.extend([(Stage::Check, total, total), (Stage::Reclaim, 1, 1)]);
        assert_eq!(*calls.borrow(), wanted);
    }

    #[test]
    fn what_nobody_foresaw_is_not_done_but_can_be_cancelled() {
        let calls = Rc::new(RefCell::new(Vec::new()));
        let seen = Rc::clone(&calls);
        let mut progress = Progress::new(Some(Box::new(move |_, done, total| {
            seen.borrow_mut().push((done, total));
            ControlFlow::Continue(())
        })));
        // Between stages nobody is asked.
        progress.pass(5 * STRIDE).unwrap();
        progress.begin(Stage::Check, || 8 * STRIDE);
        progress.step(STRIDE / 4).unwrap();
        for _ in 0..8 {
            progress.pass(STRIDE / 4).unwrap();
        }
        assert_eq!(*calls.borrow(), [(STRIDE / 4, 8 * STRIDE); 2]);
        let mut progress = Progress::new(Some(Box::new(|_, _, _| ControlFlow::Break(()))));
        progress.begin(Stage::Check, || 1);
        let errno = progress.pass(STRIDE).unwrap_err().errno();
        assert_eq!(errno, libc::ECANCELED);
    }

    #[test]
    fn only_what_has_not_taken_effect_can_be_cancelled() {
        let mut progress = Progress::new(Some(Box::new(|_, _, _| ControlFlow::Break(()))));
        for (stage, errno) in [
            (Stage::Check, Some(libc::ECANCELED)),
            (Stage::Prepare, Some(libc::ECANCELED)),
            (Stage::Reclaim, None),
        ] {
            progress.begin(stage, || 5 * STRIDE);
            let step = progress.step(STRIDE).map_err(|e| e.errno()).err();
            let end = progress.end().map_err(|e| e.errno()).err();
            assert_eq!((step, end), (errno, errno), "{stage:?}");
        }
    }
}
