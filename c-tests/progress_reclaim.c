/* SPDX-License-Identifier: MIT */
/* A verb that has taken effect cannot be cancelled: the bytes are those of a verb that nobody watched. */
#include "harness.h"

static int calls[4];

static int cancel_late(void *opaque, int stage, uint64_t done, uint64_t total)
{
    CHECK(opaque == calls);
    CHECK(stage >= QCOW2_PROGRESS_CHECK && stage <= QCOW2_PROGRESS_RECLAIM);
    calls[0] += done == total;                       /* once for each stage */
    calls[stage]++;
    return stage == QCOW2_PROGRESS_RECLAIM ? -1 : 0;
}

int main(void)
{
    const char *file = fixture("v3-4k/before");
    Bytes want = reference("v3-4k/after-1");
    Qcow2Image *bs = must_open(file, QCOW2_O_RDWR);
    Qcow2SnapshotInfo sn = named("four");
    Entry e;

    CHECK(table_entry(want, 3, &e));
    sn.date_sec = e.date_sec;
    sn.date_nsec = e.date_nsec;
    CHECK_RET(qcow2_set_progress(bs, cancel_late, calls), 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_DONE);
    CHECK_RET(calls[0], 3);
    CHECK(calls[1] > 0 && calls[2] > 0 && calls[3] > 0);
    CHECK_FILE(file, want);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&want);
    return done();
}
