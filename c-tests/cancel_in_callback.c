/* SPDX-License-Identifier: MIT */
/* A thread that is cancelled in its own pread finishes the call, and ends after it. */
#include <pthread.h>

#include "memory_io.h"

static int cancelled_in_pread, answer = 1, state_after = -1;

static int pread_that_is_cancelled(void *opaque, uint64_t offset, void *buf, size_t bytes)
{
    if (cancelled_in_pread++ == 0) {
        pthread_cancel(pthread_self());
    }
    usleep(1);                                        /* a cancellation point */
    return memory_pread(opaque, offset, buf, bytes);
}

static void *take_snapshot(void *opaque)
{
    Qcow2IoOps ops = memory_ops;
    Qcow2SnapshotInfo sn = named("four");
    Bytes want = reference("v3-4k/after-1");
    Qcow2Image *bs = NULL;
    Entry e;

    ops.pread = pread_that_is_cancelled;
    CHECK(table_entry(want, 3, &e));
    sn.date_sec = e.date_sec;
    sn.date_nsec = e.date_nsec;
    CHECK_RET(qcow2_open_io(&ops, opaque, QCOW2_O_RDWR, &bs, NULL), 0);
    answer = qcow2_snapshot_create(bs, &sn);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK(same(((MemoryIo *)opaque)->b, want));
    drop(&want);
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state_after);
    pthread_setcancelstate(state_after, NULL);
    pthread_testcancel();
    return NULL;
}

int main(void)
{
    MemoryIo io = { .b = reference("v3-4k/before") };
    pthread_t thread;
    void *end = NULL;

    CHECK(pthread_create(&thread, NULL, take_snapshot, &io) == 0);
    CHECK(pthread_join(thread, &end) == 0);
    CHECK_RET(answer, 0);
    CHECK(cancelled_in_pread > 1);
    CHECK(state_after == PTHREAD_CANCEL_ENABLE);
    CHECK(end == PTHREAD_CANCELED);
    drop(&io.b);
    return done();
}
