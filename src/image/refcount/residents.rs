//! How many blocks stay open, and what all of them may take.

use crate::error::{Error, Result};
use crate::image::room;
use std::collections::VecDeque;

/// What open blocks may take at first, in bytes.
const FEW: u64 = 24 << 20;

/// Which blocks are open, oldest first, and what all may take.
#[derive(Debug)]
pub(crate) struct Residents {
    open: VecDeque<(u64, u64)>,
    /// Bytes that they take, and may take.
    held: u64,
    limit: u64,
    /// Bytes that all other counts take.
    pub(crate) kept: u64,
    /// Bytes that all counts may take.
    cap: u64,
    /// Loads so far, and for each block the number of them when it was last left.
    now: u64,
    left: Vec<u64>,
}

impl Residents {
    /// `cap`: bytes that counts may take, [`super::packed::MOST`] but in tests.
    pub(crate) fn new(cap: u64) -> Residents {
        Residents {
            open: VecDeque::new(),
            held: 0,
            limit: FEW.min(cap / 4 * 3),
            kept: 0,
            cap,
            now: 0,
            left: Vec::new(),
        }
    }

    /// Bytes that open blocks take.
    pub(crate) fn held(&self) -> u64 {
        self.held
    }

    /// Do the counts take too much?
    pub(crate) fn over(&self) -> bool {
        self.held + self.kept > self.cap
    }

    /// What open blocks may take at most, in bytes.
    pub(crate) fn room(&self) -> u64 {
        self.cap / 4 * 3
    }

    /// Block `index` has been opened and takes `bytes`. True: it was left a short while ago, and more
    /// than now cannot stay.
    pub(crate) fn enter(&mut self, index: u64, bytes: u64) -> Result<bool> {
        self.now += 1;
        let left = self.left.get(index as usize).copied().unwrap_or(0);
        let (soon, most) = (self.now - left < 2 * self.open.len() as u64, self.room());
        let back = left != 0 && soon;
        let full = self.limit >= most;
        if back && !full {
            // The walk jumps about, and more blocks must stay.
            self.limit = (self.limit + self.limit / 8 + 1).min(most);
        }
        // Leaving needs no memory.
        if self.left.len() <= index as usize {
            room::resize(&mut self.left, index as usize + 1, 0)?;
        }
        let entries = self.open.len() as u64;
        self.open
            .try_reserve(1)
            .map_err(|_| Error::NoMemory(entries * 16))?;
        #[allow(clippy::disallowed_methods)] // there is room
        self.open.push_back((index, bytes));
        self.held += bytes;
        Ok(back && full)
    }

    /// A block that should be left, as long as the open ones take too much.
    pub(crate) fn leave(&mut self) -> Option<u64> {
        if self.held <= self.limit || self.open.len() < 2 {
            return None;
        }
        self.oldest()
    }

    /// The block that was opened first, or second if the first is `but`, to be left.
    pub(crate) fn oldest_but(&mut self, but: u64) -> Option<u64> {
        if self.open.front().is_some_and(|(index, _)| *index == but) {
            self.open.rotate_left(1);
        }
        match self.open.front() {
            Some((index, _)) if *index != but => self.oldest(),
            _ => None,
        }
    }

    /// The block that was opened first, to be left.
    pub(crate) fn oldest(&mut self) -> Option<u64> {
        let (oldest, bytes) = self.open.pop_front()?;
        self.held -= bytes;
        if let Some(slot) = self.left.get_mut(oldest as usize) {
            *slot = self.now;
        }
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::packed::MOST;
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "an hour there, and nothing in it that Miri could find")]
    #[cfg_attr(qcow2_little_memory, ignore = "it is about much memory")]
    fn a_walk_in_order_keeps_few_blocks_and_one_that_jumps_keeps_more() {
        let mut r = Residents::new(MOST);
        for pass in 0..3 {
            for i in 0..10_000 {
                r.enter(i, 65536).unwrap();
                while r.leave().is_some() {}
            }
            assert_eq!((r.limit, r.held), (FEW, FEW), "pass {pass}");
        }
        let mut r = Residents::new(MOST);
        for i in 0..20_000u64 {
            let index = i.wrapping_mul(7919) % 600;
            if !r.open.iter().any(|(i, _)| *i == index) {
                r.enter(index, 65536).unwrap();
                while r.leave().is_some() {}
            }
        }
        assert!(r.open.len() == 600 && r.limit >= 600 << 16 && r.limit <= r.room());
    }
}
