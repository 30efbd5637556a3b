/* SPDX-License-Identifier: MIT */
/* A program in C89 includes the header without a warning, and works (compiled with -std=c89 -Wpedantic -Werror). */
#define QCOW2_SNAPSHOT_COMPAT_2_1
#include <qcow2_snapshot.h>
#include <stdio.h>
#include <string.h>

int main(void)
{
    BlockDriverState *bs;
    Error *err = NULL;
    int ret = qcow2_open("/nonexistent", QCOW2_O_RDWR, &bs, &err);

    if (ret >= 0 || bs || !strstr(qcow2_error_get_pretty(err), "No such file"))
        return printf("FAIL header_c89: %d\n", ret), 1;
    qcow2_error_free(err);
    return puts("ok header_c89") < 0;
}
