//! What a storage is told that will be read: tables ahead of where a walk is, each once in a walk.
#![allow(clippy::unwrap_used)]

#[macro_use]
#[path = "reference/pass_on.rs"]
mod pass_on;

use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::Storage;
use qcow2_snapshot::{Image, NewSnapshot, OpenFlags};
use std::cell::RefCell;
use std::process::Command;
use std::rc::Rc;

#[derive(Debug)]
enum Request {
    WillRead(u64, u64),
    Read(u64, u64),
}

struct Noted {
    memory: MemoryStorage,
    requests: Rc<RefCell<Vec<Request>>>,
}

impl Storage for Noted {
    pass_on!(length write truncate discard barrier close);
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let end = offset + buf.len() as u64;
        self.requests.borrow_mut().push(Request::Read(offset, end));
        self.memory.read(offset, buf)
    }
    fn will_read(&mut self, offset: u64, bytes: u64) {
        let hint = Request::WillRead(offset, offset + bytes);
        self.requests.borrow_mut().push(hint);
    }
}

fn tool(args: &[&str]) -> bool {
    let done = Command::new(args[0]).args(&args[1..]).output();
    done.is_ok_and(|done| done.status.success())
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

#[test]
fn tables_are_announced_once_in_each_walk_and_before_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("i.qcow2");
    let name = path.to_str().unwrap();
    let options = "cluster_size=512,refcount_bits=64";
    if !tool(&[
        "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, name, "8M",
    ]) {
        println!("SKIPPED: no qemu-img and qemu-io here, so no table was announced");
        return;
    }
    // Zeros of the disk in between have no tables.
    for at in ["write 0 2M", "write 5M 3M"] {
        assert!(tool(&["qemu-io", "-f", "qcow2", "-c", at, name]));
    }
    let bytes = std::fs::read(&path).unwrap();
    let table = |at: u64, entries: u64| -> Vec<u64> {
        let entries = (0..entries).map(|i| word(&bytes, at + i * 8) & 0x00ff_ffff_ffff_fe00);
        entries.filter(|offset| *offset != 0).collect()
    };
    let l2_tables = table(word(&bytes, 40), word(&bytes, 32) & 0xffff_ffff);
    let blocks = table(word(&bytes, 48), (word(&bytes, 56) >> 32) * 64);
    assert!(l2_tables.len() > 150 && blocks.len() > 150);

    let requests = Rc::new(RefCell::new(vec![]));
    let storage = Noted {
        memory: MemoryStorage::new(bytes.clone()),
        requests: Rc::clone(&requests),
    };
    let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    requests.borrow_mut().clear();
    image.snapshot_create(&NewSnapshot::default()).unwrap();
    let requests = requests.borrow();
    let (mut announced, mut just_now, mut foretold) = (vec![], vec![], vec![]);
    for request in requests.iter() {
        let (Request::WillRead(start, end) | Request::Read(start, end)) = *request;
        let clusters = start / 512..end.div_ceil(512);
        match request {
            Request::WillRead(..) => {
                for n in clusters {
                    let before = announced.iter().filter(|m| **m == n).count();
                    assert!(before < 2, "cluster {n} again and again");
                    announced.push(n);
                    just_now.push(n);
                }
            }
            Request::Read(..) => {
                let late = clusters.clone().find(|n| just_now.contains(n));
                assert!(late.is_none(), "{late:?} is read at once");
                foretold.extend(clusters.filter(|n| announced.contains(n)));
                just_now.clear();
            }
        }
    }
    // Some blocks are read before, where clusters are looked for.
    for (what, least, offsets) in [
        ("L2 tables", 90, l2_tables),
        ("refcount blocks", 50, blocks),
    ] {
        let n = offsets
            .iter()
            .filter(|at| foretold.contains(&(**at / 512)))
            .count();
        assert!(
            n * 100 > offsets.len() * least,
            "{n} of {} {what}",
            offsets.len()
        );
    }
}
