/* SPDX-License-Identifier: MIT */
/* A second read-write open of an open image is -EAGAIN and says that it is in use. */
#include "harness.h"

int main(void)
{
    const char *path = fixture("v3-4k/after-1");
    Bytes before = slurp(path);
    Qcow2Image *first = must_open(path, QCOW2_O_RDWR), *second = NULL;
    Qcow2Error *err = NULL;
    const char *text;

    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &second, &err), -EAGAIN);
    text = take_message(&err);
    CHECK(strstr(text, "in use") || strstr(text, "using") || strstr(text, "lock"));
    CHECK_RET(qcow2_open(path, 0, &second, &err), -EAGAIN);
    take_message(&err);
    CHECK(!second);

    /* These two are for it. */
    second = must_open(path, QCOW2_O_FORCE_SHARE);
    CHECK_RET(qcow2_close(second), 0);
    second = must_open(path, QCOW2_O_NO_LOCK);
    CHECK_RET(qcow2_close(second), 0);

    /* Neither closing those nor failing took the first lock away. */
    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &second, NULL), -EAGAIN);
    CHECK_RET(qcow2_close(first), 0);
    second = must_open(path, QCOW2_O_RDWR);
    CHECK_RET(qcow2_close(second), 0);
    CHECK_FILE(path, before);
    drop(&before);
    return done();
}
