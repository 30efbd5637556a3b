/* SPDX-License-Identifier: MIT */
/* A lock that may not be taken is not another process's doing, and NO_LOCK does without. */
#include "lock_fcntl.h"

static void refused(const char *path, int with)
{
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;
    const char *words;

    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &bs, &err), -with);
    words = take_message(&err);
    if (!strstr(words, "Failed to ") || !strstr(words, strerror(with)) || strstr(words, "process")) {
        fail_at(__FILE__, __LINE__, "%s", words);
    }
    sets = 0;
    CHECK_RET(qcow2_close(must_open(path, QCOW2_O_RDWR | QCOW2_O_NO_LOCK)), 0);
    CHECK_RET(sets, 0);
}

int main(void)
{
    const char *path = fixture("v3-4k/before");
    Qcow2Image *bs = NULL, *other;
    Qcow2Error *err = NULL;

    fail_set = EACCES;
    refused(path, EACCES);
    fail_set = EPERM;
    refused(path, EPERM);
    fail_set = 0, fail_test = EACCES;
    refused(path, EACCES);

    /* Somebody who has the image is blamed as before. */
    fail_test = 0;
    other = must_open(path, QCOW2_O_RDWR);
    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &bs, &err), -EAGAIN);
    CHECK(strstr(take_message(&err), "another process"));
    CHECK_RET(qcow2_close(other), 0);
    return done();
}
