/* SPDX-License-Identifier: MIT */
/* Compiled for 2014: a list of 408-byte structs, and 16 bytes of extra data in every entry. */
#define QCOW2_SNAPSHOT_COMPAT_2_1
#include "harness.h"

int main(void)
{
    const char *path = fixture("v3-4k/before");
    Qcow2SnapshotInfo sn = named("from 2014"), *tab = NULL;
    Qcow2Image *bs = NULL;
    Bytes b;
    Entry e;

    CHECK_U64(sizeof(Qcow2SnapshotInfo), 408);
    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &bs, NULL), 0);    /* the header's macro adds the flag */
    sn.vm_clock_nsec = 77;
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_STR(sn.id_str, "4");
    CHECK_RET(qcow2_snapshot_list(bs, &tab), 4);
    CHECK_STR(tab[1].name, "two");
    CHECK_STR(tab[3].name, "from 2014");
    CHECK_U64(tab[3].vm_clock_nsec, 77);
    qcow2_snapshot_list_free(tab);
    CHECK_RET(qcow2_close(bs), 0);

    b = slurp(path);
    CHECK_U64(table_count(b), 4);
    for (uint32_t i = 0; i < 4; i++) {
        CHECK(table_entry(b, i, &e));
        CHECK_U64(e.extra_size, 16);
        CHECK_U64(e.disk_size, 8 << 20);
    }
    CHECK(e.name.len == 9 && memcmp(e.name.data, "from 2014", 9) == 0);
    drop(&b);

    need("qemu-img");
    CHECK(shell("qemu-img snapshot -l %s | grep 'from 2014'", path) == 0);
    CHECK(shell("qemu-img check %s", path) == 0);
    return done();
}
