/* SPDX-License-Identifier: MIT */
/* What cannot be asked of next_change is an errno with words, and clears the answer. */
#include "harness.h"

static void check_refused(Qcow2Image *bs, const char *from, const char *to, int64_t offset, int64_t bytes, int flags,
                          int want, const char *words)
{
    Qcow2Error *err = NULL;
    Qcow2Change c;

    memset(&c, 0x55, sizeof(c));
    CHECK_RET(qcow2_snapshot_next_change(bs, from, to, offset, bytes, flags, &c, &err), want);
    CHECK_U64(c.start | c.length | c.from_flags | c.to_flags, 0);
    CHECK(strstr(take_message(&err), words));
    CHECK_RET(qcow2_snapshot_next_change(bs, from, to, offset, bytes, flags, &c, NULL), want);
    CHECK(has_words(bs));
}

int main(void)
{
    Qcow2Image *bs = must_open(fixture("v3-4k/after-1"), 0);
    Qcow2Change c;

    check_refused(bs, "gone", NULL, 0, 1, 0, -ENOENT, "gone");
    check_refused(bs, NULL, "gone", 0, 1, 0, -ENOENT, "gone");
    check_refused(bs, "", NULL, 0, 1, 0, -ENOENT, "snapshot");
    check_refused(bs, NULL, NULL, -1, 1, 0, -EINVAL, "-1");
    check_refused(bs, NULL, NULL, 0, -1, 0, -EINVAL, "-1");
    check_refused(bs, NULL, NULL, 0, 1, 2, -EINVAL, "flags");
    CHECK_RET(qcow2_snapshot_next_change(bs, NULL, NULL, 0, INT64_MAX, 0, &c, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);

    bs = must_open(fixture("encrypted-luks/after-1"), 0);
    check_refused(bs, NULL, NULL, 0, 1, QCOW2_CHANGE_COMPARE, -ENOTSUP, "ncrypted");
    CHECK_RET(qcow2_snapshot_next_change(bs, "1", NULL, 0, INT64_MAX, 0, &c, NULL), 0);
    CHECK_RET(qcow2_close(bs), 0);
    return done();
}
