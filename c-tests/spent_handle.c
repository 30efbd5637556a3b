/* SPDX-License-Identifier: MIT */
/* After an I/O error in a verb the handle refuses further changes until it is reopened. */
#include "memory_io.h"

int main(void)
{
    MemoryIo io = { .b = reference("v3-4k/before"), .fail_writes_only = true };
    Qcow2SnapshotInfo sn = named("four");
    Qcow2Image *bs = NULL;
    int requests;

    CHECK_RET(qcow2_open_io(&memory_ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(io.requests, 0);                       /* open writes nothing */
    io.fail_at = 1;
    io.fail_with = EIO;
    CHECK_RET(qcow2_snapshot_create(bs, &sn), -EIO);
    io.fail_at = 0;
    requests = io.requests;
    CHECK_RET(qcow2_snapshot_create(bs, &sn), -EIO);
    CHECK(has_words(bs));
    CHECK_RET(qcow2_snapshot_delete(bs, "1", NULL, NULL), -EIO);
    CHECK_RET(io.requests, requests);                /* nothing was written by the refusals */
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_RET(io.requests, requests);

    CHECK_RET(qcow2_open_io(&memory_ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&io.b);
    return done();
}
