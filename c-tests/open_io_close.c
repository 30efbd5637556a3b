/* SPDX-License-Identifier: MIT */
/* The caller's close function is called exactly once, and not when open failed. */
#include "memory_io.h"

int main(void)
{
    MemoryIo io = { .b = reference("v3-4k/before") }, bad = { .b = { calloc(1, 4096), 4096 } };
    Qcow2IoOps ops = memory_ops;
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;

    CHECK_RET(qcow2_open_io(&ops, &bad, 0, &bs, &err), -EINVAL);
    take_message(&err);
    CHECK(!bs && bad.closes == 0);
    ops.size = 4;
    CHECK_RET(qcow2_open_io(&ops, &io, 0, &bs, &err), -EINVAL);
    take_message(&err);
    ops = memory_ops;
    ops.pread = NULL;
    CHECK_RET(qcow2_open_io(&ops, &io, 0, &bs, &err), -EINVAL);
    take_message(&err);
    CHECK(io.closes == 0);

    CHECK_RET(qcow2_open_io(&memory_ops, &io, 0, &bs, NULL), 0);
    CHECK(io.closes == 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_RET(io.closes, 1);

    /* discard and close may be NULL. */
    ops = memory_ops;
    ops.discard = NULL;
    ops.close = NULL;
    CHECK_RET(qcow2_open_io(&ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(qcow2_snapshot_goto(bs, "1"), 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_RET(io.closes, 1);
    drop(&io.b);
    drop(&bad.b);
    return done();
}
