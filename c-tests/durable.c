/* SPDX-License-Identifier: MIT */
/* A verb flushes before it returns 0, and NO_FLUSH never flushes. */
#include "memory_io.h"

static int flushes, writes_since;

static int count_flush(void *opaque)
{
    (void)opaque;
    flushes++;
    writes_since = 0;
    return 0;
}

static int count_pwrite(void *opaque, uint64_t offset, const void *buf, size_t bytes)
{
    writes_since++;
    return memory_pwrite(opaque, offset, buf, bytes);
}

int main(void)
{
    for (int flags = QCOW2_O_RDWR; flags; flags = flags == QCOW2_O_RDWR ? QCOW2_O_RDWR | QCOW2_O_NO_FLUSH : 0) {
        MemoryIo io = { .b = reference("v3-4k/before") };
        Qcow2IoOps ops = memory_ops;
        Qcow2SnapshotInfo sn = named("four");
        Qcow2Image *bs = NULL;

        ops.flush = count_flush;
        ops.pwrite = count_pwrite;
        flushes = 0;
        CHECK_RET(qcow2_open_io(&ops, &io, flags, &bs, NULL), 0);
        CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
        CHECK(flags & QCOW2_O_NO_FLUSH ? flushes == 0 : flushes >= 3 && writes_since == 0);
        CHECK_RET(qcow2_snapshot_goto(bs, "two"), 0);
        CHECK(flags & QCOW2_O_NO_FLUSH ? flushes == 0 : writes_since == 0);
        CHECK_RET(qcow2_snapshot_delete(bs, NULL, "two", NULL), 0);
        CHECK(flags & QCOW2_O_NO_FLUSH ? flushes == 0 : writes_since == 0);
        CHECK_RET(qcow2_close(bs), 0);
        drop(&io.b);
    }
    return done();
}
