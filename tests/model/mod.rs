//! What snapshots mean, without a byte of how they are stored.
//!
//! An image is a value: the active disk, and a list of snapshots, each with a disk of its own. A disk
//! is a size and a function from guest cluster to contents. A verb is a function from image to image.
//! That is all that a user of snapshots has to know, and all that a power cut must respect: what is
//! read after it is the image before the verb or the image after it ([`Verb::on`]).
//!
//! Nothing here is shared with `src/`. [`read`] makes the value from the bytes of a qcow2 file, by the
//! specification, and refuses what no sound image has.
//!
//! ```text
//!             bytes before ---- the library's verb ----> bytes after, or a cut
//!                  |                                          |
//!                read                                       read
//!                  v                                          v
//!             Image before ------ Verb::on ------------> Image after     the same?
//! ```

use std::collections::BTreeMap;

pub mod read;

/// What a guest cluster holds, here or in a backing file. One without an entry reads zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes with this digest.
    Bytes(u64),
    /// A compressed cluster, whose packed bytes have this digest.
    Packed(u64),
}

/// One state of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// In bytes.
    pub size: u64,
    /// By guest cluster. What lies behind the end of the disk is VM state.
    pub clusters: BTreeMap<u64, Content>,
}

/// An entry of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub id: Vec<u8>,
    pub name: Vec<u8>,
    pub vm_state_size: u64,
    pub disk: Disk,
    /// Date, clock and extra data beyond what is above.
    pub rest: Vec<u64>,
}

/// A whole image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub active: Disk,
    pub snapshots: Vec<Snapshot>,
}

/// A changing verb. Snapshots are named by their place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// With so many bytes of VM state, which the guest has written behind the end of the disk.
    Create {
        vm_state_size: u64,
    },
    Goto(usize),
    Delete(usize),
    /// All at once, or all but one.
    DeleteAllBut(Option<usize>),
    /// To [`RENAMED`].
    Rename(usize),
    WriteSnapshots,
    Repair,
    /// Let go of the backing file.
    Flatten,
}

/// What [`Verb::Create`] says of a new snapshot.
pub const NAME: &[u8] = b"new";
pub const RENAMED: &[u8] = b"another name, and a longer one";
pub const DATE: (u32, u32) = (1_400_000_000, 5);
pub const CLOCK: u64 = 9;
pub const ICOUNT: u64 = 7;

/// Where VM state begins: at the first L2 table that maps no part of the disk.
fn vm_state_begins(size: u64, cluster: u64) -> u64 {
    let by_one_table = cluster * (cluster / 8);
    size.div_ceil(by_one_table) * (cluster / 8)
}

/// One more than the largest number that an ID begins with; IDs of the images here are numbers.
fn next_id(snapshots: &[Snapshot]) -> Vec<u8> {
    let number = |s: &Snapshot| String::from_utf8_lossy(&s.id).parse::<u64>().unwrap_or(0);
    let last = snapshots.iter().map(number).max().unwrap_or(0);
    (last + 1).to_string().into_bytes()
}

impl Verb {
    /// The image after this verb; `cluster` is the size of a cluster.
    pub fn on(self, image: &Image, cluster: u64) -> Image {
        let mut after = image.clone();
        match self {
            // A snapshot is the active disk, kept. VM state then is the snapshot's alone.
            Verb::Create { vm_state_size } => {
                after.snapshots.push(Snapshot {
                    id: next_id(&image.snapshots),
                    name: NAME.into(),
                    vm_state_size,
                    disk: image.active.clone(),
                    rest: vec![u64::from(DATE.0) << 32 | u64::from(DATE.1), CLOCK, ICOUNT],
                });
                let first = vm_state_begins(image.active.size, cluster);
                let released = first..first + vm_state_size.div_ceil(cluster);
                after.active.clusters.retain(|at, _| !released.contains(at));
            }
            // The active disk is what the snapshot is, its size and VM state included.
            Verb::Goto(i) => after.active = image.snapshots[i].disk.clone(),
            Verb::Delete(i) => {
                after.snapshots.remove(i);
            }
            Verb::DeleteAllBut(kept) => {
                let mut at = 0..;
                after.snapshots.retain(|_| at.next() == kept);
            }
            Verb::Rename(i) => after.snapshots[i].name = RENAMED.into(),
            // The list is written elsewhere, counts and flags are put right, what the backing file shows
            // is copied. All of it reads the same.
            Verb::WriteSnapshots | Verb::Repair | Verb::Flatten => {}
        }
        after
    }

    /// Is `now` what may be seen while this verb runs: `old`, `new`, or both where they are equal?
    /// VM state leaves the active disk in steps, when the snapshot that has it exists.
    pub fn side(self, now: &Image, old: &Image, new: &Image) -> Side {
        let is_new = now == new || (matches!(self, Verb::Create { .. }) && leaving(now, old, new));
        match (now == old, is_new) {
            (true, true) => Side::Both,
            (true, false) => Side::Old,
            (false, true) => Side::New,
            (false, false) => Side::Neither,
        }
    }
}

/// Is `now` the new image, but for clusters of VM state that are still there?
fn leaving(now: &Image, old: &Image, new: &Image) -> bool {
    let of = |image: &Image, at| image.active.clusters.get(at).copied();
    let all = now.active.clusters.keys().chain(old.active.clusters.keys());
    now.snapshots == new.snapshots
        && now.active.size == new.active.size
        && all
            .into_iter()
            .all(|at| of(now, at) == of(new, at) || of(now, at) == of(old, at))
}

/// Where an image stands in the course of a verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Old,
    New,
    Both,
    Neither,
}
