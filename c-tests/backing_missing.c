/* SPDX-License-Identifier: MIT */
/* No verb needs the backing file. */
#include "harness.h"

int main(void)
{
    static const char *const cases[] = { "backing-raw", "backing-qcow2" };

    for (int i = 0; i < 2; i++) {
        char which[64];
        Bytes after;
        Qcow2SnapshotInfo sn = named("two");
        Qcow2Image *bs;
        Entry e;

        snprintf(which, sizeof(which), "%s/after-1", cases[i]);
        after = reference(which);
        CHECK(table_entry(after, 1, &e));
        sn.date_sec = e.date_sec;
        sn.date_nsec = e.date_nsec;
        snprintf(which, sizeof(which), "%s/before", cases[i]);
        bs = must_open(fixture(which), QCOW2_O_RDWR);
        CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
        CHECK_FILE("image.qcow2", after);
        CHECK_RET(qcow2_snapshot_goto(bs, "one"), 0);
        CHECK_RET(qcow2_snapshot_delete(bs, NULL, "one", NULL), 0);
        CHECK_RET(qcow2_close(bs), 0);
        drop(&after);
    }
    return done();
}
