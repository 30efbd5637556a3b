/* SPDX-License-Identifier: MIT */
/* An image with the dirty or the corrupt bit opens for checking; no verb changes it until a repair has found it good, and then any may. */
#include "harness.h"

static void one(const char *image, int refusal)
{
    const char *file = fixture(image);
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;
    Qcow2CheckResult found;
    Qcow2SnapshotInfo sn = named("after the repair"), *tab;
    int n;

    CHECK_RET(qcow2_open(file, QCOW2_O_RDWR, &bs, &err), refusal);
    qcow2_error_free(err);
    bs = must_open(file, QCOW2_O_RDWR | QCOW2_O_CHECK);
    n = qcow2_snapshot_list(bs, &tab);
    CHECK(n >= 0);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), -EPERM);
    CHECK(has_words(bs));
    CHECK_RET(qcow2_snapshot_goto(bs, "1"), -EPERM);
    CHECK_RET(qcow2_snapshot_delete(bs, "1", NULL, NULL), -EPERM);
    CHECK_RET(qcow2_write_snapshots(bs), -EPERM);
    CHECK_RET(qcow2_check(bs, 0, &found, NULL, NULL, NULL), 0);
    CHECK_RET(qcow2_write_snapshots(bs), -EPERM);        /* looking is not enough */
    CHECK_RET(qcow2_check(bs, QCOW2_FIX_LEAKS | QCOW2_FIX_ERRORS, &found, NULL, NULL, NULL), 0);
    CHECK_RET((int)(found.corruptions + found.leaks + found.check_errors), 0);
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_DONE);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(qcow2_close(bs), 0);
    bs = must_open(file, QCOW2_O_RDWR);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), n + 1);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_close(bs), 0);
}

int main(void)
{
    one("dirty-bit/before", -ENOTSUP);
    one("corrupt-bit/before", -EACCES);
    return done();
}
