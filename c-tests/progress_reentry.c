/* SPDX-License-Identifier: MIT */
/* Calling back into the handle from the progress function is -EBUSY, and harms nothing. */
#include "harness.h"

static int call_back(void *handle, int stage, uint64_t done, uint64_t total)
{
    Qcow2Image *bs = *(Qcow2Image **)handle;
    Qcow2SnapshotInfo *tab;

    (void)stage, (void)done, (void)total;
    CHECK_RET(qcow2_snapshot_goto(bs, "1"), -EBUSY);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), -EBUSY);
    CHECK_RET(qcow2_set_progress(bs, NULL, NULL), -EBUSY);
    CHECK_RET(qcow2_close(bs), -EBUSY);
    CHECK(strstr(qcow2_last_error(bs), "busy"));
    return 0;
}

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/before"), QCOW2_O_RDWR);
    Qcow2SnapshotInfo sn = named("four"), *tab;

    CHECK_RET(qcow2_set_progress(NULL, call_back, NULL), -EINVAL);
    CHECK_RET(qcow2_set_progress(bs, call_back, &bs), 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK(qcow2_last_error(bs) == NULL);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), 4);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
