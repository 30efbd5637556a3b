//! `du`: what snapshots hold, and what deleting them would free.

use clap::ArgMatches;
use qcow2_snapshot::{Image, OpenFlags, Snapshot, Usage};

use crate::cli::{Action, Request};
use crate::listing::{quoted, size, visible};
use crate::progress::VerbBar;
use crate::select::{self, By, Choice};
use crate::stop::{explained, print, Stop};

pub(crate) fn run(m: &ArgMatches) -> Result<(), Stop> {
    let request = Request::of(m, Action::List);
    let mut image = select::open(&request, OpenFlags::read_only())?;
    let list = select::list(&mut image)?;
    let operands = select::operands(m);
    let named = !operands.is_empty();
    let choice = Choice {
        operands,
        by: By::Any,
        keep_last: 0,
        before: None,
    };
    let chosen: Vec<&Snapshot> = choice
        .of(&list)?
        .iter()
        .filter_map(|i| list.get(*i))
        .collect();
    unique(&list, &chosen)?;

    let ids: Vec<Option<&[u8]>> = chosen.iter().map(|s| Some(s.id.as_slice())).collect();
    // Nobody need end this with care: nothing is written.
    let bar = VerbBar::new("Looking at the snapshots", request.quiet);
    let calls = ids.len() as u64 + u64::from(!named) + u64::from(!ids.is_empty());
    let mut call = 0;
    let mut ask = |states: &[Option<&[u8]>]| {
        bar.follow_part(&mut image, call, calls);
        call += 1;
        usage(&mut image, states)
    };
    let mut each = Vec::new();
    for (snapshot, id) in chosen.iter().zip(&ids) {
        each.push((*snapshot, ask(&[*id])?));
    }
    let disk = match named {
        true => None,
        false => Some(ask(&[])?),
    };
    let total = match ids.len() {
        0 => None,
        _ => Some(ask(&ids)?),
    };
    drop(bar);
    let text = match request.json {
        true => json(&each, disk, total),
        false => human(&each, disk, total),
    };
    print(text.as_bytes())
}

/// Snapshots are asked for by their IDs, so each must have its own.
pub(crate) fn unique(list: &[Snapshot], chosen: &[&Snapshot]) -> Result<(), Stop> {
    let mut ids: Vec<&[u8]> = list.iter().map(|s| s.id.as_slice()).collect();
    ids.sort_unstable();
    let of = |id: &[u8]| ids.partition_point(|i| *i <= id) - ids.partition_point(|i| *i < id);
    match chosen.iter().find(|s| of(&s.id) > 1) {
        None => Ok(()),
        Some(s) => {
            let id = String::from_utf8_lossy(&visible(&s.id)).into_owned();
            let text = format!("Two snapshots have the ID '{id}'; -d deletes by name");
            Err(Stop::failed(text))
        }
    }
}

pub(crate) fn usage(image: &mut Image, states: &[Option<&[u8]>]) -> Result<Usage, Stop> {
    image.snapshot_usage(states).map_err(|e| {
        let sentence = e.to_string();
        let line = format!("Could not find out what the snapshots hold: {sentence}");
        Stop::Failed(explained(&e, &sentence, line.into()))
    })
}

fn human(each: &[(&Snapshot, Usage)], disk: Option<Usage>, total: Option<Usage>) -> String {
    let mut out = row(
        "ID",
        "NAME",
        ["REFERENCED", "EXCLUSIVE", "ALLOCATED"].map(str::to_owned),
    );
    let cells = |u: &Usage| [u.referenced, u.exclusive, u.allocated].map(size);
    for (s, u) in each {
        let [id, name] =
            [&s.id, &s.name].map(|t| String::from_utf8_lossy(&visible(t)).into_owned());
        out += &row(&id, &name, cells(u));
    }
    if let Some(u) = disk {
        out += &row("-", "the disk", cells(&u));
    }
    if let Some(u) = total {
        let what = match each.len() {
            1 => "it".to_owned(),
            n => format!("these {n}"),
        };
        out += &format!("Deleting {what} would free {}\n", size(u.exclusive));
    }
    out
}

fn row(id: &str, name: &str, [referenced, exclusive, allocated]: [String; 3]) -> String {
    format!("{id:<7} {name:<20} {referenced:>10} {exclusive:>10} {allocated:>10}\n")
}

/// The members of a Usage.
pub(crate) fn fields(u: &Usage) -> String {
    format!(
        "\"referenced\": {}, \"exclusive\": {}, \"tables\": {}, \"vm-state\": {}, \"allocated\": {}",
        u.referenced, u.exclusive, u.tables, u.vm_state, u.allocated
    )
}

fn json(each: &[(&Snapshot, Usage)], disk: Option<Usage>, total: Option<Usage>) -> String {
    let one = |(s, u): &(&Snapshot, Usage)| {
        let (id, name) = (quoted(&s.id), quoted(&s.name));
        format!("\n    {{ \"id\": {id}, \"name\": {name}, {} }}", fields(u))
    };
    let lines: Vec<String> = each.iter().map(one).collect();
    let mut out = format!("{{ \"snapshots\": [{}]", lines.join(","));
    for (name, usage) in [("disk", disk), ("total", total)] {
        if let Some(u) = usage {
            out += &format!(",\n  \"{name}\": {{ {} }}", fields(&u));
        }
    }
    out + " }\n"
}
