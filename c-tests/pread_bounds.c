/* SPDX-License-Identifier: MIT */
/* pread: any range inside the disk, zeros where nothing is, -errno outside. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/before"), 0);
    int64_t size = qcow2_getlength(bs);
    unsigned char *all = malloc((size_t)size), part[5000];
    Qcow2Error *err = NULL;

    CHECK_U64((uint64_t)size, 8 << 20);
    CHECK_RET(qcow2_pread(bs, 0, all, (size_t)size, NULL), 0);
    for (int64_t at = 0; at + 5000 <= size; at += 4999 * 7) {
        CHECK_RET(qcow2_pread(bs, at, part, sizeof(part), NULL), 0);
        CHECK(memcmp(part, all + at, sizeof(part)) == 0);
    }
    CHECK_RET(qcow2_pread(bs, size, part, 0, NULL), 0);
    CHECK(qcow2_pread(bs, size - 1, part, 2, &err) < 0);
    take_message(&err);
    CHECK(qcow2_pread(bs, -1, part, 1, &err) < 0);
    take_message(&err);
    CHECK(qcow2_pread(bs, INT64_MAX, part, SIZE_MAX, &err) < 0);
    take_message(&err);
    free(all);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
