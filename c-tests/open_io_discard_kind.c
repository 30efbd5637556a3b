/* SPDX-License-Identifier: MIT */
/*
 * ops->discard_kind comes in the place of ops->discard, with what a range held and however long it is;
 * a table without it goes on as before. The image is the same either way.
 */
#include "memory_io.h"

enum { DISK = 8 << 20 };
static MemoryIo io;
static uint64_t largest;
static int calls[3], plain;

static int discard_kind(void *opaque, uint64_t offset, uint64_t bytes, int kind)
{
    CHECK(kind == QCOW2_DISCARD_KIND_SNAPSHOT || kind == QCOW2_DISCARD_KIND_OTHER);
    calls[kind == QCOW2_DISCARD_KIND_OTHER ? 2 : 1]++;
    largest = bytes > largest ? bytes : largest;
    return memory_discard(opaque, offset, bytes);
}

static int discard(void *opaque, uint64_t offset, uint64_t bytes)
{
    CHECK(bytes <= 2 << 20);
    plain++;
    return memory_discard(opaque, offset, bytes);
}

/* The image after a goto and a delete, by a table of this size. */
static Bytes changed(const char *image, const char *name, size_t size)
{
    Qcow2IoOps ops = memory_ops;
    Qcow2Image *bs;

    io.b = slurp(image);
    ops.size = size, ops.discard = discard, ops.discard_kind = discard_kind;
    memset(calls, 0, sizeof(calls)), plain = 0, largest = 0;
    CHECK_RET(qcow2_open_io(&ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(qcow2_snapshot_goto(bs, name), 0);
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, name, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    return io.b;
}

int main(void)
{
    Bytes with, without;

    need("qemu-img"), need("qemu-io");
    CHECK_RET(shell("qemu-img create -q -f qcow2 image.qcow2 %d && qemu-img snapshot -c a image.qcow2 && "
                    "qemu-io -c 'write -q 0 %d' image.qcow2", DISK, DISK), 0);
    without = changed("image.qcow2", "a", offsetof(Qcow2IoOps, discard_kind));
    CHECK(plain >= DISK / (2 << 20) && calls[1] == 0 && calls[2] == 0);
    with = changed("image.qcow2", "a", sizeof(Qcow2IoOps));
    CHECK(plain == 0 && calls[1] > 0 && calls[2] == 0);
    CHECK_U64(largest >= DISK, 1);
    CHECK(with.len == without.len && memcmp(with.data, without.data, with.len) == 0);
    drop(&with), drop(&without);

    /* A goto that cuts the file: the refcount blocks that go held counts, and nothing of a snapshot. */
    CHECK_RET(shell("qemu-img create -q -f qcow2 -o cluster_size=512 image.qcow2 64k && qemu-img snapshot -c a image.qcow2 && "
                    "qemu-img snapshot -l image.qcow2 >list && qemu-img resize -q image.qcow2 4M && "
                    "qemu-io -c 'write -q 0 4M' image.qcow2"), 0);
    with = changed("image.qcow2", "a", sizeof(Qcow2IoOps));
    CHECK(plain == 0 && calls[1] > 0 && calls[2] > 0);
    drop(&with);
    return done();
}
