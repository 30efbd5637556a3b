/* SPDX-License-Identifier: MIT */
/* A program without standard descriptors prints nowhere, not into an image. */
#include "harness.h"

static const char *failed;         /* there is no standard output to say it on at once */

/* The handle is there, no descriptor of it is a standard one, and it is closed. */
static void none_is_low(const char *how, int ret, Qcow2Image **bs)
{
    char c;

    if (!ret) {
        ret = qcow2_pread(*bs, 0, &c, 1, NULL);
    }
    for (int fd = 0; fd < 3; fd++) {
        ret = fcntl(fd, F_GETFD) == -1 ? ret : 1;
    }
    if (ret && !failed) {
        failed = how;
    }
    qcow2_close(*bs);
    *bs = NULL;
}

int main(void)
{
    const char *path = fixture("v3-4k/before");
    Qcow2Image *bs = NULL;
    int out, fd, ret;

    need("qemu-img");
    CHECK_RET(shell("truncate -s 64k base && qemu-img create -q -f qcow2 -b base -F raw mid"
                    "&& qemu-img create -q -f qcow2 -b mid -F qcow2 top"), 0);
    out = fcntl(1, F_DUPFD_CLOEXEC, 10);
    fd = open(path, O_RDWR);
    CHECK(out >= 10 && fd >= 3);
    close(0), close(1), close(2);

    none_is_low("qcow2_open", qcow2_open(path, QCOW2_O_RDWR, &bs, NULL), &bs);
    none_is_low("qcow2_open_fd", qcow2_open_fd(fd, QCOW2_O_RDWR, &bs, NULL), &bs);
    none_is_low("a backing chain", qcow2_open("top", 0, &bs, NULL), &bs);
    /* A file that cannot be opened again: the descriptor is duplicated. */
    ret = fchmod(fd, 0) || (getuid() == 0 && seteuid(65534));
    none_is_low("qcow2_open_fd without access", ret ? ret : qcow2_open_fd(fd, 0, &bs, NULL), &bs);

    dup2(out, 1);
    CHECK_STR(failed ? failed : "", "");
    return done();
}
