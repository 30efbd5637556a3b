/* SPDX-License-Identifier: MIT */
/* What usage calls exclusive is what deleting frees, and nothing is written to find out. */
#include "harness.h"

/* Clusters of 4 KiB with a 16-bit count, by the first refcount block. */
static uint64_t in_use(void)
{
    Bytes image = slurp("image.qcow2");
    uint64_t block = be(image, be(image, 48, 8), 8), n = 0;

    for (uint64_t i = 0; i < 2048; i++)
        n += be(image, block + 2 * i, 2) != 0;
    drop(&image);
    return n << 12;
}

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR);
    Qcow2SnapshotInfo sn = named("x");
    const char *const both[] = {"x", "1"}, *const disk[] = {NULL, NULL};
    Qcow2Usage set, one, other, active, same;

    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    Bytes before = slurp("image.qcow2");
    CHECK_RET(qcow2_snapshot_usage(bs, both, 2, &set, NULL), 0);
    CHECK_RET(qcow2_snapshot_usage(bs, both, 1, &one, NULL), 0);
    CHECK_RET(qcow2_snapshot_usage(bs, both + 1, 1, &other, NULL), 0);
    CHECK_RET(qcow2_snapshot_usage(bs, NULL, 0, &active, NULL), 0);
    CHECK_RET(qcow2_snapshot_usage(bs, disk, 2, &same, NULL), 0);
    CHECK(memcmp(&active, &same, sizeof(same)) == 0);
    CHECK(set.exclusive >= one.exclusive + other.exclusive && set.referenced >= set.exclusive);
    CHECK(set.exclusive >= set.tables && set.tables > 0 && set.allocated <= set.referenced);
    CHECK_FILE("image.qcow2", before);
    drop(&before);

    uint64_t were = in_use();
    CHECK_RET(qcow2_snapshot_delete_many(bs, both, 2, NULL), 0);
    Qcow2SnapshotInfo *tab;
    int left = qcow2_snapshot_list(bs, &tab);
    qcow2_snapshot_list_free(tab);
    /* An empty table has no cluster. */
    CHECK_U64(were - in_use(), set.exclusive + (left == 0 ? 4096 : 0));
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
