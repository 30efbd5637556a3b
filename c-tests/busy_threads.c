/* SPDX-License-Identifier: MIT */
/* A second thread on a handle is -EBUSY, in words that name threads, and harms nothing. */
#include <pthread.h>

#include "memory_io.h"

static Qcow2Image *bs;
static int answer;
static char words[256];

static void *second(void *unused)
{
    Qcow2Error *err = NULL;

    answer = qcow2_snapshot_delete(bs, NULL, "one", &err);
    snprintf(words, sizeof(words), "%s", qcow2_error_get_pretty(err));
    qcow2_error_free(err);
    CHECK_STR(qcow2_last_error(bs), words);
    return unused;
}

static int pread_beside_another_thread(void *opaque, uint64_t offset, void *buf, size_t bytes)
{
    pthread_t thread;

    if (bs && !answer) {
        CHECK(pthread_create(&thread, NULL, second, NULL) == 0);
        CHECK(pthread_join(thread, NULL) == 0);
    }
    return memory_pread(opaque, offset, buf, bytes);
}

int main(void)
{
    MemoryIo io = { .b = reference("v3-4k/before") };
    Qcow2IoOps ops = memory_ops;
    Qcow2SnapshotInfo sn = named("four");

    ops.pread = pread_beside_another_thread;
    CHECK_RET(qcow2_open_io(&ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(answer, -EBUSY);
    CHECK(strstr(words, "another thread") && strstr(words, "called back"));
    CHECK(qcow2_last_error(bs) == NULL);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&io.b);
    return done();
}
