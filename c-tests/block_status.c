/* SPDX-License-Identifier: MIT */
/* qcow2_block_status tells data, zeros and nothing apart, with their places, to the end of the disk. */
#include "harness.h"

static void check_extent(Qcow2Image *bs, int64_t at, uint64_t length, int flags, uint64_t host)
{
    Qcow2Extent e;

    CHECK_RET(qcow2_block_status(bs, at, INT64_MAX, &e, NULL), 0);
    CHECK_U64(e.start, (uint64_t)at);
    CHECK_U64(e.length, length);
    CHECK_U64(e.flags, (uint64_t)flags);
    CHECK_U64(e.depth, 0);
    CHECK_U64(e.host_offset, host);
    if (flags & QCOW2_BLOCK_OFFSET_VALID) {
        CHECK_STR(e.filename, "map.qcow2");
    } else {
        CHECK(!e.filename);
    }
}

int main(void)
{
    static const int stored = QCOW2_BLOCK_DATA | QCOW2_BLOCK_ALLOCATED | QCOW2_BLOCK_OFFSET_VALID;
    Qcow2Image *bs;
    Qcow2Extent e;
    Qcow2Error *err = NULL;

    need("qemu-io");
    CHECK_RET(shell("qemu-img create -q -f qcow2 map.qcow2 1M && qemu-io -c 'write -P 1 64k 128k' "
                    "-c 'write -z -u 192k 64k' -c 'write -c -P 2 256k 64k' map.qcow2"), 0);
    bs = must_open("map.qcow2", 0);
    check_extent(bs, 0, 64 << 10, QCOW2_BLOCK_ZERO, 0);
    check_extent(bs, 64 << 10, 128 << 10, stored, 0x50000);
    check_extent(bs, 100 << 10, 92 << 10, stored, 0x50000 + (36 << 10));
    check_extent(bs, 192 << 10, 64 << 10, QCOW2_BLOCK_ZERO | QCOW2_BLOCK_ALLOCATED, 0);
    check_extent(bs, 256 << 10, 64 << 10, QCOW2_BLOCK_DATA | QCOW2_BLOCK_ALLOCATED | QCOW2_BLOCK_COMPRESSED, 0);
    check_extent(bs, 320 << 10, 704 << 10, QCOW2_BLOCK_ZERO, 0);
    check_extent(bs, 1 << 20, 0, 0, 0);
    CHECK_RET(qcow2_block_status(bs, 70 << 10, 100, &e, NULL), 0);
    CHECK_U64(e.length, 100);
    CHECK_RET(qcow2_block_status(bs, 70 << 10, 0, &e, NULL), 0);
    CHECK_U64(e.length, 0);

    CHECK_RET(qcow2_block_status(bs, (1 << 20) + 1, 1, &e, &err), -EIO);
    take_message(&err);
    CHECK_RET(qcow2_block_status(bs, -1, 1, &e, NULL), -EIO);
    CHECK_RET(qcow2_block_status(bs, 0, -1, &e, NULL), -EINVAL);
    CHECK_U64(e.length, 0);
    CHECK(has_words(bs));
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
