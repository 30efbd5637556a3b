/* SPDX-License-Identifier: MIT */
/* A repair that is cancelled while it looks leaves every byte; one that has lowered counts is not asked any more. */
#include "harness.h"

static int cancel_stage(void *stage, int now, uint64_t done, uint64_t total)
{
    CHECK(done <= total && total > 0);
    return now == *(int *)stage;
}

int main(void)
{
    const char *file = fixture("damaged-refcount-zero/before");
    Bytes before = slurp(file), after;
    Qcow2Image *bs = must_open(file, QCOW2_O_RDWR | QCOW2_O_CHECK);
    Qcow2CheckResult found;
    int stage = QCOW2_PROGRESS_CHECK, all = QCOW2_FIX_LEAKS | QCOW2_FIX_ERRORS;

    CHECK_RET(qcow2_set_progress(bs, cancel_stage, &stage), 0);
    CHECK_RET(qcow2_check(bs, 0, &found, NULL, NULL, NULL), -ECANCELED);
    CHECK_RET(qcow2_check(bs, all, &found, NULL, NULL, NULL), -ECANCELED);
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_UNCHANGED);
    after = slurp(file);
    CHECK(same(before, after));
    stage = QCOW2_PROGRESS_RECLAIM;
    CHECK_RET(qcow2_check(bs, all, &found, NULL, NULL, NULL), 0);
    CHECK_RET((int)(found.corruptions + found.leaks), 0);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&before);
    drop(&after);
    return done();
}
