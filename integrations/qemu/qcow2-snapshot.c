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
    Coroutine *holder;                  /* has the lock of QEMU's driver for this call */
    bool wrote, published;              /* anything; what the verb is for: what comes now frees */
} Call;

/* The library's I/O is the node below. */
#define BS(call) (((Call *)(call))->bs)
#define IO(type) static type GRAPH_RDLOCK
IO(int) io_pread(void *o, uint64_t at, void *buf, size_t n) { return bdrv_pread(BS(o)->file, at, n, buf, 0); }
IO(int) io_pwrite(void *o, uint64_t at, const void *buf, size_t n) { return bdrv_pwrite(BS(o)->file, at, n, buf, 0); }
IO(int) io_flush(void *o) { return bdrv_flush(BS(o)->file->bs); }
IO(int) io_truncate(void *o, uint64_t n) { return bdrv_truncate(BS(o)->file, n, false, PREALLOC_MODE_OFF, 0, NULL); }
IO(int) io_discard_kind(void *o, uint64_t at, uint64_t n, int kind)     /* as pass-discard-snapshot says */
{
    bool pass = ((BDRVQcow2State *)BS(o)->opaque)->discard_passthrough[QCOW2_DISCARD_SNAPSHOT];
    return pass || kind != QCOW2_DISCARD_KIND_SNAPSHOT ? bdrv_pdiscard(BS(o)->file, at, n) : 0;
}
IO(int64_t) io_getlength(void *o) { return bdrv_getlength(BS(o)->file->bs); }
IO(int64_t) io_backing_length(void *o) { return BS(o)->backing ? bdrv_getlength(BS(o)->backing->bs) : 0; }

/* blkdebug's events: those of QEMU's that are most like the library's. */
static void GRAPH_RDLOCK io_event(void *o, const char *label)
{
    Call *call = o;
    call->wrote = true;
    if (call->published && strcmp(label, "barrier"))
        BLKDBG_EVENT(BS(o)->file, BLKDBG_CLUSTER_FREE);
    call->published |= !strcmp(label, "header") || !strcmp(label, "L1 table");
    BLKDBG_EVENT(BS(o)->file, !strcmp(label, "L1 table") ? BLKDBG_L1_UPDATE : !strcmp(label, "L2 table") ?
                 BLKDBG_L2_UPDATE : BLKDBG_REFBLOCK_UPDATE_PART);
}

static const Qcow2IoOps io = {
    .size = sizeof(io), .pread = io_pread, .pwrite = io_pwrite, .flush = io_flush, .getlength = io_getlength,
    .truncate = io_truncate, .event = io_event, .backing_length = io_backing_length, .discard_kind = io_discard_kind,
};

/* A request looks at tables under s->lock, then goes on by what it saw. So a call waits until none is under way and has
 * the lock to its end: QEMU drains the node, but not an NBD client that connects then. Only a coroutine can have it. */
static void coroutine_fn hold(void *opaque)
{
    Call *call = opaque;
    BDRVQcow2State *s = call->bs->opaque;
    while (qemu_co_mutex_lock(&s->lock), qatomic_read(&call->bs->in_flight)) {
        qemu_co_mutex_unlock(&s->lock);
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, 100 * SCALE_US);
    }
    call->holder = qemu_coroutine_self();
    qemu_coroutine_yield();
    qemu_co_mutex_unlock(&s->lock);
}

static int done(Call *call, int ret, Error **errp)
{
    if (ret < 0 && errp && !*errp)
        error_setg(errp, "%s", api->last_error(call->image));
    api->close(call->image);
    if (call->holder)
        qemu_coroutine_enter(call->holder);
    return ret;
}

/* A guest's write that has failed may have reached the file: QEMU's memory has what was there before. */
static bool as_in_memory(Call *call)
{
    BDRVQcow2State *s = call->bs->opaque;
    Qcow2ImageLayout image;
    return !api->image_layout(call->image, &image) && image.l1_table_offset == s->l1_table_offset &&
           image.refcount_table_offset == s->refcount_table_offset && image.l1_size == s->l1_size &&
           image.refcount_table_clusters << (s->cluster_bits - 3) >= s->refcount_table_size &&
           !memcmp(image.l1_table, s->l1_table, s->l1_size * 8) &&
           !memcmp(image.refcount_table, s->refcount_table, s->refcount_table_size * 8);
}

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
    *call = (Call) { .bs = bs };
    if (!qemu_in_coroutine()) {         /* in one (open, check) QEMU has the lock */
        qemu_coroutine_enter(qemu_coroutine_create(hold, call));
        AIO_WAIT_WHILE_UNLOCKED(NULL, !call->holder);
    }
    /* Before a change: what QEMU's caches hold goes to the file, and they forget it. */
    if (flags & QCOW2_O_RDWR)
        ret = qcow2_cache_empty(bs, s->l2_table_cache) ?: qcow2_cache_empty(bs, s->refcount_block_cache);
    /* So lazy refcounts are right in the file. The guest's next write sets the bit again. */
    if (!ret && flags == QCOW2_O_RDWR && (s->incompatible_features & QCOW2_INCOMPAT_DIRTY))
        s->incompatible_features &= ~QCOW2_INCOMPAT_DIRTY, ret = qcow2_update_header(bs);
    if (ret < 0)
        error_setg_errno(errp, -ret, "Could not write back the tables in memory");
    else if ((ret = api->open_io(&io, call, flags, &call->image, &err)) < 0)
        error_setg(errp, "%s", api->error_get_pretty(err));
    else if (flags == QCOW2_O_RDWR && !as_in_memory(call))
        error_setg(errp, "A write has failed: tables in the file are not those in memory"), ret = -EIO;
    api->error_free(err);
    return ret < 0 ? done(call, ret, NULL) : ret;
}

/* QEMU's memory becomes what the library knows, in what the verb has changed and in `what`. */
static int take(Call *call, uint32_t what)
{
    BDRVQcow2State *s = call->bs->opaque;
    Qcow2SnapshotInfo *tab = NULL;
    Qcow2SnapshotLayout at;
    Qcow2ImageLayout image;
    int n = 0, ret = api->image_layout(call->image, &image);
    what = ret < 0 ? 0 : what | image.changed;
    if (what & QCOW2_CHANGED_SNAPSHOTS) {
        qcow2_free_snapshots(call->bs);
        ret = n = api->snapshot_list(call->image, &tab);
        s->snapshots = g_new0(QCowSnapshot, MAX(n, 0));
        s->snapshots_offset = image.snapshots_offset;
        s->snapshots_size = image.snapshots_size;
    }
    for (int i = 0; i < n && !(ret = api->snapshot_layout(call->image, i, &at, NULL)); i++)
        s->snapshots[s->nb_snapshots++] = (QCowSnapshot) {
            .l1_table_offset = at.l1_table_offset, .l1_size = at.l1_size, .id_str = g_strdup(at.id),
            .name = g_strdup(at.name), .disk_size = at.disk_size, .vm_state_size = at.vm_state_size,
            .date_sec = tab[i].date_sec, .date_nsec = tab[i].date_nsec, .icount = tab[i].icount,
            .vm_clock_nsec = tab[i].vm_clock_nsec, .extra_data_size = at.extra_data_size,
            .unknown_extra_data = g_memdup2(at.unknown_extra_data, MAX(at.extra_data_size, 24) - 24),
        };
    api->snapshot_list_free(tab);
    if (what & QCOW2_CHANGED_L1) {
        qemu_vfree(s->l1_table);
        s->l1_table_offset = image.l1_table_offset;
        s->l1_size = image.l1_size;
        s->l1_table = qemu_blockalign(call->bs->file->bs, s->l1_size * L1E_SIZE);
        memcpy(s->l1_table, image.l1_table, s->l1_size * L1E_SIZE);
    }
    if (what & QCOW2_CHANGED_SIZE) {
        call->bs->total_sectors = image.size / BDRV_SECTOR_SIZE;
        s->l1_vm_state_index = size_to_l1(s, image.size);
    }
    if (what & QCOW2_CHANGED_REFTABLE) {
        g_free(s->refcount_table);
        s->refcount_table_offset = image.refcount_table_offset;
        s->refcount_table_size = image.refcount_table_clusters << (s->cluster_bits - 3);
        s->refcount_table = g_memdup2(image.refcount_table, s->refcount_table_size * 8);
        s->max_refcount_table_index = 0;
        for (uint32_t i = 0; i < s->refcount_table_size; i++)
            s->max_refcount_table_index = s->refcount_table[i] ? i : s->max_refcount_table_index;
    }
    s->free_cluster_index = s->free_byte_offset = 0;    /* where QEMU looks first: others are free now */
    return ret;
}

/* After a change. One that failed halfway may have left other flags and counts: QEMU goes on by what is in the file. */
static int GRAPH_RDLOCK end(Call *call, int ret, Error **errp)
{
    Call again = { .bs = call->bs };
    int left = ret >= 0 ? take(call, 0) : 0;
    if (ret < 0 && call->wrote && (left = api->open_io(&io, &again, QCOW2_O_CHECK, &again.image, NULL)) >= 0)
        left = take(&again, ~0);
    api->close(again.image);
    if (left < 0)
        error_report("The image has to be opened again: its state is not known"), call->bs->drv = NULL;
    return done(call, ret < 0 ? ret : left, errp);
}

/* A change: `expr` calls the library. */
#define CHANGE(bs, errp, expr) ({ Call call; int ret_ = begin(&call, bs, QCOW2_O_RDWR, errp); \
                                  ret_ < 0 ? ret_ : end(&call, expr, errp); })

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
    return done(&call, take(&call, QCOW2_CHANGED_SNAPSHOTS), errp);
}

int coroutine_fn qcow2_check_fix_snapshot_table(BlockDriverState *bs, BdrvCheckResult *r, BdrvCheckMode f) { return 0; }
int qcow2_write_snapshots(BlockDriverState *bs) { return CHANGE(bs, NULL, api->write_snapshots(call.image)); }

static void tell(void *opaque, const char *finding) { fprintf(stderr, "%s\n", finding); }
/* A table that is wrong is mended with the whole image, in the library's order: QEMU's check then finds it good. */
int coroutine_fn qcow2_check_read_snapshot_table(BlockDriverState *bs, BdrvCheckResult *result, BdrvCheckMode fix)
{
    bool mend = fix & BDRV_FIX_ERRORS;
    Qcow2CheckResult found = { 0 };
    Call call;
    int ret = begin(&call, bs, QCOW2_O_CHECK | (mend ? QCOW2_O_RDWR : 0), NULL);
    if (ret >= 0) {
        ret = api->check(call.image, QCOW2_CHECK_TABLE_ONLY, &found, mend ? NULL : tell, NULL, NULL);
        if (mend && (found.corruptions || ret == -EFBIG))
            ret = api->check(call.image, (int)fix, &found, tell, NULL, NULL) ?: found.check_errors ? -EIO : 0;
        ret = ret < 0 ? end(&call, ret, NULL) : done(&call, take(&call, QCOW2_CHANGED_SNAPSHOTS), NULL);
    }
    result->corruptions += found.corruptions;
    result->corruptions_fixed += found.corruptions_fixed;
    result->leaks_fixed += found.leaks_fixed;
    result->check_errors += ret < 0;
    return ret;
}

int qcow2_snapshot_create(BlockDriverState *bs, QEMUSnapshotInfo *sn)
{
    return CHANGE(bs, NULL, api->snapshot_create(call.image, (Qcow2SnapshotInfo *)sn));
}

int qcow2_snapshot_goto(BlockDriverState *bs, const char *snapshot_id)
{
    BDRVQcow2State *s = bs->opaque;
    QCowSnapshot *sn = NULL, *at = s->snapshots;
    BlockBackend *blk = NULL;
    Error *err = NULL;
    int ret;
    for (; at < s->snapshots + s->nb_snapshots && !(sn && !strcmp(sn->id_str, snapshot_id)); at++)
        if (!strcmp(at->id_str, snapshot_id) || (!sn && !strcmp(at->name, snapshot_id)))
            sn = at;                    /* the first of that ID, or of that name */
    if (!sn)
        return -ENOENT;
    if (sn->disk_size != bs->total_sectors * BDRV_SECTOR_SIZE)      /* may it be resized? */
        blk = blk_new_with_bs(bs, BLK_PERM_RESIZE, BLK_PERM_ALL, &err);
    ret = err ? -ENOTSUP : CHANGE(bs, &err, api->snapshot_goto(call.image, snapshot_id));
    if (ret >= 0 && blk)                /* to the size that it has: this tells the users of the node */
        ret = blk_truncate(blk, bs->total_sectors * BDRV_SECTOR_SIZE, true, PREALLOC_MODE_OFF, 0, &err);
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
    return end(&call, ret, errp);
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
    Call call;
    int ret = begin(&call, bs, 0, errp);
    if (ret < 0)
        return ret;
    ret = api->snapshot_load_tmp(call.image, snapshot_id, name, NULL) ?: take(&call, QCOW2_CHANGED_L1);
    return done(&call, ret, errp);
}
