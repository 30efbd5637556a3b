/* SPDX-License-Identifier: MIT */
/* An image cut anywhere: each verb works or fails, and a failure leaves every byte. */
#include "harness.h"

static void try_all(Bytes b)
{
    static const char *const verbs[] = { "create", "goto", "delete", "write" };

    for (size_t i = 0; i < 4; i++) {
        Qcow2SnapshotInfo sn = named("new");
        Qcow2Image *bs = NULL;
        int ret;

        spew("image.qcow2", b);
        ret = qcow2_open("image.qcow2", QCOW2_O_RDWR, &bs, NULL);
        if (ret == 0) {
            ret = i == 0 ? qcow2_snapshot_create(bs, &sn)
                : i == 1 ? qcow2_snapshot_goto(bs, "two")
                : i == 2 ? qcow2_snapshot_delete(bs, NULL, "one", NULL)
                         : qcow2_write_snapshots(bs);
            CHECK(ret == 0 || (qcow2_last_outcome(bs) == 1));
            CHECK_RET(qcow2_close(bs), 0);
        }
        if (ret < 0) {
            check_file_at(verbs[i], (int)b.len, "image.qcow2", b);
        }
    }
}

int main(void)
{
    Bytes b = reference("v3-1k/before");
    size_t all = b.len;

    for (b.len = 0; b.len < 200; b.len += 13) {
        try_all(b);
    }
    for (b.len = 512; b.len < all; b.len += 509) {
        try_all(b);
    }
    drop(&b);
    return done();
}
