/* SPDX-License-Identifier: MIT */
/* Calling back into the handle from the caller's functions is -EBUSY, and harms nothing. */
#include "memory_io.h"

int main(void)
{
    Qcow2Image *bs = NULL;
    MemoryIo io = { .b = reference("v3-4k/before") };
    Bytes want = reference("v3-4k/after-1");
    Qcow2SnapshotInfo sn = named("four");
    Entry e;

    CHECK(table_entry(want, 3, &e));
    sn.date_sec = e.date_sec;
    sn.date_nsec = e.date_nsec;
    CHECK_RET(qcow2_open_io(&memory_ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    io.reenter = &bs;
    io.reentered = 0;
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(io.reentered, -EBUSY);
    CHECK(same(io.b, want));
    io.reenter = NULL;
    CHECK_RET(qcow2_close(bs), 0);
    drop(&io.b);
    drop(&want);
    return done();
}
