/* SPDX-License-Identifier: MIT */
/* Compiled for 2014: goto to another disk size is -ENOTSUP and changes nothing. */
#define QCOW2_SNAPSHOT_COMPAT_2_1
#include "harness.h"

int main(void)
{
    const char *path = fixture("resize-4k/before");
    Bytes before = slurp(path);
    Qcow2Image *bs = NULL;

    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(qcow2_snapshot_goto(bs, "small"), -ENOTSUP);
    CHECK(has_words(bs));
    CHECK_FILE(path, before);
    CHECK_RET(qcow2_snapshot_goto(bs, "large"), 0);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&before);
    return done();
}
