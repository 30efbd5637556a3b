/* SPDX-License-Identifier: MIT */
/* A cancellation waits for the end of any call; the caller's own state comes back after each. */
#include <pthread.h>

#include "harness.h"

static int calls;

static void state_is(int want)
{
    int state = -1;

    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
    pthread_setcancelstate(state, NULL);
    CHECK(state == want);
    calls++;
}

/* Every function that may reach a cancellation point, with the cancellation pending all the time. */
static void *cancelled(void *state)
{
    int want = *(int *)state, fd = open("image.qcow2", O_RDWR);
    Qcow2SnapshotInfo sn = named("x"), *tab;
    Qcow2Error *err = NULL;
    Qcow2Extent extent;
    Qcow2Image *bs;
    char buf[512];

    CHECK(fd >= 0);
    pthread_setcancelstate(want, NULL);
    pthread_cancel(pthread_self());
#define CALL(call, ret) do { CHECK_RET(call, ret); state_is(want); } while (0)
    CALL(qcow2_open("image.qcow2", QCOW2_O_RDWR, &bs, NULL), 0);
    CALL(qcow2_snapshot_create(bs, &sn), 0);
    CALL(qcow2_snapshot_goto(bs, "x"), 0);
    CALL(qcow2_write_snapshots(bs), 0);
    CALL(qcow2_read_snapshots(bs), 0);
    CALL(qcow2_snapshot_delete(bs, NULL, "no such", &err), -ENOENT);
    CALL((qcow2_error_free(err), 0), 0);
    CALL(qcow2_snapshot_delete(bs, NULL, "x", NULL), 0);
    CALL(qcow2_snapshot_list(bs, &tab) > 0, 1);
    CALL((qcow2_snapshot_list_free(tab), 0), 0);
    CALL(qcow2_pread(bs, 0, buf, sizeof(buf), NULL), 0);
    CALL(qcow2_block_status(bs, 0, INT64_MAX, &extent, NULL), 0);
    CALL(qcow2_close(bs), 0);
    CALL(qcow2_open_fd(fd, 0, &bs, NULL), 0);
    CALL(qcow2_close(bs), 0);
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    close(fd);
    return NULL;
}

int main(void)
{
    int states[] = {PTHREAD_CANCEL_ENABLE, PTHREAD_CANCEL_DISABLE};

    for (int i = 0; i < 2; i++) {
        pthread_t thread;
        void *end = NULL;

        fixture("v3-4k/before");
        calls = 0;
        CHECK(pthread_create(&thread, NULL, cancelled, &states[i]) == 0);
        CHECK(pthread_join(thread, &end) == 0);
        CHECK(calls == 15);
        CHECK(end == NULL);
    }
    return done();
}
