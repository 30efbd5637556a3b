/* SPDX-License-Identifier: MIT */
/* In a process with functions of the same names (QEMU's own, say) the library calls its own. */
#include <dlfcn.h>

#include "harness.h"

/*
 * The program's functions with the library's names. The dynamic linker finds these first for
 * everybody who asks by name; this program itself asks the library, by dlsym().
 */
static int intruders;

#define INTRUDER(name) \
    int own_##name(void) __asm__("qcow2_" #name); \
    int own_##name(void) { intruders++; return -ENOSYS; }

INTRUDER(version)
INTRUDER(open)
INTRUDER(open_fd)
INTRUDER(open_io)
INTRUDER(close)
INTRUDER(read_snapshots)
INTRUDER(free_snapshots)
INTRUDER(write_snapshots)
INTRUDER(snapshot_create)
INTRUDER(snapshot_goto)
INTRUDER(snapshot_delete)
INTRUDER(snapshot_list)
INTRUDER(snapshot_list_free)
INTRUDER(snapshot_load_tmp)
INTRUDER(getlength)
INTRUDER(pread)
INTRUDER(block_status)
INTRUDER(load_vmstate)
INTRUDER(error_get_pretty)
INTRUDER(error_free)
INTRUDER(last_error)
INTRUDER(last_outcome)
INTRUDER(set_progress)

static void *lib;

static void *find(const char *name)
{
    void *fn = dlsym(lib, name), *own = dlsym(RTLD_DEFAULT, name);

    if (!fn || !own || fn == own)
        fail_at(__FILE__, __LINE__, "%s: the library's and the program's are not two", name);
    return fn;
}

/* A pointer of the type of the function in the header, to the library's. */
#define LIB(name) __typeof__(&name) lib_##name; void *at_##name = find(#name); \
    memcpy(&lib_##name, &at_##name, sizeof(at_##name))

int main(void)
{
    Qcow2SnapshotInfo sn = {.name = "mine", .icount = UINT64_MAX}, *tab;
    Qcow2Error *err = NULL;
    Qcow2Extent extent;
    Qcow2Image *bs;
    char buf[512];
    int n, fd;

    lib = dlopen("libqcow2_snapshot.so.0", RTLD_NOW | RTLD_GLOBAL);
    CHECK(lib);
    LIB(qcow2_version);
    LIB(qcow2_open);
    LIB(qcow2_open_fd);
    LIB(qcow2_open_io);
    LIB(qcow2_close);
    LIB(qcow2_read_snapshots);
    LIB(qcow2_free_snapshots);
    LIB(qcow2_write_snapshots);
    LIB(qcow2_snapshot_create);
    LIB(qcow2_snapshot_goto);
    LIB(qcow2_snapshot_delete);
    LIB(qcow2_snapshot_list);
    LIB(qcow2_snapshot_list_free);
    LIB(qcow2_snapshot_load_tmp);
    LIB(qcow2_getlength);
    LIB(qcow2_pread);
    LIB(qcow2_block_status);
    LIB(qcow2_load_vmstate);
    LIB(qcow2_error_get_pretty);
    LIB(qcow2_error_free);
    LIB(qcow2_last_error);
    LIB(qcow2_last_outcome);
    LIB(qcow2_set_progress);

    CHECK_STR(lib_qcow2_version(), QCOW2_SNAPSHOT_VERSION);
    CHECK_RET(lib_qcow2_open(fixture("v3-4k/before"), QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(lib_qcow2_set_progress(bs, NULL, NULL), 0);
    CHECK_RET(lib_qcow2_snapshot_create(bs, &sn), 0);
    n = lib_qcow2_snapshot_list(bs, &tab);
    CHECK(n > 0);
    lib_qcow2_snapshot_list_free(tab);
    CHECK_RET(lib_qcow2_snapshot_goto(bs, "mine"), 0);
    CHECK_RET(lib_qcow2_write_snapshots(bs), 0);
    CHECK_RET(lib_qcow2_last_outcome(bs), QCOW2_OUTCOME_DONE);
    lib_qcow2_free_snapshots(bs);
    CHECK_RET(lib_qcow2_read_snapshots(bs), 0);
    CHECK_RET(lib_qcow2_snapshot_goto(bs, "no such"), -ENOENT);
    CHECK(lib_qcow2_last_error(bs));
    CHECK_RET(lib_qcow2_snapshot_delete(bs, NULL, "no such", &err), -ENOENT);
    CHECK(lib_qcow2_error_get_pretty(err)[0]);
    lib_qcow2_error_free(err);
    err = NULL;
    CHECK_RET(lib_qcow2_close(bs), 0);

    fd = open("image.qcow2", O_RDONLY);
    CHECK(fd >= 0);
    CHECK_RET(lib_qcow2_open_fd(fd, 0, &bs, NULL), 0);
    CHECK_RET(lib_qcow2_snapshot_load_tmp(bs, NULL, "mine", NULL), 0);
    CHECK(lib_qcow2_getlength(bs) > 0);
    CHECK_RET(lib_qcow2_pread(bs, 0, buf, sizeof(buf), NULL), 0);
    CHECK_RET(lib_qcow2_block_status(bs, 0, INT64_MAX, &extent, NULL), 0);
    CHECK_RET(lib_qcow2_load_vmstate(bs, 0, buf, sizeof(buf), NULL), 0);
    CHECK_RET(lib_qcow2_close(bs), 0);
    close(fd);

    CHECK_RET(lib_qcow2_open_io(NULL, NULL, 0, &bs, &err), -EINVAL);
    lib_qcow2_error_free(err);
    err = NULL;
    CHECK_RET(lib_qcow2_open("image.qcow2", QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(lib_qcow2_snapshot_delete(bs, NULL, "mine", NULL), 0);
    CHECK_RET(lib_qcow2_close(bs), 0);

    CHECK_U64((uint64_t)intruders, 0);
    return done();
}
