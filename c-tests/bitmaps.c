/* SPDX-License-Identifier: MIT */
/* create and delete leave persistent bitmaps where they are, valid for QEMU. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("bitmap-goto/before"), QCOW2_O_RDWR);
    Bytes before = slurp("image.qcow2"), after;
    Qcow2SnapshotInfo sn = named("two");

    CHECK_U64(be(before, 88, 8), 1);
    CHECK_RET(qcow2_snapshot_goto(bs, "one"), -EBUSY);
    CHECK_FILE("image.qcow2", before);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(qcow2_snapshot_delete(bs, "1", NULL, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    after = slurp("image.qcow2");
    /* The header is untouched but for the snapshot table's place. */
    CHECK(memcmp(before.data, after.data, 60) == 0);
    CHECK(memcmp(before.data + 72, after.data + 72, 4096 - 72) == 0);
    drop(&before);
    drop(&after);
    need("qemu-img");
    CHECK(shell("qemu-img check image.qcow2") == 0);
    CHECK(shell("qemu-img info image.qcow2 | tr '\\n' ' ' | grep 'name: dirty' | grep -v in-use") == 0);
    return done();
}
