/* SPDX-License-Identifier: MIT */
/* read_snapshots loads what another handle has written. */
#include "harness.h"

int main(void)
{
    Qcow2Image *reader = must_open(fixture("v3-4k/before"), QCOW2_O_NO_LOCK);
    Qcow2Image *writer = must_open("image.qcow2", QCOW2_O_RDWR | QCOW2_O_NO_LOCK);
    Qcow2SnapshotInfo sn = named("x"), *tab;

    CHECK_RET(qcow2_snapshot_create(writer, &sn), 0);
    CHECK_RET(qcow2_close(writer), 0);
    CHECK_RET(qcow2_read_snapshots(reader), 0);
    CHECK_RET(qcow2_snapshot_list(reader, &tab), 4);
    CHECK_STR(tab[3].name, "x");
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_close(reader), 0);
    return done();
}
