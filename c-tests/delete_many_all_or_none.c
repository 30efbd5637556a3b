/* SPDX-License-Identifier: MIT */
/* If one of the snapshots is not there, none is deleted, and the message names it. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR);
    Bytes before = slurp("image.qcow2");
    const char *const some[] = {"1", "not there", NULL}, *const null[] = {"1", NULL};
    Qcow2Error *err = NULL;

    CHECK_RET(qcow2_snapshot_delete_many(bs, some, 2, &err), -ENOENT);
    CHECK(strstr(take_message(&err), "'not there'"));
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_UNCHANGED);
    CHECK_RET(qcow2_snapshot_delete_many(bs, null, 2, &err), -EINVAL);
    CHECK(strstr(take_message(&err), "NULL"));
    CHECK_RET(qcow2_snapshot_delete_many(bs, NULL, 0, NULL), 0);
    CHECK_FILE("image.qcow2", before);
    CHECK_RET(qcow2_close(bs), 0);

    bs = must_open("image.qcow2", 0);
    CHECK_RET(qcow2_snapshot_delete_many(bs, some, 1, NULL), -EACCES);
    CHECK_FILE("image.qcow2", before);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&before);
    return done();
}
