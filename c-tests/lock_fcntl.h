/* SPDX-License-Identifier: MIT */
/* fcntl() as the library calls it, with failures of lock calls on order. */
#ifndef LOCK_FCNTL_H
#define LOCK_FCNTL_H

#include <stdarg.h>
#include <sys/syscall.h>

#include "harness.h"

static int fail_query;             /* what the first query, of the whole file, fails with */
static int fail_test;              /* what queries of single bytes fail with */
static int fail_set;               /* what setting a lock fails with */
static int queries, sets;          /* lock calls */

/* The dynamic linker finds this one before the C library's. */
int fcntl(int fd, int command, ...)
{
    va_list list;
    void *argument;
    int fail = 0;

    va_start(list, command);
    argument = va_arg(list, void *);
    va_end(list);
    if (command == F_OFD_GETLK) {
        fail = ((struct flock *)argument)->l_len == 0 ? fail_query : fail_test;
        queries++;
    } else if (command == F_OFD_SETLK && ((struct flock *)argument)->l_type != F_UNLCK) {
        fail = fail_set;
        sets++;
    }
    if (fail) {
        errno = fail;
        return -1;
    }
    return syscall(SYS_fcntl, fd, command, argument);
}

#endif
