/* SPDX-License-Identifier: MIT */
/* qcow2_api: one table by one dlsym(), each member is the function of that name and does its work. */
#include "harness.h"
#include <dlfcn.h>

#define SAME(name) CHECK((void *)(uintptr_t)api->name == dlsym(library, "qcow2_" #name))

int main(void)
{
    void *library = dlopen("libqcow2_snapshot.so.0", RTLD_NOW | RTLD_LOCAL);
    const Qcow2Api *(*get)(void), *api;
    void *const *members;
    Qcow2Image *bs;
    Qcow2SnapshotInfo sn = named("by the table"), *tab;

    CHECK(library != NULL);
    *(void **)&get = dlsym(library, "qcow2_api");
    CHECK(get != NULL);
    api = get();
    CHECK_U64(api->size, sizeof(Qcow2Api));
    members = (void *const *)api;
    for (size_t i = 1; i < api->size / sizeof(void *); i++)
        CHECK(members[i] != NULL);
    SAME(version); SAME(open_io); SAME(snapshot_create); SAME(snapshot_list_free); SAME(reload); SAME(last_outcome);
    SAME(api);

    CHECK_RET(api->open(fixture("v3-4k/before"), QCOW2_O_RDWR, &bs, NULL), 0);
    CHECK_RET(api->snapshot_create(bs, &sn), 0);
    CHECK_RET(api->snapshot_list(bs, &tab), 4);
    CHECK_STR(tab[3].name, "by the table");
    api->snapshot_list_free(tab);
    CHECK_RET(api->close(bs), 0);
    return done();
}
