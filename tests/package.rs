//! What a Rust user downloads: the files of the crate, no more and no fewer.

#![allow(clippy::expect_used)]

#[path = "abi/toolbox.rs"]
mod toolbox;

use std::process::Command;
use toolbox::{compare_with_golden, root, run};

#[test]
fn the_crate_holds_what_the_golden_list_says() {
    // --allow-dirty: what is not committed yet counts too.
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args([
        "package",
        "--list",
        "--allow-dirty",
        "--offline",
        "--package=qcow2-snapshot",
        "--manifest-path",
    ]);
    cargo.arg(root().join("Cargo.toml"));
    let Some(output) = run(&mut cargo, "what goes into the crate") else {
        return;
    };
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    let list = String::from_utf8(output.stdout).expect("names are ASCII");
    // Outside of git there is no .cargo_vcs_info.json. Of src/, a module more or less is not news.
    let news = |name: &&str| {
        !(name.starts_with(".cargo_vcs") || name.starts_with("src/") && name.ends_with(".rs"))
    };
    let names: Vec<&str> = list.lines().filter(news).collect();
    compare_with_golden("tests/package.txt", &(names.join("\n") + "\n"));
    for module in ["src/lib.rs", "src/capi/mod.rs", "src/snapshot/create.rs"] {
        assert!(list.lines().any(|name| name == module), "no {module}");
    }
}
