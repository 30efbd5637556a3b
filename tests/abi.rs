//! The binary interface: what a program that was linked yesterday relies on today.

#[path = "abi/toolbox.rs"]
mod toolbox;

use std::process::Command;
use toolbox::{compare_with_golden, compile_and_run, run, shared_library};

#[test]
fn the_shared_library_exports_exactly_the_functions_of_the_contract() {
    let mut nm = Command::new("nm");
    nm.args(["-D", "--defined-only", "-P"])
        .arg(shared_library());
    let Some(output) = run(&mut nm, "the exported symbols") else {
        return;
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let table = String::from_utf8_lossy(&output.stdout);
    let mut symbols: Vec<String> = table
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(|name| format!("{name}\n"))
        .collect();
    symbols.sort();
    compare_with_golden("tests/abi/symbols.txt", &symbols.concat());
    assert!(
        symbols.iter().all(|s| s.starts_with("qcow2_")),
        "{symbols:?}"
    );
}

#[test]
fn the_soname_carries_the_number_of_the_interface() {
    let mut readelf = Command::new("readelf");
    readelf.arg("-d").arg(shared_library());
    let Some(output) = run(&mut readelf, "the SONAME") else {
        return;
    };
    let dynamic = String::from_utf8_lossy(&output.stdout);
    assert!(
        dynamic.contains("Library soname: [libqcow2_snapshot.so.0]"),
        "{dynamic}"
    );
}

#[test]
fn structs_and_constants_are_laid_out_as_ever() {
    let mut text =
        String::from("Sizes and offsets on 64-bit Linux, in bytes; made by tests/abi.rs.\n");
    for (title, flags) in [
        ("today", &[][..]),
        (
            "with QCOW2_SNAPSHOT_COMPAT_2_1",
            &["-DQCOW2_SNAPSHOT_COMPAT_2_1"][..],
        ),
    ] {
        let dir = tempfile::tempdir().expect("a scratch folder");
        let Some(layout) = compile_and_run::<&str>(dir.path(), PRINTS_THE_LAYOUT, flags, &[])
        else {
            return;
        };
        text += &format!("\n{title}\n{layout}");
    }
    compare_with_golden("tests/abi/layout.txt", &text);
}

#[test]
fn the_library_can_be_unloaded() {
    let dir = tempfile::tempdir().expect("a scratch folder");
    let library = shared_library();
    compile_and_run(
        dir.path(),
        UNLOADS_THE_LIBRARY,
        &[],
        &[library.as_os_str(), dir.path().as_os_str()],
    );
}

const PRINTS_THE_LAYOUT: &str = r#"
#include <qcow2_snapshot.h>
#include <stdio.h>
#define SIZE(type) printf("  %-44s %zu\n", "sizeof " #type, sizeof(type))
#define MEMBER(type, member) \
    printf("  %-44s %zu + %zu\n", #type "." #member, offsetof(type, member), sizeof(((type *)0)->member))
#define CONSTANT(name) printf("  %-44s %#x\n", #name, (unsigned)name)
int main(void)
{
    SIZE(Qcow2SnapshotInfo);
    MEMBER(Qcow2SnapshotInfo, id_str);
    MEMBER(Qcow2SnapshotInfo, name);
    MEMBER(Qcow2SnapshotInfo, vm_state_size);
    MEMBER(Qcow2SnapshotInfo, date_sec);
    MEMBER(Qcow2SnapshotInfo, date_nsec);
    MEMBER(Qcow2SnapshotInfo, vm_clock_nsec);
#ifndef QCOW2_SNAPSHOT_COMPAT_2_1
    MEMBER(Qcow2SnapshotInfo, icount);
#endif
    SIZE(Qcow2IoOps);
    MEMBER(Qcow2IoOps, size);
    MEMBER(Qcow2IoOps, pread);
    MEMBER(Qcow2IoOps, pwrite);
    MEMBER(Qcow2IoOps, flush);
    MEMBER(Qcow2IoOps, getlength);
    MEMBER(Qcow2IoOps, truncate);
    MEMBER(Qcow2IoOps, discard);
    MEMBER(Qcow2IoOps, close);
    MEMBER(Qcow2IoOps, open_file);
    SIZE(Qcow2Extent);
    MEMBER(Qcow2Extent, start);
    MEMBER(Qcow2Extent, length);
    MEMBER(Qcow2Extent, host_offset);
    MEMBER(Qcow2Extent, flags);
    MEMBER(Qcow2Extent, depth);
    MEMBER(Qcow2Extent, filename);
    MEMBER(Qcow2Extent, reserved);
    CONSTANT(QCOW2_O_RDWR);
    CONSTANT(QCOW2_O_NO_FLUSH);
    CONSTANT(QCOW2_O_FORCE_SHARE);
    CONSTANT(QCOW2_O_NO_LOCK);
    CONSTANT(QCOW2_O_NO_DISCARD);
    CONSTANT(QCOW2_O_COMPAT_2_1);
    CONSTANT(QCOW2_O_NO_BACKING);
    CONSTANT(QCOW2_BLOCK_DATA);
    CONSTANT(QCOW2_BLOCK_ZERO);
    CONSTANT(QCOW2_BLOCK_OFFSET_VALID);
    CONSTANT(QCOW2_BLOCK_ALLOCATED);
    CONSTANT(QCOW2_BLOCK_COMPRESSED);
    CONSTANT(QCOW2_OUTCOME_NONE);
    CONSTANT(QCOW2_OUTCOME_UNCHANGED);
    CONSTANT(QCOW2_OUTCOME_DONE);
    CONSTANT(QCOW2_OUTCOME_UNKNOWN);
    return 0;
}
"#;

/// A thread-local with a destructor would keep the library in memory after dlclose(). The
/// library is made to do something first, on the calling thread, with and without success.
const UNLOADS_THE_LIBRARY: &str = r#"
#include <dlfcn.h>
#include <qcow2_snapshot.h>
#include <stdio.h>
#include <string.h>

static int mapped(void)
{
    char line[4096];
    int found = 0;
    FILE *f = fopen("/proc/self/maps", "r");
    while (f && fgets(line, sizeof(line), f))
        found |= strstr(line, "libqcow2_snapshot") != NULL;
    if (f)
        fclose(f);
    return found;
}

int main(int argc, char **argv)
{
    int (*open_image)(const char *, int, Qcow2Image **, Qcow2Error **);
    void (*free_error)(Qcow2Error *);
    Qcow2Image *bs;
    Qcow2Error *err = NULL;
    void *library = argc == 3 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;

    if (!library)
        return puts("no library"), 2;
    *(void **)&open_image = dlsym(library, "qcow2_open");
    *(void **)&free_error = dlsym(library, "qcow2_error_free");
    if (!open_image || !free_error || !mapped())
        return puts("not loaded"), 2;
    if (open_image(argv[2], 0, &bs, &err) >= 0 || bs || !err)
        return puts("a folder was opened"), 2;
    free_error(err);
    if (dlclose(library) != 0)
        return puts(dlerror()), 2;
    return mapped() ? puts("still loaded"), 1 : 0;
}
"#;
