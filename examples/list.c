#include <stdio.h>
#include <qcow2_snapshot.h>                     // cc list.c -lqcow2_snapshot

int main(int argc, char **argv)
{
    BlockDriverState *bs;
    QEMUSnapshotInfo *sn;
    Error *err = NULL;

    if (qcow2_open(argc > 1 ? argv[1] : "", 0, &bs, &err) < 0)
        return fprintf(stderr, "%s\n", qcow2_error_get_pretty(err)), 1;
    int n = qcow2_snapshot_list(bs, &sn);
    for (int i = 0; i < n; i++)
        printf("%s\t%s\n", sn[i].id_str, sn[i].name);
    qcow2_snapshot_list_free(sn);
    return qcow2_close(bs) < 0 || n < 0;
}
