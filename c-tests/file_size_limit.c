/* SPDX-License-Identifier: MIT */
/* Past the process's file size limit a verb is -EFBIG, without SIGXFSZ, and the image as before. */
#include <signal.h>
#include <sys/resource.h>

#include "harness.h"

static bool pending(void)
{
    sigset_t set;

    return sigpending(&set) == 0 && sigismember(&set, SIGXFSZ) == 1;
}

static bool blocked(void)
{
    sigset_t set;

    return pthread_sigmask(SIG_BLOCK, NULL, &set) == 0 && sigismember(&set, SIGXFSZ) == 1;
}

static void over_the_limit(Bytes before, rlim_t limit)
{
    struct rlimit was, now;
    Qcow2SnapshotInfo sn = named("four");
    Qcow2Image *bs;
    Bytes after;

    fixture("v3-4k/before");
    bs = must_open("image.qcow2", QCOW2_O_RDWR);
    CHECK(getrlimit(RLIMIT_FSIZE, &was) == 0);
    now = was;
    now.rlim_cur = limit;
    CHECK(setrlimit(RLIMIT_FSIZE, &now) == 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), -EFBIG);
    CHECK(setrlimit(RLIMIT_FSIZE, &was) == 0);
    CHECK(strstr(qcow2_last_error(bs), "File too large"));
    CHECK_RET(qcow2_last_outcome(bs), QCOW2_OUTCOME_UNCHANGED);
    CHECK_RET(qcow2_close(bs), 0);
    after = slurp("image.qcow2");
    CHECK(after.len >= before.len && memcmp(after.data, before.data, before.len) == 0);
    drop(&after);
}

int main(void)
{
    Bytes before = reference("v3-4k/before"), after = reference("v3-4k/after-1");
    sigset_t set;

    /* Caught between the pieces of a write as well: the part that fits is written first. */
    CHECK(after.len > before.len + 512);
    for (size_t limit = before.len; limit < after.len; limit += 512) {
        over_the_limit(before, limit);
        CHECK(!pending() && !blocked());
    }
    /* A caller that has the signal blocked finds it blocked; its own one is still there. */
    sigemptyset(&set);
    sigaddset(&set, SIGXFSZ);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
    over_the_limit(before, before.len);
    CHECK(!pending() && blocked());
    raise(SIGXFSZ);
    over_the_limit(before, before.len);
    CHECK(pending() && blocked());
    drop(&before);
    drop(&after);
    return done();
}
