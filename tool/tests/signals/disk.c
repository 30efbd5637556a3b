/*
 * A disk on which something happens at one request, for LD_PRELOAD:
 *
 *   AT="write 3"          which request: the third write (read, write, sync)
 *   DO="signal 2 1"       signal 2 arrives, once
 *   DO="wait /some/file"  it hangs until the file is there
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static void request(const char *kind)
{
    static int seen;
    const char *at = getenv("AT"), *what = getenv("DO");
    char wanted[16], file[4096];
    int nth, number, times;

    if (!at || !what || sscanf(at, "%15s %d", wanted, &nth) != 2 || strcmp(wanted, kind) != 0 || ++seen != nth)
        return;
    if (sscanf(what, "signal %d %d", &number, &times) == 2)
        while (times-- > 0)
            kill(getpid(), number);
    if (sscanf(what, "wait %4095s", file) == 1)
        while (access(file, F_OK) != 0)
            usleep(10000);
}

#define REAL(name, ...) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
    return real(__VA_ARGS__)

ssize_t pread64(int fd, void *buf, size_t n, off64_t at)
{
    request("read");
    REAL(pread64, fd, buf, n, at);
}

ssize_t pwrite64(int fd, const void *buf, size_t n, off64_t at)
{
    request("write");
    REAL(pwrite64, fd, buf, n, at);
}

int fdatasync(int fd)
{
    request("sync");
    REAL(fdatasync, fd);
}
