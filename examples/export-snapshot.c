/* SPDX-License-Identifier: MIT */
/*
 * export-snapshot IMAGE NAME RAW: a snapshot's disk as a sparse raw file.
 * An empty NAME stands for the disk as it is now. RAW must not exist: it could be IMAGE itself, or
 * a file that IMAGE reads from.
 *
 *     cc export-snapshot.c -lqcow2_snapshot
 */
#define _XOPEN_SOURCE 700
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <qcow2_snapshot.h>

enum { CHUNK = 4 << 20 };               /* bytes for each read: large and straight */

static int write_all(int fd, const char *buf, size_t n, int64_t at)
{
    while (n > 0) {
        ssize_t done = pwrite(fd, buf, n, at);

        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done < 0) {
            return -errno;
        }
        buf += done;
        n -= (size_t)done;
        at += done;
    }
    return 0;
}

/* Copy what is not zero; the rest of the new file stays a hole. */
static int copy_disk(BlockDriverState *bs, int fd, char *buf, Error **errp)
{
    int64_t length = qcow2_getlength(bs), at = 0;

    if (length < 0 || ftruncate(fd, length) < 0) {
        return length < 0 ? (int)length : -errno;
    }
    while (at < length) {
        Qcow2Extent e;
        int ret = qcow2_block_status(bs, at, INT64_MAX, &e, errp);
        int64_t end = at + (int64_t)e.length;

        if (ret < 0) {
            return ret;
        }
        if (e.flags & QCOW2_BLOCK_ZERO) {
            at = end;
        }
        while (at < end) {
            size_t n = end - at < CHUNK ? (size_t)(end - at) : CHUNK;

            ret = qcow2_pread(bs, at, buf, n, errp);
            if (ret == 0) {
                ret = write_all(fd, buf, n, at);
            }
            if (ret < 0) {
                return ret;
            }
            at += (int64_t)n;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    BlockDriverState *bs = NULL;
    Error *err = NULL;
    char *buf = malloc(CHUNK);
    int fd = -1, ret;

    if (argc != 4 || !buf) {
        fprintf(stderr, "usage: %s IMAGE SNAPSHOT-NAME RAW\n", argv[0]);
        free(buf);
        return 2;
    }
    ret = qcow2_open(argv[1], 0, &bs, &err);
    if (ret == 0 && argv[2][0]) {
        ret = qcow2_snapshot_load_tmp(bs, NULL, argv[2], &err);
    }
    if (ret == 0) {
        fd = open(argv[3], O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        ret = fd < 0 ? -errno : copy_disk(bs, fd, buf, &err);
    }
    if (fd >= 0 && close(fd) < 0 && ret == 0) {
        ret = -errno;
    }
    if (fd >= 0 && ret < 0) {
        unlink(argv[3]);                /* half a disk is no disk */
    }
    if (ret < 0) {
        fprintf(stderr, "%s: %s\n", argv[0], err ? qcow2_error_get_pretty(err) : strerror(-ret));
    }
    qcow2_error_free(err);
    qcow2_close(bs);
    free(buf);
    return ret < 0;
}
