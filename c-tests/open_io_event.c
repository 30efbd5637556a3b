/* SPDX-License-Identifier: MIT */
/* ops->event comes with a label before each write, barrier and discard; none without a request. */
#include "memory_io.h"

static MemoryIo io;
static char events[4096];
static int told, done_so_far;

static void event(void *opaque, const char *label)
{
    CHECK(opaque == &io && *label);
    strcat(strcat(events, label), ";");
    told++;
}

static int pwrite_told(void *opaque, uint64_t offset, const void *buf, size_t bytes)
{
    CHECK_U64((uint64_t)told, (uint64_t)++done_so_far);
    return memory_pwrite(opaque, offset, buf, bytes);
}

static int flush_told(void *opaque)
{
    CHECK_U64((uint64_t)told, (uint64_t)++done_so_far);
    CHECK(strstr(events, "barrier;") != NULL);
    return memory_flush(opaque);
}

static int discard_told(void *opaque, uint64_t offset, uint64_t bytes)
{
    CHECK_U64((uint64_t)told, (uint64_t)++done_so_far);
    return memory_discard(opaque, offset, bytes);
}

int main(void)
{
    Qcow2IoOps ops = memory_ops;
    Qcow2SnapshotInfo sn = named("x");
    Qcow2Image *bs;

    io.b = reference("v3-64k/before");
    ops.event = event;
    ops.pwrite = pwrite_told, ops.flush = flush_told, ops.discard = discard_told;
    CHECK_RET(qcow2_open_io(&ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_STR(events, "");
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK(strstr(events, "snapshot L1 table;") && strstr(events, "refcount block;"));
    CHECK(strstr(events, "snapshot table;") < strstr(events, "header;"));
    CHECK(strcmp(events + strlen(events) - 8, "barrier;") == 0);
    events[0] = 0;
    CHECK_RET(qcow2_snapshot_delete(bs, NULL, "x", NULL), 0);
    CHECK(strstr(events, "discard;") > strstr(events, "header;"));
    CHECK_RET(qcow2_close(bs), 0);
    drop(&io.b);
    return done();
}
