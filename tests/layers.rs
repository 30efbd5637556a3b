//! The layers of the crate depend downwards only.

#![allow(clippy::unwrap_used)]

use std::path::Path;

fn sources(dir: &Path, out: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push((
                path.display().to_string(),
                std::fs::read_to_string(&path).unwrap(),
            ));
        }
    }
}

/// No file of `layer` names one of the `forbidden` modules.
fn never_names(layer: &str, forbidden: &[&str]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src")
        .join(layer);
    let mut files = Vec::new();
    sources(&dir, &mut files);
    assert!(!files.is_empty(), "no sources in {}", dir.display());
    for (name, text) in files {
        for module in forbidden {
            assert!(
                !text.contains(&format!("crate::{module}")),
                "{name} names crate::{module}"
            );
        }
    }
}

#[test]
fn io_knows_no_qcow2() {
    never_names("io", &["format", "image", "read", "snapshot", "capi"]);
}

#[test]
fn format_does_no_io() {
    never_names("format", &["io", "image", "read", "capi"]);
}

#[test]
fn image_and_verbs_do_not_know_the_c_surface() {
    never_names("image", &["capi"]);
    never_names("read", &["capi", "snapshot"]);
    never_names("snapshot", &["capi", "io"]);
}

/// What it guards against: `io::lock::open`.
#[test]
fn files_are_opened_in_one_place_only() {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    let mut places = 0;
    for (name, text) in files {
        let code = text.split("#[cfg(test)]").next().unwrap();
        let opens = |l: &&str| {
            let words = [
                "File::open(",
                "File::create",
                "options.open(",
                ".open(path",
                ".open(&",
            ];
            words.iter().any(|w| l.contains(w)) || l.trim_start().starts_with(".open(")
        };
        let lines: Vec<_> = code.lines().filter(opens).collect();
        let allowed = usize::from(name.ends_with("/io/lock.rs"));
        assert_eq!(lines.len(), allowed, "{name}: {lines:?}");
        places += lines.len();
    }
    assert_eq!(places, 1, "this test finds what it looks for");
}

#[test]
fn unsafe_code_stands_in_two_places_only() {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    for (name, text) in files {
        let allowed = name.contains("/capi/") || name.ends_with("/io/lock.rs");
        let has = text
            .lines()
            .any(|l| !l.trim_start().starts_with("//") && l.contains("unsafe "));
        assert!(allowed || !has, "unsafe code in {name}");
    }
}
