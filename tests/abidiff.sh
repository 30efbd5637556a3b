#!/bin/bash
# The interface is the committed one (tests/abi/library.abi), or more than it: types by abidiff.
# ABI_BLESS=1 writes the description again.
#
# libabigail does not read types from Rust's debugging information. So it reads a library of empty functions,
# made from the header (which cbindgen made from the Rust sources) and linked with the library's own version script;
# tests/abi.rs compares the symbols of the real one.
set -eu
cd "$(dirname "$0")/.."
for program in abidw abidiff python3; do
    command -v $program > /dev/null || {
        echo "SKIPPED: no $program here (Debian: abigail-tools): the types of the interface were not compared"
        exit 0
    }
done
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
${CC:-cc} -E -P -DQCOW2_SNAPSHOT_NO_QEMU_NAMES -include include/qcow2_snapshot.h -xc /dev/null | python3 -c '
import re, sys
empty = r"\1\n{\n    __builtin_trap();\n}"
print(re.sub(r"^((?:[a-z]|struct Qcow2)[^;{}=]*\bqcow2_\w+\([^;{}]*\));", empty, sys.stdin.read(), flags=re.M))
' > "$scratch/empty.c"
${CC:-cc} -g -O0 -w -shared -fPIC -o "$scratch/libqcow2_snapshot.so" "$scratch/empty.c" \
    -Wl,--version-script=src/libqcow2_snapshot.map -Wl,-soname,libqcow2_snapshot.so.0
describe() {
    abidw --exported-interfaces-only --no-corpus-path --no-comp-dir-path --no-show-locs --no-elf-needed \
        --out-file "$1" "$scratch/libqcow2_snapshot.so"
}
if [ "${ABI_BLESS:-}" ]; then
    describe tests/abi/library.abi
    exit
fi
# What abidiff answers, in bits: 1 and 2 errors, 4 something changed, 8 a change that breaks.
status=0
abidiff --no-added-syms tests/abi/library.abi "$scratch/libqcow2_snapshot.so" || status=$?
if [ "$status" -ne 0 ]; then
    echo "the types of the binary interface have changed (abidiff: $status); docs/abi.md says what may;"
    echo 'what only grows (a member of a size-prefixed table, say) is written again by ABI_BLESS=1 tests/abidiff.sh'
    exit 1
fi
functions=$(grep -c '<function-decl .*elf-symbol-id' tests/abi/library.abi)
[ "$functions" -ge 20 ] || { echo "only $functions functions are described"; exit 1; }
echo "abidiff: $functions functions with their types are as described, or there are more"
