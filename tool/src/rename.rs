//! `rename`: another name for a snapshot.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::ArgMatches;
use qcow2_snapshot::OpenFlags;

use crate::actions::{could_not, told};
use crate::cli::{Action, Request};
use crate::select;
use crate::stop::{explained, print, Stop};

pub(crate) fn run(m: &ArgMatches) -> Result<(), Stop> {
    let text = |id| m.get_one::<OsString>(id).map_or(OsStr::new(""), |o| o);
    let (snapshot, name) = (text("SNAPSHOT"), text("NAME"));
    let request = Request::of(m, Action::List);
    let mut image = select::open(&request, OpenFlags::RDWR)?;
    let place = match request.json {
        true => select::find(&select::list(&mut image)?, snapshot.as_bytes()),
        false => None,
    };
    image
        .snapshot_rename(snapshot.as_bytes(), name.as_bytes())
        .map_err(|e| {
            let sentence = e.to_string();
            let line = could_not("rename", snapshot, &sentence);
            Stop::Failed(explained(&e, &sentence, line))
        })?;
    if !request.json {
        return Ok(());
    }
    let list = select::list(&mut image)?;
    print(told(&[("renamed", place.and_then(|i| list.get(i)))]).as_bytes())
}
