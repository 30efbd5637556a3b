/* SPDX-License-Identifier: MIT */
/* The library's version is the one of the header. */
#include "harness.h"

int main(void)
{
    char text[64];

    snprintf(text, sizeof(text), "%d.%d.%d", QCOW2_SNAPSHOT_VERSION_MAJOR,
             QCOW2_SNAPSHOT_VERSION_MINOR, QCOW2_SNAPSHOT_VERSION_PATCH);
    CHECK_STR(qcow2_version(), text);
    return done();
}
