/* SPDX-License-Identifier: MIT */
/* What flatten cannot do it says before a byte is written. */
#include "memory_io.h"

static void refused(const char *make, int flags, int want, const char *words)
{
    Qcow2Error *err = NULL;
    Qcow2Image *bs;
    Bytes before;

    CHECK_RET(shell("rm -f base o.qcow2 data itself; %s", make), 0);
    before = slurp("o.qcow2");
    bs = must_open("o.qcow2", flags);
    CHECK_RET(qcow2_flatten(bs, &err), want);
    CHECK(strstr(take_message(&err), words));
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_UNCHANGED);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_FILE("o.qcow2", before);
    drop(&before);
}

#define BASE "qemu-img create -q -f raw base 1M && qemu-io -f raw -c 'write -P 1 0 1M' base && "
#define OVER "-f qcow2 -b base -F raw o.qcow2"

int main(void)
{
    MemoryIo io = { 0 };
    Qcow2Image *bs = NULL;
    uint64_t bytes = 1;

    need("qemu-io");
    refused(BASE "qemu-img create -q " OVER, 0, -EACCES, "read-only");
    refused(BASE "qemu-img create -q " OVER, QCOW2_O_RDWR | QCOW2_O_NO_BACKING, -ENOTSUP, "NO_BACKING");
    refused(BASE "qemu-img create -q " OVER " && rm base", QCOW2_O_RDWR, -ENOENT, "base");
    refused("qemu-img create -q -f qcow2 -u -b itself -F raw o.qcow2 1M && ln -sf o.qcow2 itself",
            QCOW2_O_RDWR | QCOW2_O_NO_LOCK, -EINVAL, "chain");
    refused(BASE "qemu-img create -q -o data_file=data " OVER, QCOW2_O_RDWR, -ENOTSUP, "data file");
    refused(BASE "qemu-img create -q -o refcount_bits=1 " OVER " && qemu-img snapshot -c one o.qcow2", QCOW2_O_RDWR,
            -EINVAL, "1 bits");
    refused(BASE "qemu-img create -q --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,"
            "encrypt.iter-time=10 " OVER, QCOW2_O_RDWR, -ENOTSUP, "encrypted");

    /* Behind callbacks without open_file. */
    CHECK_RET(shell("rm -f o.qcow2; " BASE "qemu-img create -q " OVER), 0);
    io.b = slurp("o.qcow2");
    CHECK_RET(qcow2_open_io(&memory_ops, &io, QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(qcow2_flatten_estimate(bs, &bytes, NULL), -ENOTSUP);
    CHECK_U64(bytes, 0);
    CHECK_RET(qcow2_flatten(bs, NULL), -ENOTSUP);
    CHECK(has_words(bs));
    CHECK_RET(qcow2_close(bs), 0);
    drop(&io.b);
    return done();
}
