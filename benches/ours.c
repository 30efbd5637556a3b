/* SPDX-License-Identifier: MIT */
/*
 * One verb through the C API, for the benchmark: ours FILE open|create|goto|delete|list|read [NAME],
 * or ours FILE changes|compare|maps FROM TO (what changed, or both maps as far as one would need them)
 * or ours FILE usage|delete-many NAME... or ours FILE check
 *
 * With OURS_STATS=FILE in the environment, the seconds from before the open to after the close and
 * the peak memory in KiB go there: the process around them costs more than a small verb, and what
 * the kernel tells a parent about a child's memory includes the parent's own.
 */
#define _GNU_SOURCE
#include <qcow2_snapshot.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Two readers, a handle each; whoever is free takes the next so many bytes. */
#define TURN (16 << 20)
struct reader { const char *path, *name; int64_t *next; };

/* Read what is not zero in some of the turns and do nothing with it. */
static void *read_turns(void *opaque)
{
    struct reader *r = opaque;
    BlockDriverState *bs;
    char *buf = malloc(1 << 20);
    int64_t turn, at, end, length;
    void *failed = r;
    if (!buf || qcow2_open(r->path, 0, &bs, NULL) < 0) {
        return failed;
    }
    if (qcow2_snapshot_load_tmp(bs, NULL, r->name, NULL) < 0) {
        goto out;
    }
    length = qcow2_getlength(bs);
    while ((turn = __sync_fetch_and_add(r->next, TURN)) < length) {
        int64_t until = turn + TURN < length ? turn + TURN : length;
        for (at = turn; at < until; at = end) {
            Qcow2Extent e;
            if (qcow2_block_status(bs, at, until - at, &e, NULL) < 0) {
                goto out;
            }
            end = at + (int64_t)e.length;
            for (at = e.flags & QCOW2_BLOCK_ZERO ? end : at; at < end;) {
                size_t n = end - at < 1 << 20 ? (size_t)(end - at) : 1 << 20;
                if (qcow2_pread(bs, at, buf, n, NULL) < 0) {
                    goto out;
                }
                at += (int64_t)n;
            }
        }
    }
    failed = NULL;
out:
    free(buf);
    return qcow2_close(bs) < 0 ? r : failed;
}

/* All that is not zero, as the header says that one reads in parallel. */
static int read_all(const char *path, const char *name)
{
    int64_t next = 0;
    struct reader first = { path, name, &next }, second = first;
    pthread_t thread;
    void *failed;
    if (pthread_create(&thread, NULL, read_turns, &second)) {
        return -1;
    }
    int ret = read_turns(&first) ? -1 : 0;
    pthread_join(thread, &failed);
    return failed ? -1 : ret;
}

static int all_changes(BlockDriverState *bs, const char *from, const char *to, int flags)
{
    int64_t at = 0, runs = 0, bytes = 0;
    Qcow2Change c;
    do {
        if (qcow2_snapshot_next_change(bs, from, to, at, INT64_MAX, flags, &c, NULL) < 0) {
            return -1;
        }
        runs += c.length > 0, bytes += (int64_t)c.length;
        at = (int64_t)(c.start + c.length);
    } while (c.length > 0);
    printf("%lld bytes in %lld runs\n", (long long)bytes, (long long)runs);
    return 0;
}

/* What a program would begin with that has no next_change: where everything is, in one state and then the other. */
static int whole_map(BlockDriverState *bs, const char *name)
{
    int64_t at = 0, runs = 0;
    Qcow2Extent e;
    if (qcow2_snapshot_load_tmp(bs, NULL, name, NULL) < 0) {
        return -1;
    }
    for (; at < qcow2_getlength(bs); at += (int64_t)e.length, runs++) {
        if (qcow2_block_status(bs, at, INT64_MAX, &e, NULL) < 0) {
            return -1;
        }
    }
    printf("%lld extents\n", (long long)runs);
    return 0;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void write_stats(double seconds)
{
    const char *path = getenv("OURS_STATS");
    FILE *to = path ? fopen(path, "w") : NULL, *from = fopen("/proc/self/status", "r");
    char line[128];
    unsigned long kib = 0;
    while (from && fgets(line, sizeof(line), from)) {
        if (sscanf(line, "VmHWM: %lu", &kib) == 1) {
            break;
        }
    }
    if (from) {
        fclose(from);
    }
    if (to) {
        fprintf(to, "%.9f %lu\n", seconds, kib);
        fclose(to);
    }
}

int main(int argc, char **argv)
{
    double start = now();
    BlockDriverState *bs;
    Error *err = NULL;
    QEMUSnapshotInfo sn, *tab;
    int reads = argc > 2 && (!strcmp(argv[2], "open") || !strcmp(argv[2], "list") || !strcmp(argv[2], "read") || !strcmp(argv[2], "usage") ||
                            (argc > 4 && strcmp(argv[2], "delete-many")));
    int ret = -1, checks = argc > 2 && !strcmp(argv[2], "check");

    if (argc < 3 || qcow2_open(argv[1], checks ? QCOW2_O_CHECK : reads ? 0 : QCOW2_O_RDWR, &bs, &err) < 0) {
        fprintf(stderr, "%s\n", err ? qcow2_error_get_pretty(err) : "usage: ours FILE VERB [NAME]");
        return 1;
    }
    const char *name = argc > 3 ? argv[3] : "a";
    if (!strcmp(argv[2], "open")) {
        ret = 0;
    } else if (!strcmp(argv[2], "create")) {
        memset(&sn, 0, sizeof(sn));
        strncpy(sn.name, name, sizeof(sn.name) - 1);
        sn.date_sec = 1700000000;
        ret = qcow2_snapshot_create(bs, &sn);
    } else if (!strcmp(argv[2], "goto")) {
        ret = qcow2_snapshot_goto(bs, name);
    } else if (!strcmp(argv[2], "delete")) {
        ret = qcow2_snapshot_delete(bs, NULL, name, NULL);
    } else if (!strcmp(argv[2], "delete-many")) {
        ret = qcow2_snapshot_delete_many(bs, (const char *const *)argv + 3, (size_t)argc - 3, NULL);
    } else if (!strcmp(argv[2], "usage")) {
        Qcow2Usage u;
        ret = qcow2_snapshot_usage(bs, (const char *const *)argv + 3, (size_t)argc - 3, &u, NULL);
        printf("%llu bytes, %llu of them exclusive\n", (unsigned long long)u.referenced, (unsigned long long)u.exclusive);
    } else if (checks) {
        Qcow2CheckResult found;
        ret = qcow2_check(bs, 0, &found, NULL, NULL, NULL);
        ret = ret < 0 || found.corruptions + found.leaks + found.check_errors ? -1 : 0;
    } else if (!strcmp(argv[2], "flatten")) {
        ret = qcow2_flatten(bs, NULL);
    } else if (!strcmp(argv[2], "list")) {
        ret = qcow2_snapshot_list(bs, &tab);
        for (int i = 0; i < ret; i++) {
            printf("%s %s\n", tab[i].id_str, tab[i].name);
        }
        qcow2_snapshot_list_free(tab);
    } else if (!strcmp(argv[2], "read")) {
        ret = read_all(argv[1], name);
    } else if (argc > 4 && !strcmp(argv[2], "maps")) {
        ret = whole_map(bs, argv[3]) < 0 || whole_map(bs, argv[4]) < 0 ? -1 : 0;
    } else if (argc > 4) {
        ret = all_changes(bs, argv[3], argv[4], strcmp(argv[2], "compare") ? 0 : QCOW2_CHANGE_COMPARE);
    }
    if (ret < 0) {
        const char *why = qcow2_last_error(bs);
        fprintf(stderr, "%s: %s\n", argv[2], why ? why : "failed");
    }
    int failed = qcow2_close(bs) < 0 || ret < 0;
    write_stats(now() - start);
    return failed;
}
