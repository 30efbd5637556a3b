/* SPDX-License-Identifier: MIT */
/* Where the question whether there are locks fails, with whatever, none are taken: as by QEMU. */
#include "lock_fcntl.h"

int main(void)
{
    static const int failures[] = { EACCES, EPERM, EIO, ESTALE, EINVAL, ENOLCK, ENOSYS, EOPNOTSUPP, EBADF };
    static const int flags[] = { 0, QCOW2_O_RDWR, QCOW2_O_FORCE_SHARE };
    const char *path = fixture("v3-4k/before");

    CHECK_RET(qcow2_close(must_open(path, 0)), 0);
    CHECK(queries > 0 && sets > 0);
    for (size_t i = 0; i < sizeof(failures) / sizeof(*failures); i++) {
        fail_query = failures[i];
        queries = sets = 0;
        for (size_t f = 0; f < 3; f++) {
            CHECK_RET(qcow2_close(must_open(path, flags[f])), 0);
        }
        CHECK(queries == 3 && sets == 0);
    }
    return done();
}
