//! `rename`: another name for a snapshot.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::ArgMatches;

use crate::actions::could_not;
use crate::cli::{Action, Request};
use crate::select;
use crate::stop::{explained, Stop};

pub(crate) fn run(m: &ArgMatches) -> Result<(), Stop> {
    let text = |id| m.get_one::<OsString>(id).map_or(OsStr::new(""), |o| o);
    let (snapshot, name) = (text("SNAPSHOT"), text("NAME"));
    let mut image = select::open(&Request::of(m, Action::List), true)?;
    image
        .snapshot_rename(snapshot.as_bytes(), name.as_bytes())
        .map_err(|e| {
            let sentence = e.to_string();
            let line = could_not("rename", snapshot, &sentence);
            Stop::Failed(explained(&e, &sentence, line))
        })
}
