/* SPDX-License-Identifier: MIT */
/* Whatever the names in an image hold, a message is one line that no terminal obeys. */
#include "harness.h"

/* Newlines, an escape sequence, C1 controls, the line ends of Unicode, and what is not UTF-8. */
static const char evil[] = "\n\x1b[2J\r\t\x7f\xff\xc2\x85\xe2\x80\xa8\xe2\x80\xae" "e";

static void is_one_line(const char *text)
{
    CHECK(text && strstr(text, "\\n\\x1b[2J\\r\\t\\x7f\\xff\\u{85}\\u{2028}\\u{202e}e"));
    for (const char *at = text; *at; at++) {
        CHECK(*at >= 0x20 && *at < 0x7f);
    }
}

int main(void)
{
    Bytes image;
    Qcow2Error *err = NULL;
    Qcow2Image *bs;
    Qcow2SnapshotInfo sn = named("x");
    char buf[512];

    /* The name of a backing file. */
    image = reference("backing-raw/before");
    uint64_t name = be(image, 8, 8), room = be(image, 16, 4);
    CHECK(name && room);
    put_be(image, 16, 4, sizeof(evil) - 1);
    memcpy(image.data + name, evil, sizeof(evil) - 1);
    spew("image.qcow2", image);
    bs = must_open("image.qcow2", 0);
    for (int64_t at = 0; !err && at < qcow2_getlength(bs); at += 512) {
        qcow2_pread(bs, at, buf, sizeof(buf), &err);
    }
    is_one_line(qcow2_last_error(bs));
    is_one_line(qcow2_error_get_pretty(err));
    qcow2_error_free(err);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&image);

    /* An ID, and a path. */
    bs = must_open(fixture("v3-4k/before"), QCOW2_O_RDWR);
    snprintf(sn.id_str, sizeof(sn.id_str), "%s", evil);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), 0);
    CHECK_RET(qcow2_snapshot_create(bs, &sn), -EEXIST);
    is_one_line(qcow2_last_error(bs));
    CHECK_RET(qcow2_close(bs), 0);
    err = NULL;
    CHECK_RET(qcow2_open(evil, 0, &bs, &err), -ENOENT);
    is_one_line(qcow2_error_get_pretty(err));
    qcow2_error_free(err);
    return done();
}
