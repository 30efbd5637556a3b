/* SPDX-License-Identifier: MIT */
/*
 * Fail the N-th request of each verb, once and for good: errno out, and the image holds the old or the new
 * state. Where nobody can know which, the handle does not tell where its tables are.
 */
#include "memory_io.h"

/* How many snapshots a fresh handle sees; all of it must be readable. */
static int reopened_count(MemoryIo *io)
{
    MemoryIo again = { .b = { malloc(io->b.len), io->b.len } };
    Qcow2SnapshotInfo *tab = NULL;
    Qcow2Image *bs = NULL;
    int n;

    memcpy(again.b.data, io->b.data, io->b.len);
    CHECK_RET(qcow2_open_io(&memory_ops, &again, QCOW2_O_RDWR, &bs, NULL), 0);
    n = qcow2_snapshot_list(bs, &tab);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_snapshot_goto(bs, "1"), 0);     /* the counts still add up */
    CHECK_RET(qcow2_close(bs), 0);
    drop(&again.b);
    return n;
}

static int unknown;

static bool one(Bytes before, int verb, int request, bool forever)
{
    MemoryIo io = { .b = { malloc(before.len), before.len } };
    Qcow2SnapshotInfo sn = named("four");
    Qcow2Image *bs = NULL;
    const char *const set[] = { "two", "3" };
    Qcow2ImageLayout at;
    int ret, outcome, n, old = 3, new = verb == 0 ? 4 : verb == 2 ? 2 : verb == 4 ? 1 : 3;

    memcpy(io.b.data, before.data, before.len);
    CHECK_RET(qcow2_open_io(&memory_ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    io.requests = 0;
    io.fail_at = request;
    io.fail_with = EREMOTEIO;
    io.fail_forever = forever;
    ret = verb == 0 ? qcow2_snapshot_create(bs, &sn)
        : verb == 1 ? qcow2_snapshot_goto(bs, "two")
        : verb == 2 ? qcow2_snapshot_delete(bs, NULL, "two", NULL)
        : verb == 4 ? qcow2_snapshot_delete_many(bs, set, 2, NULL)
        : verb == 5 ? qcow2_snapshot_rename(bs, "two", "another", NULL)
                    : qcow2_write_snapshots(bs);
    outcome = qcow2_last_outcome(bs);
    if (ret < 0) {
        CHECK_RET(ret, -EREMOTEIO);
        CHECK(has_words(bs));
    }
    CHECK_RET(qcow2_image_layout(bs, &at), outcome == QCOW2_OUTCOME_UNKNOWN ? -EIO : 0);
    unknown += outcome == QCOW2_OUTCOME_UNKNOWN;
    qcow2_close(bs);
    n = reopened_count(&io);
    CHECK(outcome >= 1 && outcome <= 3);
    CHECK(n == old || n == new);
    CHECK(outcome != 1 || n == old);
    CHECK(outcome != 2 || n == new);
    CHECK(ret == 0 ? outcome == 2 : true);
    drop(&io.b);
    return io.requests >= request;                   /* false: there was no N-th request */
}

int main(void)
{
    Bytes before = reference("v3-1k/before");

    for (int verb = 0; verb < 6; verb++) {
        for (int forever = 0; forever < 2; forever++) {
            for (int request = 1; one(before, verb, request, forever); request++) {
                CHECK(request < 10000);
            }
        }
    }
    CHECK(unknown >= 6);
    drop(&before);
    return done();
}
