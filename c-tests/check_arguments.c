/* SPDX-License-Identifier: MIT */
/* qcow2_check refuses what makes no sense, is no verb without a fix, and its function cannot call back. */
#include "harness.h"

static Qcow2Image *bs;
static int calls;

static void finding(void *opaque, const char *text)
{
    Qcow2CheckResult found;
    CHECK(opaque == &calls && text[0] && !strchr(text, '\n'));
    CHECK_RET(qcow2_check(bs, 0, &found, NULL, NULL, NULL), -EBUSY);
    calls++;
}

int main(void)
{
    const char *file = fixture("damaged-refcount-zero/before");
    Bytes before = slurp(file), after;
    Qcow2CheckResult found;

    CHECK_RET(qcow2_check(NULL, 0, &found, NULL, NULL, NULL), -EINVAL);
    bs = must_open(file, 0);
    CHECK_RET(qcow2_check(bs, 0, NULL, NULL, NULL, NULL), -EINVAL);
    CHECK_RET(qcow2_check(bs, 8, &found, NULL, NULL, NULL), -EINVAL);
    CHECK_RET(qcow2_check(bs, -1, &found, NULL, NULL, NULL), -EINVAL);
    CHECK_RET(qcow2_check(bs, QCOW2_FIX_LEAKS, &found, NULL, NULL, NULL), -EACCES);
    CHECK_RET(qcow2_close(bs), 0);
    bs = must_open(file, QCOW2_O_RDWR);
    CHECK_RET(qcow2_check(bs, 0, &found, finding, &calls, NULL), 0);
    CHECK(calls > 0 && found.corruptions > 0 && found.corruptions_fixed == 0);
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_NONE);
    CHECK_RET(qcow2_close(bs), 0);
    after = slurp(file);
    CHECK(same(before, after));
    drop(&before);
    drop(&after);
    return done();
}
