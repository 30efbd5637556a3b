//! `delete`: many snapshots at once, in one verb.

use std::io::{self, BufRead, IsTerminal, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::ArgMatches;
use qcow2_snapshot::{Error, OpenFlags, Snapshot};

use crate::actions::remarked;
use crate::cli::{Action, Request};
use crate::du;
use crate::listing::{quoted, size, visible};
use crate::progress::VerbBar;
use crate::select::{self, By, Choice};
use crate::signals::Asked;
use crate::stop::{explained, print, Stop};

pub(crate) fn run(m: &ArgMatches) -> Result<(), Stop> {
    let request = Request::of(m, Action::List);
    let choice = Choice {
        operands: select::operands(m),
        by: match (m.get_flag("id"), m.get_flag("name")) {
            (true, _) => By::Id,
            (_, true) => By::Name,
            _ => By::Any,
        },
        keep_last: m.get_one("keep-last").copied().unwrap_or(0),
        before: m
            .get_one::<u64>("older-than")
            .map(|age| now().saturating_sub(*age)),
    };
    let says_which = ["keep-last", "older-than"].iter().any(|o| m.contains_id(o));
    if choice.operands.is_empty() && !says_which && !m.get_flag("all") {
        return Err(Stop::Usage(
            "Which snapshots? Name them, or use --all, --keep-last or --older-than".into(),
        ));
    }
    let dry = m.get_flag("dry-run");
    let flags = match dry {
        true => OpenFlags::read_only(),
        false => OpenFlags::RDWR,
    };
    let mut image = select::open(&request, flags)?;
    let list = select::list(&mut image)?;
    let gone: Vec<&Snapshot> = choice
        .of(&list)?
        .iter()
        .filter_map(|i| list.get(*i))
        .collect();
    du::unique(&list, &gone)?;

    let ids: Vec<&[u8]> = gone.iter().map(|s| s.id.as_slice()).collect();
    let terminal = io::stdin().is_terminal() && io::stderr().is_terminal();
    let asks = terminal && ids.len() > 1 && !m.get_flag("yes") && !dry;
    // Nobody else is told what it frees, and finding out is half of the work.
    let freed = match dry || asks || request.json || io::stdout().is_terminal() {
        true if !ids.is_empty() => {
            let states: Vec<Option<&[u8]>> = ids.iter().copied().map(Some).collect();
            let bar = VerbBar::new("Looking at the snapshots", request.quiet);
            bar.follow_part(&mut image, 0, 1);
            match du::usage(&mut image, &states) {
                Ok(usage) => usage.exclusive,
                // Of a snapshot that cannot be read nothing is freed.
                Err(_) if !dry => 0,
                Err(e) => return Err(e),
            }
        }
        _ => 0,
    };
    if asks && !agreed(&gone, freed) {
        return Err(Stop::failed("Nothing was deleted"));
    }
    if !dry && !ids.is_empty() {
        let asked = Asked::watch()?;
        let bar = VerbBar::new("Deleting the snapshots", request.quiet);
        bar.follow(&mut image, &asked);
        let deleted = image.snapshot_delete_many(&ids);
        drop(bar);
        deleted.map_err(|e| {
            let sentence = e.to_string();
            let line = format!("Could not delete the snapshots: {sentence}");
            match e {
                Error::Cancelled(_) => asked.stop(line),
                _ => Stop::Failed(explained(&e, &sentence, line.into())),
            }
        })?;
        remarked(&image);
    }
    let text = match request.json {
        true => json(&gone, freed, dry),
        false if dry || io::stdout().is_terminal() => human(&gone, freed, dry),
        false => return Ok(()),
    };
    print(text.as_bytes())
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

/// Ask on the terminal.
fn agreed(gone: &[&Snapshot], freed: u64) -> bool {
    let question = format!(
        "{}Delete these {} snapshots, which frees {}? [y/N] ",
        names(gone),
        gone.len(),
        size(freed)
    );
    let mut err = io::stderr().lock();
    let asked = err
        .write_all(question.as_bytes())
        .and_then(|()| err.flush());
    let mut answer = String::new();
    let read = asked.and_then(|()| io::stdin().lock().read_line(&mut answer));
    read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

/// A line for each.
fn names(gone: &[&Snapshot]) -> String {
    let text = |t: &[u8]| String::from_utf8_lossy(&visible(t)).into_owned();
    let line = |s: &&Snapshot| format!("{:<7} {}\n", text(&s.id), text(&s.name));
    gone.iter().map(line).collect()
}

fn human(gone: &[&Snapshot], freed: u64, dry: bool) -> String {
    let n = match gone.len() {
        0 => return "No snapshot is meant\n".into(),
        1 => "1 snapshot".into(),
        n => format!("{n} snapshots"),
    };
    match dry {
        true => format!("{}Would delete {n} and free {}\n", names(gone), size(freed)),
        false => format!("Deleted {n}, {} freed\n", size(freed)),
    }
}

fn json(gone: &[&Snapshot], freed: u64, dry: bool) -> String {
    let one = |s: &&Snapshot| {
        let (id, name) = (quoted(&s.id), quoted(&s.name));
        format!("\n    {{ \"id\": {id}, \"name\": {name} }}")
    };
    let lines: Vec<String> = gone.iter().map(one).collect();
    format!(
        "{{ \"deleted\": [{}],\n  \"dry-run\": {dry}, \"freed\": {freed} }}\n",
        lines.join(",")
    )
}
