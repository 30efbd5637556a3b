/* SPDX-License-Identifier: MIT */
/* One verb through the C API, for the benchmark: ours FILE create|goto|delete|list|convert [NAME|OUT] */
#define _GNU_SOURCE
#include <fcntl.h>
#include <qcow2_snapshot.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

int main(int argc, char **argv)
{
    BlockDriverState *bs;
    Error *err = NULL;
    QEMUSnapshotInfo sn, *tab;
    int reads = argc > 2 && (!strcmp(argv[2], "list") || !strcmp(argv[2], "convert"));
    int ret = -1;

    if (argc < 3 || qcow2_open(argv[1], reads ? 0 : QCOW2_O_RDWR, &bs, &err) < 0) {
        fprintf(stderr, "%s\n", err ? qcow2_error_get_pretty(err) : "usage: ours FILE VERB [NAME]");
        return 1;
    }
    const char *name = argc > 3 ? argv[3] : "a";
    if (!strcmp(argv[2], "create")) {
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
    return qcow2_close(bs) < 0 || ret < 0;
}
