/* SPDX-License-Identifier: MIT */
/* The image's own close is the last call; what was opened through a file is closed before that file. */
#include "memory_io.h"

static MemoryIo files[4];
static const char *const names[4] = { "top", "middle", "base", "data" };
static char closed[64];

static void close_file(void *opaque)
{
    MemoryIo *io = opaque;

    io->closes++;
    strcat(strcat(closed, names[io - files]), " ");
}

static int open_file(void *opaque, const char *name, const char *format, const Qcow2IoOps **ops, void **file_opaque)
{
    static Qcow2IoOps table;

    (void)opaque, (void)format;
    table = memory_ops;
    table.open_file = open_file;
    table.close = close_file;
    *ops = &table;
    for (int i = 0; i < 4; i++) {
        if (strcmp(name, names[i]) == 0) {
            *file_opaque = &files[i];
            return 0;
        }
    }
    return -ENOENT;
}

int main(void)
{
    Qcow2IoOps ops = memory_ops;
    Qcow2Image *bs = NULL;
    char c;

    need("qemu-img");
    CHECK_RET(shell("truncate -s 64k base && qemu-img create -q -f qcow2 -o data_file=data,backing_file=base,backing_fmt=raw middle"
                    "&& qemu-img create -q -f qcow2 -b middle -F qcow2 top && qemu-io -c 'write 0 4k' middle"
                    "&& qemu-img create -q -f qcow2 -o data_file=data own 64k && qemu-io -c 'write 0 4k' own"), 0);
    for (int i = 0; i < 4; i++) {
        files[i].b = slurp(names[i]);
    }
    ops.open_file = open_file;
    ops.close = close_file;
    CHECK_RET(qcow2_open_io(&ops, &files[0], 0, &bs, NULL), 0);
    CHECK_RET(qcow2_pread(bs, 0, &c, 1, NULL), 0);
    CHECK_RET(qcow2_pread(bs, 65535, &c, 1, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_STR(closed, "base data middle top ");

    /* A data file of the image itself. */
    closed[0] = 0;
    drop(&files[0].b);
    files[0].b = slurp("own");
    CHECK_RET(qcow2_open_io(&ops, &files[0], 0, &bs, NULL), 0);
    CHECK_RET(qcow2_pread(bs, 0, &c, 1, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_STR(closed, "data top ");

    /* The chain breaks in the middle of being opened. */
    closed[0] = 0;
    drop(&files[0].b), drop(&files[2].b);
    files[0].b = slurp("top"), files[2].b = (Bytes){ (unsigned char *)strdup("KDMV"), 4 };
    memset(files[1].b.data, 0, 4);
    CHECK_RET(qcow2_open_io(&ops, &files[0], 0, &bs, NULL), 0);
    CHECK(qcow2_pread(bs, 0, &c, 1, NULL) < 0);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_STR(closed, "middle top ");
    for (int i = 0; i < 4; i++) {
        drop(&files[i].b);
    }
    return done();
}
