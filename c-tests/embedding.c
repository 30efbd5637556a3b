/* SPDX-License-Identifier: MIT */
/*
 * A program with caches of its own writes guest data between the verbs of one handle: it flushes and
 * empties them before a verb, tells by qcow2_reload() what it has changed, and goes on from
 * qcow2_image_layout(). In the end every state is what qemu-img reads. (QEMU's position, in small:
 * 4 KiB clusters, 16-bit counts, one refcount block, the L1 table and that block cached.)
 */
#include "harness.h"

enum { CLUSTER = 4096, DISK = 6 << 20, SPOTS = 48, SNAPSHOTS = 5, COUNTS = CLUSTER / 2 };
#define COPIED (UINT64_C(1) << 63)
#define OFFSET UINT64_C(0x00fffffffffffe00)

static int fd;
static Qcow2Image *bs;
static Qcow2ImageLayout at;
static uint64_t l1[16];                         /* the caches: written through ... */
static unsigned char counts[CLUSTER];           /* ... and written back */
static uint64_t counts_at;
static bool dirty, counts_valid;
static unsigned char disk[SPOTS], kept[SNAPSHOTS][SPOTS];
static bool exists[SNAPSHOTS];

static int io_pread(void *o, uint64_t offset, void *buf, size_t bytes)
{
    ssize_t n = pread(fd, buf, bytes, (off_t)offset);

    (void)o;
    if (n < 0)
        return -errno;
    memset((char *)buf + n, 0, bytes - (size_t)n);
    return 0;
}

static int io_pwrite(void *o, uint64_t offset, const void *buf, size_t bytes)
{
    CHECK(!dirty && !counts_valid);             /* or the cache would write old counts over new ones */
    (void)o;
    return pwrite(fd, buf, bytes, (off_t)offset) == (ssize_t)bytes ? 0 : -EIO;
}

static int io_flush(void *o) { (void)o; return fdatasync(fd) ? -errno : 0; }
static int64_t io_getlength(void *o) { (void)o; return lseek(fd, 0, SEEK_END); }
static int io_truncate(void *o, uint64_t length) { (void)o; return ftruncate(fd, (off_t)length) ? -errno : 0; }

static uint64_t get64(uint64_t where)
{
    unsigned char b[8];
    Bytes bytes = { b, 8 };

    CHECK_RET(io_pread(NULL, where, b, 8), 0);
    return be(bytes, 0, 8);
}

static void put(uint64_t where, int size, uint64_t value)
{
    unsigned char b[8];
    Bytes bytes = { b, sizeof(b) };

    put_be(bytes, 0, size, value);
    CHECK(pwrite(fd, b, (size_t)size, (off_t)where) == size);
}

static void load(void)
{
    CHECK_RET(qcow2_image_layout(bs, &at), 0);
    CHECK(at.l1_size <= 16 && at.cluster_bits == 12 && at.refcount_order == 4);
    memcpy(l1, at.l1_table, sizeof(*l1) * at.l1_size);
    counts_at = get64(at.refcount_table_offset);
}

static int count(uint64_t cluster, int change)
{
    Bytes b = { counts, CLUSTER };
    int now;

    CHECK(cluster < COUNTS);
    if (!counts_valid)
        CHECK_RET(io_pread(NULL, counts_at, counts, CLUSTER), 0);
    counts_valid = true;
    now = (int)be(b, cluster * 2, 2) + change;
    CHECK(now >= 0);
    if (change)
        put_be(b, cluster * 2, 2, (uint64_t)now), dirty = true;
    return now;
}

static uint64_t allocate(void)
{
    uint64_t c = 1;

    while (count(c, 0))
        c++;
    count(c, 1);
    return c * CLUSTER;
}

/* A cluster of our own with what was in the old one. */
static uint64_t copy(uint64_t old)
{
    unsigned char b[CLUSTER] = { 0 };
    uint64_t mine = allocate();

    if (old)
        CHECK_RET(io_pread(NULL, old, b, CLUSTER), 0);
    CHECK(pwrite(fd, b, CLUSTER, (off_t)mine) == CLUSTER);
    if (old)
        count(old / CLUSTER, -1);
    return mine;
}

static void guest_write(int spot, unsigned char value)
{
    uint64_t cluster = (uint64_t)spot * (DISK / CLUSTER / SPOTS), entry, data;
    uint64_t index = cluster / 512, where;
    unsigned char b[CLUSTER];

    if (!(l1[index] & COPIED)) {
        l1[index] = copy(l1[index] & OFFSET) | COPIED;
        put(at.l1_table_offset + index * 8, 8, l1[index]);
    }
    where = (l1[index] & OFFSET) + cluster % 512 * 8;
    entry = get64(where);
    data = entry & COPIED ? entry & OFFSET : copy(entry & OFFSET);
    memset(b, value, CLUSTER);
    CHECK(pwrite(fd, b, CLUSTER, (off_t)data) == CLUSTER);
    put(where, 8, data | COPIED);
    disk[spot] = value;
}

/* Before a verb: write back, empty, tell. */
static void let_go(void)
{
    if (dirty)
        CHECK(pwrite(fd, counts, CLUSTER, (off_t)counts_at) == CLUSTER);
    dirty = counts_valid = false;
    CHECK_RET(qcow2_reload(bs, NULL), 0);
}

static void same_as(const char *file, const unsigned char *want)
{
    Bytes b = slurp(file);

    CHECK_U64(b.len, DISK);
    for (int i = 0; i < SPOTS; i++)
        for (int j = 0; j < CLUSTER; j++)
            CHECK(b.data[i * (DISK / SPOTS) + j] == want[i]);
    drop(&b);
}

int main(void)
{
    const Qcow2IoOps ops = { .size = sizeof(ops), .pread = io_pread, .pwrite = io_pwrite, .flush = io_flush,
                             .getlength = io_getlength, .truncate = io_truncate };
    char name[] = "s0";

    need("qemu-img");
    for (unsigned seed = 1; seed <= 8; seed++) {
        srand(seed);
        memset(disk, 0, sizeof(disk)), memset(exists, 0, sizeof(exists));
        CHECK_RET(shell("qemu-img create -q -f qcow2 -o cluster_size=4k image.qcow2 6M"), 0);
        CHECK((fd = open("image.qcow2", O_RDWR)) >= 0);
        CHECK_RET(qcow2_open_io(&ops, NULL, QCOW2_O_RDWR, &bs, NULL), 0);
        load();
        for (int step = 0; step < 60; step++) {
            int s = rand() % SNAPSHOTS;
            Qcow2SnapshotInfo sn;

            for (int n = rand() % 12; n > 0; n--)
                guest_write(rand() % SPOTS, (unsigned char)(1 + rand() % 255));
            let_go();
            name[1] = (char)('0' + s);
            sn = named(name);
            if (!exists[s]) {
                CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
                memcpy(kept[s], disk, SPOTS), exists[s] = true;
            } else if (rand() % 2) {
                CHECK_RET(qcow2_snapshot_goto(bs, name), 0);
                memcpy(disk, kept[s], SPOTS);
            } else {
                CHECK_RET(qcow2_snapshot_delete(bs, NULL, name, NULL), 0);
                exists[s] = false;
            }
            load();
        }
        let_go();
        CHECK_RET(qcow2_close(bs), 0);
        close(fd);
        CHECK_RET(shell("qemu-img check image.qcow2"), 0);
        CHECK_RET(shell("qemu-img convert -O raw image.qcow2 raw"), 0);
        same_as("raw", disk);
        for (int s = 0; s < SNAPSHOTS; s++) {
            if (exists[s]) {
                CHECK_RET(shell("qemu-img convert -l snapshot.name=s%d -O raw image.qcow2 raw", s), 0);
                same_as("raw", kept[s]);
            }
        }
    }
    return done();
}
