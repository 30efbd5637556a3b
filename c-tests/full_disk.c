/* SPDX-License-Identifier: MIT */
/* A full disk is -ENOSPC and costs nothing: the image is as before. */
#include "memory_io.h"

int main(void)
{
    Bytes before = reference("v3-4k/before"), after = reference("v3-4k/after-1");

    CHECK(after.len > before.len);
    for (size_t limit = before.len; limit < after.len; limit += 512) {
        MemoryIo io = { .b = { malloc(before.len), before.len }, .limit = limit };
        Qcow2SnapshotInfo sn = named("four"), *tab;
        Qcow2Image *bs = NULL;

        memcpy(io.b.data, before.data, before.len);
        CHECK_RET(qcow2_open_io(&memory_ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
        CHECK_RET(qcow2_snapshot_create(bs, &sn), -ENOSPC);
        CHECK(has_words(bs));
        CHECK_RET(qcow2_last_outcome(bs), 1);
        CHECK_RET(qcow2_close(bs), 0);
        CHECK(io.b.len >= before.len && memcmp(io.b.data, before.data, before.len) == 0);

        io.limit = 0;
        CHECK_RET(qcow2_open_io(&memory_ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
        CHECK_RET(qcow2_snapshot_list(bs, &tab), 3);
        qcow2_snapshot_list_free(tab);
        CHECK_RET(qcow2_close(bs), 0);
        drop(&io.b);
    }
    drop(&before);
    drop(&after);
    return done();
}
