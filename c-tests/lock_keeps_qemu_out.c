/* SPDX-License-Identifier: MIT */
/* While our handle is open qemu-img refuses the image, as it refuses a running guest's. */
#include "harness.h"

int main(void)
{
    const char *path = fixture("v3-4k/after-1");
    Qcow2Image *bs;

    need("qemu-img");
    bs = must_open(path, QCOW2_O_RDWR);
    CHECK(shell("qemu-img snapshot -c x %s", path) != 0);
    CHECK(shell("grep 'Failed to get' shell.log") == 0 || shell("qemu-img snapshot -c x %s", path) != 0);
    CHECK(shell("qemu-img info %s", path) != 0);
    CHECK(shell("qemu-img info -U %s", path) == 0);
    CHECK_RET(qcow2_close(bs), 0);

    bs = must_open(path, 0);
    CHECK(shell("qemu-img info %s", path) == 0);
    CHECK(shell("qemu-img snapshot -c x %s", path) != 0);
    CHECK_RET(qcow2_close(bs), 0);

    bs = must_open(path, QCOW2_O_FORCE_SHARE);
    CHECK(shell("qemu-img snapshot -c x %s", path) == 0);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
