/* SPDX-License-Identifier: MIT */
/* ops->backing_length is asked by a goto to a larger disk, in the place of opening the backing file. */
#include "memory_io.h"

static MemoryIo io;
static int64_t answer;
static int asked;

static int64_t backing_length(void *opaque)
{
    CHECK(opaque == &io);
    asked++;
    return answer;
}

static int revert(Bytes image, int64_t length, Bytes *after)
{
    Qcow2IoOps ops = memory_ops;
    Qcow2Image *bs;
    int ret;

    io.b.data = memcpy(malloc(image.len), image.data, image.len);
    io.b.len = image.len;
    ops.backing_length = backing_length;
    answer = length, asked = 0;
    CHECK_RET(qcow2_open_io(&ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    ret = qcow2_snapshot_goto(bs, "large");
    CHECK_RET(qcow2_close(bs), 0);
    *after = io.b;
    return ret;
}

int main(void)
{
    Bytes image, mine, theirs;

    need("qemu-img");
    /* The disk shrinks behind the snapshot, and the backing file is longer than it is then. */
    CHECK_RET(shell("truncate -s 8M base && qemu-img create -q -f qcow2 -b base -F raw i 8M"
                    "&& qemu-img snapshot -c large i && qemu-img resize -q --shrink i 1M"), 0);
    image = slurp("i");
    CHECK_RET(revert(image, 8 << 20, &mine), 0);
    CHECK(asked == 1);
    CHECK_RET(shell("qemu-img snapshot -a large i"), 0);
    theirs = slurp("i");
    CHECK(same(mine, theirs));
    drop(&mine);

    /* Its error is the verb's, and nothing has changed. */
    CHECK_RET(revert(image, -EACCES, &mine), -EACCES);
    CHECK(same(mine, image));
    drop(&mine), drop(&image), drop(&theirs);
    return done();
}
