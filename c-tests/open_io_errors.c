/* SPDX-License-Identifier: MIT */
/* An errno of the caller's functions reaches the caller; what is no errno is -EIO. */
#include "memory_io.h"

static int number;

static int odd(void *opaque, uint64_t offset, void *buf, size_t bytes)
{
    (void)opaque, (void)offset;
    memset(buf, 0, bytes);
    return number;
}

int main(void)
{
    MemoryIo io = { .b = reference("v3-4k/before") };
    Qcow2IoOps ops = memory_ops;
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;
    static const int plain[] = { EPERM, EIO, ENOSPC, EREMOTEIO };

    ops.pread = odd;
    for (int i = 0; i < 4; i++) {
        number = -plain[i];
        CHECK_RET(qcow2_open_io(&ops, &io, 0, &bs, &err), -plain[i]);
        take_message(&err);
    }
    number = 1;
    CHECK_RET(qcow2_open_io(&ops, &io, 0, &bs, &err), -EIO);
    take_message(&err);
    number = -100000;
    CHECK_RET(qcow2_open_io(&ops, &io, 0, &bs, &err), -EIO);
    take_message(&err);
    CHECK(!bs);
    drop(&io.b);
    return done();
}
