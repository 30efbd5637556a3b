//! The binary interface: what a program that was linked yesterday relies on today.

#[path = "abi/toolbox.rs"]
mod toolbox;

use std::path::{Path, PathBuf};
use std::process::Command;
use toolbox::{compare_with_golden, compile_and_run, compiler, root, run, shared_library};

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

/// The library of "make", linked from Cargo's archive by the same script.
fn linked_by_make(dir: &Path) -> Option<PathBuf> {
    let out = dir.join("libqcow2_snapshot.so");
    let mut link = Command::new(root().join("tools/link-shared"));
    link.arg(shared_library().with_extension("a")).arg(&out);
    let compiler = compiler(false)?;
    link.env("CC", compiler.get_program());
    let output = run(&mut link, "the library with symbol versions")?;
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(out)
}

/// The answer of a program that looks at a library.
fn told(program: &str, arguments: &[&str], library: &Path) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).arg(library);
    let output = run(&mut command, "what the library of \"make\" exports")?;
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn the_installed_library_exports_the_same_with_versions_and_nothing_else() {
    let dir = tempfile::tempdir().expect("a scratch folder");
    let Some(library) = linked_by_make(dir.path()) else {
        return;
    };
    let Some(table) = told("readelf", &["--dyn-syms", "--wide"], &library) else {
        return;
    };
    let mut exported = Vec::new();
    for line in table.lines() {
        // Num: Value Size Type Bind Vis Ndx Name. ABS: the name of a version itself.
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [_, _, _, _, bind, _, index, name] = fields[..] {
            if bind != "LOCAL" && bind != "Bind" && index != "UND" && index != "ABS" {
                exported.push(format!("{name}\n"));
            }
        }
    }
    exported.sort();
    compare_with_golden("tests/abi/versions.txt", &exported.concat());

    let names: String = exported
        .iter()
        .filter_map(|line| line.split_once("@@"))
        .map(|(name, _)| format!("{name}\n"))
        .collect();
    let symbols = std::fs::read_to_string(root().join("tests/abi/symbols.txt")).expect("is there");
    assert_eq!(names, symbols, "src/libqcow2_snapshot.map lacks a function");
}

#[test]
fn the_library_does_not_ask_the_program_for_its_own_functions() {
    let dir = tempfile::tempdir().expect("a scratch folder");
    let Some(library) = linked_by_make(dir.path()) else {
        return;
    };
    for library in [library, shared_library()] {
        let Some(dynamic) = told("readelf", &["--dynamic", "--wide"], &library) else {
            return;
        };
        assert!(dynamic.contains("SYMBOLIC"), "{dynamic}");
        // A relocation by name is what another definition of that name can catch.
        let relocations = told("readelf", &["--relocs", "--wide"], &library).unwrap_or_default();
        let own: Vec<&str> = relocations
            .lines()
            .filter(|line| line.split_whitespace().any(|w| w.starts_with("qcow2_")))
            .collect();
        assert!(own.is_empty(), "{own:?}");
        for what in ["libqcow2_snapshot.so.0", "NOW"] {
            assert!(dynamic.contains(what), "no {what}: {dynamic}");
        }
        assert!(!dynamic.contains("TEXTREL"), "{dynamic}");
    }
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
    for library in [Some(shared_library()), linked_by_make(dir.path())] {
        let Some(library) = library else {
            return;
        };
        compile_and_run(
            dir.path(),
            UNLOADS_THE_LIBRARY,
            &[],
            &[library.as_os_str(), dir.path().as_os_str()],
        );
    }
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
    MEMBER(Qcow2IoOps, event);
    MEMBER(Qcow2IoOps, backing_length);
    MEMBER(Qcow2IoOps, discard_kind);
    SIZE(Qcow2Extent);
    MEMBER(Qcow2Extent, start);
    MEMBER(Qcow2Extent, length);
    MEMBER(Qcow2Extent, host_offset);
    MEMBER(Qcow2Extent, flags);
    MEMBER(Qcow2Extent, depth);
    MEMBER(Qcow2Extent, filename);
    MEMBER(Qcow2Extent, reserved);
    SIZE(Qcow2SnapshotLayout);
    MEMBER(Qcow2SnapshotLayout, id);
    MEMBER(Qcow2SnapshotLayout, name);
    MEMBER(Qcow2SnapshotLayout, l1_table_offset);
    MEMBER(Qcow2SnapshotLayout, disk_size);
    MEMBER(Qcow2SnapshotLayout, vm_state_size);
    MEMBER(Qcow2SnapshotLayout, l1_size);
    MEMBER(Qcow2SnapshotLayout, extra_data_size);
    MEMBER(Qcow2SnapshotLayout, unknown_extra_data);
    MEMBER(Qcow2SnapshotLayout, reserved);
    SIZE(Qcow2ImageLayout);
    MEMBER(Qcow2ImageLayout, version);
    MEMBER(Qcow2ImageLayout, cluster_bits);
    MEMBER(Qcow2ImageLayout, refcount_order);
    MEMBER(Qcow2ImageLayout, changed);
    MEMBER(Qcow2ImageLayout, incompatible_features);
    MEMBER(Qcow2ImageLayout, compatible_features);
    MEMBER(Qcow2ImageLayout, autoclear_features);
    MEMBER(Qcow2ImageLayout, size);
    MEMBER(Qcow2ImageLayout, l1_table_offset);
    MEMBER(Qcow2ImageLayout, refcount_table_offset);
    MEMBER(Qcow2ImageLayout, snapshots_offset);
    MEMBER(Qcow2ImageLayout, l1_size);
    MEMBER(Qcow2ImageLayout, refcount_table_clusters);
    MEMBER(Qcow2ImageLayout, nb_snapshots);
    MEMBER(Qcow2ImageLayout, reserved32);
    MEMBER(Qcow2ImageLayout, l1_table);
    MEMBER(Qcow2ImageLayout, snapshots_size);
    MEMBER(Qcow2ImageLayout, refcount_table);
    MEMBER(Qcow2ImageLayout, reserved);
    SIZE(Qcow2Change);
    MEMBER(Qcow2Change, start);
    MEMBER(Qcow2Change, length);
    MEMBER(Qcow2Change, from_flags);
    MEMBER(Qcow2Change, to_flags);
    MEMBER(Qcow2Change, reserved);
    SIZE(Qcow2Usage);
    MEMBER(Qcow2Usage, referenced);
    MEMBER(Qcow2Usage, exclusive);
    MEMBER(Qcow2Usage, tables);
    MEMBER(Qcow2Usage, vm_state);
    MEMBER(Qcow2Usage, allocated);
    MEMBER(Qcow2Usage, reserved);
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
    CONSTANT(QCOW2_BLOCK_BEYOND);
    CONSTANT(QCOW2_CHANGE_COMPARE);
    CONSTANT(QCOW2_OUTCOME_NONE);
    CONSTANT(QCOW2_OUTCOME_UNCHANGED);
    CONSTANT(QCOW2_OUTCOME_DONE);
    CONSTANT(QCOW2_OUTCOME_UNKNOWN);
    CONSTANT(QCOW2_PROGRESS_CHECK);
    CONSTANT(QCOW2_PROGRESS_PREPARE);
    CONSTANT(QCOW2_PROGRESS_RECLAIM);
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
