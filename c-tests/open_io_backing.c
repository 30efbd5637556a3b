/* SPDX-License-Identifier: MIT */
/* Behind callbacks a backing file is what open_file opens, closed once; without it, it is -ENOTSUP. */
#include "memory_io.h"

/* Two files: the image names "middle", and that one names "base". */
static MemoryIo top, middle, base;
static char asked[256];
static int refuse;

static int open_file(void *opaque, const char *name, const char *format, const Qcow2IoOps **ops, void **file_opaque)
{
    static Qcow2IoOps table;

    snprintf(asked + strlen(asked), sizeof(asked) - strlen(asked), "%s:%s:%s ",
             opaque == &top ? "top" : opaque == &middle ? "middle" : "?", name, format);
    table = memory_ops;
    table.open_file = open_file;
    *ops = &table;
    *file_opaque = strcmp(name, "middle") == 0 ? &middle : &base;
    return refuse ? -refuse : 0;
}

static Qcow2Image *open_top(const Qcow2IoOps *ops, int flags)
{
    Qcow2Image *bs = NULL;

    top.closes = middle.closes = base.closes = 0;
    asked[0] = 0;
    CHECK_RET(qcow2_open_io(ops, &top, flags, &bs, NULL), 0);
    return bs;
}

int main(void)
{
    Qcow2IoOps ops = memory_ops;
    Qcow2Image *bs;
    Qcow2Error *err = NULL;
    Qcow2Extent e;
    unsigned char c[3] = { 0 };

    need("qemu-io");
    CHECK_RET(shell("truncate -s 64k base && qemu-io -f raw -c 'write -P 1 0 64k' base"
                    "&& qemu-img create -q -f qcow2 -b base -F raw middle && qemu-io -c 'write -P 2 1k 1k' middle"
                    "&& qemu-img create -q -f qcow2 -o extended_l2=on -b middle -F qcow2 top"
                    "&& qemu-io -c 'write -P 3 4k 2k' top"), 0);
    top.b = slurp("top"), middle.b = slurp("middle"), base.b = slurp("base");

    ops.open_file = open_file;
    bs = open_top(&ops, 0);
    CHECK_RET(qcow2_pread(bs, 4096, c, 1, NULL), 0);
    CHECK_STR(asked, "");                          /* not before it is needed */
    for (int i = 0; i < 3; i++) {
        CHECK_RET(qcow2_pread(bs, (int64_t[]){ 0, 1024, 4096 }[i], c + i, 1, NULL), 0);
    }
    CHECK(c[0] == 1 && c[1] == 2 && c[2] == 3);
    CHECK_STR(asked, "top:middle:qcow2 middle:base:raw ");
    CHECK_RET(qcow2_block_status(bs, 60 << 10, INT64_MAX, &e, NULL), 0);
    CHECK_U64(e.depth, 1);                         /* middle copied the whole cluster */
    CHECK(!e.filename);
    CHECK_U64((uint64_t)(middle.closes + base.closes), 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK(top.closes == 1 && middle.closes == 1 && base.closes == 1);

    /* It fails, or what it opens is no image: the handle stays good. */
    refuse = ENOENT;
    bs = open_top(&ops, 0);
    CHECK_RET(qcow2_pread(bs, 0, c, 1, &err), -ENOENT);
    CHECK(strstr(take_message(&err), "middle"));
    CHECK(middle.closes == 0);
    refuse = 0;
    middle.b.data[0] ^= 1;
    CHECK_RET(qcow2_pread(bs, 0, c, 1, NULL), -EINVAL);
    CHECK(middle.closes == 1);
    middle.b.data[0] ^= 1;
    CHECK_RET(qcow2_pread(bs, 0, c, 1, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK(middle.closes == 2 && base.closes == 1);

    /* Not asked with NO_BACKING, nor in a table that is too short for it. */
    bs = open_top(&ops, QCOW2_O_NO_BACKING);
    CHECK_RET(qcow2_pread(bs, 0, c, 1, NULL), -ENOTSUP);
    CHECK_RET(qcow2_close(bs), 0);
    ops.size = offsetof(Qcow2IoOps, open_file);
    bs = open_top(&ops, 0);
    CHECK_RET(qcow2_pread(bs, 4096, c, 1, NULL), 0);
    CHECK_RET(qcow2_pread(bs, 0, c, 1, &err), -ENOTSUP);
    CHECK(strstr(take_message(&err), "open_file"));
    CHECK_RET(qcow2_block_status(bs, 0, INT64_MAX, &e, NULL), -ENOTSUP);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_STR(asked, "");
    drop(&top.b), drop(&middle.b), drop(&base.b);
    return done();
}
