/* SPDX-License-Identifier: MIT */
/* A process that is killed leaves no lock behind, whatever it was doing. */
#include <signal.h>
#include <sys/wait.h>

#include "harness.h"

int main(void)
{
    for (int round = 0; round < 20; round++) {
        const char *path = fixture("v3-4k/after-1");
        Qcow2Image *bs = NULL;
        Qcow2SnapshotInfo *tab;
        int ready[2], status;
        char byte;
        pid_t pid;

        CHECK(pipe(ready) == 0);
        pid = fork();
        if (pid == 0) {
            Qcow2Image *own;

            if (qcow2_open(path, QCOW2_O_RDWR, &own, NULL) != 0 || write(ready[1], "x", 1) != 1) {
                _exit(1);
            }
            for (;;) {                          /* killed in the middle of this */
                Qcow2SnapshotInfo sn = named("again");

                if (qcow2_snapshot_create(own, &sn) != 0 || qcow2_snapshot_delete(own, sn.id_str, NULL, NULL) != 0) {
                    _exit(2);
                }
            }
        }
        CHECK(read(ready[0], &byte, 1) == 1);
        CHECK_RET(qcow2_open(path, QCOW2_O_RDWR, &bs, NULL), -EAGAIN);
        usleep((useconds_t)round * 700);
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
        bs = must_open(path, QCOW2_O_RDWR);
        CHECK(qcow2_snapshot_list(bs, &tab) >= 1);
        qcow2_snapshot_list_free(tab);
        CHECK_RET(qcow2_close(bs), 0);
        close(ready[0]);
        close(ready[1]);
    }
    return done();
}
