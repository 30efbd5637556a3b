/* SPDX-License-Identifier: MIT */
/* Unknown autoclear bits: open and a refused verb write nothing, the first change clears them. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("autoclear-bits/before"), QCOW2_O_RDWR);
    Bytes before = slurp("image.qcow2"), b;

    CHECK(be(before, 88, 8) & ~3ull);
    CHECK_RET(qcow2_snapshot_goto(bs, "nothing"), -ENOENT);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_FILE("image.qcow2", before);

    bs = must_open("image.qcow2", QCOW2_O_RDWR);
    CHECK_RET(qcow2_snapshot_goto(bs, "one"), 0);
    CHECK_RET(qcow2_close(bs), 0);
    b = slurp("image.qcow2");
    CHECK_U64(be(b, 88, 8), 0);
    drop(&b);
    drop(&before);
    return done();
}
