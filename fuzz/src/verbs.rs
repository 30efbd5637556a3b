//! A chain of verbs on one handle, chosen by the program.

use super::disk::Disk;
use super::oracle::judge;
use super::{cap, flags, split};
use qcow2_snapshot::{Error, Image, NewSnapshot, OpenFlags, Snapshot};
use std::sync::LazyLock;

/// The promises that this checks after every verb:
///
/// * a verb that fails has asked for no change (unless the disk was full) and says `Unchanged`;
/// * a verb that succeeds has written only to structures of the image and to free clusters, in the
///   header only to the fields that verbs switch, and has punched only clusters whose count is 0;
/// * afterwards the image opens, read-only and read-write, and lists what it should;
/// * a verb that succeeds on an undamaged list changes the list as its name says.
pub fn verbs(data: &[u8]) {
    let Some((program, image)) = split(data) else {
        return;
    };
    let disk = Disk::new(image);
    let seen = disk.handle();
    let Ok(mut image) = Image::open_storage(Box::new(disk), flags(program, true)) else {
        return;
    };
    let steps = 1 + usize::from(program[1] % 4);
    for step in program[2..].chunks_exact(2).take(steps) {
        let (op, arg) = (step[0], step[1]);
        let Ok(list) = image.snapshot_list().map(<[_]>::to_vec) else {
            return;
        };
        let cap = cap(program);
        if image.length() >> 48 != 0 || list.iter().any(|s| !small(s, cap)) {
            return;
        }
        let was = seen.borrow().clone();
        let (what, wanted, result) = one(&mut image, op, arg, &list);
        if *SAY {
            let is = seen.borrow();
            let (writes, holes) = (&is.writes[was.writes.len()..], &is.holes[was.holes.len()..]);
            eprintln!(
                "{what}: {result:?}\n{writes:x?}\nholes {holes:x?} length {:x}",
                is.length
            );
        }
        judge(&was, &seen.borrow(), &image, &result, what);
        if seen.borrow().failed {
            return;
        }
        if result.is_ok() && wanted.is_some() {
            check_list(&mut image, &seen.borrow(), wanted, what);
        }
    }
}

/// `FUZZ_SAY=1` tells what is done and written.
static SAY: LazyLock<bool> = LazyLock::new(|| std::env::var_os("FUZZ_SAY").is_some());

/// Does the snapshot ask for no larger table than the runs are for?
fn small(s: &Snapshot, cap: u64) -> bool {
    // An L1 entry maps at least 64 clusters of 512 bytes.
    u64::from(s.l1_size) * 8 <= cap && s.disk_size / (64 * 512) <= cap / 8
}

type Wanted = Option<Vec<(Vec<u8>, Vec<u8>)>>;

fn names(list: &[Snapshot]) -> Vec<(Vec<u8>, Vec<u8>)> {
    list.iter()
        .map(|s| (s.id.clone(), s.name.clone()))
        .collect()
}

/// Run one verb. Returns its name, the list as it should be, and its result.
fn one(
    image: &mut Image,
    op: u8,
    arg: u8,
    list: &[Snapshot],
) -> (&'static str, Wanted, Result<(), Error>) {
    let chosen = list.get(usize::from(arg) % list.len().max(1));
    let mut wanted = names(list);
    match op % 8 {
        0 | 1 => {
            let new = NewSnapshot {
                id: if arg & 1 != 0 {
                    vec![b'0' + arg % 10]
                } else {
                    Vec::new()
                },
                name: vec![b'n'; usize::from(arg >> 4) * 5],
                date_sec: 1_600_000_000,
                vm_state_size: if op & 8 != 0 {
                    u64::from(arg) << (op >> 4)
                } else {
                    0
                },
                icount: u64::MAX,
                ..NewSnapshot::default()
            };
            let result = image.snapshot_create(&new);
            if let Ok(id) = &result {
                wanted.push((id.clone(), new.name.clone()));
            }
            ("create", Some(wanted), result.map(drop))
        }
        2 | 3 => {
            let Some(s) = chosen else {
                return ("goto", Some(wanted), image.snapshot_goto(b"none"));
            };
            let name = if op & 8 != 0 { &s.name } else { &s.id };
            ("goto", Some(wanted), image.snapshot_goto(name))
        }
        4 | 5 => {
            let Some(s) = chosen else {
                return (
                    "delete",
                    Some(wanted),
                    image.snapshot_delete(Some(b"none"), None),
                );
            };
            let (id, name) = match op >> 3 & 3 {
                0 => (Some(&s.id[..]), None),
                1 => (None, Some(&s.name[..])),
                _ => (Some(&s.id[..]), Some(&s.name[..])),
            };
            let first = list
                .iter()
                .position(|s| id.is_none_or(|id| s.id == id) && name.is_none_or(|n| s.name == n));
            if let Some(i) = first {
                wanted.remove(i);
            }
            ("delete", Some(wanted), image.snapshot_delete(id, name))
        }
        6 if op & 8 != 0 => {
            let name = vec![b'r'; usize::from(arg) + usize::from(op >> 4)];
            let Some(i) = list
                .iter()
                .position(|s| chosen.is_some_and(|c| c.id == s.id))
            else {
                return (
                    "rename",
                    Some(wanted),
                    image.snapshot_rename(b"none", &name),
                );
            };
            wanted[i].1.clone_from(&name);
            let result = image.snapshot_rename(&list[i].id, &name);
            ("rename", Some(wanted), result)
        }
        6 => ("write_snapshots", Some(wanted), image.write_snapshots()),
        7 if op & 8 != 0 => {
            // By IDs, of which the first counts.
            let set = || {
                list.iter()
                    .enumerate()
                    .filter(|(i, _)| arg >> (i % 8) & 1 != 0)
            };
            let ids: Vec<&[u8]> = set().map(|(_, s)| s.id.as_slice()).collect();
            let first = |id: &[u8]| list.iter().position(|s| s.id == id);
            let gone: Vec<_> = ids.iter().filter_map(|id| first(id)).collect();
            let mut n = 0..;
            wanted.retain(|_| !gone.contains(&n.next().unwrap_or(usize::MAX)));
            (
                "delete_many",
                Some(wanted),
                image.snapshot_delete_many(&ids),
            )
        }
        7 if op & 16 != 0 => {
            let set = list
                .iter()
                .enumerate()
                .filter(|(i, _)| arg >> (i % 8) & 1 != 0);
            let mut states: Vec<Option<&[u8]>> = set.map(|(_, s)| Some(s.id.as_slice())).collect();
            if op & 32 != 0 {
                states.push(None);
            }
            if let Ok(u) = image.snapshot_usage(&states) {
                assert!(
                    u.tables <= u.exclusive && u.exclusive <= u.referenced,
                    "{u:?}"
                );
                assert!(
                    u.vm_state <= u.referenced && u.allocated <= u.referenced,
                    "{u:?}"
                );
            }
            ("usage", Some(wanted), Ok(()))
        }
        _ => {
            image.free_snapshots();
            let result = image.read_snapshots();
            ("read_snapshots", result.is_ok().then_some(wanted), result)
        }
    }
}

/// The list in memory, on the disk and in theory.
fn check_list(image: &mut Image, state: &super::disk::State, wanted: Wanted, what: &str) {
    let list = match image.snapshot_list() {
        Ok(list) => list.to_vec(),
        Err(e) => panic!("no list after {what}: {e}"),
    };
    if let Some(wanted) = wanted {
        assert_eq!(names(&list), wanted, "the list after {what}");
    }
    for flags in [OpenFlags::read_only(), OpenFlags::RDWR] {
        let mut again = match Image::open_storage(Box::new(Disk::of(state.clone())), flags) {
            Ok(image) => image,
            Err(e) => panic!("the image does not open after {what}: {e}"),
        };
        let read = match again.snapshot_list() {
            Ok(list) => list.to_vec(),
            Err(e) => panic!("no list on the disk after {what}: {e}"),
        };
        assert!(
            read == list,
            "the list on the disk after {what}: {:x?}\nin memory: {:x?}",
            names(&read),
            names(&list)
        );
    }
}
