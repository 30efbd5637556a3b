/* SPDX-License-Identifier: MIT */
/* An image opened by descriptor is locked like one opened by name. */
#include "harness.h"

int main(void)
{
    const char *path = fixture("v3-4k/before");
    Qcow2Image *a = NULL, *b = NULL;
    int fd = open(path, O_RDWR);

    CHECK_RET(qcow2_open_fd(fd, QCOW2_O_RDWR, &a, NULL), 0);
    CHECK_RET(qcow2_open_fd(fd, QCOW2_O_RDWR, &b, NULL), -EAGAIN);   /* the same descriptor again */
    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &b, NULL), -EAGAIN);
    if (have("qemu-img")) {
        CHECK(shell("qemu-img snapshot -c x %s", path) != 0);
    }
    CHECK_RET(qcow2_close(a), 0);
    b = must_open(path, QCOW2_O_RDWR);
    CHECK_RET(qcow2_close(b), 0);
    close(fd);
    return done();
}
