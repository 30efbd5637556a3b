/* SPDX-License-Identifier: MIT */
/* image_layout after each verb: what the header of the file says, and what the verb has changed. */
#include "harness.h"

/* From the first entry to the end of the last; entries begin at multiples of 8. */
static uint64_t table_bytes(Bytes f)
{
    uint64_t start = be(f, 64, 8), at = start;

    for (uint64_t n = be(f, 60, 4); n > 0; n--) {
        at = (at + 7) / 8 * 8;
        at += 40 + be(f, at + 36, 4) + be(f, at + 12, 2) + be(f, at + 14, 2);
    }
    return at - start;
}

static void matches_file(Qcow2Image *bs, uint32_t changed)
{
    Qcow2ImageLayout l;
    Bytes f = slurp("image.qcow2");

    CHECK_RET(qcow2_image_layout(bs, &l), 0);
    CHECK_U64(l.version, be(f, 4, 4));
    CHECK_U64(l.cluster_bits, be(f, 20, 4));
    CHECK_U64(l.size, be(f, 24, 8));
    CHECK_U64(l.l1_size, be(f, 36, 4));
    CHECK_U64(l.l1_table_offset, be(f, 40, 8));
    CHECK_U64(l.refcount_table_offset, be(f, 48, 8));
    CHECK_U64(l.refcount_table_clusters, be(f, 56, 4));
    CHECK_U64(l.nb_snapshots, be(f, 60, 4));
    CHECK_U64(l.snapshots_offset, be(f, 64, 8));
    CHECK_U64(l.incompatible_features, be(f, 72, 8));
    CHECK_U64(l.compatible_features, be(f, 80, 8));
    CHECK_U64(l.autoclear_features, be(f, 88, 8));
    CHECK_U64(l.refcount_order, be(f, 96, 4));
    for (uint32_t i = 0; i < l.l1_size; i++)
        CHECK_U64(l.l1_table[i], be(f, l.l1_table_offset + 8 * i, 8));
    for (uint64_t i = 0; i < (uint64_t)l.refcount_table_clusters << l.cluster_bits >> 3; i++)
        CHECK_U64(l.refcount_table[i], be(f, l.refcount_table_offset + 8 * i, 8));
    CHECK_U64(l.snapshots_size, table_bytes(f));
    CHECK_U64(l.changed, changed);
    drop(&f);
}

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-64k/before"), QCOW2_O_RDWR);
    Qcow2SnapshotInfo sn = named("x");

    matches_file(bs, 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);       /* COPIED was clear already or goes now */
    Qcow2ImageLayout l;
    CHECK_RET(qcow2_image_layout(bs, &l), 0);
    CHECK(l.changed & QCOW2_CHANGED_SNAPSHOTS && !(l.changed & QCOW2_CHANGED_SIZE));
    matches_file(bs, l.changed);
    CHECK_RET(qcow2_snapshot_goto(bs, "1"), 0);
    CHECK_RET(qcow2_image_layout(bs, &l), 0);
    CHECK(l.changed & QCOW2_CHANGED_L1 && !(l.changed & QCOW2_CHANGED_SNAPSHOTS));
    matches_file(bs, l.changed);
    CHECK_RET(qcow2_snapshot_goto(bs, "no such"), -ENOENT);
    matches_file(bs, 0);
    CHECK_RET(qcow2_write_snapshots(bs), 0);
    matches_file(bs, QCOW2_CHANGED_SNAPSHOTS);
    CHECK_RET(qcow2_image_layout(bs, NULL), -EINVAL);
    CHECK_RET(qcow2_image_layout(NULL, &l), -EINVAL);
    CHECK_RET(qcow2_close(bs), 0);

    /* A handle that shows a snapshot tells its L1 table. */
    Qcow2SnapshotLayout of;
    Bytes f = slurp("image.qcow2");
    bs = must_open("image.qcow2", 0);
    CHECK_RET(qcow2_snapshot_layout(bs, 0, &of, NULL), 0);
    CHECK_RET(qcow2_snapshot_load_tmp(bs, of.id, NULL, NULL), 0);
    CHECK_RET(qcow2_image_layout(bs, &l), 0);
    CHECK(l.l1_table_offset != be(f, 40, 8));
    CHECK_U64(l.l1_table_offset, of.l1_table_offset);
    CHECK_U64(l.l1_size, of.l1_size);
    for (uint32_t i = 0; i < l.l1_size; i++)
        CHECK_U64(l.l1_table[i], be(f, l.l1_table_offset + 8 * i, 8));
    drop(&f);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
