/* SPDX-License-Identifier: MIT */
/* Changes are those of the states that are named, whatever load_tmp shows, and it goes on showing that. */
#include "harness.h"

static void check_since_old(Qcow2Image *bs, int flags)
{
    Qcow2Change c;

    CHECK_RET(qcow2_snapshot_next_change(bs, "old", NULL, 0, INT64_MAX, flags, &c, NULL), 0);
    CHECK_U64(c.start, 128 << 10);
    CHECK_RET(qcow2_snapshot_next_change(bs, "old", "new", 0, INT64_MAX, flags, &c, NULL), 0);
    CHECK_U64(c.start, 0);
}

static void check_shows(Qcow2Image *bs, int byte)
{
    unsigned char buf[512] = { 0 };

    CHECK_RET(qcow2_pread(bs, 0, buf, sizeof(buf), NULL), 0);
    CHECK(buf[0] == byte && buf[511] == byte);
}

int main(void)
{
    Qcow2Image *bs;
    Qcow2Change c;
    int flags;

    need("qemu-io");
    CHECK_RET(shell("qemu-img create -q -f qcow2 c.qcow2 1M && qemu-io -c 'write -P 1 0 64k' c.qcow2 && "
                    "qemu-img snapshot -c old c.qcow2 && qemu-io -c 'write -P 2 0 64k' c.qcow2 && "
                    "qemu-img snapshot -c new c.qcow2 && qemu-img snapshot -a old c.qcow2 && "
                    "qemu-io -c 'write -P 3 128k 64k' c.qcow2"), 0);
    bs = must_open("c.qcow2", 0);
    for (flags = 0; flags <= QCOW2_CHANGE_COMPARE; flags++) {
        check_since_old(bs, flags);
        CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "new", NULL), 0);
        check_since_old(bs, flags);
        check_shows(bs, 2);
        CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "old", NULL), 0);
        check_shows(bs, 1);
        check_since_old(bs, flags);
        check_shows(bs, 1);
    }
    CHECK_RET(qcow2_close(bs), 0);

    /* Beside somebody who writes, and read-write. */
    bs = must_open("c.qcow2", QCOW2_O_FORCE_SHARE);
    check_since_old(bs, QCOW2_CHANGE_COMPARE);
    CHECK_RET(qcow2_snapshot_next_change(bs, "old", NULL, 512 << 10, INT64_MAX, 0, &c, NULL), 0);
    CHECK_U64(c.length, 0);
    CHECK_RET(shell("qemu-io -c 'write -P 4 512k 64k' c.qcow2"), 0);
    CHECK_RET(qcow2_snapshot_next_change(bs, "old", NULL, 512 << 10, INT64_MAX, 0, &c, NULL), 0);
    CHECK_U64(c.length, 64 << 10);
    CHECK_RET(qcow2_close(bs), 0);
    bs = must_open("c.qcow2", QCOW2_O_RDWR);
    check_since_old(bs, QCOW2_CHANGE_COMPARE);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
