/* SPDX-License-Identifier: MIT */
/* IDs above 127 and names above 255 bytes are cut in the list, but match in full. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("long-names/before"), QCOW2_O_RDWR);
    Qcow2SnapshotInfo *tab;
    char id[131], name[301];

    memset(id, '7', 130);
    memset(name, 'n', 300);
    id[130] = name[300] = 0;
    CHECK_RET(qcow2_snapshot_list(bs, &tab), 2);
    CHECK_U64(strlen(tab[0].id_str), 127);
    CHECK_U64(strlen(tab[1].name), 255);
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, tab[1].name, NULL), -ENOENT);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, name, NULL), 0);
    CHECK_RET(qcow2_snapshot_delete(bs, id, NULL, NULL), 0);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), 0);
    CHECK_RET(qcow2_close(bs), 0);
    if (have("qemu-img")) {
        CHECK(shell("qemu-img check image.qcow2") == 0);
    }
    return done();
}
