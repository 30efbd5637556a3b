/* SPDX-License-Identifier: MIT */
/* An image in a malloc'ed buffer behind Qcow2IoOps, with counters and failures on order. */
#ifndef MEMORY_IO_H
#define MEMORY_IO_H

#include "harness.h"

typedef struct MemoryIo {
    Bytes b;
    size_t limit;                  /* growing beyond is -ENOSPC; 0: no limit */
    int requests, closes;
    int fail_at, fail_with;        /* the N-th request fails with -fail_with; 0: none */
    bool fail_forever;             /* and so do all after it */
    bool fail_writes_only;         /* count writes, flushes, truncates and discards only */
    size_t largest;                /* largest single request */
    Qcow2Image **reenter;          /* call back into this handle, for the test of that */
    int reentered;                 /* what it answered */
} MemoryIo;

static inline int memory_step(MemoryIo *io, bool changes, size_t bytes)
{
    if (bytes > io->largest) {
        io->largest = bytes;
    }
    if (io->fail_writes_only && !changes) {
        return 0;
    }
    io->requests++;
    if (io->fail_at && (io->requests == io->fail_at || (io->fail_forever && io->requests > io->fail_at))) {
        return -io->fail_with;
    }
    return 0;
}

static inline int memory_resize(MemoryIo *io, uint64_t length)
{
    if (io->limit && length > io->b.len && length > io->limit) {
        return -ENOSPC;
    }
    io->b.data = realloc(io->b.data, length ? length : 1);
    if (length > io->b.len) {
        memset(io->b.data + io->b.len, 0, length - io->b.len);
    }
    io->b.len = length;
    return 0;
}

static inline int memory_pread(void *opaque, uint64_t offset, void *buf, size_t bytes)
{
    MemoryIo *io = opaque;
    size_t n = offset >= io->b.len ? 0 : io->b.len - offset < bytes ? io->b.len - offset : bytes;
    int ret = memory_step(io, false, bytes);

    if (io->reenter && *io->reenter) {
        io->reentered = qcow2_snapshot_goto(*io->reenter, "1");
    }
    if (ret == 0) {
        memset(buf, 0, bytes);
        memcpy(buf, io->b.data + (n ? offset : 0), n);
    }
    return ret;
}

static inline int memory_pwrite(void *opaque, uint64_t offset, const void *buf, size_t bytes)
{
    MemoryIo *io = opaque;
    int ret = memory_step(io, true, bytes);

    if (ret == 0 && offset + bytes > io->b.len) {
        ret = memory_resize(io, offset + bytes);
    }
    if (ret == 0) {
        memcpy(io->b.data + offset, buf, bytes);
    }
    return ret;
}

static inline int memory_flush(void *opaque)
{
    return memory_step(opaque, true, 0);
}

static inline int64_t memory_getlength(void *opaque)
{
    return (int64_t)((MemoryIo *)opaque)->b.len;
}

static inline int memory_truncate(void *opaque, uint64_t length)
{
    int ret = memory_step(opaque, true, 0);

    return ret ? ret : memory_resize(opaque, length);
}

static inline int memory_discard(void *opaque, uint64_t offset, uint64_t bytes)
{
    MemoryIo *io = opaque;
    int ret = memory_step(io, true, 0);

    if (ret == 0 && offset < io->b.len) {
        memset(io->b.data + offset, 0, io->b.len - offset < bytes ? io->b.len - offset : bytes);
    }
    return ret;
}

static inline void memory_close(void *opaque)
{
    ((MemoryIo *)opaque)->closes++;
}

static const Qcow2IoOps memory_ops = {
    .size = sizeof(Qcow2IoOps), .pread = memory_pread, .pwrite = memory_pwrite, .flush = memory_flush,
    .getlength = memory_getlength, .truncate = memory_truncate, .discard = memory_discard, .close = memory_close,
};

#endif
