/* SPDX-License-Identifier: MIT */
/*
 * A create that fails can leave another L1 table in the file than the handle tells (flags), though nothing
 * "changed". A new handle tells what is there.
 */
#include "memory_io.h"

static void is_in_file(Qcow2Image *bs, Bytes f, bool *other)
{
    Qcow2ImageLayout at;

    CHECK_RET(qcow2_image_layout(bs, &at), 0);
    CHECK_U64(at.changed, 0);
    *other = false;
    for (uint32_t i = 0; i < at.l1_size; i++)
        *other |= at.l1_table[i] != be(f, at.l1_table_offset + 8 * i, 8);
}

int main(void)
{
    Bytes before = reference("v3-64k/before");
    int others = 0, failed = 0;

    for (int request = 1;; request++) {
        MemoryIo io = { .b = { malloc(before.len), before.len } };
        Qcow2SnapshotInfo sn = named("x");
        Qcow2Image *bs = NULL;
        bool other;
        int ret;

        memcpy(io.b.data, before.data, before.len);
        CHECK_RET(qcow2_open_io(&memory_ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
        io.requests = 0;
        io.fail_at = request;
        io.fail_with = EIO;
        ret = qcow2_snapshot_create(bs, &sn);
        if (ret < 0 && qcow2_last_outcome(bs) == QCOW2_OUTCOME_UNCHANGED) {
            failed++;
            is_in_file(bs, io.b, &other);
            others += other;
            CHECK_RET(qcow2_close(bs), 0);
            io.fail_at = 0;
            CHECK_RET(qcow2_open_io(&memory_ops, &io, 0, &bs, NULL), 0);
            is_in_file(bs, io.b, &other);
            CHECK(!other);
        }
        CHECK_RET(qcow2_close(bs), 0);
        drop(&io.b);
        if (!ret)
            break;
    }
    CHECK(failed > 5);
    CHECK(others > 0);
    drop(&before);
    return done();
}
