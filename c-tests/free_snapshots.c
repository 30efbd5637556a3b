/* SPDX-License-Identifier: MIT */
/* free_snapshots empties the list in memory only; the next verb keeps every snapshot. */
#include "harness.h"

static int count(Qcow2Image *bs)
{
    Qcow2SnapshotInfo *tab = NULL;
    int n = qcow2_snapshot_list(bs, &tab);

    qcow2_snapshot_list_free(tab);
    return n;
}

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/before"), QCOW2_O_RDWR);
    Bytes before = slurp("image.qcow2"), after = reference("v3-4k/after-1");
    Qcow2SnapshotInfo sn = named("four");
    Entry e;

    qcow2_free_snapshots(bs);
    CHECK_RET(count(bs), 0);
    CHECK_FILE("image.qcow2", before);
    CHECK_RET(qcow2_read_snapshots(bs), 0);
    CHECK_RET(count(bs), 3);

    qcow2_free_snapshots(bs);
    CHECK(table_entry(after, 3, &e));
    sn.date_sec = e.date_sec;
    sn.date_nsec = e.date_nsec;
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(count(bs), 4);
    CHECK_FILE("image.qcow2", after);

    qcow2_free_snapshots(bs);
    CHECK_RET(qcow2_write_snapshots(bs), 0);
    CHECK_RET(count(bs), 4);
    qcow2_free_snapshots(bs);
    CHECK_RET(qcow2_snapshot_goto(bs, "two"), 0);
    qcow2_free_snapshots(bs);
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, "one", NULL), 0);
    CHECK_RET(count(bs), 3);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&before);
    drop(&after);
    return done();
}
