/* SPDX-License-Identifier: MIT */
/* Names in an image mean what they meant when it was opened, wherever the program goes then. */
#include "harness.h"

static int first_byte(Qcow2Image *bs)
{
    unsigned char c = 0;
    Qcow2Error *err = NULL;

    if (qcow2_pread(bs, 0, &c, 1, &err) < 0) {
        fail_at(__FILE__, __LINE__, "%s", take_message(&err));
    }
    CHECK_RET(qcow2_close(bs), 0);
    return c;
}

int main(void)
{
    /* A chain, a name that is relative to the current folder, a data file. */
    static const char *const names[] = { "sub/top", "sub/file", "sub/data" };
    Qcow2Image *by_path[3], *by_fd[3], *missing;
    Qcow2Error *err = NULL;

    need("qemu-io");
    CHECK_RET(shell("mkdir sub other other/sub"
                    "&& for d in . other; do ( cd $d && p=$(expr 7 + 0$(test $d = other && echo 1))"
                    "&& truncate -s 64k base sub/base && qemu-io -f raw -c \"write -P $p 0 64k\" base"
                    "&& qemu-io -f raw -c \"write -P $p 0 64k\" sub/base"
                    "&& qemu-img create -q -f qcow2 -b base -F raw sub/mid 64k"
                    "&& qemu-img create -q -f qcow2 -b mid -F qcow2 sub/top 64k"
                    "&& qemu-img create -q -f qcow2 -u -b file:base -F raw sub/file 64k"
                    "&& qemu-img create -q -f qcow2 -o data_file=raw sub/data 64k"
                    "&& qemu-io -c \"write -P $p 0 64k\" sub/data ) || exit 1; done"), 0);
    for (int i = 0; i < 3; i++) {
        int fd = open(names[i], O_RDONLY);

        by_path[i] = must_open(names[i], 0);
        CHECK_RET(qcow2_open_fd(fd, 0, &by_fd[i], NULL), 0);
        close(fd);
    }
    CHECK_RET(shell("cp sub/top gone && mv sub/mid sub/x && mv sub/x sub/mid"), 0);
    missing = must_open("gone", 0);
    CHECK_RET(chdir("other"), 0);
    for (int i = 0; i < 3; i++) {
        CHECK_RET(first_byte(by_path[i]), 7);
        CHECK_RET(first_byte(by_fd[i]), 7);
    }

    /* Messages have the name as it was given, or as the image has it. */
    CHECK_RET(qcow2_pread(missing, 0, &(char){ 0 }, 1, &err), -ENOENT);
    CHECK(strstr(take_message(&err), "'mid'"));
    CHECK_RET(qcow2_close(missing), 0);
    return done();
}
