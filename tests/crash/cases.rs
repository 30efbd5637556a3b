//! What is run: verbs on images, chains of them, and where the images come from.

use std::path::Path;

use qcow2_snapshot::{Image, NewSnapshot, Result};

#[path = "../reference/ops.rs"]
mod ops;

use super::craft::{self, Fill, Shape};

/// A changing verb.
#[derive(Clone, Debug)]
pub enum Verb {
    Create(NewSnapshot),
    Goto(Vec<u8>),
    Delete(Vec<u8>),
    DeleteMany(Vec<Vec<u8>>),
    /// The snapshot, and its new name.
    Rename(Vec<u8>, Vec<u8>),
    Write,
}

impl Verb {
    pub fn kind(&self) -> &'static str {
        match self {
            Verb::Create(new) if new.vm_state_size > 0 => "create with VM state",
            Verb::Create(_) => "create",
            Verb::Goto(_) => "goto",
            Verb::Delete(_) => "delete",
            Verb::DeleteMany(_) => "delete_many",
            Verb::Rename(..) => "rename",
            Verb::Write => "write_snapshots",
        }
    }

    pub fn run(&self, image: &mut Image) -> Result<()> {
        match self {
            Verb::Create(new) => image.snapshot_create(new).map(|_| ()),
            Verb::Goto(name) => image.snapshot_goto(name),
            Verb::Delete(name) => image.snapshot_delete(None, Some(name)),
            Verb::DeleteMany(names) => {
                let names: Vec<&[u8]> = names.iter().map(Vec::as_slice).collect();
                image.snapshot_delete_many(&names)
            }
            Verb::Rename(name, new) => image.snapshot_rename(name, new),
            Verb::Write => image.write_snapshots(),
        }
    }
}

pub fn create(name: &str, vm_state_size: u64) -> Verb {
    Verb::Create(NewSnapshot {
        name: name.into(),
        date_sec: 1_400_000_000,
        date_nsec: 5,
        vm_clock_nsec: 9,
        vm_state_size,
        icount: u64::MAX,
        ..NewSnapshot::default()
    })
}

pub fn delete_many(names: &[&str]) -> Verb {
    Verb::DeleteMany(names.iter().map(|n| n.as_bytes().to_vec()).collect())
}

pub fn rename(name: &str, new: &str) -> Verb {
    Verb::Rename(name.into(), new.into())
}

/// An image and the verbs to run on it, one after the other.
pub struct Chain {
    pub name: String,
    pub image: Vec<u8>,
    pub verbs: Vec<Verb>,
}

/// The chains of `c-tests/images`. Folders that are about refusing damaged images come out with
/// no verbs or are refused by the judge, which says so.
pub fn reference(most_bytes: usize) -> (Vec<Chain>, Vec<String>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("c-tests/images");
    let (mut out, mut skipped) = (vec![], vec![]);
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    names.sort();
    for path in names {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Ok(lines) = std::fs::read_to_string(path.join("ops")) else {
            continue;
        };
        let image = ops::unpacked(&path.join("before.qcow2.gz"));
        if image.len() > most_bytes {
            skipped.push(format!("{name} ({} MiB)", image.len() >> 20));
            continue;
        }
        let mut verbs = vec![];
        for line in lines.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["create", ref new @ ..] => verbs.push(Verb::Create(ops::new_snapshot(new))),
                ["goto", name] => verbs.push(Verb::Goto(ops::name(name))),
                ["delete", name] => verbs.push(Verb::Delete(ops::name(name))),
                ["write-snapshots"] => verbs.push(Verb::Write),
                _ => {}
            }
        }
        if !verbs.is_empty() {
            // Every image is good for these, too.
            verbs.push(Verb::Write);
            verbs.push(create("the last one", 0));
            out.push(Chain { name, image, verbs });
        }
    }
    (out, skipped)
}

/// A shape by name, for the rare cases that must be there.
pub fn rare(seeds: u64) -> Vec<Chain> {
    let base = Shape::default();
    let snap0 = || Verb::Goto(b"snap0".to_vec());
    let snap1 = || Verb::Goto(b"snap1".to_vec());
    let gone = || Verb::Delete(b"snap0".to_vec());
    // More than 64 entries of 8 bytes: an L1 table of several sectors.
    let wide = Shape {
        disk: 64 * 150,
        snapshots: [Some(64 * 150), Some(64 * 150), None],
        writes: 40,
        ..base
    };
    let full = |left, table| Some(Fill { left, table });
    let mut shapes: Vec<(String, Shape, Vec<Verb>)> = vec![
        (
            "goto, one sector of the L1".into(),
            base,
            vec![snap0(), snap1()],
        ),
        (
            "goto, several sectors of the L1".into(),
            wide,
            vec![snap0(), snap1()],
        ),
        (
            "goto, several sectors, nowhere for a temporary L1".into(),
            Shape {
                fill: full(0, false),
                gaps: 0,
                ..wide
            },
            vec![snap0()],
        ),
        (
            "goto, several sectors, a hole in the middle for a temporary L1".into(),
            Shape {
                fill: full(0, false),
                gaps: 6,
                ..wide
            },
            vec![snap0(), snap1()],
        ),
        (
            "goto to a smaller disk".into(),
            Shape {
                snapshots: [Some(30), Some(200), None],
                disk: 200,
                ..base
            },
            vec![snap0(), snap1()],
        ),
        (
            "goto to a much smaller disk".into(),
            Shape {
                snapshots: [Some(10), Some(64 * 150), None],
                disk: 64 * 150,
                writes: 40,
                ..base
            },
            vec![snap0(), snap1()],
        ),
        (
            "goto to a larger disk".into(),
            Shape {
                snapshots: [Some(200), Some(30), None],
                disk: 10,
                ..base
            },
            vec![snap0(), snap1()],
        ),
        (
            "goto to a disk with a larger L1".into(),
            Shape {
                snapshots: [Some(64 * 90), Some(64 * 130), None],
                disk: 20,
                writes: 30,
                short_l1: true,
                ..base
            },
            vec![snap1(), snap0()],
        ),
        (
            "goto to a larger disk, and to a larger L1 still in the old one's place".into(),
            Shape {
                disk: 40,
                snapshots: [Some(200), Some(300), None],
                extra_l1: 2,
                vm: 3,
                short_l1: true,
                refcount_order: 6,
                ..base
            },
            vec![snap0(), snap1()],
        ),
        (
            "goto to a larger L1 at the same size".into(),
            Shape {
                extra_l1: 70,
                vm: 3,
                short_l1: true,
                ..base
            },
            vec![snap0(), snap1()],
        ),
        (
            "create with VM state".into(),
            Shape {
                extra_l1: 3,
                vm: 5,
                writes: 30,
                ..base
            },
            vec![
                create("vm", 150 * 512),
                snap0(),
                Verb::Goto(b"vm".to_vec()),
                Verb::Delete(b"vm".to_vec()),
            ],
        ),
        (
            "unknown autoclear bits".into(),
            Shape {
                unknown_autoclear: true,
                ..base
            },
            vec![create("new", 0)],
        ),
        (
            "unknown autoclear bits, goto".into(),
            Shape {
                unknown_autoclear: true,
                ..wide
            },
            vec![snap0()],
        ),
        (
            "unknown autoclear bits, delete".into(),
            Shape {
                unknown_autoclear: true,
                ..base
            },
            vec![gone()],
        ),
        (
            "compressed clusters in shared host clusters".into(),
            Shape {
                packed: 5,
                writes: 40,
                snapshots: [Some(40); 3],
                ..base
            },
            vec![
                snap0(),
                gone(),
                create("new", 0),
                snap1(),
                Verb::Delete(b"snap2".to_vec()),
            ],
        ),
        (
            "compressed clusters of 4 KiB".into(),
            Shape {
                cluster_bits: 12,
                packed: 6,
                writes: 40,
                ..base
            },
            vec![snap0(), gone(), create("new", 0)],
        ),
        (
            "extended L2 entries".into(),
            Shape {
                cluster_bits: 14,
                extended: true,
                packed: 1,
                zero: 2,
                ..base
            },
            vec![snap0(), create("new", 0), gone(), Verb::Write],
        ),
        (
            "extended L2 entries, VM state".into(),
            Shape {
                cluster_bits: 14,
                extended: true,
                extra_l1: 1,
                vm: 4,
                ..base
            },
            vec![create("vm", 5 * 16384), snap0()],
        ),
        (
            "version 2".into(),
            Shape {
                v3: false,
                packed: 2,
                ..base
            },
            vec![snap0(), create("new", 0), gone(), Verb::Write],
        ),
    ];
    let three = Shape {
        snapshots: [Some(40); 3],
        writes: 30,
        ..base
    };
    let all = || delete_many(&["snap0", "snap1", "snap2"]);
    let two = || delete_many(&["snap2", "snap0", "snap2"]);
    for (name, shape) in [
        ("that share a little", three),
        // Few writes between snapshots: most tables belong to all of them.
        (
            "that share most",
            Shape {
                disk: 64 * 20,
                snapshots: [Some(64 * 20); 3],
                writes: 3,
                ..base
            },
        ),
        (
            "of other sizes",
            Shape {
                snapshots: [Some(200), Some(10), Some(64 * 70)],
                ..three
            },
        ),
        (
            "with VM state",
            Shape {
                extra_l1: 3,
                vm: 4,
                ..three
            },
        ),
        (
            "with compressed clusters and zeros",
            Shape {
                packed: 4,
                zero: 2,
                ..three
            },
        ),
        (
            "of version 2",
            Shape {
                v3: false,
                packed: 2,
                ..three
            },
        ),
        (
            "with extended L2 entries",
            Shape {
                cluster_bits: 14,
                extended: true,
                packed: 1,
                zero: 2,
                ..three
            },
        ),
        (
            "with unknown autoclear bits",
            Shape {
                unknown_autoclear: true,
                ..three
            },
        ),
        (
            "over a backing file",
            Shape {
                backing: true,
                ..three
            },
        ),
    ] {
        shapes.push((
            format!("delete many {name}"),
            shape,
            vec![two(), rename("snap1", "other"), create("new", 0)],
        ));
        shapes.push((
            format!("delete all {name}"),
            shape,
            vec![
                rename("snap2", ""),
                delete_many(&["snap0", "snap1", ""]),
                Verb::Write,
            ],
        ));
    }
    for order in 0..=6 {
        let shape = Shape {
            refcount_order: order,
            packed: 1,
            ..base
        };
        shapes.push((
            format!("refcounts of {} bits", 1 << order),
            shape,
            vec![
                gone(),
                create("new", 0),
                snap1(),
                Verb::Delete(b"snap1".to_vec()),
                Verb::Write,
            ],
        ));
    }
    for left in 0..6 {
        for table in [false, true] {
            // 64 blocks of 64 counts: the refcount table is full at 4096 clusters.
            let shape = Shape {
                refcount_order: 6,
                gaps: 0,
                fill: full(left, table),
                ..base
            };
            let what = if table { "table" } else { "block" };
            let wide = Shape {
                writes: 25,
                ..Shape {
                    refcount_order: 6,
                    gaps: 0,
                    fill: full(left, table),
                    ..wide
                }
            };
            let short = Shape {
                short_l1: true,
                extra_l1: 70,
                vm: 2,
                ..shape
            };
            shapes.push((
                format!("create, refcount {what} grows, {left} left"),
                shape,
                vec![create("new", 0), gone()],
            ));
            shapes.push((
                format!("delete many, refcount {what} grows, {left} left"),
                Shape {
                    snapshots: [Some(40); 3],
                    ..shape
                },
                vec![rename("snap1", "a longer name"), two(), all()],
            ));
            shapes.push((
                format!("delete, refcount {what} grows, {left} left"),
                shape,
                vec![gone(), Verb::Write],
            ));
            shapes.push((
                format!("goto, refcount {what} grows, {left} left"),
                short,
                vec![snap0(), create("new", 0)],
            ));
            if table {
                shapes.push((
                    format!("goto, several sectors, refcount {what} nearly full, {left} left"),
                    Shape {
                        fill: full(left, false),
                        ..wide
                    },
                    vec![create("new", 0), snap0()],
                ));
            }
            let vm = Shape {
                extra_l1: 2,
                vm: 5,
                writes: 20,
                ..shape
            };
            shapes.push((
                format!("VM state, refcount {what} grows, {left} left"),
                vm,
                vec![create("vm", 70 * 512)],
            ));
        }
    }
    // In this one a resize enters its own tables in an L1 that another takes the place of before the
    // publish: the epoch before it must show the old disk.
    let mut out = vec![Chain {
        name: "goto to a larger disk over a longer backing file, L1 in the old one's place".into(),
        image: craft::image(
            Shape {
                disk: 64 * 70,
                snapshots: [Some(64 * 71), Some(64 * 72), None],
                extra_l1: 20,
                vm: 3,
                gaps: 16,
                short_l1: true,
                refcount_order: 6,
                backing: true,
                writes: 60,
                ..base
            },
            239,
        ),
        verbs: vec![snap0(), snap1()],
    }];
    for (name, shape, verbs) in shapes {
        for seed in 1..=seeds {
            out.push(Chain {
                name: format!("{name} (seed {seed})"),
                image: craft::image(shape, seed),
                verbs: verbs.clone(),
            });
        }
    }
    out
}

/// Any shape, any verbs.
pub fn random(seed: u64) -> Chain {
    let mut rng = qcow2_snapshot::io::trace::SplitMix64::new(seed);
    let mut pick = |of: &[u64]| of[rng.below(of.len() as u64) as usize];
    let v3 = pick(&[1, 1, 1, 0]) == 1;
    let extended = v3 && pick(&[0, 0, 0, 0, 1]) == 1;
    let cluster_bits = if extended {
        14
    } else {
        pick(&[9, 9, 9, 9, 10, 12]) as u32
    };
    let disks = [1, 7, 40, 40, 200, 64 * 70, 64 * 150];
    let same = pick(&disks);
    // Most shapes are bent to where two epochs of a goto come from: another disk size, an active
    // L1 shorter than it wants, a snapshot's L1 longer still, refcount blocks that are soon full.
    let resized = v3 && pick(&[0, 1, 1]) == 1;
    let mut disk = || if resized { pick(&disks) } else { same };
    let sizes = [disk(), disk(), disk(), disk()];
    let small = cluster_bits == 9;
    let shape = Shape {
        cluster_bits,
        v3,
        extended,
        refcount_order: if v3 {
            pick(&[6, 6, 6, 6, 6, 6, 4, 4, 0, 1, 2, 3, 5]) as u32
        } else {
            4
        },
        disk: sizes[0],
        snapshots: [
            Some(sizes[1]),
            Some(sizes[2]).filter(|_| pick(&[0, 1, 1]) == 1),
            Some(sizes[3]).filter(|_| pick(&[0, 1]) == 1),
        ],
        extra_l1: pick(&[0, 1, 2, 20, 70]),
        vm: pick(&[0, 2, 4]),
        writes: pick(&[3, 12, 40]),
        packed: pick(&[0, 0, 1, 4]),
        zero: pick(&[0, 1, 3]),
        gaps: pick(&[0, 2, 8]),
        fill: Some(Fill {
            left: pick(&[0, 1, 2, 3, 4, 5, 9]),
            table: false,
        })
        .filter(|_| small && pick(&[0, 1]) == 1),
        unknown_autoclear: v3 && pick(&[0, 0, 0, 1]) == 1,
        short_l1: pick(&[0, 1, 1]) == 1,
        backing: v3 && pick(&[0, 0, 1]) == 1,
    };
    let mut verbs = vec![];
    for i in 0..pick(&[1, 2, 4]) {
        let name = format!("snap{}", pick(&[0, 1, 2])).into_bytes();
        verbs.push(match pick(&[0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 4, 5, 5, 6]) {
            0 => create(&format!("new{i}"), pick(&[1, 10, 70]) << cluster_bits),
            1 => create(&format!("new{i}"), 0),
            2 => Verb::Goto(name),
            3 => Verb::Delete(name),
            5 => delete_many(&["snap0", "snap2", "snap1"][..pick(&[1, 2, 3]) as usize]),
            6 => Verb::Rename(name, b"renamed".to_vec()),
            _ => Verb::Write,
        });
    }
    Chain {
        name: format!("random image {seed}"),
        image: craft::image(shape, seed),
        verbs,
    }
}
