/* SPDX-License-Identifier: MIT */
/* QEMU's block/qcow2-snapshot.c, by libqcow2_snapshot. README.md says how, and what was compared. */
#include "qemu/osdep.h"
#include <dlfcn.h>
#include "system/block-backend.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/memalign.h"
#include "qcow2.h"
#define QCOW2_SNAPSHOT_NO_QEMU_NAMES
#define QCOW2_SNAPSHOT_NO_PROTOTYPES
#include <qcow2_snapshot.h>

QEMU_BUILD_BUG_ON(sizeof(QEMUSnapshotInfo) != sizeof(Qcow2SnapshotInfo));
static const Qcow2Api *api;

typedef struct Call {                   /* a handle of the library, for one call from QEMU */
    BlockDriverState *bs;
    Qcow2Image *image;
    bool published;                     /* what the verb is for has been written: what comes now frees */
} Call;

/* The library's I/O is the node below. */
#define BELOW(call) (((Call *)(call))->bs->file)
#define IO static int GRAPH_RDLOCK
IO io_pread(void *o, uint64_t at, void *buf, size_t n) { return bdrv_pread(BELOW(o), at, n, buf, 0); }
IO io_pwrite(void *o, uint64_t at, const void *buf, size_t n) { return bdrv_pwrite(BELOW(o), at, n, buf, 0); }
IO io_flush(void *o) { return bdrv_flush(BELOW(o)->bs); }
IO io_truncate(void *o, uint64_t n) { return bdrv_truncate(BELOW(o), n, false, PREALLOC_MODE_OFF, 0, NULL); }
IO io_discard_kind(void *o, uint64_t at, uint64_t n, int kind)     /* as pass-discard-snapshot says */
{
    bool pass = ((BDRVQcow2State *)((Call *)o)->bs->opaque)->discard_passthrough[QCOW2_DISCARD_SNAPSHOT];
    return pass || kind != QCOW2_DISCARD_KIND_SNAPSHOT ? bdrv_pdiscard(BELOW(o), at, n) : 0;
}
static int64_t GRAPH_RDLOCK io_getlength(void *o) { return bdrv_getlength(BELOW(o)->bs); }
/* QEMU may have been told to do without a backing node: then nothing shows through. */
#define BACKING(call) (((Call *)(call))->bs->backing)
static int64_t GRAPH_RDLOCK io_backing_length(void *o) { return BACKING(o) ? bdrv_getlength(BACKING(o)->bs) : 0; }

/* blkdebug's events: those of QEMU's that are most like the library's. */
static void GRAPH_RDLOCK io_event(void *o, const char *label)
{
    Call *call = o;
    if (call->published && strcmp(label, "barrier"))
        BLKDBG_EVENT(BELOW(o), BLKDBG_CLUSTER_FREE);
    call->published |= !strcmp(label, "header") || !strcmp(label, "L1 table");
    BLKDBG_EVENT(BELOW(o), !strcmp(label, "L1 table") ? BLKDBG_L1_UPDATE : !strcmp(label, "L2 table") ?
                 BLKDBG_L2_UPDATE : BLKDBG_REFBLOCK_UPDATE_PART);
}

static const Qcow2IoOps io = {
    .size = sizeof(io), .pread = io_pread, .pwrite = io_pwrite, .flush = io_flush, .getlength = io_getlength,
    .truncate = io_truncate, .event = io_event, .backing_length = io_backing_length, .discard_kind = io_discard_kind,
};

static int GRAPH_RDLOCK begin(Call *call, BlockDriverState *bs, int flags, Error **errp)
{
    BDRVQcow2State *s = bs->opaque;
    void *so = api ? NULL : dlopen("libqcow2_snapshot.so.0", RTLD_NOW | RTLD_LOCAL);
    const Qcow2Api *(*get)(void) = so ? dlsym(so, "qcow2_api") : NULL;
    Qcow2Error *err = NULL;
    int ret = 0;
    if (get && get()->size >= endof(Qcow2Api, check))
        api = get();
    if (!api)
        return error_setg(errp, "No libqcow2_snapshot 0.2: %s", so ? "it is older" : dlerror()), -ENOTSUP;
    /* Before a change: what QEMU's caches hold goes to the file, and they forget it. */
    if (flags & QCOW2_O_RDWR)
        ret = qcow2_cache_empty(bs, s->l2_table_cache) ?: qcow2_cache_empty(bs, s->refcount_block_cache);
    /* So lazy refcounts are right in the file. The guest's next write sets the bit again. */
    if (!ret && flags == QCOW2_O_RDWR && (s->incompatible_features & QCOW2_INCOMPAT_DIRTY)) {
        s->incompatible_features &= ~QCOW2_INCOMPAT_DIRTY;
        ret = qcow2_update_header(bs);
    }
    if (ret < 0)
        return error_setg_errno(errp, -ret, "Could not write back the tables in memory"), ret;
    *call = (Call) { .bs = bs };
    if ((ret = api->open_io(&io, call, flags, &call->image, &err)) < 0)
        error_setg(errp, "%s", api->error_get_pretty(err));
    api->error_free(err);
    return ret;
}

static int take_snapshots(Call *call)
{
    BDRVQcow2State *s = call->bs->opaque;
    Qcow2ImageLayout image;
    Qcow2SnapshotLayout at;
    Qcow2SnapshotInfo *tab = NULL;
    int ret = api->image_layout(call->image, &image);
    int n = ret < 0 ? ret : api->snapshot_list(call->image, &tab);
    qcow2_free_snapshots(call->bs);
    s->snapshots = g_new0(QCowSnapshot, MAX(n, 0));
    s->snapshots_offset = n < 0 ? 0 : image.snapshots_offset;
    s->snapshots_size = n < 0 ? 0 : image.snapshots_size;
    for (int i = 0; i < n && !(ret = api->snapshot_layout(call->image, i, &at, NULL)); i++) {
        s->snapshots[s->nb_snapshots++] = (QCowSnapshot) {
            .l1_table_offset = at.l1_table_offset, .l1_size = at.l1_size, .id_str = g_strdup(at.id),
            .name = g_strdup(at.name), .disk_size = at.disk_size, .vm_state_size = at.vm_state_size,
            .date_sec = tab[i].date_sec, .date_nsec = tab[i].date_nsec, .icount = tab[i].icount,
            .vm_clock_nsec = tab[i].vm_clock_nsec, .extra_data_size = at.extra_data_size,
            .unknown_extra_data = g_memdup2(at.unknown_extra_data, MAX(at.extra_data_size, 24) - 24),
        };
    }
    api->snapshot_list_free(tab);
    return n < 0 ? n : ret;
}

/* A table of the file, in the byte order of the host. */
static uint64_t * GRAPH_RDLOCK read_table(BlockDriverState *bs, uint64_t offset, uint32_t entries, int *ret)
{
    uint64_t *table = g_new0(uint64_t, entries);
    *ret = bdrv_pread(bs->file, offset, entries * 8LL, table, 0);
    for (uint32_t i = 0; i < entries; i++)
        be64_to_cpus(&table[i]);
    return table;
}

static void take_l1(BlockDriverState *bs, uint64_t offset, uint32_t entries, const uint64_t *words)
{
    BDRVQcow2State *s = bs->opaque;
    qemu_vfree(s->l1_table);
    s->l1_table = memcpy(qemu_blockalign(bs->file->bs, entries * L1E_SIZE), words, entries * L1E_SIZE);
    s->l1_table_offset = offset;
    s->l1_size = entries;
}

/* After a change QEMU's memory becomes what is in the file. If that is not known the node is dropped. */
static int GRAPH_RDLOCK end(Call *call, int ret)
{
    BDRVQcow2State *s = call->bs->opaque;
    Qcow2ImageLayout at;
    int left = api->image_layout(call->image, &at);
    if (at.changed & QCOW2_CHANGED_SNAPSHOTS)
        left = take_snapshots(call);
    if (at.changed & QCOW2_CHANGED_L1)
        take_l1(call->bs, at.l1_table_offset, at.l1_size, at.l1_table);
    if (at.changed & QCOW2_CHANGED_SIZE) {
        call->bs->total_sectors = at.size / BDRV_SECTOR_SIZE;
        s->l1_vm_state_index = size_to_l1(s, at.size);
    }
    if (left >= 0 && (at.changed & QCOW2_CHANGED_REFTABLE)) {
        g_free(s->refcount_table);
        s->refcount_table_offset = at.refcount_table_offset;
        s->refcount_table_size = at.refcount_table_clusters << (s->cluster_bits - 3);
        s->refcount_table = read_table(call->bs, s->refcount_table_offset, s->refcount_table_size, &left);
        s->max_refcount_table_index = 0;
        for (uint32_t i = 0; i < s->refcount_table_size; i++)
            s->max_refcount_table_index = s->refcount_table[i] ? i : s->max_refcount_table_index;
    }
    s->free_cluster_index = s->free_byte_offset = 0;    /* where QEMU looks first: others are free now */
    if (left < 0)
        error_report("The image has to be opened again: its state is not known"), call->bs->drv = NULL;
    api->close(call->image);
    return ret < 0 ? ret : left;
}

/* A change: `expr` calls the library. */
#define CHANGE(bs, expr) ({ Call call; int ret_ = begin(&call, bs, QCOW2_O_RDWR, NULL); \
                            ret_ < 0 ? ret_ : end(&call, expr); })

void qcow2_free_snapshots(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;
    for (int i = 0; i < s->nb_snapshots; i++)
        g_free(s->snapshots[i].id_str), g_free(s->snapshots[i].name), g_free(s->snapshots[i].unknown_extra_data);
    g_clear_pointer(&s->snapshots, g_free);
    s->nb_snapshots = 0;
}

/* s->nb_snapshots is what the header says; none is in memory yet. Dirty and corrupt images have a list, too. */
int coroutine_fn qcow2_read_snapshots(BlockDriverState *bs, Error **errp)
{
    BDRVQcow2State *s = bs->opaque;
    int ret = s->nb_snapshots;
    Call call;
    s->nb_snapshots = 0;
    if (!ret || (ret = begin(&call, bs, QCOW2_O_CHECK, errp)) < 0)
        return ret;
    if ((ret = take_snapshots(&call)) < 0)
        error_setg(errp, "%s", api->last_error(call.image));
    api->close(call.image);
    return ret;
}

int qcow2_write_snapshots(BlockDriverState *bs) { return CHANGE(bs, api->write_snapshots(call.image)); }

static void tell(void *opaque, const char *finding) { fprintf(stderr, "%s\n", finding); }

/* A table that is wrong is mended with the whole image, in the library's order: QEMU's check then finds it good. */
int coroutine_fn qcow2_check_read_snapshot_table(BlockDriverState *bs, BdrvCheckResult *result, BdrvCheckMode fix)
{
    bool mend = fix & BDRV_FIX_ERRORS;
    Qcow2CheckResult found = { 0 };
    Call call;
    int ret = begin(&call, bs, QCOW2_O_CHECK, NULL);
    if (ret >= 0) {
        if ((ret = api->check(call.image, QCOW2_CHECK_TABLE_ONLY, &found, mend ? NULL : tell, NULL, NULL)) >= 0)
            ret = take_snapshots(&call);
        api->close(call.image);
    }
    if (mend && (found.corruptions || ret == -EFBIG) &&
        (ret = begin(&call, bs, QCOW2_O_CHECK | QCOW2_O_RDWR, NULL)) >= 0)
        ret = end(&call, api->check(call.image, (int)fix, &found, tell, NULL, NULL));
    result->corruptions += found.corruptions;
    result->corruptions_fixed += found.corruptions_fixed;
    result->leaks_fixed += found.leaks_fixed;
    result->check_errors += ret < 0;
    return ret;
}

int coroutine_fn qcow2_check_fix_snapshot_table(BlockDriverState *bs, BdrvCheckResult *r, BdrvCheckMode f) { return 0; }

static QCowSnapshot *find(BDRVQcow2State *s, const char *id, const char *name)
{
    for (QCowSnapshot *sn = s->snapshots; sn < s->snapshots + s->nb_snapshots; sn++)
        if ((!id || !strcmp(sn->id_str, id)) && (!name || !strcmp(sn->name, name)))
            return sn;
    return NULL;
}

int qcow2_snapshot_create(BlockDriverState *bs, QEMUSnapshotInfo *sn)
{
    return CHANGE(bs, api->snapshot_create(call.image, (Qcow2SnapshotInfo *)sn));
}

int qcow2_snapshot_goto(BlockDriverState *bs, const char *snapshot_id)
{
    QCowSnapshot *sn = find(bs->opaque, snapshot_id, NULL) ?: find(bs->opaque, NULL, snapshot_id);
    int64_t size = sn ? sn->disk_size : 0;
    BlockBackend *blk = NULL;
    Error *err = NULL;
    Call call;
    int ret;
    if (!sn)
        return -ENOENT;
    if (size != bs->total_sectors * BDRV_SECTOR_SIZE)   /* may it be resized? */
        blk = blk_new_with_bs(bs, BLK_PERM_RESIZE, BLK_PERM_ALL, &err);
    ret = err ? -ENOTSUP : begin(&call, bs, QCOW2_O_RDWR, &err);
    if (ret >= 0) {
        if ((ret = api->snapshot_goto(call.image, snapshot_id)) < 0)
            error_setg(&err, "%s", api->last_error(call.image));
        ret = end(&call, ret);
    }
    if (ret >= 0 && blk)                /* to the size that it has: this tells the users of the node */
        ret = blk_truncate(blk, size, true, PREALLOC_MODE_OFF, 0, &err);
    blk_unref(blk);
    return err ? error_report_err(err), ret : ret;
}

int qcow2_snapshot_delete(BlockDriverState *bs, const char *snapshot_id, const char *name, Error **errp)
{
    Call call;
    int ret = begin(&call, bs, QCOW2_O_RDWR, errp);
    if (ret < 0)
        return ret;
    ret = api->snapshot_delete(call.image, snapshot_id, name, NULL);
    if (ret < 0 && api->last_outcome(call.image) == QCOW2_OUTCOME_DONE)     /* in the words of QEMU's tests */
        fprintf(stderr, "qcow2_free_clusters failed: %s\n", strerror(-ret)),
        error_setg_errno(errp, -ret, "Failed to free the cluster and L1 table");
    else if (ret < 0)
        error_setg(errp, "%s", api->last_error(call.image));
    return end(&call, ret);
}

int qcow2_snapshot_list(BlockDriverState *bs, QEMUSnapshotInfo **psn_tab)
{
    BDRVQcow2State *s = bs->opaque;
    *psn_tab = g_new0(QEMUSnapshotInfo, s->nb_snapshots);
    for (int i = 0; i < s->nb_snapshots; i++) {
        QCowSnapshot *sn = &s->snapshots[i];
        QEMUSnapshotInfo *info = &(*psn_tab)[i];
        *info = (QEMUSnapshotInfo) { .vm_state_size = sn->vm_state_size, .date_sec = sn->date_sec,
            .date_nsec = sn->date_nsec, .vm_clock_nsec = sn->vm_clock_nsec, .icount = sn->icount };
        pstrcpy(info->id_str, sizeof(info->id_str), sn->id_str);
        pstrcpy(info->name, sizeof(info->name), sn->name);
    }
    return has_data_file(bs) ? -ENOTSUP : s->nb_snapshots;
}

int qcow2_snapshot_load_tmp(BlockDriverState *bs, const char *snapshot_id, const char *name, Error **errp)
{
    QCowSnapshot *sn = find(bs->opaque, snapshot_id, name);
    g_autofree uint64_t *l1 = NULL;
    Call call;
    int ret = begin(&call, bs, 0, errp);
    if (ret < 0)
        return ret;
    if ((ret = api->snapshot_load_tmp(call.image, snapshot_id, name, NULL)) < 0)
        error_setg(errp, "%s", api->last_error(call.image));
    else
        l1 = read_table(bs, sn->l1_table_offset, sn->l1_size, &ret);
    if (l1 && ret < 0)
        error_setg_errno(errp, -ret, "Failed to read l1 table for snapshot");
    else if (l1)
        take_l1(bs, sn->l1_table_offset, sn->l1_size, l1);
    api->close(call.image);
    return ret;
}
