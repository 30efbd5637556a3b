/* SPDX-License-Identifier: MIT */
/* The library unloads after dlclose. */
#include <dlfcn.h>

#include "harness.h"

/* This program is linked with the library and so keeps it; a copy under another name is not. */
int main(void)
{
    Dl_info info;
    void *lib, *fn;
    int (*open_image)(const char *, int, Qcow2Image **, Qcow2Error **);
    int (*close_image)(Qcow2Image *);
    int (*read_image)(Qcow2Image *, int64_t, void *, size_t, Qcow2Error **);
    static char whole[4 << 20];
    Qcow2Image *bs = NULL;

    need("qemu-img");
    CHECK(dladdr((void *)(uintptr_t)qcow2_version, &info));
    CHECK(shell("cp '%s' ./copy.so", info.dli_fname) == 0);
    lib = dlopen("./copy.so", RTLD_NOW | RTLD_LOCAL);
    CHECK(lib);
    fn = dlsym(lib, "qcow2_open");
    memcpy(&open_image, &fn, sizeof(fn));
    fn = dlsym(lib, "qcow2_close");
    memcpy(&close_image, &fn, sizeof(fn));
    fn = dlsym(lib, "qcow2_pread");
    memcpy(&read_image, &fn, sizeof(fn));
    CHECK(open_image && close_image && read_image);
    CHECK_RET(open_image(fixture("v3-4k/before"), QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(close_image(bs), 0);
    /* Helper threads unpack this. */
    CHECK_RET(shell("head -c 4M /dev/zero | tr '\\0' x > x.raw && qemu-img convert -c -O qcow2 x.raw x.qcow2"), 0);
    CHECK_RET(open_image("x.qcow2", 0, &bs, NULL), 0);
    CHECK_RET(read_image(bs, 0, whole, sizeof(whole), NULL), 0);
    CHECK(whole[sizeof(whole) - 1] == 'x');
    CHECK_RET(close_image(bs), 0);
    CHECK_RET(dlclose(lib), 0);
    CHECK(!dlopen("./copy.so", RTLD_NOW | RTLD_NOLOAD));
    return done();
}
