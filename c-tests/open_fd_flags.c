/* SPDX-License-Identifier: MIT */
/* A descriptor that cannot serve is -EINVAL or -EACCES. */
#include "harness.h"

static void refuse(int oflag, int flags, int want)
{
    int fd = open("image.qcow2", oflag);
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;

    if (fd < 0 && oflag & O_DIRECT) {
        return;                                    /* not on this file system */
    }
    CHECK(fd >= 0);
    CHECK_RET(qcow2_open_fd(fd, flags, &bs, &err), want);
    CHECK(!bs);
    take_message(&err);
    CHECK_RET(fcntl(fd, F_GETFD) >= 0, 1);
    close(fd);
}

int main(void)
{
    Qcow2Image *bs = NULL;
    Bytes before;
    int fd;

    fixture("v3-4k/before");
    before = slurp("image.qcow2");
    refuse(O_PATH, 0, -EINVAL);
    refuse(O_RDWR | O_APPEND, QCOW2_O_RDWR, -EINVAL);
    refuse(O_RDWR | O_DIRECT, QCOW2_O_RDWR, -EINVAL);
    refuse(O_RDONLY, QCOW2_O_RDWR, -EACCES);
    refuse(O_WRONLY, 0, -EACCES);
    CHECK(qcow2_open_fd(-1, 0, &bs, NULL) < 0);
    CHECK(qcow2_open_fd(12345, 0, &bs, NULL) < 0);
    fd = open(".", O_RDONLY);
    CHECK(qcow2_open_fd(fd, 0, &bs, NULL) < 0);
    close(fd);
    CHECK_FILE("image.qcow2", before);
    drop(&before);
    return done();
}
