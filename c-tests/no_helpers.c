/* SPDX-License-Identifier: MIT */
/* Where no helper thread can be started, the call does the work alone. */
#include <pthread.h>
#include <sched.h>

#include "harness.h"

static int asked;

/* Found before the C library's, as this stands in the program. */
int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg)
{
    (void)thread, (void)attr, (void)start, (void)arg;
    asked++;
    return EAGAIN;
}

int main(void)
{
    static char whole[4 << 20];
    Qcow2Image *bs;
    cpu_set_t set;

    need("qemu-img");
    CHECK_RET(shell("head -c 4M /dev/zero | tr '\\0' x > x.raw && qemu-img convert -c -O qcow2 x.raw x.qcow2"), 0);
    bs = must_open("x.qcow2", 0);
    CHECK_RET(qcow2_pread(bs, 0, whole, sizeof(whole), NULL), 0);
    for (size_t i = 0; i < sizeof(whole); i++) {
        if (whole[i] != 'x') {
            fail_at(__FILE__, __LINE__, "byte %zu", i);
            break;
        }
    }
    /* One for each further processor would be asked for; after the first refusal no other. */
    CHECK(sched_getaffinity(0, sizeof(set), &set) == 0);
    CHECK_U64((uint64_t)asked, CPU_COUNT(&set) > 1);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
