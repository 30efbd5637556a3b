//! The four actions of `qemu-img snapshot`, with its messages.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use qcow2_snapshot::{Error, Image, NewSnapshot, Outcome, Snapshot};

use crate::cli::{Action, Request};
use crate::listing;
use crate::progress::VerbBar;
use crate::signals::Asked;
use crate::stop::{print, strerror, Stop};
use crate::target::{warn_of_raw, Opened, Target};

/// Room for text in QEMU's `QEMUSnapshotInfo`, which qemu-img goes through.
const ID_ROOM: usize = 127;
const NAME_ROOM: usize = 255;

/// Do what the call asks for. `link`: another qemu-img may be there for what is not served.
pub(crate) fn run(request: &Request, link: bool) -> Result<(), Stop> {
    let target = Target::of(request)?;
    let write = !matches!(request.action, Action::List);
    let mut image = match target.open(request.file, write)? {
        Opened::Image(image) => image,
        Opened::Other { .. } if link => {
            return Err(Stop::NotServed(
                b"The image is not in qcow2 format, and there is no other qemu-img in PATH"
                    .to_vec(),
            ))
        }
        Opened::Other { guessed } => return without_snapshots(request, guessed),
    };
    let (verb, what, name) = match request.action {
        Action::List => return list(&mut image, request.json, link),
        Action::Create(name) => ("create", "Creating the snapshot", name),
        Action::Apply(name) => ("apply", "Applying the snapshot", name),
        Action::Delete(name) => ("delete", "Deleting the snapshot", name),
    };
    let asked = Asked::watch()?;
    let bar = VerbBar::new(what, request.quiet);
    bar.follow(&mut image, &asked);
    let result = match request.action {
        Action::Create(_) => create(&mut image, name),
        Action::Apply(_) => apply(&mut image, name),
        _ => delete(&mut image, name),
    };
    drop(bar);
    match result {
        Ok(()) => Ok(()),
        Err((Some(Error::Cancelled(text)), _)) => Err(asked.stop(could_not(verb, name, &text))),
        // The locks go with the image, before another program wants them.
        Err((Some(Error::Unsupported(text)), _))
            if link && image.last_outcome() != Outcome::Unknown =>
        {
            Err(Stop::NotServed(text.into_bytes()))
        }
        Err((_, lines)) => Err(Stop::Failed(lines)),
    }
}

/// An error of the library, and the lines to print.
type Failure = (Option<Error>, Vec<Vec<u8>>);

fn list(image: &mut Image, json: bool, link: bool) -> Result<(), Stop> {
    let snapshots: Vec<Snapshot> = match image.snapshot_list() {
        Ok(list) => list.iter().map(as_qemu_sees_it).collect(),
        Err(e) if link || json => {
            return Err(Stop::NotServed(
                format!("Could not list the snapshots: {e}").into_bytes(),
            ))
        }
        // qemu-img says nothing and is content.
        Err(_) => return Ok(()),
    };
    if json {
        print(listing::json(&snapshots).as_bytes())
    } else {
        print(&listing::table(&snapshots))
    }
}

fn create(image: &mut Image, name: &OsStr) -> Result<(), Failure> {
    // QEMU has the time in microseconds.
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let new = NewSnapshot {
        name: cut(name.as_bytes(), NAME_ROOM).to_vec(),
        date_sec: now.as_secs() as u32,
        date_nsec: now.subsec_micros() * 1000,
        ..NewSnapshot::default()
    };
    image.snapshot_create(&new).map(|_| ()).map_err(|e| {
        let line = could_not("create", name, &strerror(e.errno()));
        (Some(e), vec![line])
    })
}

fn apply(image: &mut Image, name: &OsStr) -> Result<(), Failure> {
    image.snapshot_goto(name.as_bytes()).map_err(|e| {
        let text = e.to_string();
        let mut lines = Vec::new();
        if matches!(e, Error::Busy(_)) {
            lines.push(could_not("apply", name, &text));
        } else {
            if printed_apart(&text) {
                lines.push(text.into_bytes());
            }
            let text = format!("Failed to load snapshot: {}", strerror(e.errno()));
            lines.push(could_not("apply", name, &text));
        }
        (Some(e), lines)
    })
}

/// Errors whose text QEMU prints on a line of its own, before the errno's.
fn printed_apart(text: &str) -> bool {
    const APART: [&str; 5] = [
        "Snapshot L1 table too large",
        "Snapshot L1 table offset invalid",
        "The new size must be a multiple of 512",
        "Can't resize a v2 image which has snapshots",
        "Can't resize an image with bitmaps",
    ];
    APART.contains(&text)
}

fn delete(image: &mut Image, name: &OsStr) -> Result<(), Failure> {
    let found = match image.snapshot_list() {
        Ok(list) => list
            .iter()
            .map(as_qemu_sees_it)
            .find(|s| s.name == name.as_bytes()),
        Err(e) => return Err((Some(e), vec![could_not("delete", name, NOT_FOUND)])),
    };
    let Some(found) = found else {
        return Err((None, vec![could_not("delete", name, NOT_FOUND)]));
    };
    // Its ID too: another snapshot may have the same name. What was cut does not match any more.
    image
        .snapshot_delete(Some(&found.id), Some(&found.name))
        .map_err(|e| {
            let line = could_not("delete", name, &delete_words(&e));
            (Some(e), vec![line])
        })
}

/// The step that failed, and then the errno's words, where the library knows more.
fn delete_words(e: &Error) -> String {
    const STEPS: [&str; 3] = [
        "Failed to remove snapshot from snapshot list",
        "Failed to free the cluster and L1 table",
        "Failed to update snapshot status in disk",
    ];
    let text = e.to_string();
    match STEPS.iter().find(|s| text.starts_with(**s)) {
        Some(step) => format!("{step}: {}", strerror(e.errno())),
        None => text,
    }
}

const NOT_FOUND: &str = "snapshot not found";

fn could_not(verb: &str, name: &OsStr, text: &str) -> Vec<u8> {
    let before = format!("Could not {verb} snapshot '");
    [before.as_bytes(), name.as_bytes(), b"': ", text.as_bytes()].concat()
}

/// An image in a format without internal snapshots: QEMU opens it and then fails, or not.
fn without_snapshots(request: &Request, guessed: bool) -> Result<(), Stop> {
    if guessed {
        // QEMU opens the image again after a failed -a, and says it again.
        let times = match request.action {
            Action::List => 0,
            Action::Apply(_) => 2,
            _ => 1,
        };
        (0..times).for_each(|_| warn_of_raw(request.file));
    }
    let line = match request.action {
        Action::List if request.json => {
            b"Could not list the snapshots: Operation not supported".to_vec()
        }
        Action::List => return Ok(()),
        Action::Create(name) => could_not("create", name, &strerror(libc::ENOTSUP)),
        Action::Apply(name) => could_not("apply", name, "Block driver does not support snapshots"),
        Action::Delete(name) => could_not("delete", name, NOT_FOUND),
    };
    Err(Stop::failed(line))
}

/// A snapshot with ID and name as they fit into QEMU's struct.
fn as_qemu_sees_it(s: &Snapshot) -> Snapshot {
    Snapshot {
        id: cut(&s.id, ID_ROOM).to_vec(),
        name: cut(&s.name, NAME_ROOM).to_vec(),
        unknown_extra_data: Vec::new(),
        ..s.clone()
    }
}

/// QEMU's `pstrcpy`.
fn cut(text: &[u8], room: usize) -> &[u8] {
    let text = text.split(|b| *b == 0).next().unwrap_or_default();
    text.get(..room).unwrap_or(text)
}
