#!/bin/bash
# "make install" into scratch folders, and what a user does then: build programs with pkg-config,
# shared and static, run them, load and unload the library, read the manual, uninstall.
# Called by "make install-smoke", with CC, CARGO, MAKE and CARGO_TARGET_DIR as there.
set -u
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc} MAKE=${MAKE:-make}
dir=$(mktemp -d "${TMPDIR:-/tmp}/qcow2-install.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
unset LD_LIBRARY_PATH PKG_CONFIG_PATH PKG_CONFIG_SYSROOT_DIR
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
flags='-std=c99 -Wall -Wextra -Wpedantic -Werror'
passed=0 failed=0 skipped=0

# claim NAME COMMAND...: a command that must succeed; its words are shown if it does not.
claim() {
    local name=$1
    shift
    if "$@" > "$dir/log" 2>&1; then
        echo "ok $name"
        passed=$((passed + 1))
    else
        echo "FAIL $name: $*"
        sed 's/^/    /' "$dir/log"
        failed=$((failed + 1))
    fi
}
skip() {
    echo "SKIP $1: $2"
    skipped=$((skipped + 1))
}
install_make() { "$MAKE" --no-print-directory "$@"; }
files() { (cd "$1" && find . ! -type d | sort); }

# ---- a package: DESTDIR, and every folder elsewhere ----------------------------------------
stage="$dir/stage with a space"
there=(DESTDIR="$stage" PREFIX=/usr LIBDIR=/usr/lib/some-linux-gnu MANDIR=/usr/man)
staged_right() {
    diff - <(files "$stage" | grep -v '/man3/') << END || return 1
./usr/bin/qcow2-snapshot
./usr/include/qcow2_snapshot.h
./usr/lib/some-linux-gnu/libqcow2_snapshot.a
./usr/lib/some-linux-gnu/libqcow2_snapshot.so
./usr/lib/some-linux-gnu/libqcow2_snapshot.so.0
./usr/lib/some-linux-gnu/libqcow2_snapshot.so.$version
./usr/lib/some-linux-gnu/pkgconfig/qcow2_snapshot.pc
./usr/man/man1/qcow2-snapshot.1
./usr/share/bash-completion/completions/qcow2-snapshot
./usr/share/fish/vendor_completions.d/qcow2-snapshot.fish
./usr/share/zsh/site-functions/_qcow2-snapshot
END
    # A page for each function and the overview; no word of the scratch folder, no empty file.
    [ "$(files "$stage/usr/man/man3" | wc -l)" -eq $(($(wc -l < tests/abi/symbols.txt) + 1)) ] &&
        ! grep -rIl "$dir" "$stage" && [ -z "$(find "$stage" -type f -size 0)" ]
}
claim install-staged install_make install "${there[@]}"
claim every-file-in-its-place staged_right
claim uninstall install_make uninstall "${there[@]}"
claim nothing-is-left test -z "$(files "$stage")"

# ---- a user's own prefix --------------------------------------------------------------------
prefix=$dir/prefix lib=$dir/prefix/lib
claim install install_make install PREFIX="$prefix"
export PKG_CONFIG_PATH=$lib/pkgconfig
if ! command -v pkg-config > /dev/null; then
    skip pkg-config "no pkg-config here: programs were not built against what is installed"
    echo "$passed passed, $failed failed, $skipped skipped"
    [ $failed -eq 0 ]
    exit
fi
same_private_libraries() {
    local named ours
    # What rustc names for a static library, without what every C compiler adds. Of an empty
    # crate, which is quick; that it is enough for ours too, the programs below show.
    named=$(cd "$dir" && : > empty.rs && ${RUSTC:-rustc} --crate-type staticlib \
        --print native-static-libs empty.rs 2>&1 | sed -n 's/.*native-static-libs: //p')
    [ -n "$named" ] || { echo "rustc names no libraries"; return 1; }
    ours=$(pkg-config --static --libs-only-l qcow2_snapshot)
    diff <(tr ' ' '\n' <<< "$named" | grep -vxE -e '-lgcc_s|-lc|' | sort) \
        <(tr ' ' '\n' <<< "$ours" | grep -vxE -e '-lqcow2_snapshot|' | sort)
}
claim version-for-pkg-config pkg-config --exact-version="$version" qcow2_snapshot
# A package that is moved, or looked at from outside (--define-prefix, --define-variable), has one place to change.
movable() {
    local flags
    [ "$(pkg-config --variable=prefix qcow2_snapshot)" = "$prefix" ] || return 1
    flags=$(pkg-config --define-variable=prefix=/elsewhere --cflags --libs qcow2_snapshot)
    [ "$(echo $flags)" = '-I/elsewhere/include -L/elsewhere/lib -lqcow2_snapshot' ]
}
claim one-prefix-in-the-pkg-config-file movable
claim private-libraries-are-those-of-rustc same_private_libraries

# Three ways to link: shared; our archive in a program that is dynamic otherwise; wholly static.
build_and_run() {
    local way=$1 out=$dir/$1 flags_of_pc libs program
    mkdir -p "$out"
    flags_of_pc=$(pkg-config --cflags qcow2_snapshot)
    case $way in
    shared) libs="$(pkg-config --libs qcow2_snapshot) -Wl,-rpath,$lib" ;;
    archive) libs="$(pkg-config --static --libs qcow2_snapshot)"
        libs=${libs/-lqcow2_snapshot/-l:libqcow2_snapshot.a} ;;
    static) libs="-static $(pkg-config --static --libs qcow2_snapshot)" ;;
    esac
    for program in demo list manual export-snapshot incremental; do
        # shellcheck disable=SC2086
        $CC $flags $flags_of_pc -o "$out/$program" "examples/$program.c" $libs || return 1
    done
    if [ "$way" = shared ]; then
        ldd "$out/demo" | grep -q "libqcow2_snapshot.so.0 => $lib/" || return 1
    else
        ! readelf -d "$out/demo" | grep 'NEEDED.*qcow2' || return 1
    fi
    (cd "$out" && ./demo disk.qcow2 && ./list disk.qcow2 && ./manual disk.qcow2 &&
        ./export-snapshot disk.qcow2 tuesday tuesday.raw && [ -s tuesday.raw ])
}
claim examples-shared build_and_run shared
claim examples-with-our-archive build_and_run archive
printf 'int main(void) { return 0; }\n' > "$dir/empty.c"
if $CC -static -o "$dir/empty" "$dir/empty.c" 2> /dev/null; then
    claim examples-static build_and_run static
else
    skip examples-static "no static C library here: wholly static programs were not built"
fi

# ---- load, use on a thread, unload ----------------------------------------------------------
cat > "$dir/unload.c" << 'END'
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <qcow2_snapshot.h>

static const char *library, *image;

static int mapped(void)
{
    char line[4096];
    int found = 0;
    FILE *f = fopen("/proc/self/maps", "r");
    while (f && fgets(line, sizeof(line), f))
        found += strstr(line, "libqcow2_snapshot") != NULL;
    if (f)
        fclose(f);
    return found;
}

static void *use(void *failure)
{
    int (*open_image)(const char *, int, Qcow2Image **, Qcow2Error **);
    int (*list)(Qcow2Image *, Qcow2SnapshotInfo **);
    int (*create)(Qcow2Image *, Qcow2SnapshotInfo *);
    int (*delete_one)(Qcow2Image *, const char *, const char *, Qcow2Error **);
    void (*list_free)(Qcow2SnapshotInfo *);
    int (*close_image)(Qcow2Image *);
    Qcow2SnapshotInfo sn = {.name = "on a thread"}, *tab;
    Qcow2Image *bs;
    void *lib = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    int n;

    *(const char **)failure = "not loaded";
    if (!lib || !mapped())
        return NULL;
    *(void **)&open_image = dlsym(lib, "qcow2_open");
    *(void **)&list = dlvsym(lib, "qcow2_snapshot_list", "QCOW2_SNAPSHOT_0.1");
    *(void **)&create = dlsym(lib, "qcow2_snapshot_create");
    *(void **)&delete_one = dlsym(lib, "qcow2_snapshot_delete");
    *(void **)&list_free = dlsym(lib, "qcow2_snapshot_list_free");
    *(void **)&close_image = dlsym(lib, "qcow2_close");
    *(const char **)failure = "not used";
    if (!list || open_image(image, QCOW2_O_RDWR, &bs, NULL) < 0 || create(bs, &sn) < 0)
        return NULL;
    n = list(bs, &tab);
    if (n < 1 || strcmp(tab[n - 1].name, sn.name) != 0)
        return NULL;
    list_free(tab);
    if (delete_one(bs, sn.id_str, NULL, NULL) < 0 || close_image(bs) < 0)
        return NULL;
    *(const char **)failure = dlclose(lib) == 0 ? NULL : "not closed";
    /* The thread is still there, and so would be what the library had left on it. */
    if (!*(const char **)failure && mapped())
        *(const char **)failure = "still mapped on the thread that used it";
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    const char *failure = "no thread";

    if (argc != 3)
        return 2;
    library = argv[1];
    image = argv[2];
    for (int round = 0; round < 3; round++) {
        if (pthread_create(&thread, NULL, use, &failure) != 0 || pthread_join(thread, NULL) != 0)
            failure = "no thread";
        if (failure)
            return puts(failure), 1;
        if (mapped())
            return puts("still mapped after the thread's end"), 1;
    }
    return 0;
}
END
# shellcheck disable=SC2086,SC2046
claim build-a-program-that-loads-it $CC -std=c99 -D_GNU_SOURCE -Wall -Wextra -Werror \
    $(pkg-config --cflags qcow2_snapshot) -o "$dir/unload" "$dir/unload.c" -ldl -lpthread
claim loaded-used-on-a-thread-unloaded \
    "$dir/unload" "$lib/libqcow2_snapshot.so.0" "$dir/shared/disk.qcow2"

# ---- the rest of what was installed ---------------------------------------------------------
exports_only_versioned() {
    readelf --dyn-syms --wide "$lib/libqcow2_snapshot.so" |
        awk '$1 ~ /^[0-9]+:$/ && $5 != "LOCAL" && $7 != "UND" && $7 != "ABS" { print $8 }' |
        sort > "$dir/exported"
    diff "$dir/exported" <(sort tests/abi/versions.txt)
}
claim versioned-symbols-and-no-others exports_only_versioned
if command -v python3 > /dev/null; then
    claim python-finds-the-soname env LD_LIBRARY_PATH="$lib" \
        python3 examples/list.py libqcow2_snapshot.so.0 "$dir/shared/disk.qcow2"
fi
claim the-tool-runs "$prefix/bin/qcow2-snapshot" -l "$dir/shared/disk.qcow2"
claim bash-reads-its-completion bash -n "$prefix/share/bash-completion/completions/qcow2-snapshot"
if command -v man > /dev/null && man --version > /dev/null 2>&1; then
    one_page() { [ "$(man -M "$prefix/share/man" "$@" | wc -l)" -gt 20 ]; }
    claim man-finds-the-library one_page 3 libqcow2_snapshot
    claim man-finds-a-function one_page qcow2_snapshot_create
    claim man-finds-the-tool one_page 1 qcow2-snapshot
    pages_without_warnings() {
        for page in "$prefix"/share/man/man?/*; do
            man --warnings -E UTF-8 -l "$page" 2>&1 > /dev/null
        done > "$dir/warnings"
        cat "$dir/warnings"
        [ ! -s "$dir/warnings" ]
    }
    claim man-warns-of-nothing pages_without_warnings
else
    skip man "no man here: the installed pages were not looked up"
fi
claim uninstall-again install_make uninstall PREFIX="$prefix"
claim nothing-is-left-again test -z "$(files "$prefix")"

echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
