/* SPDX-License-Identifier: MIT */
/* Messages are English whatever setlocale() was told: the C library is not asked for words. */
#include "memory_io.h"

/* What a C library in another language says. -rdynamic: the library would find these first. */
int foreign_strerror_r(int errnum, char *buf, size_t n) __asm__("__xpg_strerror_r");
int foreign_strerror_r(int errnum, char *buf, size_t n)
{
    snprintf(buf, n, "Fehler %d", errnum);
    return 0;
}

int main(void)
{
    static const struct { int errnum; const char *words; } cases[] = {
        {EIO, "Input/output error"}, {EPERM, "Operation not permitted"}, {ESTALE, "Stale file handle"},
        {EDQUOT, "Disk quota exceeded"}, {ETIMEDOUT, "Connection timed out"}, {4000, "Unknown error 4000"},
    };
    Qcow2Error *err = NULL;
    Qcow2Image *bs;

    CHECK_RET(qcow2_open("no such file", 0, &bs, &err), -ENOENT);
    CHECK_STR(qcow2_error_get_pretty(err), "Could not open 'no such file': No such file or directory");
    qcow2_error_free(err);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        MemoryIo io = {.b = reference("v3-4k/before"), .fail_at = 1, .fail_with = cases[i].errnum};

        err = NULL;
        CHECK_RET(qcow2_open_io(&memory_ops, &io, 0, &bs, &err), -cases[i].errnum);
        CHECK(strstr(qcow2_error_get_pretty(err), cases[i].words));
        qcow2_error_free(err);
        drop(&io.b);
    }
    return done();
}
