/* SPDX-License-Identifier: MIT */
/*
 * Where getlength tells whole sectors only, as QEMU does, goto through a temporary L1 table leaves the
 * file as long as what is in it needs, not as long as was told: as long as qemu-img leaves it.
 */
#include "harness.h"

static int fd;
static bool was_longer;

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
    (void)o;
    return pwrite(fd, buf, bytes, (off_t)offset) == (ssize_t)bytes ? 0 : -EIO;
}

static int io_discard(void *o, uint64_t offset, uint64_t bytes)
{
    static const char zeros[4096];

    for (uint64_t n; bytes > 0; offset += n, bytes -= n)
        if (io_pwrite(o, offset, zeros, n = bytes < 4096 ? bytes : 4096) < 0)
            return -EIO;
    return 0;
}

static int io_flush(void *o) { (void)o; return 0; }
static int64_t io_getlength(void *o) { (void)o; return (lseek(fd, 0, SEEK_END) + 511) & ~511LL; }

static int io_truncate(void *o, uint64_t length)
{
    was_longer |= (uint64_t)lseek(fd, 0, SEEK_END) > length;
    (void)o;
    return ftruncate(fd, (off_t)length) ? -errno : 0;
}

/* Goto "a" of an image that ends within a sector, by both. `cut`: the file has to be made shorter for that. */
static void same_length(const char *make, bool cut)
{
    const Qcow2IoOps ops = { .size = sizeof(ops), .pread = io_pread, .pwrite = io_pwrite, .flush = io_flush,
                             .getlength = io_getlength, .truncate = io_truncate, .discard = io_discard };
    Qcow2Image *bs;
    Bytes before, theirs;

    CHECK_RET(shell("%s && cp image.qcow2 qemu.qcow2 && qemu-img snapshot -a a qemu.qcow2", make), 0);
    was_longer = false;
    before = slurp("image.qcow2");
    CHECK(before.len % 512 != 0);       /* the snapshot table is the last thing in it */
    CHECK((fd = open("image.qcow2", O_RDWR)) >= 0);
    CHECK_RET(qcow2_open_io(&ops, NULL, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(qcow2_snapshot_goto(bs, "a"), 0);
    CHECK_RET(qcow2_close(bs), 0);
    close(fd);
    CHECK(was_longer == cut);
    theirs = slurp("qemu.qcow2");
    CHECK_FILE("image.qcow2", theirs);
    drop(&before), drop(&theirs);
}

int main(void)
{
    need("qemu-img"), need("qemu-io");
    same_length("qemu-img create -q -f qcow2 -o cluster_size=4k image.qcow2 256M && qemu-img snapshot -c a image.qcow2 && "
                "qemu-io -c 'write -q 0 4k' -c 'write -q 200M 4k' image.qcow2 && qemu-img snapshot -c b image.qcow2", true);
    /* QEMU cuts a file that it has made longer back to whole clusters: more than there was. */
    same_length("qemu-img create -q -f qcow2 -o cluster_size=512 image.qcow2 64k && qemu-img snapshot -c a image.qcow2 && "
                "qemu-img resize -q image.qcow2 4M && qemu-io -c 'write -q 0 4M' image.qcow2 && "
                "qemu-img snapshot -c b image.qcow2", false);
    return done();
}
