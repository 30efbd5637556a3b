/* SPDX-License-Identifier: MIT */
/* A snapshot table that cannot be read is mended by itself, or with everything else; until then listing says what is wrong. */
#include "harness.h"

static void one(int fix)
{
    const char *file = fixture("extra-data-too-much/before");
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;
    Qcow2CheckResult found;
    Qcow2SnapshotInfo *tab;

    CHECK_RET(qcow2_open(file, 0, &bs, &err), -EFBIG);
    qcow2_error_free(err);
    err = NULL;
    bs = must_open(file, QCOW2_O_RDWR | QCOW2_O_CHECK);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), -EFBIG);
    CHECK_RET(qcow2_check(bs, 0, &found, NULL, NULL, &err), -EFBIG);
    CHECK(err != NULL && found.corruptions == 0 && found.total_clusters == 0);
    qcow2_error_free(err);
    CHECK_RET(qcow2_check(bs, fix, &found, NULL, NULL, NULL), 0);
    CHECK(found.corruptions == 0 && found.corruptions_fixed >= 1);
    CHECK(qcow2_snapshot_list(bs, &tab) > 0);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_check(bs, 0, &found, NULL, NULL, NULL), 0);
    CHECK_RET((int)(found.corruptions + found.check_errors), 0);
    CHECK_RET(qcow2_close(bs), 0);
    bs = must_open(file, QCOW2_O_RDWR);
    CHECK_RET(qcow2_close(bs), 0);
}

int main(void)
{
    one(QCOW2_CHECK_TABLE_ONLY | QCOW2_FIX_ERRORS);
    one(QCOW2_FIX_LEAKS | QCOW2_FIX_ERRORS);
    return done();
}
