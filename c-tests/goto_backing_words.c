/* SPDX-License-Identifier: MIT */
/* goto's -ENOENT, -EACCES and -EAGAIN for a backing file are told from its own by their words. */
#include "harness.h"

static void goto_says(int flags, const char *id, int want, const char *words, const char *not_words)
{
    Qcow2Image *bs = must_open("image.qcow2", flags);

    /* Root may read anything: what is opened from here on is opened as nobody. */
    if (want == -EACCES && geteuid() == 0) {
        CHECK(seteuid(65534) == 0);
    }
    CHECK_RET(qcow2_snapshot_goto(bs, id), want);
    CHECK(strstr(qcow2_last_error(bs), words) && !strstr(qcow2_last_error(bs), not_words));
    CHECK_RET(qcow2_close(bs), 0);
    CHECK(seteuid(getuid()) == 0);
}

int main(void)
{
    static const char LENGTH[] = "Could not learn the length of the backing file: Could not open backing file: ";
    Bytes image = reference("backing-grow-longer/before"), busy = reference("v3-4k/before"), name;
    uint64_t at = be(image, 8, 8), n = be(image, 16, 4);
    Entry e;
    char path[1024], id[128];
    Qcow2Image *user;

    /* The snapshot is larger than the active disk. */
    CHECK(table_entry(image, 0, &e) && e.disk_size > be(image, 24, 8));
    snprintf(id, sizeof(id), "%.*s", (int)e.id.len, (const char *)e.id.data);
    name = (Bytes){ image.data + at, n };
    snprintf(path, sizeof(path), "%.*s", (int)name.len, (const char *)name.data);
    spew("image.qcow2", image);
    goto_says(QCOW2_O_RDWR, "no such", -ENOENT, "Can't find the snapshot", "backing");
    goto_says(0, id, -EACCES, "read-only", "backing");

    unlink(path);
    goto_says(QCOW2_O_RDWR, id, -ENOENT, LENGTH, "snapshot");
    /* Somebody writes to it. */
    spew(path, busy);
    user = must_open(path, QCOW2_O_RDWR);
    goto_says(QCOW2_O_RDWR, id, -EAGAIN, LENGTH, "snapshot");
    CHECK_RET(qcow2_close(user), 0);
    CHECK(chmod(path, 0) == 0);
    goto_says(QCOW2_O_RDWR, id, -EACCES, LENGTH, "read-only");
    CHECK_FILE("image.qcow2", image);
    drop(&image);
    drop(&busy);
    return done();
}
