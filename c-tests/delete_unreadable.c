/* SPDX-License-Identifier: MIT */
/* A snapshot whose L1 table is not where one can be: a repair frees nothing while it is there; delete drops it, frees nothing and says
 * so; then a repair of leaks gives the space back. */
#include "harness.h"

static const char *said;

static void note(void *opaque, const char *finding)
{
    if (strstr(finding, "Nothing is freed")) {
        said = opaque;
    }
}

int main(void)
{
    const char *file = fixture("damaged-snapshot-l1/before");
    const char *const both[] = {"1", "2"};
    Qcow2SnapshotInfo *tab;
    Qcow2CheckResult found;
    Qcow2Image *bs;

    bs = must_open(file, QCOW2_O_RDWR | QCOW2_O_CHECK);
    CHECK_RET(qcow2_check(bs, QCOW2_FIX_LEAKS | QCOW2_FIX_ERRORS, &found, note, "yes", NULL), 0);
    CHECK(said != NULL && found.corruptions == 2 && found.leaks_fixed == 0);
    CHECK_RET(qcow2_close(bs), 0);

    bs = must_open(file, QCOW2_O_RDWR);
    CHECK_RET(qcow2_snapshot_delete(bs, "1", NULL, NULL), 0);
    CHECK(strstr(qcow2_last_error(bs), "qcow2-snapshot check -r leaks"));
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_DONE);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), 1);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_snapshot_delete_many(bs, both + 1, 1, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);

    bs = must_open(file, QCOW2_O_RDWR | QCOW2_O_CHECK);
    CHECK_RET(qcow2_check(bs, QCOW2_FIX_LEAKS, &found, NULL, NULL, NULL), 0);
    CHECK(found.leaks_fixed > 0 && found.leaks + found.corruptions + found.check_errors == 0);
    CHECK_RET(qcow2_snapshot_list(bs, &tab), 0);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
