/* SPDX-License-Identifier: MIT */
/* snapshot_layout: what the table has of each snapshot, in full length; NULLs and ends refused. */
#include "harness.h"

int main(void)
{
    Qcow2Image *bs = must_open(fixture("names/after-1"), 0);
    Bytes image = reference("names/after-1");
    Qcow2SnapshotLayout at;
    Qcow2Error *err = NULL;
    Entry e;
    uint32_t i;

    for (i = 0; table_entry(image, i, &e); i++) {
        CHECK_RET(qcow2_snapshot_layout(bs, i, &at, &err), 0);
        CHECK(strlen(at.id) == e.id.len && !memcmp(at.id, e.id.data, e.id.len));
        CHECK(strlen(at.name) == e.name.len && !memcmp(at.name, e.name.data, e.name.len));
        CHECK_U64(at.l1_table_offset, e.l1_offset);
        CHECK_U64(at.l1_size, e.l1_size);
        CHECK_U64(at.disk_size, e.disk_size);
        CHECK_U64(at.vm_state_size, e.vm_state_size);
        CHECK_U64(at.extra_data_size, e.extra_size);
        CHECK((at.unknown_extra_data != NULL) == (e.extra_size > 24));
        if (at.unknown_extra_data)
            CHECK(!memcmp(at.unknown_extra_data, e.extra.data + 24, e.extra_size - 24));
    }
    CHECK(i > 0);
    CHECK_RET(qcow2_snapshot_layout(bs, i, &at, &err), -ENOENT);
    CHECK(at.id == NULL && strstr(take_message(&err), "index"));
    CHECK_RET(qcow2_snapshot_layout(bs, 0, NULL, NULL), -EINVAL);
    CHECK_RET(qcow2_snapshot_layout(NULL, 0, &at, NULL), -EINVAL);
    qcow2_free_snapshots(bs);
    CHECK_RET(qcow2_snapshot_layout(bs, 0, &at, NULL), -ENOENT);
    CHECK_RET(qcow2_close(bs), 0);
    drop(&image);
    return done();
}
