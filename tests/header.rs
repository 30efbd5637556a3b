//! The C header: it is what cbindgen makes today, and every C and C++ program can include it.

#[path = "header/generate.rs"]
mod generate;
#[path = "abi/toolbox.rs"]
mod toolbox;

use std::ffi::CStr;
use toolbox::{compare_with_golden, compiler, root, run};

const COMMITTED: &str = "include/qcow2_snapshot.h";

#[test]
fn the_committed_header_is_what_cbindgen_makes() {
    compare_with_golden(COMMITTED, &generate::header());
}

#[test]
fn the_version_macros_are_the_version_of_the_library() {
    let version = unsafe_version();
    let header = std::fs::read_to_string(root().join(COMMITTED)).expect("the header is committed");
    let value = |name: &str| {
        let start = format!("#define QCOW2_SNAPSHOT_VERSION{name} ");
        let line = header.lines().find_map(|l| l.strip_prefix(&start));
        line.unwrap_or_else(|| panic!("no QCOW2_SNAPSHOT_VERSION{name}"))
    };
    assert_eq!(value(""), format!("\"{version}\""));
    assert_eq!(
        format!(
            "{}.{}.{}",
            value("_MAJOR"),
            value("_MINOR"),
            value("_PATCH")
        ),
        version
    );
}

#[allow(unsafe_code)]
fn unsafe_version() -> String {
    // SAFETY: the function returns a static string that ends in NUL.
    let version = unsafe { CStr::from_ptr(qcow2_snapshot::capi::qcow2_version()) };
    version.to_str().expect("ASCII").to_owned()
}

const NO_QEMU_NAMES: &str = "-DQCOW2_SNAPSHOT_NO_QEMU_NAMES";
const COMPAT_2_1: &str = "-DQCOW2_SNAPSHOT_COMPAT_2_1";

/// Every combination of the header's macros.
const MACROS: [&[&str]; 4] = [
    &[],
    &[NO_QEMU_NAMES],
    &[COMPAT_2_1],
    &[NO_QEMU_NAMES, COMPAT_2_1],
];

#[test]
fn the_header_compiles_as_every_c_under_every_macro() {
    for language in ["c89", "gnu89", "c99", "gnu99", "c11", "c17"] {
        compiles(false, &[&format!("-std={language}")]);
    }
}

#[test]
fn the_header_compiles_as_every_cpp_under_every_macro() {
    for language in ["c++98", "gnu++98", "c++11", "c++17"] {
        compiles(true, &["-xc++", &format!("-std={language}")]);
    }
}

/// Included twice, alone and first, and its names used.
fn compiles(cpp: bool, language: &[&str]) {
    let dir = tempfile::tempdir().expect("a scratch folder");
    let source = dir.path().join("uses_the_header.c");
    std::fs::write(&source, USES_THE_HEADER).expect("the scratch folder is writable");
    for macros in MACROS {
        let Some(mut command) = compiler(cpp) else {
            return;
        };
        command.args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]);
        command.args(language).args(macros);
        command.arg("-I").arg(root().join("include")).arg(&source);
        let Some(output) = run(&mut command, "that the header compiles") else {
            return;
        };
        assert!(
            output.status.success(),
            "with {macros:?}:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

const USES_THE_HEADER: &str = r#"
#include <qcow2_snapshot.h>
#include <qcow2_snapshot.h>

#ifdef QCOW2_SNAPSHOT_NO_QEMU_NAMES
/* What a program has that includes QEMU's headers. */
typedef struct BlockDriverState BlockDriverState;
typedef struct Error Error;
typedef struct QEMUSnapshotInfo { int theirs; } QEMUSnapshotInfo;
#else
/* The signatures of block/qcow2-snapshot.c. */
int (*create)(BlockDriverState *bs, QEMUSnapshotInfo *sn_info) = qcow2_snapshot_create;
int (*revert)(BlockDriverState *bs, const char *snapshot_id) = qcow2_snapshot_goto;
int (*remove_one)(BlockDriverState *bs, const char *snapshot_id, const char *name, Error **errp)
    = qcow2_snapshot_delete;
int (*list)(BlockDriverState *bs, QEMUSnapshotInfo **psn_tab) = qcow2_snapshot_list;
int (*load_tmp)(BlockDriverState *bs, const char *snapshot_id, const char *name, Error **errp)
    = qcow2_snapshot_load_tmp;
void (*free_all)(BlockDriverState *bs) = qcow2_free_snapshots;
int (*read_all)(BlockDriverState *bs) = qcow2_read_snapshots;
int (*write_all)(BlockDriverState *bs) = qcow2_write_snapshots;
#endif

/* A pointer to an open is right with and without the macros of 2014. */
int (*by_name)(const char *, int, Qcow2Image **, Qcow2Error **) = qcow2_open;

#ifdef QCOW2_SNAPSHOT_COMPAT_2_1
typedef char size_of_2014[sizeof(Qcow2SnapshotInfo) == 408 ? 1 : -1];
#else
typedef char size_of_today[sizeof(Qcow2SnapshotInfo) == 416 ? 1 : -1];
#endif

struct Qcow2Image *tagged;
int flags = QCOW2_O_RDWR | QCOW2_O_NO_BACKING;

int use(Qcow2Image **pbs, Qcow2Error **errp);
int use(Qcow2Image **pbs, Qcow2Error **errp)
{
    return qcow2_open("x", flags, pbs, errp) + qcow2_open_fd(3, 0, pbs, errp)
        + qcow2_open_io(NULL, NULL, 0, pbs, errp);
}
"#;

#[test]
fn without_prototypes_the_header_stands_beside_functions_of_the_same_names() {
    let dir = tempfile::tempdir().expect("a scratch folder");
    let source = dir.path().join("no_prototypes.c");
    std::fs::write(&source, NO_PROTOTYPES).expect("the scratch folder is writable");
    let Some(mut command) = compiler(false) else {
        return;
    };
    command.args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]);
    command.arg("-I").arg(root().join("include")).arg(&source);
    let Some(output) = run(&mut command, "that prototypes can be left out") else {
        return;
    };
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
}

const NO_PROTOTYPES: &str = r#"
/* What QEMU's block/qcow2.h declares. */
typedef struct BlockDriverState BlockDriverState;
typedef struct Error Error;
typedef struct QEMUSnapshotInfo QEMUSnapshotInfo;
int qcow2_snapshot_create(BlockDriverState *bs, QEMUSnapshotInfo *sn_info);
int qcow2_write_snapshots(void *other, int signature);

#define QCOW2_SNAPSHOT_NO_QEMU_NAMES
#define QCOW2_SNAPSHOT_NO_PROTOTYPES
#include <qcow2_snapshot.h>

int call(const Qcow2Api *api, Qcow2Image *image);
int call(const Qcow2Api *api, Qcow2Image *image)
{
    return api->snapshot_goto(image, "1");
}
"#;

#[test]
fn the_table_of_functions_has_them_all_in_the_order_of_the_header() {
    let header = std::fs::read_to_string(root().join(COMMITTED)).expect("the header is committed");
    let (types, functions) = header
        .split_once("#ifndef QCOW2_SNAPSHOT_NO_PROTOTYPES")
        .expect("functions are guarded");
    let (_, table) = types
        .split_once("typedef struct Qcow2Api {")
        .expect("is there");
    let members: Vec<String> = table
        .lines()
        .take_while(|line| !line.starts_with('}'))
        .filter_map(|line| Some(line.split_once("(*")?.1.split_once(')')?.0.to_owned()))
        .collect();
    let names: Vec<String> = functions
        .lines()
        .take_while(|line| !line.starts_with("#endif"))
        .filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()))
        .filter_map(|line| {
            line.split_once("qcow2_")?
                .1
                .split_once('(')
                .map(|(n, _)| n.to_owned())
        })
        .collect();
    assert!(names.len() > 20);
    assert_eq!(members, names);
}
