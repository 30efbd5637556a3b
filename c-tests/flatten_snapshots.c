/* SPDX-License-Identifier: MIT */
/* After flatten the disk and every snapshot read as before, without the backing file; qemu-img finds nothing wrong. */
#include "harness.h"

static void read_all(const char *when)
{
    char line[512];

    snprintf(line, sizeof(line), "qemu-img convert -O raw o.qcow2 disk.%s"
             " && for s in one two; do qemu-img convert -l snapshot.name=$s -O raw o.qcow2 $s.%s; done", when, when);
    CHECK_RET(shell("%s", line), 0);
}

int main(void)
{
    static const char *const states[] = { "disk", "one", "two" };
    Qcow2Image *bs;

    need("qemu-io");
    CHECK_RET(shell("qemu-img create -q -f raw base 3M && qemu-io -f raw -c 'write -P 1 0 3M' base"
                    " && qemu-img create -q -f qcow2 -b base -F raw o.qcow2 4M && qemu-io -c 'write -P 2 64k 64k' o.qcow2"
                    " && qemu-img snapshot -c one o.qcow2 && qemu-io -c 'write -P 3 1M 100k' o.qcow2"
                    " && qemu-img snapshot -c two o.qcow2 && qemu-io -c 'write -z -u 2M 128k' o.qcow2"), 0);
    read_all("before");
    bs = must_open("o.qcow2", QCOW2_O_RDWR);
    CHECK_RET(qcow2_flatten(bs, NULL), 0);
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_DONE);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_RET(shell("rm base && qemu-img check -q o.qcow2 && ! qemu-img info o.qcow2 | grep -q backing"), 0);
    read_all("after");
    for (int i = 0; i < 3; i++) {
        CHECK_RET(shell("cmp %s.before %s.after", states[i], states[i]), 0);
    }
    return done();
}
