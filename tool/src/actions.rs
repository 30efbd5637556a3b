//! The four actions of `qemu-img snapshot`, with its messages.

use std::ffi::OsStr;
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use qcow2_snapshot::{Error, Image, NewSnapshot, OpenFlags, Outcome, Snapshot};

use crate::cli::{self, Action, Request};
use crate::listing;
use crate::progress::VerbBar;
use crate::select;
use crate::signals::Asked;
use crate::stop::{explained, print, say, strerror, Stop};
use crate::target::{warn_of_raw, Opened, Target};

/// Room for text in QEMU's `QEMUSnapshotInfo`, which qemu-img goes through.
const ID_ROOM: usize = 127;
const NAME_ROOM: usize = 255;

/// Do what the call asks for. `link`: another qemu-img may be there for what is not served.
pub(crate) fn run(request: &Request, link: bool) -> Result<(), Stop> {
    let target = Target::of(request)?;
    let flags = match request.action {
        Action::List => OpenFlags::read_only(),
        _ => OpenFlags::RDWR,
    };
    let mut image = match target.open(request.file, flags)? {
        Opened::Image(image) => image,
        Opened::Other { .. } if link => {
            return Err(Stop::not_served(
                "The image is not in qcow2 format, and there is no other qemu-img in PATH",
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
    if result.is_ok() {
        remarked(&image);
    }
    match result {
        Ok(()) if request.json => print(done(&mut image, request.action)?.as_bytes()),
        Ok(()) => Ok(()),
        Err((Some(Error::Cancelled(text)), _)) => Err(asked.stop(could_not(verb, name, &text))),
        // The locks go with the image, before another program wants them.
        Err((Some(Error::Unsupported(_)), lines))
            if link && image.last_outcome() != Outcome::Unknown =>
        {
            Err(Stop::NotServed(lines))
        }
        Err((_, lines)) => Err(Stop::Failed(lines)),
    }
}

/// What a subcommand did, in JSON.
fn done(image: &mut Image, action: Action) -> Result<String, Stop> {
    let list = select::list(image)?;
    Ok(match action {
        Action::Create(_) => told(&[("created", list.last())]),
        Action::Apply(name) => {
            let found = select::find(&list, name.as_bytes());
            told(&[("reverted-to", found.and_then(|i| list.get(i)))])
        }
        Action::List | Action::Delete(_) => String::new(), // they have words of their own
    })
}

/// Snapshots in a JSON object, each under the name of what was done with it.
pub(crate) fn told(what: &[(&str, Option<&Snapshot>)]) -> String {
    let member = |(key, s): &(&str, Option<&Snapshot>)| {
        let (id, name) = s.map_or((&[][..], &[][..]), |s| (&s.id, &s.name));
        let (id, name) = (listing::quoted(id), listing::quoted(name));
        format!("\"{key}\": {{ \"id\": {id}, \"name\": {name} }}")
    };
    let members: Vec<String> = what.iter().map(member).collect();
    format!("{{ {} }}\n", members.join(",\n  "))
}

/// What there is to know of a verb that succeeded.
pub(crate) fn remarked(image: &Image) {
    if let Some(text) = image.remark() {
        say(cli::NAME, &[text.as_bytes().to_vec()]);
    }
}

/// An error of the library, and the lines to print.
pub(crate) type Failure = (Option<Error>, Vec<Vec<u8>>);

fn list(image: &mut Image, json: bool, link: bool) -> Result<(), Stop> {
    let snapshots: Vec<Snapshot> = match image.snapshot_list() {
        Ok(list) => list.iter().map(as_qemu_sees_it).collect(),
        // qemu-img says nothing and is content where there cannot be any.
        Err(Error::Unsupported(text)) if !(link || json) => {
            say(cli::NAME, &[text.into_bytes()]);
            return Ok(());
        }
        Err(e) => {
            let sentence = e.to_string();
            let line = format!("Could not list the snapshots: {sentence}");
            return Err(Stop::NotServed(explained(&e, &sentence, line.into())));
        }
    };
    if json {
        print(listing::json(&snapshots).as_bytes())
    } else {
        let terminal = std::io::stdout().is_terminal();
        print(&listing::table(&snapshots, terminal))
    }
}

pub(crate) fn create(image: &mut Image, name: &OsStr) -> Result<(), Failure> {
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
        failure(e, line)
    })
}

pub(crate) fn apply(image: &mut Image, name: &OsStr) -> Result<(), Failure> {
    image.snapshot_goto(name.as_bytes()).map_err(|e| {
        let text = match &e {
            Error::Busy(text) => text.clone(),
            _ => format!("Failed to load snapshot: {}", strerror(e.errno())),
        };
        failure(e, could_not("apply", name, &text))
    })
}

fn delete(image: &mut Image, name: &OsStr) -> Result<(), Failure> {
    let found = match image.snapshot_list() {
        Ok(list) => list
            .iter()
            .map(as_qemu_sees_it)
            .find(|s| s.name == name.as_bytes()),
        Err(e) => return Err(failure(e, could_not("delete", name, NOT_FOUND))),
    };
    let Some(found) = found else {
        return Err((None, vec![could_not("delete", name, NOT_FOUND)]));
    };
    // Its ID too: another snapshot may have the same name. What was cut does not match any more.
    image
        .snapshot_delete(Some(&found.id), Some(&found.name))
        .map_err(|e| {
            let said = e.to_string();
            let named = STEPS
                .iter()
                .find_map(|step| Some((step, said.strip_prefix(step)?.strip_prefix(": ")?)));
            let (step, sentence) = match (named, &e) {
                (Some((step, rest)), _) => (Some(step), rest),
                // QEMU writes the list first. Here it has its place when the verb is done.
                (None, Error::Io { .. } | Error::Os { .. } | Error::Corrupt(_)) => {
                    let done = image.last_outcome() == Outcome::Done;
                    (STEPS.get(usize::from(done)), said.as_str())
                }
                (None, _) => (None, said.as_str()),
            };
            let text = match step {
                Some(step) => format!("{step}: {}", strerror(e.errno())),
                None => said.clone(),
            };
            let line = could_not("delete", name, &text);
            let lines = explained(&e, sentence, line);
            (Some(e), lines)
        })
}

/// The steps of a delete, for which QEMU has words.
const STEPS: [&str; 3] = [
    "Failed to remove snapshot from snapshot list",
    "Failed to free the cluster and L1 table",
    "Failed to update snapshot status in disk",
];

const NOT_FOUND: &str = "snapshot not found";

fn failure(e: Error, line: Vec<u8>) -> Failure {
    let lines = explained(&e, &e.to_string(), line);
    (Some(e), lines)
}

pub(crate) fn could_not(verb: &str, name: &OsStr, text: &str) -> Vec<u8> {
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
            let text = "Could not list the snapshots: Image is not in qcow2 format";
            return Err(Stop::failed(text));
        }
        Action::List => return Ok(()),
        Action::Create(name) => could_not("create", name, &strerror(libc::ENOTSUP)),
        Action::Apply(name) => could_not("apply", name, "Block driver does not support snapshots"),
        Action::Delete(name) => could_not("delete", name, NOT_FOUND),
    };
    Err(Stop::Failed(vec![
        b"Image is not in qcow2 format".to_vec(),
        line,
    ]))
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
