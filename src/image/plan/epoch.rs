//! What a verb publishes, in order.

use super::super::replay::{NewData, Replay};
use crate::error::Result;
use crate::format::header::{Meaning, Places};
use crate::room;

/// What is published by one write. An epoch may move tables; what they say to a reader stays.
#[derive(Debug)]
pub(crate) struct Epoch {
    /// Where the tables stand from then on.
    pub(crate) places: Places,
    /// Contents for clusters that nothing published refers to any more.
    pub(crate) new: Vec<NewData>,
    /// Refcount blocks that it makes, by their index in the refcount table.
    pub(crate) blocks: Vec<u64>,
    /// Refcount tables that it makes, among those that the replay has had.
    pub(crate) tables: Vec<usize>,
}

/// All of a verb's epochs. Size and snapshots change once, with the decisive one: a state between
/// the old and the new one cannot be said.
#[derive(Debug)]
pub(crate) struct Epochs {
    pub(crate) all: Vec<Epoch>,
    pub(crate) decisive: usize,
    /// What the image means from the decisive epoch on.
    pub(crate) meaning: Meaning,
}

impl Epochs {
    /// What a replay has come to. The contents for new clusters move here.
    pub(crate) fn of(replay: &mut Replay, decisive: usize) -> Result<Epochs> {
        let refs = &replay.refs;
        let mut all = Vec::new();
        for epoch in 0..=refs.epoch() {
            let made = |born: Option<usize>| born == Some(epoch);
            let blocks = refs.loaded().filter(|(_, b)| made(b.born));
            let tables = refs.tables().iter().enumerate();
            let epoch = Epoch {
                places: replay.places_at(epoch),
                new: Vec::new(),
                blocks: room::collected(blocks.map(|(index, _)| index))?,
                tables: room::collected(tables.filter(|(_, t)| made(t.born)).map(|(i, _)| i))?,
            };
            room::push(&mut all, epoch)?;
        }
        for data in std::mem::take(&mut replay.new_data) {
            if let Some(epoch) = all.get_mut(data.epoch) {
                room::push(&mut epoch.new, data)?;
            }
        }
        Ok(Epochs {
            all,
            decisive,
            meaning: replay.meaning,
        })
    }
}
