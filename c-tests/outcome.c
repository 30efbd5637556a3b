/* SPDX-License-Identifier: MIT */
/* last_outcome: 0 before any verb, 1 after a refusal, 2 after success. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/before"), QCOW2_O_RDWR);
    Qcow2SnapshotInfo sn = named("x"), *tab;

    CHECK_RET(qcow2_last_outcome(bs), 0);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), 3);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_last_outcome(bs), 0);
    CHECK_RET(qcow2_snapshot_goto(bs, "nothing"), -ENOENT);
    CHECK_RET(qcow2_last_outcome(bs), 1);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(qcow2_last_outcome(bs), 2);
    CHECK_RET(qcow2_snapshot_delete(bs, "99", NULL, NULL), -ENOENT);
    CHECK_RET(qcow2_last_outcome(bs), 1);
    CHECK_RET(qcow2_snapshot_delete(bs, "4", NULL, NULL), 0);
    CHECK_RET(qcow2_last_outcome(bs), 2);
    CHECK_RET(qcow2_write_snapshots(bs), 0);
    CHECK_RET(qcow2_last_outcome(bs), 2);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
