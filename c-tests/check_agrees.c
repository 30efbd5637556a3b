/* SPDX-License-Identifier: MIT */
/* qemu-img check is clean and the disks compare equal after each verb, on every variant. */
#include "harness.h"

static const char *const cases[] = { "v2-512", "v2-64k", "v3-512", "v3-4k", "v3-64k", "refcount-8", "refcount-64",
                                     "lazy-refcounts", "extended-l2", "compressed-zlib", "compressed-512",
                                     "resize-4k", "vm-state-v3", "unknown-extension", "header-length-152" };

static void clean(const char *name, const char *verb)
{
    if (shell("qemu-img check image.qcow2") != 0) {
        fail_at(name, 0, "qemu-img check is not clean after %s", verb);
    }
}

int main(void)
{
    need("qemu-img");
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char which[64];
        Qcow2Image *bs;
        Qcow2SnapshotInfo sn = named("agreed"), *tab;

        snprintf(which, sizeof(which), "%s/before", cases[i]);
        bs = must_open(fixture(which), QCOW2_O_RDWR);
        CHECK(shell("cp image.qcow2 old.qcow2") == 0);
        CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
        CHECK_RET(qcow2_close(bs), 0);
        clean(cases[i], "create");
        CHECK(shell("qemu-img compare image.qcow2 old.qcow2") == 0);

        bs = must_open("image.qcow2", QCOW2_O_RDWR);
        CHECK(qcow2_snapshot_list(bs, &tab) > 0);
        CHECK_RET(qcow2_snapshot_goto(bs, tab[0].id_str), 0);
        CHECK_RET(qcow2_snapshot_goto(bs, "agreed"), 0);
        CHECK_RET(qcow2_close(bs), 0);
        clean(cases[i], "goto");
        CHECK(shell("qemu-img compare image.qcow2 old.qcow2") == 0);

        bs = must_open("image.qcow2", QCOW2_O_RDWR);
        CHECK_RET(qcow2_snapshot_delete(bs, tab[0].id_str, tab[0].name, NULL), 0);
        qcow2_snapshot_list_free(tab);
        CHECK_RET(qcow2_close(bs), 0);
        clean(cases[i], "delete");
        CHECK(shell("qemu-img compare image.qcow2 old.qcow2") == 0);
    }
    return done();
}
