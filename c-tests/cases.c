/* SPDX-License-Identifier: MIT */
#include "cases.h"

#include <dirent.h>
#include <sys/wait.h>

#include "harness.h"

/* ---- the lines of an ops file (described in images/make-images) ------------------- */

typedef enum { CREATE, GOTO, DELETE, WRITE, LIST, OPEN_RW, OPEN_RO } Verb;

typedef struct Op {
    int line;
    Verb verb;
    char *arg;                     /* name, or the count of `list` */
    Qcow2SnapshotInfo sn;          /* of create */
    int fails, later;              /* errno, or 0 */
    const char *says;              /* part of the message of the failure */
} Op;

static const struct { const char *word; Verb verb; } verbs[] = {
    { "create", CREATE }, { "goto", GOTO }, { "delete", DELETE }, { "write-snapshots", WRITE },
    { "list", LIST }, { "open-rw", OPEN_RW }, { "open-ro", OPEN_RO },
};

static const struct { const char *word; int number; } errnos[] = {
    { "EINVAL", EINVAL }, { "EFBIG", EFBIG }, { "ENOTSUP", ENOTSUP }, { "EBUSY", EBUSY },
    { "EACCES", EACCES }, { "EIO", EIO }, { "ENOENT", ENOENT },
};

static int errno_of(const char *word)
{
    for (size_t i = 0; word && i < sizeof(errnos) / sizeof(errnos[0]); i++) {
        if (strcmp(word, errnos[i].word) == 0) {
            return errnos[i].number;
        }
    }
    fail_at(__FILE__, __LINE__, "ops: no such errno: %s", word ? word : "(none)");
}

/* %XX and "" of a name, in place. */
static char *unescape(char *s)
{
    char *out = s;

    if (strcmp(s, "\"\"") == 0) {
        *s = 0;
    }
    for (char *in = s; *in; in++) {
        char hex[3] = { in[0] == '%' ? in[1] : 0, in[0] == '%' ? in[2] : 0, 0 };

        *out++ = *hex ? (char)strtol(hex, NULL, 16) : *in;
        in += *hex ? 2 : 0;
    }
    *out = 0;
    return s;
}

static void parse_create(Op *op, char **save)
{
    char *word = strtok_r(NULL, " ", save);

    op->sn = named(op->arg);
    op->sn.date_sec = (uint32_t)strtoul(word, NULL, 10);
    op->sn.date_nsec = (uint32_t)strtoul(strtok_r(NULL, " ", save), NULL, 10);
    while ((word = strtok_r(NULL, " ", save))) {
        uint64_t n = strtoull(strchr(word, '=') + 1, NULL, 10);

        if (strncmp(word, "vm_state_size=", 14) == 0) {
            op->sn.vm_state_size = n;
        } else if (strncmp(word, "vm_clock_nsec=", 14) == 0) {
            op->sn.vm_clock_nsec = n;
        } else {
            op->sn.icount = n;
        }
    }
}

static bool parse(char *line, Op *op)
{
    char *save, *word = strtok_r(line, " ", &save);

    if (strcmp(word, "fails") == 0 || strcmp(word, "later") == 0) {
        int *where = *word == 'f' ? &op->fails : &op->later;

        *where = errno_of(strtok_r(NULL, " ", &save));
        word = strtok_r(NULL, " ", &save);
    }
    for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
        if (strcmp(word, verbs[i].word) == 0) {
            op->verb = verbs[i].verb;
            op->arg = strtok_r(NULL, " ", &save);
            if (op->arg) {
                unescape(op->arg);
            }
            if (op->verb == CREATE) {
                parse_create(op, &save);
            }
            return true;
        }
    }
    return false;
}

/* ---- one case --------------------------------------------------------------------- */

typedef struct Run {
    const char *name;
    Qcow2Image *bs;
    Bytes now;                     /* what the file must hold */
    int step;                      /* changes done */
    char message[1024];            /* of the last failure */
} Run;

static void take_error(Run *run, Qcow2Error **err, int ret)
{
    if ((ret < 0) != (*err != NULL)) {
        fail_at(__FILE__, __LINE__, "%d returned, but errp is %sset", ret, *err ? "" : "not ");
    }
    if (*err) {
        snprintf(run->message, sizeof(run->message), "%s", take_message(err));
    }
}

static int reopen(Run *run, int flags)
{
    Qcow2Error *err = NULL;
    int ret;

    CHECK_RET(qcow2_close(run->bs), 0);
    run->bs = NULL;
    ret = qcow2_open("image.qcow2", flags, &run->bs, &err);
    take_error(run, &err, ret);
    CHECK((ret == 0) == (run->bs != NULL));
    return ret;
}

/* The list as the library tells it is the table as the file has it. */
static int list(Run *run)
{
    Qcow2SnapshotInfo *tab = NULL;
    int n = qcow2_snapshot_list(run->bs, &tab);

    if (n < 0) {
        CHECK(!tab);
        return n;
    }
    CHECK_RET(n, table_count(run->now));
    CHECK((n == 0) == (tab == NULL));
    for (int i = 0; i < n; i++) {
        char id[128] = "", name[256] = "";
        Entry e;

        CHECK(table_entry(run->now, (uint32_t)i, &e));
        snprintf(id, sizeof(id), "%.*s", (int)e.id.len, (char *)e.id.data);
        snprintf(name, sizeof(name), "%.*s", (int)e.name.len, (char *)e.name.data);
        CHECK_STR(tab[i].id_str, id);
        CHECK_STR(tab[i].name, name);
        CHECK_U64(tab[i].vm_state_size, e.vm_state_size);
        CHECK_U64(tab[i].date_sec, e.date_sec);
        CHECK_U64(tab[i].date_nsec, e.date_nsec);
        CHECK_U64(tab[i].vm_clock_nsec, e.vm_clock_nsec);
        CHECK_U64(tab[i].icount, e.icount);
    }
    qcow2_snapshot_list_free(tab);
    return n;
}

static int perform(Run *run, Op *op)
{
    Qcow2Error *err = NULL;
    int ret;

    switch (op->verb) {
    case CREATE:
        ret = qcow2_snapshot_create(run->bs, &op->sn);
        break;
    case GOTO:
        ret = qcow2_snapshot_goto(run->bs, op->arg);
        break;
    case DELETE:
        ret = qcow2_snapshot_delete(run->bs, NULL, op->arg, &err);
        take_error(run, &err, ret);
        return ret;
    case WRITE:
        ret = qcow2_write_snapshots(run->bs);
        break;
    case LIST:
        ret = list(run);
        break;
    default:
        return reopen(run, op->verb == OPEN_RW ? QCOW2_O_RDWR : 0);
    }
    if (ret < 0) {
        CHECK(has_words(run->bs));
        snprintf(run->message, sizeof(run->message), "%s", qcow2_last_error(run->bs));
    }
    return ret;
}

static void check_step(Run *run, Op *op)
{
    char which[512];

    snprintf(which, sizeof(which), "%s/after-%d", run->name, ++run->step);
    drop(&run->now);
    run->now = reference(which);
    check_file_at("ops", op->line, "image.qcow2", run->now);
    if (op->verb == CREATE) {
        Entry e;

        /* The ID that was chosen is written back. */
        CHECK(table_entry(run->now, table_count(run->now) - 1, &e));
        CHECK(strlen(op->sn.id_str) == e.id.len && memcmp(op->sn.id_str, e.id.data, e.id.len) == 0);
    }
    CHECK_RET(list(run), table_count(run->now));
}

static void do_op(Run *run, Op *op, bool chain)
{
    bool opens = op->verb == OPEN_RW || op->verb == OPEN_RO;
    int ret;

    if (!run->bs && !opens) {
        ret = reopen(run, op->verb == LIST && !chain ? 0 : QCOW2_O_RDWR);
        if (ret < 0) {
            fail_at("ops", op->line, "open: %d: %s", ret, run->message);
        }
    }
    ret = perform(run, op);
    if (op->later && ret == -op->later) {
        check_file_at("ops", op->line, "image.qcow2", run->now);
        qcow2_close(run->bs);
        drop(&run->now);
        skip("refused for now, the file untouched: %s", run->message);
    }
    if (op->fails) {
        check_ret_at("ops", op->line, "the return value", ret, -op->fails);
        if (op->says && !strcasestr(run->message, op->says)) {
            fail_at("ops", op->line, "the message says \"%s\", not \"%s\"", run->message, op->says);
        }
        check_file_at("ops", op->line, "image.qcow2", run->now);
    } else if (ret < 0) {
        fail_at("ops", op->line, "-%s: %s", strerrorname_np(-ret), run->message);
    } else if (op->verb == LIST) {
        check_ret_at("ops", op->line, "the count", ret, atoi(op->arg));
    } else if (!opens) {
        check_step(run, op);
    }
    if (!chain && !opens) {
        CHECK_RET(qcow2_close(run->bs), 0);
        run->bs = NULL;
        check_file_at("ops", op->line, "image.qcow2", run->now);   /* close writes nothing */
    }
}

/* Backing and data files of the case. */
static void companions(const char *images, const char *name)
{
    if (shell("cd '%s/%s' && for f in *.gz; do case $f in before.*|after-*) ;; *) gzip -dc $f > \"$OLDPWD/${f%%.gz}\" ;; esac; done",
              images, name)) {
        fail_at(__FILE__, __LINE__, "cannot unpack the files beside %s", name);
    }
}

static void replay(const char *images, const char *name, bool chain)
{
    Run run = { .name = name };
    char path[4600], *line, *rest;
    Op op = { .line = 0 };
    Bytes ops;
    int number = 0;

    snprintf(path, sizeof(path), "%s/before", name);
    run.now = reference(path);
    spew("image.qcow2", run.now);
    companions(images, name);
    snprintf(path, sizeof(path), "%s/%s/ops", images, name);
    ops = slurp(path);
    CHECK(ops.len > 0 && ops.data[ops.len - 1] == '\n');
    ops.data[ops.len - 1] = 0;

    rest = (char *)ops.data;
    while ((line = strsep(&rest, "\n"))) {
        memset(&op, 0, sizeof(op));
        op.line = ++number;
        if (!parse(line, &op)) {
            fail_at("ops", number, "not an operation: %s", line);
        }
        if (rest && strncmp(rest, "says ", 5) == 0) {
            op.says = strsep(&rest, "\n") + 5;
            number++;
        }
        do_op(&run, &op, chain);
    }
    CHECK_RET(qcow2_close(run.bs), 0);
    check_file_at("close", 0, "image.qcow2", run.now);
    drop(&run.now);
    drop(&ops);
}

/* ---- all cases -------------------------------------------------------------------- */

/* A process for each case: a crash or an endless loop costs one case only. */
static int replay_child(const char *images, const char *name, bool chain)
{
    static char label[512];
    int status;
    pid_t pid = fork();

    if (pid == 0) {
        snprintf(label, sizeof(label), "%s %s", test_name, name);
        test_name = label;
        alarm(300);
        if (mkdir(name, 0755) || chdir(name)) {
            fail_at(__FILE__, __LINE__, "mkdir: %s", strerror(errno));
        }
        replay(images, name, chain);
        exit(done());
    }
    waitpid(pid, &status, 0);
    if (shell("rm -rf '%s'", name)) {
        fail_at(__FILE__, __LINE__, "cannot remove %s", name);
    }
    if (WIFSIGNALED(status)) {
        printf("FAIL %s %s: signal %d\n", test_name, name, WTERMSIG(status));
    } else if (WEXITSTATUS(status) > 1 && WEXITSTATUS(status) != 77) {
        printf("FAIL %s %s: exit status %d (valgrind?)\n", test_name, name, WEXITSTATUS(status));
    }
    return WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 77) ? 0 : 1;
}

static int is_case(const struct dirent *d)
{
    return d->d_name[0] != '.' && d->d_type != DT_REG;
}

int replay_main(int argc, char **argv, bool chain)
{
    const char *images = getenv("IMAGES");
    struct dirent **found = NULL;
    int n, bad = 0;

    CHECK(images);
    for (int i = 1; i < argc; i++) {
        bad |= replay_child(images, argv[i], chain);
    }
    if (argc > 1) {
        return bad;
    }
    n = scandir(images, &found, is_case, alphasort);
    CHECK(n > 0);
    for (int i = 0; i < n; i++) {
        bad |= replay_child(images, found[i]->d_name, chain);
        free(found[i]);
    }
    free(found);
    return bad;
}
