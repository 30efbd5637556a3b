/* SPDX-License-Identifier: MIT */
/* Readers share an image, and keep a writer out. */
#include "harness.h"

int main(void)
{
    const char *path = fixture("v3-4k/after-1");
    Qcow2Image *a = must_open(path, 0), *b = must_open(path, 0), *c = NULL;
    Qcow2Error *err = NULL;

    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &c, &err), -EAGAIN);
    take_message(&err);
    CHECK_RET(qcow2_close(a), 0);
    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &c, NULL), -EAGAIN);
    CHECK_RET(qcow2_close(b), 0);
    c = must_open(path, QCOW2_O_RDWR);
    CHECK_RET(qcow2_close(c), 0);
    return done();
}
