/* SPDX-License-Identifier: MIT */
/* Without a backing file flatten has nothing to do, and does nothing. */
#include "harness.h"

int main(void)
{
    Bytes before = reference("v3-4k/after-1");
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR);
    uint64_t bytes = 1;

    CHECK_RET(qcow2_flatten_estimate(bs, &bytes, NULL), 0);
    CHECK_U64(bytes, 0);
    CHECK_RET(qcow2_flatten(bs, NULL), 0);
    CHECK_RET(qcow2_flatten_estimate(bs, NULL, NULL), -EINVAL);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_FILE("image.qcow2", before);
    drop(&before);
    return done();
}
