/* SPDX-License-Identifier: MIT */
/* With QCOW2_SNAPSHOT_NO_QEMU_NAMES a program has QEMU's names for itself. */
#define QCOW2_SNAPSHOT_NO_QEMU_NAMES

/* As in QEMU's own headers. */
typedef struct BlockDriverState { int theirs; } BlockDriverState;
typedef struct Error { int theirs; } Error;
typedef struct QEMUSnapshotInfo { int theirs; } QEMUSnapshotInfo;

#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/before"), 0);

    CHECK_U64(sizeof(QEMUSnapshotInfo), sizeof(int));
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
