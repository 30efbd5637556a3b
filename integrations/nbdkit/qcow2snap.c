/* SPDX-License-Identifier: MIT */
/*
 * nbdkit qcow2snap IMAGE: the snapshots inside a qcow2 image, each as an export of its own,
 * read-only. See nbdkit-qcow2snap-plugin.1.
 *
 * A handle of libqcow2_snapshot serves one thread at a time, and nbdkit calls from many: each
 * connection keeps the handles that are idle and opens one more when there is none, at most as
 * many as nbdkit has threads.
 */
#define NBDKIT_API_VERSION 2
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <nbdkit-plugin.h>
#include <qcow2_snapshot.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#define BY_ID "id:"

static char *image;             /* absolute: nbdkit changes its folder */
static const char *pinned;      /* snapshot=: the only export, whatever name is asked for */
static int flags;

struct idle {
    BlockDriverState *bs;
    struct idle *next;
};

struct connection {
    char *id;                   /* of the snapshot; NULL: the disk */
    int64_t size;
    uint32_t cluster_size;
    pthread_mutex_t lock;       /* for the list alone */
    struct idle *idle;
};

static int failed(int ret, const char *words)
{
    nbdkit_error("%s: %s", image, words ? words : strerror(-ret));
    nbdkit_set_error(-ret);
    return -1;
}

static int failed_with(int ret, Error *err)
{
    failed(ret, qcow2_error_get_pretty(err));
    qcow2_error_free(err);
    return -1;
}

static int config(const char *key, const char *value)
{
    int on;

    if (strcmp(key, "file") == 0) {
        free(image);
        return (image = nbdkit_absolute_path(value)) ? 0 : -1;
    }
    if (strcmp(key, "snapshot") == 0) {
        pinned = value;
        return 0;
    }
    if (strcmp(key, "share") == 0 || strcmp(key, "backing") == 0) {
        if ((on = nbdkit_parse_bool(value)) < 0)
            return -1;
        if (*key == 's')
            flags = on ? flags | QCOW2_O_FORCE_SHARE : flags & ~QCOW2_O_FORCE_SHARE;
        else
            flags = on ? flags & ~QCOW2_O_NO_BACKING : flags | QCOW2_O_NO_BACKING;
        return 0;
    }
    nbdkit_error("unknown parameter '%s'", key);
    return -1;
}

static int config_complete(void)
{
    if (image)
        return 0;
    nbdkit_error("you must give the image: nbdkit qcow2snap IMAGE");
    return -1;
}

static void unload(void)
{
    free(image);
}

/* The image, showing the snapshot with this ID; NULL after telling why not. */
static BlockDriverState *open_image(const char *id)
{
    BlockDriverState *bs;
    Error *err = NULL;
    int ret = qcow2_open(image, flags, &bs, &err);

    if (ret == 0 && id && (ret = qcow2_snapshot_load_tmp(bs, id, NULL, &err)) < 0)
        qcow2_close(bs);
    if (ret == 0)
        return bs;
    failed_with(ret, err);
    return NULL;
}

/* Which snapshot does an export stand for? *id: NULL for the disk, else to be freed. */
static int find_snapshot(BlockDriverState *bs, const char *export, char **id)
{
    const char *by_id = strncmp(export, BY_ID, strlen(BY_ID)) ? NULL : export + strlen(BY_ID);
    Qcow2SnapshotLayout s;
    size_t i;

    *id = NULL;
    if (*export == 0)
        return 0;
    for (i = 0; !*id && by_id && qcow2_snapshot_layout(bs, i, &s, NULL) == 0; i++)
        if (strcmp(s.id, by_id) == 0)
            *id = strdup(s.id);
    for (i = 0; !*id && qcow2_snapshot_layout(bs, i, &s, NULL) == 0; i++)
        if (strcmp(s.name, export) == 0)
            *id = strdup(s.id);
    if (*id)
        return 0;
    nbdkit_error("%s: no snapshot has the name '%s' (by ID: '" BY_ID "N')", image, export);
    nbdkit_set_error(ENOENT);
    return -1;
}

/* The name under which a snapshot is offered: its own where that leads to it, else its ID. */
static char *export_of(BlockDriverState *bs, size_t index)
{
    Qcow2SnapshotLayout s, other;
    char *name = NULL;
    bool plain;
    size_t i;

    if (qcow2_snapshot_layout(bs, index, &s, NULL) < 0)
        return NULL;
    plain = *s.name && strncmp(s.name, BY_ID, strlen(BY_ID)) != 0;
    for (i = 0; plain && i < index && qcow2_snapshot_layout(bs, i, &other, NULL) == 0; i++)
        plain = strcmp(other.name, s.name) != 0;
    if (asprintf(&name, "%s%s", plain ? "" : BY_ID, plain ? s.name : s.id) < 0)
        return NULL;
    return name;
}

static int list_exports(int readonly, int is_tls, struct nbdkit_exports *exports)
{
    BlockDriverState *bs;
    Qcow2SnapshotLayout s;
    char what[128];
    int ret = 0;
    size_t i;

    (void)readonly, (void)is_tls;
    if (pinned)
        return nbdkit_add_export(exports, pinned, NULL);
    if (!(bs = open_image(NULL)))
        return -1;
    ret = nbdkit_add_export(exports, "", "the disk as it is now");
    for (i = 0; ret == 0 && qcow2_snapshot_layout(bs, i, &s, NULL) == 0; i++) {
        char *name = export_of(bs, i);

        snprintf(what, sizeof(what), "snapshot %.64s, %" PRIu64 " bytes", s.id, s.disk_size);
        ret = name ? nbdkit_add_export(exports, name, what) : failed(-ENOMEM, NULL);
        free(name);
    }
    qcow2_close(bs);
    return ret;
}

static const char *default_export(int readonly, int is_tls)
{
    (void)readonly, (void)is_tls;
    return pinned ? pinned : "";
}

static void give_back(struct connection *c, BlockDriverState *bs)
{
    struct idle *one = malloc(sizeof(*one));

    if (!one) {
        qcow2_close(bs);
        return;
    }
    one->bs = bs;
    pthread_mutex_lock(&c->lock);
    one->next = c->idle, c->idle = one;
    pthread_mutex_unlock(&c->lock);
}

static BlockDriverState *take(struct connection *c)
{
    BlockDriverState *bs = NULL;
    struct idle *one;

    pthread_mutex_lock(&c->lock);
    if ((one = c->idle))
        c->idle = one->next;
    pthread_mutex_unlock(&c->lock);
    if (one)
        bs = one->bs;
    free(one);
    return bs ? bs : open_image(c->id);
}

static void close_connection(void *handle)
{
    struct connection *c = handle;
    struct idle *one;

    while ((one = c->idle)) {
        c->idle = one->next;
        qcow2_close(one->bs);
        free(one);
    }
    pthread_mutex_destroy(&c->lock);
    free(c->id);
    free(c);
}

static void *open_connection(int readonly)
{
    const char *export = pinned ? pinned : nbdkit_export_name();
    struct connection *c = calloc(1, sizeof(*c));
    Qcow2ImageLayout layout;
    BlockDriverState *bs;

    (void)readonly;
    if (!c || !export)
        return free(c), failed(-ENOMEM, NULL), NULL;
    pthread_mutex_init(&c->lock, NULL);
    if ((bs = open_image(NULL)) && find_snapshot(bs, export, &c->id) == 0) {
        /* The handle that found it cannot go back to the disk, but shows a snapshot at once. */
        Error *err = NULL;
        int ret = c->id ? qcow2_snapshot_load_tmp(bs, c->id, NULL, &err) : 0;

        if (ret == 0 && (ret = qcow2_image_layout(bs, &layout)) == 0) {
            c->cluster_size = 1u << layout.cluster_bits;
            c->size = qcow2_getlength(bs);
            give_back(c, bs);
            return c;
        }
        failed_with(ret, err);
    }
    qcow2_close(bs);
    close_connection(c);
    return NULL;
}

static int64_t get_size(void *handle)
{
    return ((struct connection *)handle)->size;
}

static int block_size(void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
    uint32_t cluster = ((struct connection *)handle)->cluster_size;

    *minimum = 1, *maximum = 32 << 20;
    *preferred = cluster < 512 ? 512 : cluster;
    return 0;
}

static int can_multi_conn(void *handle)
{
    (void)handle;
    return 1;                   /* read-only */
}

static int pread_snapshot(void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t nbd_flags)
{
    BlockDriverState *bs = take(handle);
    Error *err = NULL;
    int ret;

    (void)nbd_flags;
    if (!bs)
        return -1;
    ret = qcow2_pread(bs, (int64_t)offset, buf, count, &err);
    give_back(handle, bs);
    return ret < 0 ? failed_with(ret, err) : 0;
}

static int extents(void *handle, uint32_t count, uint64_t offset, uint32_t nbd_flags,
                   struct nbdkit_extents *found)
{
    uint64_t end = offset + count;
    BlockDriverState *bs = take(handle);
    Error *err = NULL;
    Qcow2Extent e;
    int ret = 0;

    if (!bs)
        return -1;
    while (offset < end) {
        uint32_t type;

        if ((ret = qcow2_block_status(bs, (int64_t)offset, (int64_t)(end - offset), &e, &err)) < 0)
            break;
        if (e.length == 0)
            break;
        type = (e.flags & QCOW2_BLOCK_DATA ? 0 : NBDKIT_EXTENT_HOLE)
             | (e.flags & QCOW2_BLOCK_ZERO ? NBDKIT_EXTENT_ZERO : 0);
        if ((ret = nbdkit_add_extent(found, offset, e.length, type)) < 0)
            break;
        if (nbd_flags & NBDKIT_FLAG_REQ_ONE)
            break;
        offset += e.length;
    }
    give_back(handle, bs);
    return err ? failed_with(ret, err) : ret;
}

static struct nbdkit_plugin plugin = {
    .name = "qcow2snap",
    .longname = "snapshots inside a qcow2 image",
    .version = QCOW2_SNAPSHOT_VERSION,
    .description = "Each internal snapshot of a qcow2 image is an export, read-only.",
    .config = config,
    .config_complete = config_complete,
    .config_help = "[file=]<IMAGE>     (required) The qcow2 image.\n"
                   "snapshot=<NAME>    Serve this snapshot only (a name, or id:N).\n"
                   "share=true         Read beside a running guest; what it writes may be torn.\n"
                   "backing=false      Never open a backing file.",
    .magic_config_key = "file",
    .unload = unload,
    .list_exports = list_exports,
    .default_export = default_export,
    .open = open_connection,
    .close = close_connection,
    .get_size = get_size,
    .block_size = block_size,
    .can_multi_conn = can_multi_conn,
    .pread = pread_snapshot,
    .extents = extents,
    .errno_is_preserved = 0,
};

NBDKIT_REGISTER_PLUGIN(plugin)
