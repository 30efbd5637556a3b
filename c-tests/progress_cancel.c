/* SPDX-License-Identifier: MIT */
/* A verb that is cancelled before it writes leaves every byte and a good handle; while it writes, an image that is what it was. */
#include "harness.h"

static int cancel_stage(void *stage, int now, uint64_t done, uint64_t total)
{
    CHECK(done <= total && total > 0);
    return now == *(int *)stage;
}

int main(void)
{
    const char *file = fixture("v3-4k/before");
    Bytes before = slurp(file), want = reference("v3-4k/after-1"), again;
    Qcow2Image *bs = must_open(file, QCOW2_O_RDWR);
    Qcow2SnapshotInfo sn = named("four"), *tab;
    int stage = QCOW2_PROGRESS_CHECK;
    Entry e;

    CHECK(table_entry(want, 3, &e));
    sn.date_sec = e.date_sec;
    sn.date_nsec = e.date_nsec;
    CHECK_RET(qcow2_set_progress(bs, cancel_stage, &stage), 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), -ECANCELED);
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_UNCHANGED);
    CHECK(has_words(bs));
    CHECK_RET(qcow2_snapshot_goto(bs, "1"), -ECANCELED);
    CHECK_RET(qcow2_snapshot_delete(bs, "1", NULL, NULL), -ECANCELED);
    CHECK_RET(qcow2_write_snapshots(bs), -ECANCELED);
    again = slurp(file);
    CHECK(same(again, before));
    CHECK_RET(qcow2_set_progress(bs, NULL, NULL), 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_FILE(file, want);                          /* as if it had been the first try */

    stage = QCOW2_PROGRESS_PREPARE;
    CHECK_RET(qcow2_set_progress(bs, cancel_stage, &stage), 0);
    CHECK_RET(qcow2_snapshot_delete(bs, "1", NULL, NULL), -ECANCELED);
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_UNCHANGED);
    CHECK_RET(qcow2_snapshot_delete(bs, "1", NULL, NULL), -EIO);
    CHECK_RET(qcow2_close(bs), 0);
    bs = must_open(file, QCOW2_O_RDWR);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), 4);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_snapshot_delete(bs, "1", NULL, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&before);
    drop(&want);
    drop(&again);
    return done();
}
