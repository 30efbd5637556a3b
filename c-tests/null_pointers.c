/* SPDX-License-Identifier: MIT */
/* NULL for any pointer is an errno, never a crash. */
#include "harness.h"

static void no_handle(void)
{
    Qcow2SnapshotInfo sn = named("x"), *tab = &sn;
    Qcow2Error *err = NULL;
    char buf[16];

    CHECK_RET(qcow2_read_snapshots(NULL), -EINVAL);
    CHECK_RET(qcow2_write_snapshots(NULL), -EINVAL);
    CHECK_RET(qcow2_snapshot_create(NULL, &sn), -EINVAL);
    CHECK_RET(qcow2_snapshot_goto(NULL, "1"), -EINVAL);
    CHECK_RET(qcow2_snapshot_delete(NULL, "1", NULL, NULL), -EINVAL);
    CHECK_RET(qcow2_snapshot_delete(NULL, "1", NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_list(NULL, &tab), -EINVAL);
    CHECK(!tab);
    CHECK_RET(qcow2_snapshot_load_tmp(NULL, "1", NULL, &err), -EINVAL);
    take_message(&err);
    CHECK(qcow2_getlength(NULL) < 0);
    CHECK_RET(qcow2_pread(NULL, 0, buf, 1, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_load_vmstate(NULL, 0, buf, 1, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_block_status(NULL, 0, 1, NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_next_change(NULL, NULL, NULL, 0, 1, 0, NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_usage(NULL, NULL, 0, NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_delete_many(NULL, NULL, 0, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_rename(NULL, "1", "x", &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_flatten(NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_flatten_estimate(NULL, NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_last_outcome(NULL), -EINVAL);
    CHECK_RET(qcow2_set_progress(NULL, NULL, NULL), -EINVAL);
    qcow2_last_error(NULL);
    qcow2_free_snapshots(NULL);
    qcow2_snapshot_list_free(NULL);
    qcow2_error_free(NULL);
    qcow2_error_get_pretty(NULL);
    CHECK_RET(qcow2_close(NULL), 0);
}

static void no_argument(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), QCOW2_O_RDWR);
    Bytes before = slurp("image.qcow2");
    Qcow2Error *err = NULL;

    CHECK_RET(qcow2_snapshot_create(bs, NULL), -EINVAL);
    CHECK_RET(qcow2_snapshot_goto(bs, NULL), -ENOENT);
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, NULL, NULL), -ENOENT);
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, NULL, &err), -ENOENT);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_list(bs, NULL), -EINVAL);
    CHECK(qcow2_snapshot_load_tmp(bs, NULL, NULL, &err) < 0);
    take_message(&err);
    CHECK_RET(qcow2_pread(bs, 0, NULL, 1, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_load_vmstate(bs, 0, NULL, 1, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_block_status(bs, 0, 1, NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_next_change(bs, "1", NULL, 0, 1, 0, NULL, &err), -EINVAL);
    take_message(&err);
    Qcow2Usage usage;
    const char *const one[] = {"1", NULL};
    CHECK_RET(qcow2_snapshot_usage(bs, NULL, 0, NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_usage(bs, NULL, 1, &usage, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_delete_many(bs, NULL, 1, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_delete_many(bs, one, 2, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_delete_many(bs, NULL, 0, &err), 0);
    CHECK_RET(qcow2_snapshot_usage(bs, one, 2, &usage, &err), 0);
    CHECK_RET(qcow2_snapshot_rename(bs, NULL, "x", &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_snapshot_rename(bs, "1", NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_FILE("image.qcow2", before);
    drop(&before);
    CHECK_RET(qcow2_close(bs), 0);
}

int main(void)
{
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;

    no_handle();
    no_argument();
    CHECK_RET(qcow2_open(NULL, 0, &bs, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_open("image.qcow2", 0, NULL, &err), -EINVAL);
    take_message(&err);
    CHECK_RET(qcow2_open(NULL, 0, &bs, NULL), -EINVAL);
    CHECK_RET(qcow2_open_fd(0, 0, NULL, NULL), -EINVAL);
    CHECK_RET(qcow2_open_io(NULL, NULL, 0, &bs, &err), -EINVAL);
    take_message(&err);
    CHECK(!bs);
    return done();
}
