//! How the shared library is linked, which Cargo.toml cannot say.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // cargo-c links by rustc, whose own version script leaves no room for ours: a library under the
    // same SONAME whose symbols have no versions.
    if env::var_os("CARGO_FEATURE_CAPI").is_some() {
        panic!("cargo-c would make a library without symbol versions: use make install (CONTRIBUTING.md)");
    }
    // `qcow2_compat_2_1`: only cbindgen sees it, and makes an #ifdef of it.
    println!("cargo::rustc-check-cfg=cfg(qcow2_compat_2_1, qcow2_little_memory)");

    // Mach-O and PE have no SONAME; only Linux is supported.
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        // The number changes when a program compiled against an older header would no longer work.
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libqcow2_snapshot.so.0");
        // Calls within the library stay there, whatever a program defines or preloads.
        println!("cargo::rustc-cdylib-link-arg=-Wl,-Bsymbolic");
    }
}
