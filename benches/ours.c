/* SPDX-License-Identifier: MIT */
/*
 * One verb through the C API, for the benchmark: ours FILE open|create|goto|delete|list|convert [NAME|OUT]
 *
 * With OURS_STATS=FILE in the environment, the seconds from before the open to after the close and
 * the peak memory in KiB go there: the process around them costs more than a small verb, and what
 * the kernel tells a parent about a child's memory includes the parent's own.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <qcow2_snapshot.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Copy the disk out, 2 MiB at a time, leaving holes for zeros. */
static int convert(BlockDriverState *bs, const char *out)
{
    static char buf[2 << 20], zeros[2 << 20];
    int64_t len = qcow2_getlength(bs);
    int fd = open(out, O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || ftruncate(fd, len) < 0) {
        return -1;
    }
    for (int64_t at = 0; at < len; at += (int64_t)sizeof(buf)) {
        size_t n = (size_t)(len - at) < sizeof(buf) ? (size_t)(len - at) : sizeof(buf);
        int ret = qcow2_pread(bs, at, buf, n, NULL);
        if (ret < 0 || (memcmp(buf, zeros, n) && pwrite(fd, buf, n, at) != (ssize_t)n)) {
            return -1;
        }
    }
    return close(fd);
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
    int reads = argc > 2 && (!strcmp(argv[2], "open") || !strcmp(argv[2], "list") || !strcmp(argv[2], "convert"));
    int ret = -1;

    if (argc < 3 || qcow2_open(argv[1], reads ? 0 : QCOW2_O_RDWR, &bs, &err) < 0) {
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
    } else if (!strcmp(argv[2], "list")) {
        ret = qcow2_snapshot_list(bs, &tab);
        for (int i = 0; i < ret; i++) {
            printf("%s %s\n", tab[i].id_str, tab[i].name);
        }
        qcow2_snapshot_list_free(tab);
    } else if (!strcmp(argv[2], "convert")) {
        ret = convert(bs, name);
    }
    if (ret < 0) {
        const char *why = qcow2_last_error(bs);
        fprintf(stderr, "%s: %s\n", argv[2], why ? why : "failed");
    }
    int failed = qcow2_close(bs) < 0 || ret < 0;
    write_stats(now() - start);
    return failed;
}
