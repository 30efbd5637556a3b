/* SPDX-License-Identifier: MIT */
/* create stores date, clock and icount as given, date 0 too; texts without NUL end with the array. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/before"), QCOW2_O_RDWR);
    Qcow2SnapshotInfo sn = named("zero");
    Bytes b;
    Entry e;

    sn.date_sec = sn.date_nsec = 0;
    sn.vm_clock_nsec = 0x0123456789abcdef;
    sn.icount = UINT64_MAX;
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    memset(sn.id_str, 'i', sizeof(sn.id_str));
    memset(sn.name, 'n', sizeof(sn.name));
    sn.date_sec = sn.date_nsec = UINT32_MAX;
    sn.icount = 5;
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(qcow2_close(bs), 0);

    b = slurp("image.qcow2");
    CHECK(table_entry(b, 3, &e));
    CHECK_U64(e.date_sec, 0);
    CHECK_U64(e.date_nsec, 0);
    CHECK_U64(e.vm_clock_nsec, 0x0123456789abcdef);
    CHECK_U64(e.icount, UINT64_MAX);
    CHECK(table_entry(b, 4, &e));
    CHECK_U64(e.date_sec, UINT32_MAX);
    CHECK_U64(e.date_nsec, UINT32_MAX);
    CHECK_U64(e.icount, 5);
    CHECK_U64(e.extra_size, 24);
    CHECK(e.id.len >= 127 && e.id.len <= 128 && e.name.len >= 255 && e.name.len <= 256);
    drop(&b);
    return done();
}
