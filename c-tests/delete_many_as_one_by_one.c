/* SPDX-License-Identifier: MIT */
/* delete_many leaves the list, the disk and the snapshots that deleting one after the other leaves. */
#include "harness.h"

enum { SIZE = 64 << 10 };

static Qcow2Image *with_five(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR);
    const char *names[] = {"a", "b", "c", "b", "d"};

    for (size_t i = 0; i < 5; i++) {
        Qcow2SnapshotInfo sn = named(names[i]);
        CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    }
    return bs;
}

/* The names in order, and a disk. */
static void state(Qcow2Image *bs, char *names, unsigned char *disk)
{
    Qcow2SnapshotInfo *tab;
    int n = qcow2_snapshot_list(bs, &tab);

    names[0] = 0;
    for (int i = 0; i < n; i++) {
        strcat(strcat(names, tab[i].id_str), tab[i].name);
        strcat(names, " ");
    }
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_pread(bs, 0, disk, SIZE, NULL), 0);
}

int main(void)
{
    const char *const gone[] = {"b", "d", "a", "b"};    /* the first "b" only */
    static unsigned char disk[2][SIZE];
    char names[2][4096];
    Qcow2Image *bs = with_five();

    CHECK_RET(qcow2_snapshot_delete_many(bs, gone, 4, NULL), 0);
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_DONE);
    state(bs, names[0], disk[0]);
    CHECK_RET(qcow2_close(bs), 0);
    if (have("qemu-img"))
        CHECK_RET(shell("qemu-img check image.qcow2"), 0);

    bs = with_five();
    for (size_t i = 0; i < 3; i++)
        CHECK_RET(qcow2_snapshot_delete(bs, NULL, gone[i], NULL), 0);
    state(bs, names[1], disk[1]);
    CHECK_STR(names[0], names[1]);
    CHECK(memcmp(disk[0], disk[1], SIZE) == 0);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
