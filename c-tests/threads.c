/* SPDX-License-Identifier: MIT */
/* Many handles on many threads: each does what it does alone. Run under helgrind and ThreadSanitizer too. */
#include <pthread.h>

#include "harness.h"

enum { THREADS = 8, ROUNDS = 6 };

static Bytes start;

static void *work(void *arg)
{
    int me = *(int *)arg;
    char path[32], name[32];

    snprintf(path, sizeof(path), "thread-%d.qcow2", me);
    for (int round = 0; round < ROUNDS; round++) {
        Qcow2Image *bs = NULL, *second = NULL;
        Qcow2Error *err = NULL;
        Qcow2SnapshotInfo sn = named("x"), *tab = NULL;
        char sector[512];
        int before;

        spew(path, start);
        snprintf(name, sizeof(name), "t%d-%d", me, round);
        snprintf(sn.name, sizeof(sn.name), "%s", name);
        CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &bs, NULL), 0);
        CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &second, &err), -EAGAIN);
        CHECK(strlen(qcow2_error_get_pretty(err)) > 0);
        qcow2_error_free(err);
        err = NULL;
        before = qcow2_snapshot_list(bs, &tab);
        CHECK(before >= 0);
        qcow2_snapshot_list_free(tab);
        CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
        CHECK_RET(qcow2_snapshot_create(bs, &sn), -EEXIST);
        CHECK(strlen(qcow2_last_error(bs)) > 0);
        CHECK_RET(qcow2_snapshot_goto(bs, name), 0);
        CHECK_RET(qcow2_pread(bs, 0, sector, sizeof(sector), NULL), 0);
        CHECK_RET(qcow2_snapshot_delete(bs, NULL, name, NULL), 0);
        CHECK_RET(qcow2_snapshot_list(bs, &tab), before);
        qcow2_snapshot_list_free(tab);
        CHECK_RET(qcow2_close(bs), 0);
    }
    return NULL;
}

int main(void)
{
    pthread_t threads[THREADS];
    int numbers[THREADS];

    start = reference("v3-1k/after-1");
    for (int i = 0; i < THREADS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, work, &numbers[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    drop(&start);
    return done();
}
