/* SPDX-License-Identifier: MIT */
/* load_tmp: -EINVAL on a read-write handle, -ENOENT without such a snapshot, QEMU's errno for a bad L1. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/before"), QCOW2_O_RDWR);
    Qcow2Error *err = NULL;
    unsigned char c;

    CHECK_RET(qcow2_snapshot_load_tmp(bs, "1", NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_close(bs), 0);

    bs = must_open("image.qcow2", 0);
    CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "nothing", &err), -ENOENT);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_load_tmp(bs, "1", "two", &err), -ENOENT);
    take_message(&err);
    CHECK_RET(qcow2_pread(bs, 4096, &c, 1, NULL), 0);     /* the handle is as it was */
    CHECK_U64(c, 0x41);
    CHECK_RET(qcow2_close(bs), 0);

    bs = must_open(fixture("damaged-snapshot-l1/before"), 0);
    CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "one", &err), -EINVAL);
    CHECK(strstr(take_message(&err), "L1"));
    CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "two", &err), -EFBIG);
    CHECK(strstr(take_message(&err), "L1"));
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
