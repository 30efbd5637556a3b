/* SPDX-License-Identifier: MIT */
/* A failing discard is ignored: the verb succeeds. */
#include "memory_io.h"

static int no_discard(void *opaque, uint64_t offset, uint64_t bytes)
{
    (void)opaque, (void)offset, (void)bytes;
    return -EOPNOTSUPP;
}

int main(void)
{
    MemoryIo io = { .b = reference("v3-4k/after-1") };
    Qcow2IoOps ops = memory_ops;
    Qcow2Image *bs = NULL;

    ops.discard = no_discard;
    CHECK_RET(qcow2_open_io(&ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(qcow2_snapshot_goto(bs, "two"), 0);
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, "two", NULL), 0);
    CHECK_RET(qcow2_last_outcome(bs), 2);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&io.b);
    return done();
}
