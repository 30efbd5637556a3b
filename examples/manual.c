/*
 * The examples of the manual pages, as one program: what stands between EXAMPLE and END is in
 * the page of each function named there (tests/man.rs takes it), and tests/install.sh runs it.
 *
 *     cc manual.c -lqcow2_snapshot && ./a.out scratch.qcow2     (as "make demo" leaves one)
 */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <qcow2_snapshot.h>

/* EXAMPLE qcow2_version */
void print_versions(void)
{
    printf("compiled with %s, running with %s\n", QCOW2_SNAPSHOT_VERSION, qcow2_version());
}
/* END */

/* EXAMPLE qcow2_open qcow2_error_get_pretty qcow2_error_free */
BlockDriverState *open_image(const char *filename, int flags)
{
    BlockDriverState *bs;
    Error *err = NULL;

    if (qcow2_open(filename, flags, &bs, &err) < 0) {
        fprintf(stderr, "%s: %s\n", filename, qcow2_error_get_pretty(err));
        qcow2_error_free(err);
    }
    return bs;                  /* NULL after a failure */
}
/* END */

/* EXAMPLE qcow2_close */
int is_sound(const char *filename)
{
    BlockDriverState *bs;
    int ret = qcow2_open(filename, 0, &bs, NULL);

    if (ret < 0)
        return ret;             /* there is no handle to close */
    return qcow2_close(bs);
}
/* END */

/* EXAMPLE qcow2_check */
static void print_finding(void *opaque, const char *finding)
{
    fprintf(opaque, "%s\n", finding);
}

/* After a guest was killed, or a verb was cancelled: give back what leaked. */
int repair_leaks(const char *filename)
{
    BlockDriverState *bs;
    Qcow2CheckResult found;
    Error *err = NULL;
    int ret = qcow2_open(filename, QCOW2_O_RDWR | QCOW2_O_CHECK, &bs, &err);

    if (ret == 0) {
        ret = qcow2_check(bs, QCOW2_FIX_LEAKS, &found, print_finding, stderr, &err);
        if (ret == 0)
            printf("%" PRIu64 " clusters given back, %" PRIu64 " corruptions\n",
                   found.leaks_fixed, found.corruptions);
        qcow2_close(bs);
    }
    if (err) {
        fprintf(stderr, "%s: %s\n", filename, qcow2_error_get_pretty(err));
        qcow2_error_free(err);
    }
    return ret;
}
/* END */

/* EXAMPLE qcow2_open_fd */
BlockDriverState *open_in_folder(int folder, const char *name)
{
    BlockDriverState *bs = NULL;
    Error *err = NULL;
    int fd = openat(folder, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);

    if (fd < 0)
        return NULL;
    if (qcow2_open_fd(fd, QCOW2_O_RDWR, &bs, &err) < 0) {
        fprintf(stderr, "%s: %s\n", name, qcow2_error_get_pretty(err));
        qcow2_error_free(err);
    }
    close(fd);                  /* the handle does not need it */
    return bs;
}
/* END */

/* EXAMPLE qcow2_open_io */
static int io_pread(void *opaque, uint64_t offset, void *buf, size_t bytes)
{
    while (bytes > 0) {
        ssize_t n = pread(*(int *)opaque, buf, bytes, (off_t)offset);
        if (n < 0 && errno != EINTR)
            return -errno;
        if (n == 0) {
            memset(buf, 0, bytes);      /* past the end: zeros */
            return 0;
        }
        if (n > 0) {
            buf = (char *)buf + n;
            offset += (uint64_t)n;
            bytes -= (size_t)n;
        }
    }
    return 0;
}

static int io_pwrite(void *opaque, uint64_t offset, const void *buf, size_t bytes)
{
    while (bytes > 0) {
        ssize_t n = pwrite(*(int *)opaque, buf, bytes, (off_t)offset);
        if (n < 0 && errno != EINTR)
            return -errno;
        if (n > 0) {
            buf = (const char *)buf + n;
            offset += (uint64_t)n;
            bytes -= (size_t)n;
        }
    }
    return 0;
}

static int io_flush(void *opaque)
{
    return fdatasync(*(int *)opaque) < 0 ? -errno : 0;
}

static int64_t io_getlength(void *opaque)
{
    struct stat st;

    return fstat(*(int *)opaque, &st) < 0 ? -errno : (int64_t)st.st_size;
}

static int io_truncate(void *opaque, uint64_t length)
{
    return ftruncate(*(int *)opaque, (off_t)length) < 0 ? -errno : 0;
}

/* No lock is taken: the caller sees to it that nobody else uses the file. */
BlockDriverState *open_own_io(int *fd)
{
    static const Qcow2IoOps ops = {
        .size = sizeof(Qcow2IoOps),
        .pread = io_pread,
        .pwrite = io_pwrite,
        .flush = io_flush,
        .getlength = io_getlength,
        .truncate = io_truncate,
    };
    BlockDriverState *bs;

    qcow2_open_io(&ops, fd, QCOW2_O_RDWR, &bs, NULL);
    return bs;                  /* NULL after a failure; *fd must stay until it is closed */
}
/* END */

/* EXAMPLE qcow2_snapshot_list qcow2_snapshot_list_free */
int print_snapshots(BlockDriverState *bs)
{
    QEMUSnapshotInfo *sn;
    int n = qcow2_snapshot_list(bs, &sn);

    if (n < 0)
        fprintf(stderr, "%s\n", qcow2_last_error(bs));
    for (int i = 0; i < n; i++)
        printf("%s\t%s\t%" PRIu64 "\n", sn[i].id_str, sn[i].name, sn[i].vm_state_size);
    qcow2_snapshot_list_free(sn);
    return n;
}
/* END */

/* EXAMPLE qcow2_snapshot_create qcow2_last_error */
int take_snapshot(BlockDriverState *bs, const char *name)
{
    QEMUSnapshotInfo sn = {.date_sec = (uint32_t)time(NULL), .icount = UINT64_MAX};
    int ret;

    snprintf(sn.name, sizeof(sn.name), "%s", name);
    ret = qcow2_snapshot_create(bs, &sn);
    if (ret < 0)
        fprintf(stderr, "%s\n", qcow2_last_error(bs));
    else
        printf("the ID is %s\n", sn.id_str);
    return ret;
}
/* END */

/* EXAMPLE qcow2_snapshot_goto qcow2_last_outcome */
int revert(BlockDriverState *bs, const char *id_or_name)
{
    int ret = qcow2_snapshot_goto(bs, id_or_name);

    if (ret < 0) {
        fprintf(stderr, "%s\n", qcow2_last_error(bs));
        switch (qcow2_last_outcome(bs)) {
        case QCOW2_OUTCOME_NONE:
        case QCOW2_OUTCOME_UNCHANGED:
            fprintf(stderr, "The disk is what it was.\n");
            break;
        case QCOW2_OUTCOME_DONE:
            fprintf(stderr, "It took effect; \"qcow2-snapshot check\" may find leaks.\n");
            break;
        case QCOW2_OUTCOME_UNKNOWN:
            fprintf(stderr, "Open the image again to see.\n");
            break;
        }
    }
    return ret;
}
/* END */

/* EXAMPLE qcow2_snapshot_delete */
int delete_all_named(BlockDriverState *bs, const char *name)
{
    int ret;

    do {                        /* one for each call, until there is none */
        ret = qcow2_snapshot_delete(bs, NULL, name, NULL);
    } while (ret == 0);
    return ret == -ENOENT ? 0 : ret;
}
/* END */

/* EXAMPLE qcow2_snapshot_load_tmp qcow2_getlength qcow2_pread */
int write_raw(const char *filename, const char *name, FILE *out)
{
    BlockDriverState *bs;
    static char buf[65536];
    int ret = qcow2_open(filename, 0, &bs, NULL);

    if (ret == 0)
        ret = qcow2_snapshot_load_tmp(bs, NULL, name, NULL);
    int64_t left = ret < 0 ? 0 : qcow2_getlength(bs);
    for (int64_t at = 0; ret == 0 && left > 0;) {
        size_t bytes = left < (int64_t)sizeof(buf) ? (size_t)left : sizeof(buf);
        ret = qcow2_pread(bs, at, buf, bytes, NULL);
        if (ret == 0 && fwrite(buf, 1, bytes, out) != bytes)
            ret = -EIO;
        at += (int64_t)bytes;
        left -= (int64_t)bytes;
    }
    qcow2_close(bs);
    return ret;
}
/* END */

/* EXAMPLE qcow2_block_status */
int64_t bytes_with_data(BlockDriverState *bs)
{
    int64_t length = qcow2_getlength(bs), sum = 0;
    Qcow2Extent e;

    for (int64_t at = 0; at < length; at += (int64_t)e.length) {
        int ret = qcow2_block_status(bs, at, INT64_MAX, &e, NULL);
        if (ret < 0)
            return ret;
        if ((e.flags & QCOW2_BLOCK_DATA) && !(e.flags & QCOW2_BLOCK_ZERO))
            sum += (int64_t)e.length;
    }
    return sum;
}
/* END */

/* EXAMPLE qcow2_snapshot_next_change */
/* Bytes that an incremental copy of the disk, as it is now, must take since the snapshot `since`. */
int64_t bytes_changed(BlockDriverState *bs, const char *since)
{
    int64_t at = 0, sum = 0;
    Qcow2Change c;

    do {
        int ret = qcow2_snapshot_next_change(bs, since, NULL, at, INT64_MAX, QCOW2_CHANGE_COMPARE, &c, NULL);
        if (ret < 0)
            return ret;
        sum += (int64_t)c.length;
        at = (int64_t)(c.start + c.length);
    } while (c.length > 0);
    return sum;
}
/* END */

/* EXAMPLE qcow2_snapshot_usage qcow2_snapshot_delete_many */
/* Delete them if that frees so much; returns the bytes freed. */
int64_t make_room(BlockDriverState *bs, const char *const *snapshots, size_t n, uint64_t wanted)
{
    Qcow2Usage usage;
    Error *err = NULL;
    int ret = qcow2_snapshot_usage(bs, snapshots, n, &usage, &err);

    if (ret == 0 && usage.exclusive < wanted)
        return 0;               /* something else holds what they hold */
    if (ret == 0)
        ret = qcow2_snapshot_delete_many(bs, snapshots, n, &err);
    if (ret < 0) {
        fprintf(stderr, "%s\n", qcow2_error_get_pretty(err));
        qcow2_error_free(err);
        return ret;
    }
    return (int64_t)usage.exclusive;
}
/* END */

/* EXAMPLE qcow2_snapshot_rename */
int mark_as_good(BlockDriverState *bs, const char *id_or_name)
{
    Error *err = NULL;
    int ret = qcow2_snapshot_rename(bs, id_or_name, "known good", &err);

    if (ret < 0)
        fprintf(stderr, "%s\n", qcow2_error_get_pretty(err));
    qcow2_error_free(err);      /* NULL is fine */
    return ret;
}
/* END */

/* EXAMPLE qcow2_flatten */
/* Make an overlay a whole image, its snapshots too. */
int stand_alone(const char *file)
{
    BlockDriverState *bs;
    int ret = qcow2_open(file, QCOW2_O_RDWR, &bs, NULL);

    if (ret < 0)
        return ret;
    ret = qcow2_flatten(bs, NULL);
    qcow2_close(bs);
    return ret;
}
/* END */

/* EXAMPLE qcow2_flatten_estimate */
/* Will what flatten copies fit into `room` bytes? */
int would_fit(BlockDriverState *bs, uint64_t room)
{
    uint64_t bytes;
    int ret = qcow2_flatten_estimate(bs, &bytes, NULL);

    return ret < 0 ? ret : bytes <= room;
}
/* END */

/* EXAMPLE qcow2_load_vmstate */
int has_vm_state(BlockDriverState *bs, const QEMUSnapshotInfo *sn)
{
    unsigned char magic[4];
    int ret;

    if (sn->vm_state_size < sizeof(magic))
        return 0;
    ret = qcow2_snapshot_load_tmp(bs, sn->id_str, NULL, NULL);
    if (ret == 0)
        ret = qcow2_load_vmstate(bs, 0, magic, sizeof(magic), NULL);
    return ret < 0 ? ret : memcmp(magic, "QEVM", 4) == 0;
}
/* END */

/* EXAMPLE qcow2_read_snapshots qcow2_free_snapshots */
int count_on_disk(BlockDriverState *bs)
{
    QEMUSnapshotInfo *sn;
    int ret;

    qcow2_free_snapshots(bs);           /* from here on the list is empty ... */
    ret = qcow2_read_snapshots(bs);     /* ... and is loaded from the image again */
    if (ret == 0) {
        ret = qcow2_snapshot_list(bs, &sn);
        qcow2_snapshot_list_free(sn);
    }
    return ret;
}
/* END */

/* EXAMPLE qcow2_write_snapshots */
int move_table(const char *filename)
{
    BlockDriverState *bs;
    int ret = qcow2_open(filename, QCOW2_O_RDWR, &bs, NULL);

    if (ret == 0)
        ret = qcow2_write_snapshots(bs);
    if (ret < 0)
        fprintf(stderr, "%s\n", qcow2_last_error(bs));
    qcow2_close(bs);
    return ret;
}
/* END */

/* EXAMPLE qcow2_snapshot_layout */
int print_disk_sizes(BlockDriverState *bs)
{
    Qcow2SnapshotLayout one;
    size_t i;

    for (i = 0; qcow2_snapshot_layout(bs, i, &one, NULL) == 0; i++)
        printf("%s %s: %" PRIu64 " bytes\n", one.id, one.name, one.disk_size);
    return (int)i;
}
/* END */

/* EXAMPLE qcow2_image_layout qcow2_reload */
int revert_beside_a_cache(BlockDriverState *bs, const char *snapshot, uint64_t *my_l1, size_t room)
{
    Qcow2ImageLayout now;
    int ret = qcow2_reload(bs, NULL);           /* this program has written the image itself */

    if (ret < 0 || (ret = qcow2_snapshot_goto(bs, snapshot)) < 0)
        return ret;
    if ((ret = qcow2_image_layout(bs, &now)) < 0)
        return ret;
    if (now.changed & QCOW2_CHANGED_L1)
        memcpy(my_l1, now.l1_table, sizeof(*my_l1) * (now.l1_size < room ? now.l1_size : room));
    return 0;
}
/* END */

/* EXAMPLE qcow2_api */
const char *loaded_version(void *library)       /* from dlopen("libqcow2_snapshot.so.0", RTLD_NOW | RTLD_LOCAL) */
{
    const Qcow2Api *(*get)(void);
    const Qcow2Api *api;

    *(void **)&get = dlsym(library, "qcow2_api");
    if (!get)
        return "older than 0.2";
    api = get();
    if (api->size <= offsetof(Qcow2Api, snapshot_layout))       /* is the member there? */
        return "too old";
    return api->version();
}
/* END */

/* EXAMPLE qcow2_set_progress */
static volatile sig_atomic_t ctrl_c;    /* set by the program's handler of SIGINT */

static int show_progress(void *opaque, int stage, uint64_t done, uint64_t total)
{
    static const char *const words[] = { "", "checking", "writing", "freeing" };

    fprintf(opaque, "\r%s: %d %%  ", words[stage], (int)(100.0 * done / total));
    return ctrl_c;              /* after QCOW2_PROGRESS_PREPARE nobody looks at it */
}

int delete_with_progress(BlockDriverState *bs, const char *name)
{
    int ret;

    qcow2_set_progress(bs, show_progress, stderr);
    ret = qcow2_snapshot_delete(bs, NULL, name, NULL);
    qcow2_set_progress(bs, NULL, NULL);
    return ret;                 /* -ECANCELED after Ctrl-C */
}
/* END */

static void must(bool right, const char *what)
{
    if (!right) {
        fprintf(stderr, "manual: %s\n", what);
        exit(1);
    }
}

int main(int argc, char **argv)
{
    QEMUSnapshotInfo *sn;
    BlockDriverState *bs;
    int n, fd;

    must(argc == 2, "usage: manual SCRATCH-IMAGE (it will be changed)");
    print_versions();
    must(strcmp(QCOW2_SNAPSHOT_VERSION, qcow2_version()) == 0, "not the library of the header");
    must(!open_image("/nowhere/at.all", 0), "opened what is not there");
    must(is_sound(argv[1]) == 0 && is_sound("/dev/null") == -EINVAL, "is_sound");

    bs = open_image(argv[1], QCOW2_O_RDWR);
    must(bs, "open_image");
    must(take_snapshot(bs, "manual") == 0, "take_snapshot");
    n = print_snapshots(bs);
    must(n > 0 && count_on_disk(bs) == n, "count_on_disk");
    must(revert(bs, "manual") == 0 && revert(bs, "no such") == -ENOENT, "revert");
    must(print_disk_sizes(bs) == n, "print_disk_sizes");
    uint64_t l1[1] = {0};
    must(revert_beside_a_cache(bs, "manual", l1, 1) == 0, "revert_beside_a_cache");
    must(bytes_with_data(bs) > 0, "bytes_with_data");
    must(bytes_changed(bs, "manual") == 0 && bytes_changed(bs, "no such") == -ENOENT, "bytes_changed");
    must(qcow2_close(bs) == 0, "close");

    bs = open_image(argv[1], 0);
    must(bs && qcow2_snapshot_list(bs, &sn) == n && has_vm_state(bs, sn) == 0, "has_vm_state");
    qcow2_snapshot_list_free(sn);
    must(qcow2_close(bs) == 0, "close");
    FILE *raw = tmpfile();
    must(raw && write_raw(argv[1], "manual", raw) == 0 && ftell(raw) > 0, "write_raw");
    fclose(raw);

    must(repair_leaks(argv[1]) == 0, "repair_leaks");
    must(move_table(argv[1]) == 0, "move_table");
    bs = open_in_folder(AT_FDCWD, argv[1]);
    must(bs && take_snapshot(bs, "progress") == 0, "take_snapshot");
    ctrl_c = 1;
    must(delete_with_progress(bs, "progress") == -ECANCELED, "delete_with_progress");
    ctrl_c = 0;
    must(delete_with_progress(bs, "progress") == 0, "delete_with_progress");
    must(delete_all_named(bs, "manual") == 0 && print_snapshots(bs) == n - 1, "delete_all_named");
    must(qcow2_close(bs) == 0, "close");
    fd = open(argv[1], O_RDWR);
    bs = open_own_io(&fd);
    must(bs && take_snapshot(bs, "through own functions") == 0, "open_own_io");
    must(print_snapshots(bs) == n && qcow2_close(bs) == 0, "open_own_io");
    close(fd);

    bs = open_image(argv[1], QCOW2_O_RDWR);
    must(bs && take_snapshot(bs, "one") == 0 && take_snapshot(bs, "two") == 0, "take_snapshot");
    must(mark_as_good(bs, "two") == 0 && mark_as_good(bs, "two") == -ENOENT, "mark_as_good");
    const char *const both[] = {"one", "known good"};
    must(make_room(bs, both, 2, UINT64_MAX) == 0 && make_room(bs, both, 2, 1) > 0, "make_room");
    must(print_snapshots(bs) == n && qcow2_close(bs) == 0, "make_room");
    return 0;
}
