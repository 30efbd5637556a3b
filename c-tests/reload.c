/* SPDX-License-Identifier: MIT */
/* reload: what another handle has done to the image is seen, and a verb goes on from there. */
#include "harness.h"

int main(void)
{
    const char *path = fixture("v3-4k/before");
    Qcow2Image *owner = must_open(path, QCOW2_O_RDWR | QCOW2_O_NO_LOCK);
    Qcow2Image *other = must_open(path, QCOW2_O_RDWR | QCOW2_O_NO_LOCK);
    Qcow2SnapshotInfo sn = named("by another"), *tab;
    Qcow2ImageLayout before, after;

    CHECK_RET(qcow2_image_layout(owner, &before), 0);
    CHECK_RET(qcow2_snapshot_goto(other, "1"), 0);
    CHECK_RET(qcow2_snapshot_create(other, &sn), 0);
    CHECK_RET(qcow2_close(other), 0);
    CHECK_RET(qcow2_snapshot_list(owner, &tab), 3);
    qcow2_snapshot_list_free(tab);

    CHECK_RET(qcow2_reload(owner, NULL), 0);
    CHECK_RET(qcow2_image_layout(owner, &after), 0);
    CHECK(after.snapshots_offset != before.snapshots_offset);
    CHECK_U64(after.nb_snapshots, 4);
    CHECK_RET(qcow2_snapshot_list(owner, &tab), 4);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_snapshot_delete(owner, NULL, "by another", NULL), 0);
    CHECK_RET(qcow2_reload(NULL, NULL), -EINVAL);
    CHECK_RET(qcow2_close(owner), 0);

    if (have("qemu-img"))
        CHECK_RET(shell("qemu-img check image.qcow2"), 0);

    /* What is not an image any more spends the handle. */
    owner = must_open(path, 0);
    CHECK_RET(truncate(path, 0), 0);
    CHECK(qcow2_reload(owner, NULL) < 0);
    CHECK_RET(qcow2_image_layout(owner, &after), -EIO);
    CHECK_RET(qcow2_close(owner), 0);
    return done();
}
