/* SPDX-License-Identifier: MIT */
/* delete takes an ID, a name, or both of the same entry. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR);
    Bytes by_name;

    CHECK_RET(qcow2_snapshot_delete(bs, "2", "three", NULL), -ENOENT);
    CHECK_RET(qcow2_snapshot_delete(bs, "two", NULL, NULL), -ENOENT);
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, "2", NULL), -ENOENT);
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, "two", NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    by_name = slurp("image.qcow2");

    bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR);
    CHECK_RET(qcow2_snapshot_delete(bs, "2", NULL, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_FILE("image.qcow2", by_name);

    bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR);
    CHECK_RET(qcow2_snapshot_delete(bs, "2", "two", NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_FILE("image.qcow2", by_name);
    drop(&by_name);
    return done();
}
