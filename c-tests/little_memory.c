/* SPDX-License-Identifier: MIT */
/* Under a memory limit, of whatever size, a verb on an image with 8 MiB of L1 table returns 0 or
 * -ENOMEM, and the image is sound. Never does the library end the process. */
#include "harness.h"

#include <sys/resource.h>
#include <sys/wait.h>

enum { CREATE, GOTO, DELETE, VERBS };
static const char *const verbs[VERBS] = { "create", "goto", "delete" };
#ifndef STEP
#define STEP 1572864                                        /* 1.5 MB */
#endif

static uint64_t memory_now(void)
{
    unsigned long long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");

    CHECK(f && fscanf(f, "%llu", &pages) == 1);
    fclose(f);
    return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* A disk of 512 TiB with the snapshots `old` and `new` and data in L2 tables far apart. */
static void make_image(void)
{
    Qcow2Image *bs;

    CHECK(shell("qemu-img create -q -f qcow2 image 512T") == 0);
    for (int i = 0; i < 3; i++) {
        Qcow2SnapshotInfo sn = named(i == 1 ? "old" : "new");

        CHECK(shell("qemu-io -c 'write 0 64k' -c 'write %dT 1M' -c 'write 511T 64k' image", 100 * i) == 0);
        if (i == 0)
            continue;
        bs = must_open("image", QCOW2_O_RDWR);
        CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
        CHECK_RET(qcow2_close(bs), 0);
    }
    CHECK(shell("qemu-io -c 'write 300T 1M' -c 'write 0 64k' image") == 0);
}

/* In a child: 0, or 1 for -ENOMEM, with a limit of `room` more bytes than the process has. */
static int verb(const char *path, int which, uint64_t room)
{
    struct rlimit limit = { memory_now() + room, memory_now() + room };
    Qcow2SnapshotInfo sn = named("more");
    Qcow2Image *bs = NULL;
    int ret;

    CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
    ret = qcow2_open(path, QCOW2_O_RDWR, &bs, NULL);
    if (ret == 0) {
        ret = which == CREATE ? qcow2_snapshot_create(bs, &sn)
            : which == GOTO ? qcow2_snapshot_goto(bs, "old")
            : qcow2_snapshot_delete(bs, NULL, "new", NULL);
        CHECK(ret == 0 || has_words(bs));
        CHECK_RET(qcow2_close(bs), 0);
    }
    CHECK(ret == 0 || ret == -ENOMEM);
    return ret != 0;
}

int main(void)
{
    if (getenv("VALGRIND"))
        skip("valgrind has the memory of the process in its own hands: no limit was set");
    need("qemu-img");
    need("qemu-io");
    make_image();
    Bytes before = slurp("image");

    for (int which = 0; which < VERBS; which++) {
        int refused = 0, status = 1;

        for (uint64_t room = 0; status != 0; room += STEP) {
            spew("copy", before);
            fflush(NULL);
            pid_t child = fork();
            CHECK(child >= 0);
            if (child == 0)
                _exit(verb("copy", which, room));
            CHECK(waitpid(child, &status, 0) == child);
            if (!WIFEXITED(status) || WEXITSTATUS(status) > 1)
                fail_at(__FILE__, __LINE__, "%s in %llu bytes: status %#x", verbs[which],
                        (unsigned long long)room, status);
            refused += status != 0;
            int found = shell("qemu-img check copy");
            CHECK(found == 0 || found == 3);                /* 3: leaked clusters */
            CHECK(room < 1u << 30);
        }
        if (refused < 3)
            fail_at(__FILE__, __LINE__, "%s: only %d limits were too low", verbs[which], refused);
    }
    drop(&before);
    return done();
}
