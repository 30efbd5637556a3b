/* SPDX-License-Identifier: MIT */
/* Code written against QEMU's names and signatures compiles and works unchanged. */
#include "harness.h"

static int save(BlockDriverState *bs, QEMUSnapshotInfo *sn_info)
{
    return qcow2_snapshot_create(bs, sn_info);
}

int main(void)
{
    BlockDriverState *bs = NULL;
    Error *local_err = NULL;
    QEMUSnapshotInfo sn, *sn_tab = NULL;

    memset(&sn, 0, sizeof(sn));
    strcpy(sn.name, "as QEMU");
    CHECK_RET(qcow2_open(fixture("v3-4k/before"), QCOW2_O_RDWR, &bs, &local_err), 0);
    CHECK_RET(save(bs, &sn), 0);
    CHECK_RET(qcow2_snapshot_list(bs, &sn_tab), 4);
    free(sn_tab);
    CHECK_RET(qcow2_snapshot_delete(bs, sn.id_str, sn.name, &local_err), 0);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
