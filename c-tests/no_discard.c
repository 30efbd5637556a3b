/* SPDX-License-Identifier: MIT */
/* NO_DISCARD: the same length and the same bytes in every cluster in use; only holes differ. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR | QCOW2_O_NO_DISCARD);
    Bytes want = reference("v3-4k/after-2"), got;
    uint64_t block = be(want, be(want, 48, 8), 8);

    CHECK_RET(qcow2_snapshot_goto(bs, "two"), 0);
    CHECK_RET(qcow2_close(bs), 0);
    got = slurp("image.qcow2");
    CHECK_U64(got.len, want.len);
    for (uint64_t c = 0; c * 4096 < want.len; c++) {
        size_t n = want.len - c * 4096 < 4096 ? want.len - c * 4096 : 4096;

        if (be(want, block + 2 * c, 2)) {
            CHECK(memcmp(got.data + c * 4096, want.data + c * 4096, n) == 0);
        }
    }
    drop(&want);
    drop(&got);
    return done();
}
