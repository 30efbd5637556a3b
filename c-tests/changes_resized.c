/* SPDX-License-Identifier: MIT */
/* What is past the end of `from` is changed, past the end of `to` nothing is; VM state is never seen. */
#include "harness.h"

static void check_change(Qcow2Image *bs, const char *from, const char *to, int flags, int64_t at, uint64_t start,
                         uint64_t length, uint32_t from_flags, uint32_t to_flags)
{
    Qcow2Change c;

    CHECK_RET(qcow2_snapshot_next_change(bs, from, to, at, INT64_MAX, flags, &c, NULL), 0);
    CHECK_U64(c.start, start);
    CHECK_U64(c.length, length);
    CHECK_U64(c.from_flags, from_flags);
    CHECK_U64(c.to_flags, to_flags);
}

int main(void)
{
    static const int64_t small = (1 << 20) + 512, large = 3 << 20;
    static const uint32_t data = QCOW2_BLOCK_DATA | QCOW2_BLOCK_ALLOCATED;
    Qcow2Image *bs;
    int flags;

    need("qemu-io");
    CHECK_RET(shell("qemu-img create -q -f qcow2 c.qcow2 %lld && qemu-io -c 'write -b -P 7 0 128k' c.qcow2 && "
                    "qemu-img snapshot -c small c.qcow2 && qemu-img resize -q c.qcow2 3M && "
                    "qemu-io -c 'write -P 5 2M 64k' c.qcow2", (long long)small), 0);
    bs = must_open("c.qcow2", 0);
    for (flags = 0; flags <= QCOW2_CHANGE_COMPARE; flags++) {
        check_change(bs, "small", NULL, flags, 0, small, (2 << 20) - small, QCOW2_BLOCK_BEYOND, 0);
        check_change(bs, "small", NULL, flags, 2 << 20, 2 << 20, 64 << 10, QCOW2_BLOCK_BEYOND, data);
        check_change(bs, "small", NULL, flags, large - 1, large - 1, 1, QCOW2_BLOCK_BEYOND, 0);
        check_change(bs, "small", NULL, flags, large, large, 0, 0, 0);
        check_change(bs, "small", NULL, flags, INT64_MAX, INT64_MAX, 0, 0, 0);
        check_change(bs, NULL, "small", flags, 0, 0, 0, 0, 0);
        check_change(bs, NULL, "small", flags, small, small, 0, 0, 0);
        check_change(bs, "small", "small", flags, 0, 0, 0, 0, 0);
        check_change(bs, NULL, NULL, flags, 0, 0, 0, 0, 0);
    }
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
