#!/bin/bash
# A program that has qcow2_snapshot_create() and others of QEMU's itself, linked with the static library
# under other names: each function is its own.
set -eu
cd "$(dirname "$0")/.."
P=${PREFIXED:-qs_}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cat > "$scratch/both.c" << END
#include <stdio.h>
#define QCOW2_SNAPSHOT_NO_QEMU_NAMES
#include "${P}qcow2_snapshot.h"

/* QEMU's, as a program has them that is made of QEMU. */
typedef struct BlockDriverState { int theirs; } BlockDriverState;
int qcow2_snapshot_create(BlockDriverState *bs, void *sn_info);
int qcow2_snapshot_create(BlockDriverState *bs, void *sn_info) { (void)sn_info; return bs->theirs; }
int qcow2_open(int anything);
int qcow2_open(int anything) { return anything; }

int main(void)
{
    BlockDriverState theirs = { 42 };
    Qcow2SnapshotInfo sn = { .name = "x" };
    Qcow2Image *bs = NULL;

    if (qcow2_snapshot_create(&theirs, NULL) != 42 || qcow2_open(7) != 7)
        return 1;
    if (${P}qcow2_snapshot_create(NULL, &sn) != -22 || ${P}qcow2_open("/nowhere", 0, &bs, NULL) != -2)
        return 2;
    printf("%s\\n", ${P}qcow2_version());
    return 0;
}
END
${CC:-cc} -std=c99 -Wall -Werror -Ibuild -o "$scratch/both" "$scratch/both.c" "build/lib${P}qcow2_snapshot.a" \
    -lutil -lrt -lpthread -lm -ldl
version=$("$scratch/both")
test "$version" = "$(sed -n 's/^#define QCOW2_SNAPSHOT_VERSION "\(.*\)"/\1/p' include/qcow2_snapshot.h)"
! nm --defined-only -g "build/lib${P}qcow2_snapshot.a" 2> /dev/null | grep -q ' T qcow2_'
echo "a program with QEMU's functions links with ${P}qcow2_*"
