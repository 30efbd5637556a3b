/* SPDX-License-Identifier: MIT */
/* After load_tmp the handle has the snapshot's disk size. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("resize-4k/before"), 0);
    unsigned char c;

    CHECK_U64((uint64_t)qcow2_getlength(bs), 3 << 20);
    CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "small", NULL), 0);
    CHECK_U64((uint64_t)qcow2_getlength(bs), 64 << 10);
    CHECK_RET(qcow2_pread(bs, (64 << 10) - 1, &c, 1, NULL), 0);
    CHECK(qcow2_pread(bs, 64 << 10, &c, 1, NULL) < 0);
    CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "middle", NULL), 0);
    CHECK_U64((uint64_t)qcow2_getlength(bs), 512 << 10);
    CHECK_RET(qcow2_pread(bs, 400 << 10, &c, 1, NULL), 0);
    CHECK_U64(c, 3);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
