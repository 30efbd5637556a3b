//! What a handle may still do, and what the last verb has done.

use super::{Changed, Image};
use crate::error::{Error, Result};
use crate::flags::OpenFlags;

/// What the last changing verb did to the image (`qcow2_last_outcome()`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Outcome {
    /// No verb has run yet.
    None = 0,
    /// The image means what it meant before.
    Unchanged = 1,
    /// The verb is done (perhaps with leaked clusters).
    Done = 2,
    /// Old or new state: open the image again to know.
    Unknown = 3,
}

/// What may still be done with a handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Good,
    /// A write failed: only reading goes on.
    NoChanges,
    /// The state of the image is not known any more, or a panic was caught.
    Spent,
}

/// What the last changing verb has left behind in the handle.
pub(super) struct Last {
    pub(super) standing: Standing,
    pub(super) outcome: Outcome,
    pub(super) changed: Changed,
    pub(super) remark: Option<String>,
}

impl Image {
    /// Opened to be checked, and not found good yet: no verb may change it.
    pub(crate) fn unchecked(&self) -> bool {
        self.flags.has(OpenFlags::CHECK)
    }

    /// What the last changing verb did.
    pub fn last_outcome(&self) -> Outcome {
        self.last.outcome
    }

    /// A remark on the last verb that succeeded.
    pub fn remark(&self) -> Option<&str> {
        self.last.remark.as_deref()
    }

    pub(crate) fn set_remark(&mut self, text: &str) {
        self.last.remark = Some(text.into());
    }

    /// Make the handle refuse everything but close, after a panic in the middle of a call.
    pub fn poison(&mut self) {
        if self.last.outcome != Outcome::None {
            self.last.outcome = Outcome::Unknown;
        }
        self.last.standing = Standing::Spent;
    }

    /// May the handle still be used to read?
    pub(crate) fn usable(&self) -> Result<()> {
        if self.last.standing == Standing::Spent {
            return Err(Error::Spent(
                "An earlier failure left the state of the image unknown; close the handle and open it again".into(),
            ));
        }
        Ok(())
    }

    /// A changing verb has nothing to change: it is done.
    pub(crate) fn nothing_to_do(&mut self) -> Result<()> {
        self.usable()?;
        self.last.outcome = Outcome::Done;
        self.last.changed = Changed::default();
        Ok(())
    }

    /// Begin to change the image, whatever is wrong with it: may this handle do that at all?
    pub(crate) fn begin_repair(&mut self) -> Result<()> {
        self.usable()?;
        self.last.remark = None;
        (self.last.outcome, self.last.changed) = (Outcome::Unchanged, Changed::default());
        if !self.flags.has(OpenFlags::RDWR) {
            return Err(Error::Access("The image is opened read-only".into()));
        }
        if self.last.standing == Standing::NoChanges {
            return Err(Error::Spent(
                "An earlier write failed; the image can be read but not changed until it is opened again".into(),
            ));
        }
        self.dev.changed = false;
        Ok(())
    }

    /// Begin a verb: the image must be good.
    pub(crate) fn begin_change(&mut self) -> Result<()> {
        self.begin_repair()?;
        if self.unchecked() {
            return Err(Error::NotPermitted(
                "The image is opened to be checked; repair it first, or open it without that flag"
                    .into(),
            ));
        }
        if self.header.has_data_file() {
            return Err(Error::Unsupported(
                "Internal snapshots are not supported on images with an external data file".into(),
            ));
        }
        if !self.snapshots.loaded {
            self.load_snapshots()?;
        }
        Ok(())
    }

    /// What is true of the image should the next request of a repair fail.
    pub(crate) fn repairing(&mut self, outcome: Outcome) {
        self.last.outcome = outcome;
    }

    /// Nothing is wrong any more: the handle is as any other from now on.
    pub(crate) fn found_good(&mut self) {
        self.flags = self.flags.without(OpenFlags::CHECK);
    }

    /// A repair is over.
    pub(crate) fn end_repair(&mut self, ended: bool) {
        self.forget_reads();
        if self.dev.changed {
            // Any of them may have been written.
            self.last.changed = Changed {
                size: false,
                l1: true,
                reftable: true,
                snapshots: true,
            };
        }
        if ended {
            self.last.outcome = Outcome::Done;
        } else if self.last.outcome == Outcome::Unknown {
            self.last.standing = Standing::Spent;
        } else if self.dev.changed && self.last.standing == Standing::Good {
            self.last.standing = Standing::NoChanges;
        }
    }
}
