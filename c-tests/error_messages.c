/* SPDX-License-Identifier: MIT */
/* Each failure has its errno and words: in errp, or in qcow2_last_error(). */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR);
    Qcow2SnapshotInfo sn = named("x"), *tab;
    Qcow2Error *err = NULL;
    const char *text;

    CHECK_RET(qcow2_snapshot_goto(bs, "nothing"), -ENOENT);
    text = qcow2_last_error(bs);
    CHECK(text && *text);

    CHECK_RET(qcow2_snapshot_delete(bs, "99", NULL, &err), -ENOENT);
    CHECK(strstr(take_message(&err), "snapshot"));
    CHECK_RET(qcow2_snapshot_delete(bs, "1", "two", &err), -ENOENT);   /* both must be the same entry */
    take_message(&err);
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, "nothing", NULL), -ENOENT);

    snprintf(sn.id_str, sizeof(sn.id_str), "1");
    CHECK_RET(qcow2_snapshot_create(bs, &sn), -EEXIST);
    CHECK(has_words(bs));

    /* errp stays NULL when the call succeeds. */
    CHECK_RET(qcow2_snapshot_delete(bs, "1", "one", &err), 0);
    CHECK(!err);
    CHECK(qcow2_snapshot_list(bs, &tab) > 0);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
