/* SPDX-License-Identifier: MIT */
/* A verb on a read-only handle is -EACCES and changes nothing. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), 0);
    Bytes before = slurp("image.qcow2");
    Qcow2SnapshotInfo sn = named("x");
    Qcow2Error *err = NULL;

    CHECK_RET(qcow2_snapshot_create(bs, &sn), -EACCES);
    CHECK(has_words(bs));
    CHECK_RET(qcow2_snapshot_goto(bs, "1"), -EACCES);
    CHECK_RET(qcow2_snapshot_delete(bs, "1", NULL, &err), -EACCES);
    take_message(&err);
    CHECK_RET(qcow2_write_snapshots(bs), -EACCES);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_FILE("image.qcow2", before);
    drop(&before);
    return done();
}
