//! `flatten`: let go of the backing file, with every snapshot.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::ArgMatches;
use qcow2_snapshot::{printable, Error, Image, OpenFlags};

use crate::check;
use crate::listing::size;
use crate::progress::VerbBar;
use crate::signals::Asked;
use crate::stop::{explained, print, Stop};
use crate::target::{not_opened, open_words};

pub(crate) fn run(m: &ArgMatches) -> Result<(), Stop> {
    let name = m.get_one::<OsString>("IMAGE");
    let name = name.map_or(OsStr::new(""), |o| o);
    let dry = m.get_flag("dry-run");
    let flags = match dry {
        true => OpenFlags::read_only(),
        false => OpenFlags::RDWR,
    };
    let flags = match m.get_flag("no-lock") {
        true => flags | OpenFlags::NO_LOCK,
        false => flags,
    };
    if m.get_flag("repair") && !dry {
        check::repair_first(name.as_ref(), flags, m.get_flag("quiet"))?;
    }
    let mut image = Image::open(name.as_ref(), flags).map_err(|e| {
        let words = open_words(&e, name.as_ref());
        Stop::Failed(explained(&e, &words, not_opened(name, &words)))
    })?;
    let line = |text: &str| format!("Could not flatten '{}': {text}", printable(name.as_bytes()));
    let failed = |e: Error| {
        let sentence = e.to_string();
        Stop::Failed(explained(&e, &sentence, line(&sentence).into()))
    };
    if dry {
        let bytes = image.flatten_estimate().map_err(failed)?;
        return print(format!("{} to copy at most\n", size(bytes)).as_bytes());
    }
    let asked = Asked::watch()?;
    let bar = VerbBar::new("Letting go of the backing file", m.get_flag("quiet"));
    bar.follow(&mut image, &asked);
    let result = image.flatten();
    drop(bar);
    match result {
        Err(Error::Cancelled(text)) => Err(asked.stop(line(&text))),
        other => other.map_err(failed),
    }
}
