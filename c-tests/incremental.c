/* SPDX-License-Identifier: MIT */
/* examples/incremental.c makes a copy of one snapshot that of the next: data, zeros, discards, a longer and a shorter disk. */
#include "harness.h"

#define main incremental_main
#include "../examples/incremental.c"
#undef main

static int run(const char *from, const char *to, const char *raw)
{
    char program[] = "incremental", image[] = "i.qcow2";
    char *argv[] = { program, image, (char *)from, (char *)to, (char *)raw, NULL };

    return incremental_main(5, argv);
}

int main(void)
{
    static const char *const order[] = { "one", "two", "three", "one" };
    size_t i;

    need("qemu-img");
    CHECK_RET(shell("qemu-img create -q -f qcow2 i.qcow2 8M && qemu-io -c 'write -P 1 0 3M' i.qcow2 && "
                    "qemu-img snapshot -c one i.qcow2 && qemu-img resize -q i.qcow2 12M && "
                    "qemu-io -c 'write -P 2 1M 100' -c 'write -z 2M 64k' -c 'discard 2560k 64k' -c 'write -P 3 9M 64k' "
                    "i.qcow2 && qemu-img snapshot -c two i.qcow2 && qemu-img resize -q --shrink i.qcow2 5M && "
                    "qemu-io -c 'write -P 4 4M 1M' i.qcow2 && qemu-img snapshot -c three i.qcow2"), 0);
    CHECK_RET(shell("for s in one two three; do cp i.qcow2 g.qcow2 && qemu-img snapshot -a $s g.qcow2 && "
                    "qemu-img convert -O raw g.qcow2 $s.raw; done && cp one.raw copy.raw"), 0);
    for (i = 0; i + 1 < sizeof(order) / sizeof(order[0]); i++) {
        CHECK_RET(run(order[i], order[i + 1], "copy.raw"), 0);
        CHECK_RET(shell("cmp copy.raw %s.raw", order[i + 1]), 0);
    }
    CHECK_RET(run("one", "gone", "copy.raw"), 1);
    CHECK_RET(run("gone", "one", "copy.raw"), 1);
    CHECK_RET(run("one", "two", "none.raw"), 1);
    CHECK_RET(run("one", "two", "/dev/full"), 1);
    return done();
}
