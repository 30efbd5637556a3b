/* SPDX-License-Identifier: MIT */
/* A flatten that is cancelled leaves every state as it was and a good handle; the next call goes on. */
#include "harness.h"

typedef struct Watch {
    int calls, stop_at;
    uint64_t copied;
} Watch;

static int watch(void *opaque, int stage, uint64_t done, uint64_t total)
{
    Watch *w = opaque;

    CHECK(done <= total && total > 0);
    if (stage == QCOW2_PROGRESS_PREPARE) {
        w->copied = done;
        return ++w->calls == w->stop_at;
    }
    return 0;
}

int main(void)
{
    Watch w = { 0, 50, 0 };
    uint64_t before, left;
    Qcow2Image *bs;

    need("qemu-io");
    CHECK_RET(shell("qemu-img create -q -f raw base 160M && qemu-io -f raw -c 'write -P 1 0 160M' base"
                    " && qemu-img create -q -f qcow2 -b base -F raw o.qcow2 && qemu-img snapshot -c one o.qcow2"), 0);
    bs = must_open("o.qcow2", QCOW2_O_RDWR | QCOW2_O_NO_FLUSH);
    CHECK_RET(qcow2_flatten_estimate(bs, &before, NULL), 0);
    CHECK_U64(before, 160 << 20);
    CHECK_RET(qcow2_set_progress(bs, watch, &w), 0);
    CHECK_RET(qcow2_flatten(bs, NULL), -ECANCELED);
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_UNCHANGED);
    CHECK(has_words(bs));
    CHECK_RET(qcow2_flatten_estimate(bs, &left, NULL), 0);
    CHECK(left < before && left >= before - w.copied - (64 << 20));   /* what is copied stays */
    w.stop_at = 0;
    CHECK_RET(qcow2_flatten(bs, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_RET(shell("qemu-img check -q o.qcow2 && qemu-img compare -q -f qcow2 -F raw o.qcow2 base"
                    " && qemu-img convert -l one -O raw o.qcow2 one && cmp one base"), 0);
    return done();
}
