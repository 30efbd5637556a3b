/* SPDX-License-Identifier: MIT */
/* A block device is opened by path and by descriptor; its length stays, and what would not fit is -ENOSPC first. */
#include "harness.h"

/* Attach ./image.qcow2 to a loop device that lives as long as the descriptor. */
static int attach(char *path, int size, bool read_only)
{
    FILE *out = popen(read_only ? "losetup -r -f --show image.qcow2 2>/dev/null"
                                : "losetup -f --show image.qcow2 2>/dev/null", "r");
    int fd;

    if (!fgets(path, size, out) || path[0] != '/') {
        skip("no loop devices here (they need root and losetup)");
    }
    pclose(out);
    path[strcspn(path, "\n")] = 0;
    fd = open(path, read_only ? O_RDONLY : O_RDWR);
    CHECK(shell("losetup -d %s", path) == 0 && fd >= 0);
    return fd;
}

int main(void)
{
    const char *file = fixture("v3-4k/before");
    Qcow2SnapshotInfo sn = named("x");
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;
    Bytes before = slurp(file), after;
    char path[64];
    int fd = attach(path, sizeof(path), false);

    CHECK(before.len % 512 == 0);
    bs = must_open(path, QCOW2_O_RDWR);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), -ENOSPC);
    CHECK(strstr(qcow2_last_error(bs), "block device ends at"));
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_UNCHANGED);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_RET(fsync(fd), 0);
    CHECK_FILE(file, before);
    close(fd);

    CHECK_RET(truncate(file, (off_t)before.len + (1 << 20)), 0);
    fd = attach(path, sizeof(path), false);
    CHECK_RET(qcow2_open_fd(fd, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(qcow2_open(path, 0, &(Qcow2Image *){ NULL }, &err), -EAGAIN);
    take_message(&err);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_RET(lseek(fd, 0, SEEK_CUR), 0);
    close(fd);
    after = slurp(file);
    CHECK_U64(after.len, before.len + (1 << 20));
    CHECK_U64(table_count(after), table_count(before) + 1);

    fd = attach(path, sizeof(path), true);
    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &bs, &err), -EACCES);
    CHECK(strstr(take_message(&err), "The device is not writable"));
    bs = must_open(path, 0);
    CHECK_RET(qcow2_close(bs), 0);
    close(fd);
    drop(&before);
    drop(&after);
    return done();
}
