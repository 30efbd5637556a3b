/* SPDX-License-Identifier: MIT */
/* create keeps the caller's ID, refuses one that exists, and writes a chosen one back. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/before"), QCOW2_O_RDWR);
    Bytes before = slurp("image.qcow2");
    Qcow2SnapshotInfo sn = named("mine"), *tab;

    strcpy(sn.id_str, "2");
    CHECK_RET(qcow2_snapshot_create(bs, &sn), -EEXIST);
    CHECK_STR(sn.id_str, "2");
    CHECK_FILE("image.qcow2", before);
    drop(&before);

    strcpy(sn.id_str, "my own");
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_STR(sn.id_str, "my own");
    strcpy(sn.id_str, "70");
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    sn = named("next");
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_STR(sn.id_str, "71");

    CHECK_RET(qcow2_snapshot_list(bs, &tab), 6);
    CHECK_STR(tab[3].id_str, "my own");
    CHECK_STR(tab[5].id_str, "71");
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
