/* SPDX-License-Identifier: MIT */
/* The list is one malloc'ed array: free() and qcow2_snapshot_list_free() release it. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/before"), 0);
    Qcow2SnapshotInfo *tab = NULL;

    CHECK_RET(qcow2_snapshot_list(bs, &tab), 3);
    CHECK_STR(tab[0].id_str, "1");
    CHECK_STR(tab[2].name, "three");
    free(tab);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), 3);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
