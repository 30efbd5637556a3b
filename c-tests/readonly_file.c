/* SPDX-License-Identifier: MIT */
/* A file without write permission opens read-only, and read-write is -EACCES. */
#include "harness.h"

int main(void)
{
    const char *path = fixture("v3-4k/after-1");
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;

    chmod(path, 0444);
    if (geteuid() == 0) {
        skip("root may write to any file; -EACCES from the file system was not tested");
    }
    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &bs, &err), -EACCES);
    take_message(&err);
    bs = must_open(path, 0);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
