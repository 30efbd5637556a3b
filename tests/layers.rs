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
    never_names("image", &["read", "capi"]);
    never_names("read", &["capi", "snapshot"]);
    never_names("snapshot", &["capi", "io", "maintain"]);
    never_names("maintain", &["capi", "io"]);
}

/// `plan` makes steps of what `replay` has found out, which counts in `refcount`.
#[test]
fn inside_of_image_arrows_point_down_too() {
    never_names("image/refcount", &["image::replay", "image::plan"]);
    never_names("image/replay", &["image::plan"]);
    for file in ["tables.rs", "device.rs", "progress.rs"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/image");
        let text = std::fs::read_to_string(path.join(file)).unwrap();
        for room in ["refcount", "replay", "plan"] {
            let named = [format!("super::{room}"), format!("image::{room}")];
            assert!(
                !named.iter().any(|n| text.contains(n)),
                "{file} names {room}"
            );
        }
    }
}

/// Names of the files of the same folder that a file uses.
fn siblings(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]").next().unwrap();
    let uses = code.lines().filter(|l| l.starts_with("use "));
    let mut all = Vec::new();
    for line in uses {
        for part in line.split("super::").skip(1) {
            let name: String = part
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                .collect();
            all.push(name);
        }
    }
    all
}

#[test]
fn no_two_files_of_a_folder_name_each_other() {
    for folder in ["capi", "format", "io", "image", "image/plan"] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("src")
            .join(folder);
        let mut uses = std::collections::BTreeMap::new();
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
                uses.insert(name, siblings(&std::fs::read_to_string(path).unwrap()));
            }
        }
        let names = |a: &String, b: &String| uses.get(a).is_some_and(|u| u.contains(b));
        for a in uses.keys().filter(|a| *a != "mod") {
            for b in uses.keys().filter(|b| *b != "mod" && a < *b) {
                assert!(!(names(a, b) && names(b, a)), "{folder}: {a} and {b}");
            }
        }
    }
}

#[test]
fn no_two_types_have_one_name() {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    let mut known = std::collections::BTreeMap::new();
    for (name, text) in files {
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
        for line in code.lines().filter(|l| !l.starts_with("    ")) {
            let words: Vec<&str> = line.split(|c: char| !c.is_alphanumeric()).collect();
            let at = words
                .iter()
                .position(|w| ["struct", "enum", "trait"].contains(w));
            let is_item = line.starts_with("pub") || at == Some(0);
            let Some(n) = at.filter(|_| is_item).and_then(|at| words.get(at + 1)) else {
                continue;
            };
            let other = known.insert((*n).to_owned(), name.clone());
            assert_eq!(other, None, "{n} stands in {name} too");
        }
    }
    assert!(known.len() > 80);
}

#[test]
fn a_file_of_more_than_600_lines_says_why() {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    for (name, text) in files {
        let reason =
            |l: &str| l.starts_with("//!") && (l.contains("long file") || l.contains("Long,"));
        let said = text.lines().take(8).any(reason);
        assert!(said || text.lines().count() <= 600, "{name}");
    }
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
