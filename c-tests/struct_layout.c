/* SPDX-License-Identifier: MIT */
/* The structs have QEMU's members at QEMU's offsets. */
#include <stddef.h>

#include "harness.h"

int main(void)
{
    CHECK_U64(sizeof(Qcow2SnapshotInfo), 416);
    CHECK_U64(offsetof(Qcow2SnapshotInfo, id_str), 0);
    CHECK_U64(offsetof(Qcow2SnapshotInfo, name), 128);
    CHECK_U64(offsetof(Qcow2SnapshotInfo, vm_state_size), 384);
    CHECK_U64(offsetof(Qcow2SnapshotInfo, date_sec), 392);
    CHECK_U64(offsetof(Qcow2SnapshotInfo, date_nsec), 396);
    CHECK_U64(offsetof(Qcow2SnapshotInfo, vm_clock_nsec), 400);
    CHECK_U64(offsetof(Qcow2SnapshotInfo, icount), 408);
    CHECK_U64(offsetof(Qcow2IoOps, size), 0);
    return done();
}
