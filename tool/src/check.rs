//! `check`: what `qemu-img check` does, with its output and exit codes.

use std::io::Write;
use std::path::Path;

use clap::ArgMatches;
use qcow2_snapshot::{CheckResult, Error, Fix, Image, OpenFlags};

use crate::cli::{self, Action, Request};
use crate::listing::quoted;
use crate::progress::VerbBar;
use crate::signals::Asked;
use crate::stop::{force_remove, print, say, strerror, Stop};
use crate::target::{Opened, Target};

/// Exit codes of `qemu-img check`.
const FAILED: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const NOT_SUPPORTED: u8 = 63;

pub(crate) fn run(m: &ArgMatches) -> Result<(), Stop> {
    let request = Request::of(m, Action::List);
    let shown = request.file.to_string_lossy().into_owned();
    let text = |id| m.get_one::<String>(id).map(String::as_str);
    let fix = match text("repair") {
        None => Fix::NONE,
        Some("leaks") => Fix::LEAKS,
        Some(_) => Fix::LEAKS | Fix::ERRORS,
    };
    let (json, quiet) = (text("output") == Some("json"), m.get_flag("quiet"));
    let flags = match fix.writes() {
        true => OpenFlags::RDWR,
        false => OpenFlags::read_only(),
    };
    let opened = Target::of(&request)?.open(request.file, flags | OpenFlags::CHECK)?;
    let Opened::Image(mut image) = opened else {
        let line = "This image format does not support checks";
        return Err(Stop::Code(NOT_SUPPORTED, line.into()));
    };
    let result = look(&mut image, fix, quiet);
    let closed = image.close();
    let result = result?;
    closed.map_err(|e| Stop::failed(format!("Could not close '{shown}': {e}")))?;
    if !quiet || json {
        print(
            match json {
                true => as_json(&result, &shown),
                false => for_people(&result),
            }
            .as_bytes(),
        )?;
    }
    if result.check_errors != 0 {
        return Err(Stop::Code(FAILED, "Check failed".into()));
    }
    match (result.corruptions, result.leaks) {
        (0, 0) => Ok(()),
        (0, _) => Err(Stop::Code(LEAKS, String::new())),
        _ => Err(Stop::Code(CORRUPT, String::new())),
    }
}

/// `--repair` of the subcommands that change an image. What cannot be opened, or is not good afterwards, is
/// for them to refuse.
pub(crate) fn repair_first(path: &Path, flags: OpenFlags, quiet: bool) -> Result<(), Stop> {
    let Ok(mut image) = Image::open(path, flags | OpenFlags::CHECK) else {
        return Ok(());
    };
    let r = look(&mut image, Fix::LEAKS | Fix::ERRORS, quiet)?;
    image
        .close()
        .map_err(|e| Stop::failed(format!("Could not close '{}': {e}", path.display())))?;
    if r.corruptions + r.leaks + r.check_errors != 0 {
        let left =
            "The repair could not mend all of the image; 'qcow2-snapshot check' says what is left";
        say(cli::NAME, &[left.into()]);
    }
    Ok(())
}

/// Check, with a bar for whoever waits and findings on the standard error.
fn look(image: &mut Image, fix: Fix, quiet: bool) -> Result<CheckResult, Stop> {
    let asked = Asked::watch()?;
    let bar = VerbBar::new("Checking the image", quiet);
    bar.follow(image, &asked);
    let mut tell = |line: &str| {
        // Nobody is there to be told if this fails.
        let _ = writeln!(std::io::stderr(), "{line}");
    };
    let result = image.check(fix, &mut tell);
    drop(bar);
    image.set_progress(None);
    match result {
        Ok(result) => Ok(result),
        Err(Error::Cancelled(text)) => Err(asked.stop(text.into_bytes())),
        Err(e @ Error::Io { .. }) => Err(Stop::failed(format!("Check failed: {e}"))),
        Err(e) => {
            let hint = force_remove(&e.to_string()).map(Vec::from);
            let line = format!("Check failed: {}", strerror(e.errno()));
            Err(Stop::Failed(
                hint.into_iter().chain([line.into()]).collect(),
            ))
        }
    }
}

/// The words of `qemu-img check`.
fn for_people(r: &CheckResult) -> String {
    let mut out = String::new();
    if r.corruptions_fixed | r.leaks_fixed != 0 {
        out += &format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\nDouble checking the fixed image now...\n",
            r.leaks_fixed, r.corruptions_fixed
        );
    }
    if r.corruptions | r.leaks | r.check_errors == 0 {
        out += "No errors were found on the image.\n";
    }
    if r.corruptions != 0 {
        out += &format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            r.corruptions
        );
    }
    if r.leaks != 0 {
        out += &format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            r.leaks
        );
    }
    if r.check_errors != 0 {
        out += &format!(
            "\n{} internal errors have occurred during the check.\n",
            r.check_errors
        );
    }
    if r.total_clusters != 0 && r.allocated_clusters != 0 {
        let of = |n: u64, all: u64| n as f64 * 100.0 / all as f64;
        out += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            r.allocated_clusters,
            r.total_clusters,
            of(r.allocated_clusters, r.total_clusters),
            of(r.fragmented_clusters, r.allocated_clusters),
            of(r.compressed_clusters, r.allocated_clusters)
        );
    }
    if r.image_end_offset != 0 {
        out += &format!("Image end offset: {}\n", r.image_end_offset);
    }
    out
}

/// The JSON of `qemu-img check`, in its order; what is 0 is left out where it leaves it out.
fn as_json(r: &CheckResult, name: &str) -> String {
    let name = quoted(name.as_bytes());
    let fields = [
        ("image-end-offset", r.image_end_offset, true),
        ("compressed-clusters", r.compressed_clusters, false),
        ("total-clusters", r.total_clusters, false),
        ("corruptions-fixed", r.corruptions_fixed, false),
        ("corruptions", r.corruptions, false),
        ("check-errors", r.check_errors, true),
        ("leaks-fixed", r.leaks_fixed, false),
        ("leaks", r.leaks, false),
        ("allocated-clusters", r.allocated_clusters, false),
    ];
    let mut lines: Vec<String> = fields
        .iter()
        .filter(|(_, n, always)| *n != 0 || *always)
        .map(|(field, n, _)| format!("    \"{field}\": {n}"))
        .collect();
    lines.push(format!("    \"filename\": {name}"));
    lines.push("    \"format\": \"qcow2\"".into());
    if r.fragmented_clusters != 0 {
        lines.push(format!(
            "    \"fragmented-clusters\": {}",
            r.fragmented_clusters
        ));
    }
    format!("{{\n{}\n}}\n", lines.join(",\n"))
}
