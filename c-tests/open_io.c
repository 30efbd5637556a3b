/* SPDX-License-Identifier: MIT */
/* An image behind the caller's functions gets the same bytes as a file, in requests of at most 2 MiB. */
#include "memory_io.h"

int main(void)
{
    static const char *const verbs[] = { "create", "goto", "delete" };
    MemoryIo io = { .b = reference("v3-4k/before") };
    Qcow2IoOps ops = memory_ops;
    Qcow2Image *bs = NULL;
    Qcow2SnapshotInfo sn = named("four");

    CHECK_RET(qcow2_open_io(&ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    memset(&ops, 0xff, sizeof(ops));               /* the table was copied */
    for (int i = 0; i < 3; i++) {
        char which[32];
        Bytes want;
        Entry e;

        snprintf(which, sizeof(which), "v3-4k/after-%d", i + 1);
        want = reference(which);
        if (i == 0) {
            CHECK(table_entry(want, 3, &e));
            sn.date_sec = e.date_sec;
            sn.date_nsec = e.date_nsec;
            CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
        } else {
            CHECK_RET(i == 1 ? qcow2_snapshot_goto(bs, "two") : qcow2_snapshot_delete(bs, NULL, "two", NULL), 0);
        }
        spew("image.qcow2", io.b);
        check_file_at(verbs[i], 0, "image.qcow2", want);
        drop(&want);
    }
    CHECK_RET(qcow2_close(bs), 0);
    CHECK(io.largest <= 2 << 20);
    drop(&io.b);
    return done();
}
