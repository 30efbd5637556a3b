/* SPDX-License-Identifier: MIT */
/* examples/export-snapshot.c writes over no file: not over its image, under whatever name, and not over another. */
#include "harness.h"

#define main export_main
#include "../examples/export-snapshot.c"
#undef main

int main(void)
{
    char image[256], link[] = "hard-link", other[] = "other";
    char *to[] = { image, link, other };
    Bytes before, after;

    snprintf(image, sizeof(image), "%s", fixture("v3-4k/before"));
    before = slurp(image);
    CHECK_RET(shell("ln '%s' hard-link && echo mine > other", image), 0);
    for (int i = 0; i < 3; i++) {
        char *argv[] = { "export-snapshot", image, "one", to[i], NULL };

        CHECK_RET(export_main(4, argv), 1);
        after = slurp(image);
        CHECK(same(before, after));
        drop(&after);
    }
    after = slurp(other);
    CHECK(after.len == 5);
    drop(&after);
    drop(&before);
    return done();
}
