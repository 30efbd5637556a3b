/* SPDX-License-Identifier: MIT */
/* After load_tmp a read-only handle reads the snapshot's data; the file is not touched. */
#include "harness.h"

static unsigned char byte_at(Qcow2Image *bs, int64_t at)
{
    unsigned char c = 0xEE;
    Qcow2Error *err = NULL;
    int ret = qcow2_pread(bs, at, &c, 1, &err);

    if (ret < 0) {
        fail_at(__FILE__, __LINE__, "pread %lld: %s", (long long)at, take_message(&err));
    }
    return c;
}

/* The history of v3-4k is mix() of images/make-images. */
int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/before"), 0);
    Bytes before = slurp("image.qcow2");

    CHECK_U64(byte_at(bs, 0), 0);                 /* discarded */
    CHECK_U64(byte_at(bs, 4096), 0x41);
    CHECK_U64(byte_at(bs, 11 * 4096 + 4095), 0x42);

    CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "one", NULL), 0);
    CHECK_U64(byte_at(bs, 0), 0x11);
    CHECK_U64(byte_at(bs, 4096), 0);              /* zero with an offset */
    CHECK_U64(byte_at(bs, 2 * 4096), 0x11);
    CHECK_U64(byte_at(bs, 11 * 4096), 0);

    CHECK_RET(qcow2_snapshot_load_tmp(bs, "2", NULL, NULL), 0);
    CHECK_U64(byte_at(bs, 2 * 4096), 0x21);
    CHECK_U64(byte_at(bs, 10 * 4096), 0x22);
    CHECK_RET(qcow2_snapshot_load_tmp(bs, "3", "three", NULL), 0);
    CHECK_U64(byte_at(bs, 0), 0);
    CHECK_U64(byte_at(bs, 5 * 4096), 0x31);

    CHECK_RET(qcow2_close(bs), 0);
    CHECK_FILE("image.qcow2", before);
    drop(&before);
    return done();
}
