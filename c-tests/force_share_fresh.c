/* SPDX-License-Identifier: MIT */
/* A FORCE_SHARE handle that is kept open reads what is in the image when it reads. */
#include "harness.h"

static Qcow2Image *bs;

static int byte_at(int64_t offset)
{
    unsigned char c = 0xee;
    Qcow2Error *err = NULL;

    if (qcow2_pread(bs, offset, &c, 1, &err) < 0) {
        fail_at(__FILE__, __LINE__, "%s", take_message(&err));
    }
    return c;
}

int main(void)
{
    QEMUSnapshotInfo *tab;
    Qcow2Error *err = NULL;
    Qcow2Extent e;
    char c;

    need("qemu-io");
    CHECK_RET(shell("qemu-img create -q -f qcow2 base 2M && qemu-io -c 'write -P 9 0 64k' -c 'write -P 8 1M 64k' base"
                    "&& qemu-img create -q -f qcow2 -b base -F qcow2 top && qemu-io -c 'write -P 1 0 64k' top"), 0);
    sleep(4);    /* later than a file system's clock needs to tell two changes apart: tables are kept then */
    bs = must_open("top", QCOW2_O_FORCE_SHARE);
    CHECK_RET(byte_at(0), 1);
    CHECK_RET(byte_at(1 << 20), 8);

    /* The cluster of 0 becomes that of 64 KiB. */
    CHECK_RET(shell("qemu-io -c 'discard 0 64k' -c 'write -P 2 64k 64k' top"), 0);
    CHECK_RET(byte_at(65536), 2);
    CHECK_RET(byte_at(0), 0);
    /* The same in the file behind it. */
    CHECK_RET(shell("qemu-io -c 'discard 1M 64k' -c 'write -P 3 1088k 64k' base"), 0);
    CHECK_RET(byte_at(1 << 20), 0);
    CHECK_RET(byte_at(1088 << 10), 3);

    /* Snapshots come and go; another disk is put in the place of this one. */
    CHECK_RET(shell("qemu-img snapshot -c one top && qemu-io -c 'write -P 4 0 64k' top && qemu-img snapshot -c two top"
                    "&& qemu-img resize -q top 3M"), 0);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), 2);
    CHECK_STR(tab[1].name, "two");
    qcow2_snapshot_list_free(tab);
    CHECK_RET(byte_at(0), 4);
    CHECK_RET(byte_at((3 << 20) - 1), 0);
    CHECK_RET(shell("qemu-img snapshot -a one top"), 0);
    CHECK_RET(qcow2_block_status(bs, 65536, INT64_MAX, &e, NULL), 0);
    CHECK(e.flags & QCOW2_BLOCK_DATA);
    CHECK_RET(byte_at(0), 0);

    /* What is shown of a snapshot stays, until that one is deleted: then no bytes of others. */
    CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "two", NULL), 0);
    CHECK_RET(byte_at(0), 4);
    CHECK_RET(shell("qemu-img snapshot -d one top && qemu-io -c 'write -P 5 0 64k' top"), 0);
    CHECK_RET(byte_at(0), 4);
    CHECK_RET(shell("qemu-img snapshot -d two top && qemu-img snapshot -c two top"), 0);
    CHECK_RET(qcow2_pread(bs, 0, &c, 1, &err), -ENOENT);
    CHECK(strstr(take_message(&err), "deleted"));
    CHECK_RET(qcow2_snapshot_load_tmp(bs, NULL, "two", NULL), 0);
    CHECK_RET(byte_at(0), 5);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
