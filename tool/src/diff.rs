//! `diff`: which bytes of the disk changed between two snapshots, or since one.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;

use clap::ArgMatches;
use qcow2_snapshot::{Change, Image, Mapping, OpenFlags};

use crate::listing::size;
use crate::progress;
use crate::stop::{explained, without_number, Stop};
use crate::target::{not_opened, open_words};

pub(crate) fn run(m: &ArgMatches) -> Result<(), Stop> {
    let operand = |id| m.get_one::<OsString>(id).map(OsString::as_os_str);
    let name = operand("IMAGE").unwrap_or_default();
    let [from, to] = ["FROM", "TO"].map(|id| operand(id).map(OsStr::as_bytes));
    let flags = match m.get_flag("force-share") {
        true => OpenFlags::FORCE_SHARE,
        false => OpenFlags::read_only(),
    };
    let mut image = Image::open(name.as_ref(), flags).map_err(|e| {
        let words = open_words(&e, name.as_ref());
        Stop::Failed(explained(&e, &words, not_opened(name, &words)))
    })?;
    let json = m.get_one::<String>("output").is_some_and(|o| o == "json");
    let compare = m.get_flag("compare");

    // Lines on a terminal show how far it is, and a bar would be in their way.
    let hidden = m.get_flag("quiet") || io::stdout().is_terminal();
    let bar = progress::bytes(image.length(), hidden);
    let mut out = BufWriter::new(io::stdout().lock());
    let mut sum = Sum::default();
    let mut show = |change: Change| {
        bar.set_position(change.start);
        let line = match json {
            true => sum.json(&change),
            false => sum.human(&change),
        };
        sum.runs += 1;
        sum.bytes += change.length;
        out.write_all(line.as_bytes())
    };
    for change in image.snapshot_changes(from, to, compare) {
        let change = change.map_err(|e| {
            bar.finish_and_clear();
            let sentence = e.to_string();
            let line = format!("Could not compare the snapshots: {sentence}");
            Stop::Failed(explained(&e, &sentence, line.into()))
        })?;
        if let Err(e) = show(change) {
            return unwritten(&e);
        }
    }
    bar.finish_and_clear();
    let end = match json {
        true => sum.json_end(),
        false => sum.human_end(compare),
    };
    match out.write_all(end.as_bytes()).and_then(|()| out.flush()) {
        Err(e) => unwritten(&e),
        Ok(()) => Ok(()),
    }
}

/// A reader that went away is not an error.
fn unwritten(e: &io::Error) -> Result<(), Stop> {
    if e.kind() == io::ErrorKind::BrokenPipe {
        return Ok(());
    }
    let text = format!("Could not write the output: {}", without_number(e));
    Err(Stop::failed(text))
}

/// What has been shown.
#[derive(Default)]
struct Sum {
    runs: u64,
    bytes: u64,
}

impl Sum {
    fn human(&self, c: &Change) -> String {
        let mut out = match self.runs {
            0 => line("OFFSET", "LENGTH", "WAS", "IS"),
            _ => String::new(),
        };
        let offset = format!("{:#x}", c.start);
        out += &line(&offset, &size(c.length), word(c.from), word(c.to));
        out
    }

    fn human_end(&self, compare: bool) -> String {
        let runs = match self.runs {
            0 => return "No changes\n".into(),
            1 => "1 run".into(),
            n => format!("{n} runs"),
        };
        let differ = match compare {
            true => "changed",
            false => "may have changed",
        };
        format!("{} in {runs} {differ}\n", size(self.bytes))
    }

    /// An entry of `qemu-img map --output=json`, and what it was.
    fn json(&self, c: &Change) -> String {
        let before = if self.runs == 0 { "[" } else { ",\n" };
        format!(
            "{before}{{ \"start\": {}, \"length\": {}, \"depth\": 0, {}, \"was\": {{ {}, \"beyond\": {} }} }}",
            c.start,
            c.length,
            fields(c.to),
            fields(c.from),
            c.from == Mapping::Beyond
        )
    }

    fn json_end(&self) -> String {
        let before = if self.runs == 0 { "[" } else { "" };
        format!("{before}]\n")
    }
}

fn line(offset: &str, length: &str, was: &str, is: &str) -> String {
    format!("{offset:<18} {length:>10}  {was:<11} {is}\n")
}

fn word(mapping: Mapping) -> &'static str {
    match mapping {
        Mapping::Beyond => "past end",
        Mapping::Unallocated => "unallocated",
        Mapping::Zero => "zeros",
        Mapping::Data => "data",
        Mapping::Compressed => "compressed",
    }
}

fn fields(mapping: Mapping) -> String {
    let compressed = mapping == Mapping::Compressed;
    let data = compressed || mapping == Mapping::Data;
    let zero = mapping == Mapping::Zero;
    format!(
        "\"present\": {}, \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}",
        data || zero
    )
}
