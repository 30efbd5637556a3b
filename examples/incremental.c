/* SPDX-License-Identifier: MIT
 * incremental IMAGE FROM TO RAW: RAW holds the disk of snapshot FROM (export-snapshot made it); make it that
 * of snapshot TO, by reading and writing only what changed. Broken off, it can be called again. (-lqcow2_snapshot) */
#define _XOPEN_SOURCE 700
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <qcow2_snapshot.h>

static char buf[4 << 20];
static int update(BlockDriverState *bs, const char *from, const char *to, int fd, Error **errp)
{
    int64_t size = qcow2_getlength(bs), at = 0;
    Qcow2Change c;
    int ret = 0;

    if (size < 0 || ftruncate(fd, size) < 0) {                  /* what is new behind the old end is zeros */
        return size < 0 ? (int)size : -errno;
    }
    while ((ret = qcow2_snapshot_next_change(bs, from, to, at, INT64_MAX, 0, &c, errp)) == 0 && c.length) {
        for (at = (int64_t)c.start; at < (int64_t)(c.start + c.length); ) {
            size_t left = (size_t)(c.start + c.length) - (size_t)at, n = left < sizeof(buf) ? left : sizeof(buf);
            if ((ret = qcow2_pread(bs, at, buf, n, errp)) < 0) {
                return ret;
            }
            if (c.from_flags & QCOW2_BLOCK_BEYOND && buf[0] == 0 && memcmp(buf, buf + 1, n - 1) == 0) {
                ret = (int)n;                                   /* nothing but zeros there already */
            } else if ((ret = (int)pwrite(fd, buf, n, at)) < 0) {
                return -errno;
            }
            at += ret;
        }
    }
    return ret == 0 && fsync(fd) < 0 ? -errno : ret;
}

int main(int argc, char **argv)
{
    BlockDriverState *bs = NULL;
    Error *err = NULL;
    int fd, ret;

    if (argc != 5) {
        return fprintf(stderr, "usage: %s IMAGE FROM TO RAW\n", argv[0]), 2;
    }
    fd = open(argv[4], O_WRONLY | O_CLOEXEC);
    ret = fd < 0 ? -errno : qcow2_open(argv[1], 0, &bs, &err);
    if (ret == 0 && (ret = qcow2_snapshot_load_tmp(bs, argv[3], NULL, NULL)) == -ENOENT) {  /* an ID, else a name */
        ret = qcow2_snapshot_load_tmp(bs, NULL, argv[3], &err);
    }
    ret = ret < 0 ? ret : update(bs, argv[2], argv[3], fd, &err);
    if (ret < 0) {
        fprintf(stderr, "%s: %s\n", argv[0], err ? qcow2_error_get_pretty(err) : strerror(-ret));
    }
    qcow2_error_free(err);
    qcow2_close(bs);
    return fd >= 0 && close(fd) < 0 ? 1 : ret < 0;
}
