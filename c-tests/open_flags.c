/* SPDX-License-Identifier: MIT */
/* Unknown open flags, and FORCE_SHARE with RDWR, are -EINVAL. */
#include "harness.h"

int main(void)
{
    const int known = QCOW2_O_RDWR | QCOW2_O_NO_FLUSH | QCOW2_O_FORCE_SHARE | QCOW2_O_NO_LOCK |
                      QCOW2_O_NO_DISCARD | QCOW2_O_COMPAT_2_1 | QCOW2_O_NO_BACKING | QCOW2_O_CHECK;
    const char *path = fixture("v3-4k/before");

    for (int bit = 0; bit < 31; bit++) {
        Qcow2Image *bs = NULL;
        Qcow2Error *err = NULL;
        int ret = qcow2_open(path, 1 << bit, &bs, &err);

        if (known & 1 << bit) {
            CHECK_RET(ret, 0);
            CHECK_RET(qcow2_close(bs), 0);
        } else {
            CHECK_RET(ret, -EINVAL);
            CHECK(!bs);
            take_message(&err);
        }
    }
    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR | QCOW2_O_FORCE_SHARE, &(Qcow2Image *){ NULL }, NULL), -EINVAL);
    return done();
}
