//! `qcow2-snapshot.1` from the options in [`crate::cli`] and the words in `man/`; run with
//! `QCOW2_BLESS=1` to write it again.
#![allow(clippy::unwrap_used)]

use clap_mangen::Man;

use crate::cli;

#[test]
fn the_manual_page_says_what_the_options_are() {
    let mut page = Vec::new();
    let man = Man::new(cli::command())
        .title("QCOW2-SNAPSHOT")
        .section("1")
        .date("")
        .source(concat!("qcow2-snapshot ", env!("CARGO_PKG_VERSION")))
        .manual("User Commands");
    man.render_title(&mut page).unwrap();
    man.render_name_section(&mut page).unwrap();
    page.extend_from_slice(include_bytes!("../man/synopsis.roff"));
    man.render_options_section(&mut page).unwrap();
    page.extend_from_slice(include_bytes!("../man/sections.roff"));

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/qcow2-snapshot.1");
    if std::env::var_os("QCOW2_BLESS").is_some() {
        std::fs::write(path, &page).unwrap();
    }
    let committed = std::fs::read(path).unwrap_or_default();
    assert!(
        committed == page,
        "{path} is not what the options say; QCOW2_BLESS=1 cargo test -p qcow2-snapshot-tool writes it again"
    );
}

#[test]
fn clap_finds_no_fault_with_the_options() {
    cli::command().debug_assert();
    cli::link_command().debug_assert();
}
