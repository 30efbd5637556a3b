/* SPDX-License-Identifier: MIT */
/* write_snapshots of an image without snapshots leaves the file as it is. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("zero-sized-disk/before"), QCOW2_O_RDWR);
    Bytes before = slurp("image.qcow2");

    CHECK_RET(qcow2_write_snapshots(bs), 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_FILE("image.qcow2", before);
    drop(&before);
    return done();
}
