//! The writing half of every verb. This order is the product:
//!
//! ```text
//! prepare  new data in clusters that nothing published refers to
//!          refcounts raised, never lowered;  COPIED cleared, never set
//!    B     (then 8-byte refcount table entries that hook up new blocks, each behind its block)
//! publish  one write within one 512-byte sector: the old state becomes the new one
//!    B
//! reclaim  refcounts lowered;  COPIED set;  holes punched where clusters became free
//!    B     (the promise of return 0)
//! ```
//!
//! `B` is a barrier. Between two barriers any subset of the writes may reach the disk, torn at 512
//! bytes. Before the publish nothing that the old state needs has changed in a way that matters to
//! it; from the publish on nothing that the new state needs is touched any more. A power cut
//! therefore leaves the old or the new state and at worst leaked clusters.
//!
//! What is written is a value before anything is:
//!
//! ```text
//! replay + Plan --(epoch)--> Epochs --(steps, pure)--> [Step] --(execute, one loop)--> the disk
//! ```
//!
//! A verb whose new data must go to clusters that the verb itself frees (QEMU reuses them at once)
//! is cut into *epochs*, each with a publish of its own that makes the disk forget these clusters.
//! One of them is *decisive*: it alone changes what the image means. Counts are raised once, before
//! the first publish, to the highest value that any epoch needs, and lowered once, after the last.

mod damage;
mod edit;
mod epoch;
mod execute;
mod passes;
mod rules;
mod steps;

use super::device::Device;
use super::replay::overlap::Protected;
use super::replay::walk::{Marked, Walked};
use super::replay::Replay;
use super::Outcome;
use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::room;
use std::rc::Rc;

pub(crate) use edit::{At, Edit};
pub(crate) use execute::write_ahead;
#[cfg(test)]
pub(crate) use rules::text;
pub(crate) use steps::{What, Write};

/// How the active L1 table gets new contents.
pub(crate) enum How {
    /// Its changed entries lie in one sector: written in place, which publishes them.
    OneSector,
    /// The new contents stand in new clusters, to which the header is switched (QEMU grew the table).
    Moved,
    /// A temporary copy of the new contents stands elsewhere. The header is switched to it, the
    /// table is written in place, the header is switched back.
    Through(Rc<Temporary>),
    /// No place for a temporary copy: written in place, a power cut may leave a mixture.
    InPlace,
    /// Entries are published one by one, each valid with any other (VM state after create).
    EachEntry,
}

/// What a verb wants written, besides what its replay holds.
#[derive(Default)]
pub(crate) struct Plan {
    /// The epoch whose publish is the verb's own.
    pub(crate) decisive: usize,
    /// L2 tables whose entries lose COPIED in prepare.
    pub(crate) clear: Vec<Marked>,
    /// L2 tables whose entries get the final COPIED in reclaim.
    pub(crate) set: Vec<Marked>,
    /// L1 tables that change in bit 63 only.
    pub(crate) copied: Vec<Rc<Edit>>,
    /// The L1 table that a growth has left behind. Its clusters are free, but QEMU leaves its last
    /// words in them.
    pub(crate) left: Option<Rc<Edit>>,
    /// The active L1, where it changes in more than bit 63.
    pub(crate) l1: Option<(Rc<Edit>, How)>,
    /// Entries of tables, each in one sector, with any of which the image reads as before: written
    /// when the verb has taken effect and what they name is stable.
    pub(crate) entries: Vec<Write>,
    /// Entries again, with COPIED where the counts that went down demand it.
    pub(crate) flags: Vec<Write>,
    /// The header stops naming the backing file.
    pub(crate) let_go: bool,
}

impl Plan {
    /// The L1 table at `offset` has been walked: it may change in bit 63.
    pub(crate) fn flag(
        &mut self,
        replay: &mut Replay,
        offset: u64,
        l1: &[u64],
        walked: &Walked,
    ) -> Result<()> {
        if !walked.l1_changed {
            return Ok(());
        }
        let edit = Edit::new(offset, l1, &walked.l1)?;
        replay.refs.reach_to(offset.saturating_add(edit.bytes()));
        room::push(&mut self.copied, edit)
    }

    /// Write it all, in order. `autoclear`: what is left of these bits, where some are not known.
    /// Returns what is true of the image now, besides.
    pub(crate) fn carry_out(
        self,
        dev: &mut Device,
        was: &Header,
        autoclear: Option<u64>,
        replay: &mut Replay,
    ) -> (Outcome, Result<Vec<steps::Step>>) {
        let file = (dev.length(), dev.length_in_sectors());
        let looked = check_blocks(replay)
            .and_then(|()| epoch::Epochs::of(replay, self.decisive))
            .and_then(|epochs| steps::steps(was, autoclear, file, replay, epochs, self))
            .and_then(|steps| dev.progress.end().map(|()| steps));
        let steps = match looked {
            Ok(steps) => steps,
            Err(e) => return (Outcome::Unchanged, Err(e)),
        };
        debug_assert_eq!(rules::broken_rule(&steps), None);
        let (outcome, result) = execute::execute(dev, &mut replay.refs, &steps);
        (outcome, result.map(|()| steps))
    }
}

/// QEMU checks each refcount block that it writes against the other structures.
fn check_blocks(replay: &Replay) -> Result<()> {
    for (_, block) in replay.refs.loaded().filter(|(_, b)| b.is_written()) {
        replay.overlap.check(
            block.offset,
            replay.g.cluster_size(),
            Some(Protected::Refblock),
        )?;
    }
    Ok(())
}

const TEMPORARY_L1: &str = "temporary L1 table";

/// Has a verb failed because there was no room for its temporary L1 table?
pub(crate) fn no_room(e: &Error) -> bool {
    let full = [libc::ENOSPC, libc::EDQUOT, libc::EFBIG];
    matches!(e, Error::Io { op, .. } if *op == TEMPORARY_L1) && full.contains(&e.errno())
}

/// Where a copy of the new L1 contents lives from one header switch to the next.
#[derive(Debug)]
pub(crate) struct Temporary {
    /// Free clusters that the replay never touches.
    pub(crate) offset: u64,
    /// What is in them, as far as the file goes.
    old: Vec<u8>,
    /// Where the file ends without it.
    file_end: u64,
}

impl Temporary {
    /// For a copy of `bytes` bytes at `offset`. `file_end`: where the file ends before it.
    pub(crate) fn new(
        dev: &mut Device,
        offset: u64,
        bytes: u64,
        file_end: u64,
    ) -> Result<Temporary> {
        let inside = dev.length().saturating_sub(offset).min(bytes);
        let old = dev.read_vec("Could not read free clusters", offset, inside)?;
        Ok(Temporary {
            offset,
            old,
            file_end,
        })
    }
}
