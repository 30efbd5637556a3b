//! The manual pages of the library: they are what the header says today, and they format.

#[path = "man/pages.rs"]
mod pages;
#[path = "abi/toolbox.rs"]
mod toolbox;

use std::collections::BTreeSet;
use std::process::Command;
use toolbox::{compare_with_golden, root, run};

#[test]
fn the_committed_pages_say_what_the_header_says() {
    let examples = std::fs::read_to_string(root().join("examples/manual.c")).expect("is there");
    // It is what cbindgen makes: tests/header.rs.
    let header = root().join("include/qcow2_snapshot.h");
    let header = std::fs::read_to_string(header).expect("is there");
    let pages = pages::pages(&header, &examples);

    let folder = root().join("man/man3");
    let wanted: BTreeSet<String> = pages.keys().map(|name| format!("{name}.3")).collect();
    for name in names(&folder).difference(&wanted) {
        if std::env::var_os("QCOW2_BLESS").is_some() {
            std::fs::remove_file(folder.join(name)).expect("the source tree is writable");
        } else {
            panic!("man/man3/{name} is the page of nothing: \"make header\" removes it");
        }
    }
    for (name, text) in &pages {
        compare_with_golden(&format!("man/man3/{name}.3"), text);
    }

    // One page for each exported function, and the overview.
    let symbols = std::fs::read_to_string(root().join("tests/abi/symbols.txt")).expect("is there");
    let mut exported: BTreeSet<String> = symbols.lines().map(|name| format!("{name}.3")).collect();
    exported.insert("libqcow2_snapshot.3".to_owned());
    assert_eq!(wanted, exported);
}

fn names(folder: &std::path::Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).expect("man/man3 is there");
    entries
        .map(|e| {
            e.expect("readable")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}

#[test]
fn every_page_formats_without_a_warning() {
    let folder = root().join("man/man3");
    for name in names(&folder) {
        let mut groff = Command::new("groff");
        groff.args(["-man", "-Tutf8", "-Kutf8", "-ww", "-z"]);
        groff.arg(folder.join(&name));
        let Some(output) = run(&mut groff, "whether the manual pages format") else {
            return;
        };
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && words.is_empty(),
            "{name}: {words}"
        );
    }
}
