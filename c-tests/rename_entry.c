/* SPDX-License-Identifier: MIT */
/* rename changes the name in the table and nothing else of any entry. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR);
    Qcow2SnapshotInfo sn = named("second"), *was, *is;
    Qcow2Error *err = NULL;
    char longest[257] = "";

    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    int n = qcow2_snapshot_list(bs, &was);
    memset(longest, 'x', 256);
    CHECK_RET(qcow2_snapshot_rename(bs, "second", longest, &err), -EINVAL);
    CHECK(strstr(take_message(&err), "256"));
    CHECK_RET(qcow2_snapshot_rename(bs, "third", "new", &err), -ENOENT);
    CHECK(strstr(take_message(&err), "'third'"));
    const char *const names[] = {longest + 1, was[0].name, ""};
    for (size_t i = 0; i < 3; i++) {
        CHECK_RET(qcow2_snapshot_rename(bs, sn.id_str, names[i], NULL), 0);
        CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_DONE);
        CHECK_RET(qcow2_snapshot_list(bs, &is), n);
        CHECK_STR(is[n - 1].name, names[i]);
        memcpy(is[n - 1].name, was[n - 1].name, sizeof(is->name));
        CHECK(memcmp(is, was, sizeof(*is) * (size_t)n) == 0);
        qcow2_snapshot_list_free(is);
    }
    qcow2_snapshot_list_free(was);
    CHECK_RET(qcow2_close(bs), 0);
    if (have("qemu-img"))
        CHECK_RET(shell("qemu-img check image.qcow2"), 0);
    return done();
}
