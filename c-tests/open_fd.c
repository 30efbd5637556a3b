/* SPDX-License-Identifier: MIT */
/* A descriptor opens the image like its name; it stays the caller's. */
#include "harness.h"

int main(void)
{
    Bytes after = reference("v3-4k/after-1");
    Qcow2SnapshotInfo sn = named("four");
    Qcow2Image *bs = NULL;
    int fd = open(fixture("v3-4k/before"), O_RDWR | O_CLOEXEC);
    char c;
    Entry e;

    CHECK(fd >= 0 && table_entry(after, 3, &e));
    sn.date_sec = e.date_sec;
    sn.date_nsec = e.date_nsec;
    CHECK_RET(lseek(fd, 7, SEEK_SET), 7);
    CHECK_RET(qcow2_open_fd(fd, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_FILE("image.qcow2", after);
    CHECK_RET(lseek(fd, 0, SEEK_CUR), 7);          /* not even its position moved */
    CHECK(read(fd, &c, 1) == 1);
    close(fd);
    drop(&after);
    return done();
}
