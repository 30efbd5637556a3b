/* SPDX-License-Identifier: MIT */
/* What is no qcow2 image is refused with a message and not touched. */
#include "harness.h"

static void refuse(const char *path, int want)
{
    for (int i = 0; i < 2; i++) {
        Qcow2Image *bs = (Qcow2Image *)&bs;
        Qcow2Error *err = NULL;
        int ret = qcow2_open(path, i ? QCOW2_O_RDWR : 0, &bs, &err);

        CHECK(ret < 0);
        if (want) {
            CHECK_RET(ret, want);
        }
        CHECK(!bs);
        take_message(&err);
    }
}

int main(void)
{
    Bytes b = reference("v3-4k/after-1"), junk = { malloc(65536), 65536 };
    unsigned seed = 1;

    refuse("no-such-file", -ENOENT);
    refuse("", -ENOENT);
    mkdir("folder", 0755);
    refuse("folder", 0);
    refuse("/dev/null", 0);
    spew("empty", (Bytes){ b.data, 0 });
    refuse("empty", -EINVAL);
    for (size_t i = 0; i < junk.len; i++) {
        junk.data[i] = (unsigned char)rand_r(&seed);
    }
    spew("junk", junk);
    refuse("junk", -EINVAL);
    CHECK_FILE("junk", junk);
    put_be(b, 0, 4, 0x514649fa);
    spew("magic", b);
    refuse("magic", -EINVAL);
    put_be(b, 0, 4, 0x514649fb);
    put_be(b, 4, 4, 1);
    spew("version-1", b);
    refuse("version-1", 0);
    put_be(b, 4, 4, 4);
    spew("version-4", b);
    refuse("version-4", 0);
    CHECK_FILE("version-4", b);
    drop(&b);
    drop(&junk);
    return done();
}
