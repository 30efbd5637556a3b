/* SPDX-License-Identifier: MIT */
/* An image that was not closed properly has no usage: its counts say nothing. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("dirty-bit/before"), 0);
    Qcow2Error *err = NULL;
    Qcow2Usage usage;

    memset(&usage, 0x55, sizeof(usage));
    CHECK_RET(qcow2_snapshot_usage(bs, NULL, 0, &usage, &err), -ENOTSUP);
    CHECK(strstr(take_message(&err), "dirty"));
    CHECK_U64(usage.referenced | usage.exclusive | usage.allocated, 0);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
