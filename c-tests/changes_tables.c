/* SPDX-License-Identifier: MIT */
/* Without COMPARE a change is a run of clusters that are mapped otherwise, with what they were and are. */
#include "harness.h"

enum { KiB = 1 << 10 };

static const uint32_t data = QCOW2_BLOCK_DATA | QCOW2_BLOCK_ALLOCATED;
static const uint32_t zero = QCOW2_BLOCK_ZERO | QCOW2_BLOCK_ALLOCATED;
static const uint32_t packed = QCOW2_BLOCK_DATA | QCOW2_BLOCK_ALLOCATED | QCOW2_BLOCK_COMPRESSED;

static int64_t check_next(Qcow2Image *bs, const char *from, const char *to, int64_t at, uint64_t start,
                          uint64_t length, uint32_t from_flags, uint32_t to_flags)
{
    Qcow2Change c;

    memset(&c, 0x55, sizeof(c));
    CHECK_RET(qcow2_snapshot_next_change(bs, from, to, at, INT64_MAX, 0, &c, NULL), 0);
    CHECK_U64(c.start, start);
    CHECK_U64(c.length, length);
    CHECK_U64(c.from_flags, from_flags);
    CHECK_U64(c.to_flags, to_flags);
    CHECK_U64(c.reserved[0] | c.reserved[1] | c.reserved[2] | c.reserved[3], 0);
    return (int64_t)(c.start + c.length);
}

int main(void)
{
    Qcow2Image *bs;
    int64_t at;

    need("qemu-io");
    CHECK_RET(shell("qemu-img create -q -f qcow2 c.qcow2 1M && qemu-io -c 'write -P 1 64k 192k' c.qcow2 && "
                    "qemu-img snapshot -c old c.qcow2 && qemu-io -c 'write -P 1 64k 100' -c 'write -z 128k 64k' "
                    "-c 'write -c -P 2 320k 64k' -c 'write -P 3 700k 512' -c 'write -z 896k 64k' c.qcow2"), 0);
    bs = must_open("c.qcow2", 0);
    /* Written with what was there before: the tables cannot know. */
    at = check_next(bs, "old", NULL, 0, 64 * KiB, 64 * KiB, data, data);
    at = check_next(bs, "old", NULL, at, 128 * KiB, 64 * KiB, data, zero);
    at = check_next(bs, "old", NULL, at, 320 * KiB, 64 * KiB, 0, packed);
    at = check_next(bs, "old", NULL, at, 640 * KiB, 64 * KiB, 0, data);
    /* Zeros where nothing was: no change. */
    check_next(bs, "old", NULL, at, (uint64_t)at, 0, 0, 0);
    check_next(bs, NULL, "1", 0, 64 * KiB, 64 * KiB, data, data);
    check_next(bs, NULL, "1", 200 * KiB, 320 * KiB, 64 * KiB, packed, 0);
    check_next(bs, "old", NULL, 70 * KiB, 70 * KiB, 58 * KiB, data, data);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
