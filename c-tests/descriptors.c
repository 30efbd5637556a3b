/* SPDX-License-Identifier: MIT */
/* Handles use O_CLOEXEC descriptors, and closing leaves none behind. */
#include "harness.h"

static int open_descriptors(bool inherited_only)
{
    int n = 0;

    for (int fd = 3; fd < 256; fd++) {
        int flags = fcntl(fd, F_GETFD);
        n += flags >= 0 && !(inherited_only && flags & FD_CLOEXEC);
    }
    return n;
}

int main(void)
{
    const char *path = fixture("v3-4k/before");
    int all = open_descriptors(false), inherited = open_descriptors(true);
    Qcow2Image *bs = NULL;

    for (int i = 0; i < 3; i++) {
        bs = must_open(path, i ? QCOW2_O_RDWR : 0);
        CHECK(open_descriptors(false) > all);
        CHECK_RET(open_descriptors(true), inherited);
        CHECK_RET(qcow2_close(bs), 0);
        CHECK_RET(open_descriptors(false), all);
    }
    CHECK(qcow2_open(".", 0, &bs, NULL) < 0);
    spew(path, (Bytes){ (unsigned char *)"no", 2 });
    CHECK(qcow2_open(path, QCOW2_O_RDWR, &bs, NULL) < 0);
    CHECK_RET(open_descriptors(false), all);
    return done();
}
