/* SPDX-License-Identifier: MIT */
/* A VM state that the active L1 does not cover is -EINVAL, and nothing is written. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("vm-state-v3/before"), QCOW2_O_RDWR);
    Bytes before = slurp("image.qcow2");
    static const uint64_t sizes[] = { 1ull << 24, 1ull << 32, 1ull << 62, UINT64_MAX - 4096, UINT64_MAX };

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        Qcow2SnapshotInfo sn = named("vm");

        sn.vm_state_size = sizes[i];
        CHECK_RET(qcow2_snapshot_create(bs, &sn), -EINVAL);
        CHECK(has_words(bs));
        CHECK_STR(sn.id_str, "");
        CHECK_RET(qcow2_last_outcome(bs), 1);
        CHECK_FILE("image.qcow2", before);
    }
    CHECK_RET(qcow2_close(bs), 0);
    drop(&before);
    return done();
}
