/* SPDX-License-Identifier: MIT */
/* While a QEMU program has the image open read-write, opening it is -EAGAIN. */
#include <fcntl.h>
#include <signal.h>

#include "harness.h"

/* Has somebody said that he writes (QEMU's byte 101)? Asked without a lock of our own, which would stop him. */
static int is_written(const char *path)
{
    int fd = open(path, O_RDONLY);
    struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 101, .l_len = 1 };
    int ret = fcntl(fd, F_OFD_GETLK, &l);
    close(fd);
    return ret == 0 && l.l_type != F_UNLCK;
}

int main(void)
{
    const char *path = fixture("v3-4k/after-1");
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;
    Bytes before = slurp(path);
    char line[64];
    FILE *qemu;

    need("qemu-io");
    qemu = popen("exec qemu-io -f qcow2 -c 'sleep 600000' image.qcow2 & echo $!; wait 2>/dev/null", "r");
    CHECK(qemu && fgets(line, sizeof(line), qemu));
    for (int i = 0; i < 500 && !is_written(path); i++) {
        usleep(20000);
    }
    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &bs, &err), -EAGAIN);
    take_message(&err);
    CHECK_RET(qcow2_open(path, 0, &bs, &err), -EAGAIN);
    take_message(&err);
    CHECK(!bs);
    bs = must_open(path, QCOW2_O_FORCE_SHARE);
    CHECK_RET(qcow2_close(bs), 0);
    kill((pid_t)atol(line), SIGTERM);
    pclose(qemu);
    CHECK_FILE(path, before);
    drop(&before);
    bs = must_open(path, QCOW2_O_RDWR);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
