/*
 * A walk through internal snapshots: create, list, load_tmp, goto, delete.
 *
 *     make demo        or:  cc demo.c -lqcow2_snapshot && ./a.out scratch.qcow2
 *
 * It makes its own image, so no qemu-img is needed, and it plays the guest that
 * writes to the disk between the snapshots. Any surprise ends it with exit status 1.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <qcow2_snapshot.h>

#define CLUSTER 65536u
#define COPIED (UINT64_C(1) << 63)

static const char *image;

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "demo: %s: %s\n", what, why ? why : "no reason given");
    exit(1);
}

/* ---- the scratch image and the guest: what QEMU does in real life ---------------------- */

/* All numbers of the format are big-endian. */
static void put(FILE *f, uint64_t at, int bytes, uint64_t value)
{
    unsigned char raw[8];
    for (int i = 0; i < bytes; i++)
        raw[i] = (unsigned char)(value >> (8 * (bytes - 1 - i)));
    if (fseek(f, (long)at, SEEK_SET) != 0 || fwrite(raw, 1, (size_t)bytes, f) != (size_t)bytes)
        fail("write", strerror(errno));
}

static uint64_t get(FILE *f, uint64_t at, int bytes)
{
    unsigned char raw[8] = {0};
    uint64_t value = 0;
    if (fseek(f, (long)at, SEEK_SET) != 0 || fread(raw, 1, (size_t)bytes, f) != (size_t)bytes)
        fail("read", "the image ended too early");
    for (int i = 0; i < bytes; i++)
        value = value << 8 | raw[i];
    return value;
}

static void put_cluster(FILE *f, uint64_t at, const void *data, size_t bytes)
{
    static unsigned char cluster[CLUSTER];
    memset(cluster, 0, sizeof(cluster));
    memcpy(cluster, data, bytes);
    if (fseek(f, (long)at, SEEK_SET) != 0 || fwrite(cluster, 1, CLUSTER, f) != CLUSTER)
        fail("write", strerror(errno));
}

/*
 * A disk of 1 MiB in a qcow2 image of version 3 with clusters of 64 KiB:
 *
 *   cluster   0        1                2                3         4         5
 *             header | refcount table | refcount block | L1 table | L2 table | data
 */
static void make_image(const char *text)
{
    FILE *f = fopen(image, "w+b");
    if (!f)
        fail(image, strerror(errno));
    for (unsigned i = 0; i < 6; i++)
        put_cluster(f, i * CLUSTER, "", 0);
    put(f, 0, 4, 0x514649fb);              /* "QFI\xfb" */
    put(f, 4, 4, 3);                       /* version */
    put(f, 20, 4, 16);                     /* cluster bits */
    put(f, 24, 8, 1 << 20);                /* disk size */
    put(f, 36, 4, 1);                      /* entries of the L1 table */
    put(f, 40, 8, 3 * CLUSTER);            /* L1 table */
    put(f, 48, 8, 1 * CLUSTER);            /* refcount table */
    put(f, 56, 4, 1);                      /* clusters of the refcount table */
    put(f, 96, 4, 4);                      /* refcounts of 1 << 4 bits */
    put(f, 100, 4, 104);                   /* length of the header */
    put(f, 1 * CLUSTER, 8, 2 * CLUSTER);
    for (unsigned i = 0; i < 6; i++)
        put(f, 2 * CLUSTER + 2 * i, 2, 1);
    put(f, 3 * CLUSTER, 8, 4 * CLUSTER | COPIED);
    put(f, 4 * CLUSTER, 8, 5 * CLUSTER | COPIED);
    put_cluster(f, 5 * CLUSTER, text, strlen(text));
    if (fclose(f) != 0)
        fail(image, strerror(errno));
    printf("Made the image %s; its disk begins with \"%s\".\n", image, text);
}

static void add_to_refcount(FILE *f, uint64_t cluster_at, int addend)
{
    uint64_t at = 2 * CLUSTER + 2 * (cluster_at / CLUSTER);
    put(f, at, 2, get(f, at, 2) + (uint64_t)addend);
}

/*
 * The guest writes the first cluster of its disk. A snapshot shares it (the COPIED flags are
 * clear), so the write goes to a copy: of the data, and of the L2 table that leads there.
 */
static void guest_writes(const char *text)
{
    FILE *f = fopen(image, "r+b");
    if (!f || fseek(f, 0, SEEK_END) != 0)
        fail(image, strerror(errno));
    uint64_t l1 = get(f, 40, 8);
    uint64_t old_l2 = get(f, l1, 8);
    if (old_l2 & COPIED)
        fail("guest", "the disk is not shared with a snapshot");
    uint64_t old_data = get(f, old_l2, 8);
    fseek(f, 0, SEEK_END);
    uint64_t new_l2 = ((uint64_t)ftell(f) + CLUSTER - 1) / CLUSTER * CLUSTER;
    uint64_t new_data = new_l2 + CLUSTER;
    put_cluster(f, new_l2, "", 0);         /* no other cluster of this disk has data */
    put_cluster(f, new_data, text, strlen(text));
    add_to_refcount(f, new_l2, 1);
    add_to_refcount(f, new_data, 1);
    put(f, new_l2, 8, new_data | COPIED);
    put(f, l1, 8, new_l2 | COPIED);
    add_to_refcount(f, old_l2, -1);
    add_to_refcount(f, old_data, -1);
    if (fclose(f) != 0)
        fail(image, strerror(errno));
    printf("\nThe guest writes \"%s\" over it.\n", text);
}

/* ---- the library ------------------------------------------------------------------------ */

static BlockDriverState *open_image(int flags)
{
    BlockDriverState *bs;
    Error *err = NULL;
    if (qcow2_open(image, flags, &bs, &err) < 0)
        fail("open", qcow2_error_get_pretty(err));
    return bs;
}

static void close_image(BlockDriverState *bs)
{
    int ret = qcow2_close(bs);
    if (ret < 0)
        fail("close", strerror(-ret));
}

static void expect_disk(BlockDriverState *bs, const char *text)
{
    char seen[64];
    Error *err = NULL;
    if (qcow2_pread(bs, 0, seen, sizeof(seen), &err) < 0)
        fail("read the disk", qcow2_error_get_pretty(err));
    seen[sizeof(seen) - 1] = '\0';
    printf("  The disk begins with \"%s\".\n", seen);
    if (strcmp(seen, text) != 0)
        fail("the disk should begin with", text);
}

static void create(const char *name)
{
    BlockDriverState *bs = open_image(QCOW2_O_RDWR);
    QEMUSnapshotInfo sn = {.date_sec = (uint32_t)time(NULL), .icount = UINT64_MAX};
    snprintf(sn.name, sizeof(sn.name), "%s", name);
    if (qcow2_snapshot_create(bs, &sn) < 0)
        fail("create", qcow2_last_error(bs));
    printf("Created the snapshot \"%s\"; its ID is %s.\n", name, sn.id_str);
    close_image(bs);
}

static void expect_list(BlockDriverState *bs, int expected)
{
    QEMUSnapshotInfo *sn;
    int n = qcow2_snapshot_list(bs, &sn);
    if (n < 0)
        fail("list", qcow2_last_error(bs));
    printf("  The image holds %d snapshot%s:\n", n, n == 1 ? "" : "s");
    for (int i = 0; i < n; i++) {
        char date[32];
        time_t when = sn[i].date_sec;
        strftime(date, sizeof(date), "%Y-%m-%d %H:%M:%S", localtime(&when));
        printf("    ID %s, \"%s\", of %s\n", sn[i].id_str, sn[i].name, date);
    }
    qcow2_snapshot_list_free(sn);
    if (n != expected)
        fail("list", "this is not the number of snapshots that were made");
}

int main(int argc, char **argv)
{
    BlockDriverState *bs, *second;
    Error *err = NULL;

    if (argc != 2) {
        fprintf(stderr, "usage: %s SCRATCH-IMAGE (it will be overwritten)\n", argv[0]);
        return 1;
    }
    image = argv[1];
    printf("libqcow2_snapshot %s\n\n", qcow2_version());

    make_image("Monday: a first draft");
    create("monday");
    guest_writes("Tuesday: much better");
    create("tuesday");
    guest_writes("Wednesday: what have I done");

    printf("\nOpen the image read-only.\n");
    bs = open_image(0);
    expect_list(bs, 2);
    expect_disk(bs, "Wednesday: what have I done");
    printf("Look at \"monday\" through this handle (load_tmp); the image stays as it is.\n");
    if (qcow2_snapshot_load_tmp(bs, NULL, "monday", &err) < 0)
        fail("load_tmp", qcow2_error_get_pretty(err));
    expect_disk(bs, "Monday: a first draft");
    close_image(bs);

    printf("\nOpen the image read-write and revert to \"tuesday\" (goto).\n");
    bs = open_image(QCOW2_O_RDWR);
    expect_disk(bs, "Wednesday: what have I done");
    if (qcow2_snapshot_goto(bs, "tuesday") < 0)
        fail("goto", qcow2_last_error(bs));
    expect_disk(bs, "Tuesday: much better");

    printf("Delete \"monday\".\n");
    if (qcow2_snapshot_delete(bs, NULL, "monday", &err) < 0)
        fail("delete", qcow2_error_get_pretty(err));
    expect_list(bs, 1);
    expect_disk(bs, "Tuesday: much better");

    printf("\nErrors come as QEMU's errno and words. Delete \"monday\" again:\n");
    if (qcow2_snapshot_delete(bs, NULL, "monday", &err) != -ENOENT)
        fail("delete", "a snapshot that is gone should be -ENOENT");
    printf("  %s\n", qcow2_error_get_pretty(err));
    qcow2_error_free(err);
    err = NULL;

    printf("Open the image a second time while it is open here:\n");
    if (qcow2_open(image, QCOW2_O_RDWR, &second, &err) != -EAGAIN)
        fail("open", "an image in use should be -EAGAIN");
    printf("  %s\n", qcow2_error_get_pretty(err));
    qcow2_error_free(err);
    close_image(bs);

    printf("\nAll as it should be. If you have QEMU's tools: qemu-img check %s\n", image);
    return 0;
}
