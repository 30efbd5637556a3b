/* SPDX-License-Identifier: MIT */
/*
 * What every C test shares: claims, scratch files, reference images.
 *
 * A test is one program and one claim. It runs in an empty scratch folder of its own
 * and prints one line: `ok NAME`, `SKIP NAME: why` or `FAIL NAME: where: what`.
 * Reference images come from c-tests/images (see make-images there).
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <qcow2_snapshot.h>

/* ---- claims ---------------------------------------------------------------------- */

extern const char *test_name;

#define CHECK(cond) \
    do { if (!(cond)) fail_at(__FILE__, __LINE__, "%s", #cond); } while (0)

/* A return value: 0, a count, or -errno, which is spelled out. */
#define CHECK_RET(call, want) check_ret_at(__FILE__, __LINE__, #call, (call), (want))
#define CHECK_STR(got, want) check_str_at(__FILE__, __LINE__, #got, (got), (want))
#define CHECK_U64(got, want) check_u64_at(__FILE__, __LINE__, #got, (got), (want))

void fail_at(const char *file, int line, const char *fmt, ...)
    __attribute__((noreturn, format(printf, 3, 4)));
void check_ret_at(const char *file, int line, const char *what, long long got, long long want);
void check_str_at(const char *file, int line, const char *what, const char *got, const char *want);
void check_u64_at(const char *file, int line, const char *what, uint64_t got, uint64_t want);

/* The claim cannot be tested here: say aloud what was not tested. */
void skip(const char *fmt, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* The last line of main(): return done(); */
int done(void);

/* ---- bytes and files ------------------------------------------------------------- */

typedef struct Bytes {
    unsigned char *data;
    size_t len;
} Bytes;

Bytes slurp(const char *path);
void spew(const char *path, Bytes b);
void drop(Bytes *b);
bool same(Bytes a, Bytes b);
uint64_t be(Bytes b, uint64_t offset, int size);      /* big endian; zeros past the end */
void put_be(Bytes b, uint64_t offset, int size, uint64_t value);

/* A reference image, "CASE/before" or "CASE/after-N": its bytes, or as a scratch file. */
Bytes reference(const char *which);
const char *fixture(const char *which);               /* makes ./image.qcow2 */

/* Fail with a readable, decoded difference unless the file has exactly these bytes. */
#define CHECK_FILE(path, want) check_file_at(__FILE__, __LINE__, (path), (want))
void check_file_at(const char *file, int line, const char *path, Bytes want);

/* ---- the snapshot table, decoded independently of the library -------------------- */

typedef struct Entry {
    uint64_t l1_offset, vm_clock_nsec, vm_state_size, disk_size, icount;
    uint32_t l1_size, date_sec, date_nsec, extra_size;
    Bytes extra, id, name;                            /* point into the image */
} Entry;

uint32_t table_count(Bytes image);
bool table_entry(Bytes image, uint32_t index, Entry *out);   /* false: not there */

/* ---- handles --------------------------------------------------------------------- */

/* Open or fail the test with the library's message. Not macros: never the 2014 struct. */
Qcow2Image *must_open(const char *path, int flags);
/* The message of an error that must be there; frees it. The text lives until the next call. */
const char *take_message(Qcow2Error **err);
/* The last failure of a call without errp is explained. */
bool has_words(Qcow2Image *bs);

/* QEMUSnapshotInfo with a name and a fixed date; inline so that it is this file's struct. */
static inline Qcow2SnapshotInfo named(const char *name)
{
    Qcow2SnapshotInfo sn;
    memset(&sn, 0, sizeof(sn));
    snprintf(sn.name, sizeof(sn.name), "%s", name);
    sn.date_sec = 1399420800;
    sn.date_nsec = 123456000;
    return sn;
}

/* ---- other programs -------------------------------------------------------------- */

bool have(const char *tool);
void need(const char *tool);                          /* skip the test without it */
int shell(const char *fmt, ...) __attribute__((format(printf, 1, 2)));   /* exit status; quiet */

#endif
