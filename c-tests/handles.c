/* SPDX-License-Identifier: MIT */
/* Handles are independent of each other. */
#include "harness.h"

int main(void)
{
    Qcow2Image *a, *b;
    Bytes want = reference("v3-4k/after-1"), other = reference("v3-1k/after-1");
    Qcow2SnapshotInfo sn = named("four");
    Entry e;

    a = must_open(fixture("v3-4k/before"), QCOW2_O_RDWR);
    CHECK(rename("image.qcow2", "other.qcow2") == 0);
    b = must_open(fixture("v3-1k/before"), QCOW2_O_RDWR);
    CHECK(table_entry(want, 3, &e));
    sn.date_sec = e.date_sec;
    sn.date_nsec = e.date_nsec;
    CHECK_RET(qcow2_snapshot_goto(b, "nothing"), -ENOENT);
    CHECK_RET(qcow2_snapshot_create(a, &sn), 0);
    CHECK_RET(qcow2_last_outcome(b), 1);
    CHECK_RET(qcow2_last_outcome(a), 2);
    memset(sn.id_str, 0, sizeof(sn.id_str));
    CHECK_RET(qcow2_snapshot_create(b, &sn), 0);
    CHECK_RET(qcow2_close(a), 0);
    CHECK_RET(qcow2_close(b), 0);
    CHECK_FILE("other.qcow2", want);
    CHECK_FILE("image.qcow2", other);
    drop(&want);
    drop(&other);
    return done();
}
