/* SPDX-License-Identifier: MIT */
/* examples/export-snapshot.c writes the bytes of qemu-img convert, with holes where it may. */
#include "harness.h"

#include <sys/stat.h>

#define main export_main
#include "../examples/export-snapshot.c"
#undef main

static void exports(const char *which, const char *name, bool at_qemus_size)
{
    char program[] = "export-snapshot", to[] = "ours.raw", *argv[] = { program, NULL, (char *)name, to, NULL };
    char image[256];
    Bytes ours, theirs;

    snprintf(image, sizeof(image), "%s", fixture(which));
    argv[1] = image;
    unlink(to);
    CHECK_RET(export_main(4, argv), 0);
    CHECK_RET(shell("qemu-img convert -O raw %s%s '%s' theirs.raw", *name ? "-l snapshot.name=" : "", name, image), 0);
    ours = slurp("ours.raw");
    theirs = slurp("theirs.raw");
    if (!at_qemus_size) {                        /* qemu-img keeps the size of the disk of today */
        ours.len = theirs.len = ours.len < theirs.len ? ours.len : theirs.len;
    }
    CHECK(same(ours, theirs));
    drop(&ours);
    drop(&theirs);
}

int main(void)
{
    struct stat st;

    need("qemu-img");
    exports("v3-4k/before", "", true);
    exports("v3-4k/before", "one", true);
    exports("extended-l2/before", "one", true);
    exports("compressed-zstd/before", "", true);
    exports("resize-4k/before", "small", false);

    CHECK_RET(shell("qemu-img create -q -f qcow2 big.qcow2 1G && qemu-io -c 'write -P 5 900M 64k' big.qcow2 "
                    "&& qemu-img snapshot -c one big.qcow2"), 0);
    char *argv[] = { "export-snapshot", "big.qcow2", "one", "big.raw", NULL };
    CHECK_RET(export_main(4, argv), 0);
    CHECK(stat("big.raw", &st) == 0);
    CHECK_U64((uint64_t)st.st_size, 1 << 30);
    CHECK(st.st_blocks * 512 <= 1 << 20);
    CHECK_RET(shell("qemu-img compare -f qcow2 -F raw big.qcow2 big.raw"), 0);
    return done();
}
