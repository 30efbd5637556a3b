/* SPDX-License-Identifier: MIT */
/* With COMPARE a change is exact to the sector, through a backing file too, and rewritten data is none. */
#include "harness.h"

static void check_exact(Qcow2Image *bs, int64_t at, int64_t bytes, uint64_t start, uint64_t length)
{
    Qcow2Change c;

    CHECK_RET(qcow2_snapshot_next_change(bs, "old", NULL, at, bytes, QCOW2_CHANGE_COMPARE, &c, NULL), 0);
    CHECK_U64(c.start, start);
    CHECK_U64(c.length, length);
}

int main(void)
{
    Qcow2Image *bs;
    Qcow2Change c;
    Qcow2Error *err = NULL;

    need("qemu-io");
    CHECK_RET(shell("qemu-img create -q -f qcow2 base 128k && qemu-io -c 'write -P 9 0 128k' base && "
                    "qemu-img create -q -f qcow2 -b base -F qcow2 c.qcow2 1M && qemu-io -c 'write -P 1 256k 128k' c.qcow2 && "
                    "qemu-img snapshot -c old c.qcow2 && qemu-io -c 'write -P 9 0 64k' -c 'write -P 8 65k 1k' "
                    "-c 'write -P 1 256k 64k' -c 'write -P 2 330k 512' -c 'write -P 2 331k 512' "
                    "-c 'write -z 512k 64k' c.qcow2"), 0);
    bs = must_open("c.qcow2", 0);
    check_exact(bs, 0, INT64_MAX, 65 << 10, 1024);
    check_exact(bs, 66 << 10, INT64_MAX, 330 << 10, 512);
    check_exact(bs, (330 << 10) + 512, INT64_MAX, 331 << 10, 512);
    check_exact(bs, (331 << 10) + 100, INT64_MAX, (331 << 10) + 100, 412);
    /* Zeros behind the end of the backing file, and the same data written again. */
    check_exact(bs, (331 << 10) + 512, INT64_MAX, (331 << 10) + 512, 0);
    check_exact(bs, 0, (65 << 10) + 100, 65 << 10, 100);
    check_exact(bs, 0, 65 << 10, 0, 0);
    CHECK_RET(qcow2_close(bs), 0);

    bs = must_open("c.qcow2", QCOW2_O_NO_BACKING);
    CHECK_RET(qcow2_snapshot_next_change(bs, "old", NULL, 0, 4096, 0, &c, NULL), 0);
    CHECK_U64(c.length, 4096);
    CHECK_RET(qcow2_snapshot_next_change(bs, "old", NULL, 0, 4096, QCOW2_CHANGE_COMPARE, &c, &err), -ENOTSUP);
    CHECK_U64(c.length, 0);
    take_message(&err);
    check_exact(bs, 256 << 10, INT64_MAX, 330 << 10, 512);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
