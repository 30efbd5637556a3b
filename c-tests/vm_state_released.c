/* SPDX-License-Identifier: MIT */
/* create with VM state: the snapshot keeps it, the active L1's range holds none, qemu-img check is clean. */
#include "harness.h"

#define OFFSET_MASK 0xfffffffffffe00ull

int main(void)
{
    Qcow2Image *bs = must_open(fixture("vm-state-v3/before"), QCOW2_O_RDWR);
    Qcow2SnapshotInfo sn = named("vm");
    Bytes b;
    Entry e;
    uint64_t active, saved;

    sn.vm_state_size = 20000;
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(qcow2_close(bs), 0);
    b = slurp("image.qcow2");
    CHECK(table_entry(b, 0, &e));
    CHECK_U64(e.vm_state_size, 20000);
    /* Clusters of 4 KiB: one L2 table covers 2 MiB; the disk has 1 MiB, the VM state begins
     * in the next table. */
    active = be(b, be(b, 40, 8) + 8, 8) & OFFSET_MASK;
    saved = be(b, e.l1_offset + 8, 8) & OFFSET_MASK;
    CHECK(saved && active != saved);
    for (int i = 0; i < 5; i++) {
        CHECK(active == 0 || be(b, active + 8 * i, 8) == 1);       /* the zero flag alone */
        CHECK(be(b, saved + 8 * i, 8) & OFFSET_MASK);
    }
    drop(&b);
    need("qemu-img");
    CHECK(shell("qemu-img check image.qcow2") == 0);
    return done();
}
