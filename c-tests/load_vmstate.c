/* SPDX-License-Identifier: MIT */
/* qcow2_load_vmstate reads the state of the snapshot that load_tmp shows, and refuses what cannot be. */
#include "harness.h"

static void check_state(Qcow2Image *bs, int64_t at, size_t n, unsigned char want)
{
    unsigned char buf[8192];

    memset(buf, 0xee, sizeof(buf));
    CHECK_RET(qcow2_load_vmstate(bs, at, buf, n, NULL), 0);
    for (size_t i = 0; i < n; i++) {
        CHECK_U64(buf[i], want);
    }
    CHECK_U64(buf[n], 0xee);
}

int main(void)
{
    Qcow2Image *bs;
    Qcow2Error *err = NULL;
    char c;

    need("qemu-io");
    CHECK_RET(shell("qemu-img create -q -f qcow2 -o cluster_size=4k vm.qcow2 1M "
                    "&& qemu-io -c 'write -b -P 7 0 8k' vm.qcow2 && qemu-img snapshot -c one vm.qcow2"
                    "&& qemu-io -c 'write -b -P 9 512 6k' vm.qcow2"), 0);
    bs = must_open("vm.qcow2", 0);
    check_state(bs, 0, 512, 7);                    /* the disk has its own, before any goto */
    check_state(bs, 512, 6 << 10, 9);
    CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "one", NULL), 0);
    check_state(bs, 0, 512, 7);
    check_state(bs, 5000, 3000, 7);
    check_state(bs, 8192, 4096, 0);                /* never saved */
    check_state(bs, 1LL << 40, 100, 0);

    CHECK_RET(qcow2_load_vmstate(bs, 0, NULL, 0, NULL), 0);
    CHECK_RET(qcow2_load_vmstate(bs, 0, NULL, 1, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_load_vmstate(bs, -1, &c, 1, NULL), -EIO);
    CHECK_RET(qcow2_load_vmstate(bs, INT64_MAX, &c, 1, NULL), -EIO);
    CHECK(has_words(bs));
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
