/* SPDX-License-Identifier: MIT */
/* A server of QEMU's and we keep each other out of an image: qemu-nbd, qemu-storage-daemon. */
#include <signal.h>
#include <sys/wait.h>

#include "harness.h"

/* Start a server on ./image.qcow2. */
static pid_t serve(const char *const argv[])
{
    pid_t pid = fork();

    if (pid == 0) {
        int null = open("server.log", O_WRONLY | O_CREAT | O_TRUNC, 0600);

        dup2(null, 1);
        dup2(null, 2);
        execvp(argv[0], (char *const *)argv);
        _exit(127);
    }
    return pid;
}

static void with(const char *program, const char *const argv[])
{
    const char *path = fixture("v3-4k/after-1");
    Bytes before = slurp(path);
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;
    pid_t pid;
    int status;

    need(program);
    unlink("nbd.sock");
    pid = serve(argv);
    /* It makes its socket first, and opens the image then. */
    for (int i = 0; i < 1000 && (access("nbd.sock", F_OK) != 0 || qcow2_open(path, QCOW2_O_RDWR, &bs, NULL) == 0); i++) {
        qcow2_close(bs);
        bs = NULL;
        usleep(10000);
    }
    CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &bs, &err), -EAGAIN);
    take_message(&err);
    CHECK_RET(qcow2_open(path, 0, &bs, &err), -EAGAIN);
    take_message(&err);
    CHECK(!bs);
    bs = must_open(path, QCOW2_O_FORCE_SHARE);
    CHECK_RET(qcow2_close(bs), 0);
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK_FILE(path, before);

    /* The reverse: it does not start. */
    unlink("nbd.sock");
    bs = must_open(path, QCOW2_O_RDWR);
    pid = serve(argv);
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != 127);
    CHECK_RET(qcow2_close(bs), 0);
    CHECK_FILE(path, before);
    drop(&before);
}

int main(void)
{
    static const char *const nbd[] = { "qemu-nbd", "-f", "qcow2", "-t", "-k", "nbd.sock", "image.qcow2", NULL };
    static const char *const daemon[] = {
        "qemu-storage-daemon",
        "--blockdev", "driver=file,node-name=f,filename=image.qcow2",
        "--blockdev", "driver=qcow2,node-name=q,file=f",
        "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
        "--export", "type=nbd,id=e,node-name=q,writable=on",
        NULL
    };
    char folder[4096];
    char absolute[4200];
    const char *nbd_here[8];

    /* qemu-nbd wants an absolute path for its socket. */
    CHECK(getcwd(folder, sizeof(folder)));
    snprintf(absolute, sizeof(absolute), "%s/nbd.sock", folder);
    memcpy(nbd_here, nbd, sizeof(nbd));
    nbd_here[5] = absolute;
    with("qemu-nbd", nbd_here);
    with("qemu-storage-daemon", daemon);
    return done();
}
