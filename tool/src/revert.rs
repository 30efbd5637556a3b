//! `revert`: as `-a`, and with `--save-as` after a snapshot of the disk as it is.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::ArgMatches;
use qcow2_snapshot::{Error, Image, OpenFlags};

use crate::actions::{self, could_not, told, Failure};
use crate::cli::{Action, Request};
use crate::progress::VerbBar;
use crate::select;
use crate::signals::Asked;
use crate::stop::{print, Stop};

pub(crate) fn run(m: &ArgMatches) -> Result<(), Stop> {
    let text = |id| m.get_one::<OsString>(id).map(OsString::as_os_str);
    let snapshot = text("SNAPSHOT").unwrap_or_default();
    let request = Request::of(m, Action::Apply(snapshot));
    let Some(saved) = text("save-as") else {
        return actions::run(&request, false);
    };
    let mut image = select::open(&request, OpenFlags::RDWR)?;
    // Not after the first half.
    let id = wanted(&mut image, snapshot)?;
    let asked = Asked::watch()?;
    let bar = VerbBar::new("Creating the snapshot", request.quiet);
    bar.follow(&mut image, &asked);
    let created = actions::create(&mut image, saved);
    drop(bar);
    created.map_err(|e| stopped(e, &asked, "create", saved))?;
    let bar = VerbBar::new("Applying the snapshot", request.quiet);
    bar.follow(&mut image, &asked);
    let applied = actions::apply(&mut image, &id);
    drop(bar);
    applied.map_err(|(e, mut lines)| {
        let kept = [
            b"The snapshot '".as_slice(),
            saved.as_bytes(),
            b"' was created",
        ]
        .concat();
        lines.insert(0, kept);
        stopped((e, lines), &asked, "apply", snapshot)
    })?;
    actions::remarked(&image);
    if !request.json {
        return Ok(());
    }
    let list = select::list(&mut image)?;
    let found = select::find(&list, id.as_bytes()).and_then(|i| list.get(i));
    print(told(&[("reverted-to", found), ("saved", list.last())]).as_bytes())
}

/// The ID of the snapshot, which the new one must not be taken for.
fn wanted(image: &mut Image, snapshot: &OsStr) -> Result<OsString, Stop> {
    let list = select::list(image)?;
    let found = select::find(&list, snapshot.as_bytes());
    let found = found.and_then(|i| list.get(i)).ok_or_else(|| {
        let text = "Failed to load snapshot: No such file or directory";
        Stop::Failed(vec![could_not("apply", snapshot, text)])
    })?;
    Ok(OsStr::from_bytes(&found.id).to_owned())
}

fn stopped((error, lines): Failure, asked: &Asked, verb: &str, name: &OsStr) -> Stop {
    match error {
        Some(Error::Cancelled(text)) => asked.stop(could_not(verb, name, &text)),
        _ => Stop::Failed(lines),
    }
}
