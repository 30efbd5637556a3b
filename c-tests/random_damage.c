/* SPDX-License-Identifier: MIT */
/* Random values in metadata fields: no crash, no hang, and a failure leaves every byte. */
#include "harness.h"

static unsigned seed = 20140507;

/* Overwrite a few words of header, tables or snapshot table with something nasty. */
static void damage(Bytes b)
{
    static const uint64_t nasty[] = { 0, 1, 0xff, 0x200, 0x7fffffff, 0x80000000, 0xffffffff, 0x0040000000000000,
                                      0x4000000000000000, 0x8000000000000000, 0x7ffffffffffffe00, UINT64_MAX };
    uint64_t areas[] = { 0, be(b, 40, 8), be(b, 48, 8), be(b, 64, 8), be(b, be(b, 48, 8), 8),
                         be(b, be(b, 40, 8), 8) & 0xfffffffffffe00 };

    for (int n = 1 + rand_r(&seed) % 3; n > 0; n--) {
        uint64_t at = areas[rand_r(&seed) % 6] + (rand_r(&seed) % 128 & ~3u);
        uint64_t value = rand_r(&seed) % 3 ? nasty[rand_r(&seed) % 12] : (uint64_t)rand_r(&seed) << 20;
        int size = rand_r(&seed) % 2 ? 8 : 4;

        if (at >= 4 && at + 8 <= b.len) {       /* not the magic: that is another test */
            put_be(b, at, size, value);
        }
    }
}

int main(void)
{
    Bytes whole = reference("v3-1k/before"), b = { malloc(whole.len), whole.len };
    int rounds = getenv("ROUNDS") ? atoi(getenv("ROUNDS")) : 1500;

    for (int i = 0; i < rounds; i++) {
        Qcow2Image *bs = NULL;
        Qcow2SnapshotInfo sn = named("new"), *tab;
        int ret;

        memcpy(b.data, whole.data, whole.len);
        damage(b);
        spew("image.qcow2", b);
        alarm(60);
        ret = qcow2_open("image.qcow2", QCOW2_O_RDWR | QCOW2_O_NO_BACKING, &bs, NULL);
        if (ret == 0) {
            ret = i % 4 == 0 ? qcow2_snapshot_create(bs, &sn)
                : i % 4 == 1 ? qcow2_snapshot_goto(bs, "one")
                : i % 4 == 2 ? qcow2_snapshot_delete(bs, NULL, "two", NULL)
                             : qcow2_write_snapshots(bs);
            if (qcow2_snapshot_list(bs, &tab) > 0) {
                qcow2_snapshot_list_free(tab);
            }
            CHECK_RET(qcow2_close(bs), 0);
        }
        if (ret < 0) {
            check_file_at("round", i, "image.qcow2", b);
        }
    }
    drop(&whole);
    drop(&b);
    return done();
}
