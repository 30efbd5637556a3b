/* SPDX-License-Identifier: MIT */
#include "harness.h"

#include <stdarg.h>
#include <sys/wait.h>

const char *test_name = "?";
static char home[4096];                   /* the scratch folder of this test */

/* Runs before main(): a name, and a folder of its own as the current one. */
__attribute__((constructor)) static void begin(void)
{
    const char *scratch = getenv("SCRATCH");

    test_name = program_invocation_short_name;
    setvbuf(stdout, NULL, _IOLBF, 0);
    snprintf(home, sizeof(home), "%s/%s.XXXXXX", scratch ? scratch : "/tmp", test_name);
    if (!mkdtemp(home) || chdir(home)) {
        perror(home);
        exit(1);
    }
}

/* ---- claims ---------------------------------------------------------------------- */

void fail_at(const char *file, int line, const char *fmt, ...)
{
    va_list ap;

    printf("FAIL %s: %s:%d: ", test_name, file, line);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    printf("\n");
    exit(1);
}

static const char *spelled(long long ret, char *buf, size_t size)
{
    if (ret < 0 && ret > -4096) {
        snprintf(buf, size, "%lld (-%s)", ret, strerrorname_np((int)-ret));
    } else {
        snprintf(buf, size, "%lld", ret);
    }
    return buf;
}

void check_ret_at(const char *file, int line, const char *what, long long got, long long want)
{
    char a[64], b[64];

    if (got != want) {
        fail_at(file, line, "%s is %s, not %s", what, spelled(got, a, sizeof(a)),
                spelled(want, b, sizeof(b)));
    }
}

void check_str_at(const char *file, int line, const char *what, const char *got, const char *want)
{
    if (!got || strcmp(got, want) != 0) {
        fail_at(file, line, "%s is \"%s\", not \"%s\"", what, got ? got : "(null)", want);
    }
}

void check_u64_at(const char *file, int line, const char *what, uint64_t got, uint64_t want)
{
    if (got != want) {
        fail_at(file, line, "%s is %#llx, not %#llx", what,
                (unsigned long long)got, (unsigned long long)want);
    }
}

void skip(const char *fmt, ...)
{
    va_list ap;

    printf("SKIP %s: ", test_name);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    printf("\n");
    exit(77);
}

int done(void)
{
    printf("ok %s\n", test_name);
    return 0;
}

/* ---- bytes and files ------------------------------------------------------------- */

static Bytes read_all(FILE *f, const char *what)
{
    Bytes b = { NULL, 0 };
    size_t room = 0, n;

    do {
        if (b.len == room) {
            room = room ? room * 2 : 65536;
            b.data = realloc(b.data, room);
            if (!b.data) {
                fail_at(__FILE__, __LINE__, "no memory for %s", what);
            }
        }
        n = fread(b.data + b.len, 1, room - b.len, f);
        b.len += n;
    } while (n > 0);
    return b;
}

Bytes slurp(const char *path)
{
    FILE *f = fopen(path, "rb");
    Bytes b;

    if (!f) {
        fail_at(__FILE__, __LINE__, "%s: %s", path, strerror(errno));
    }
    b = read_all(f, path);
    fclose(f);
    return b;
}

void spew(const char *path, Bytes b)
{
    static const unsigned char zeros[4096];
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);

    if (fd < 0 || ftruncate(fd, (off_t)b.len)) {
        fail_at(__FILE__, __LINE__, "%s: %s", path, strerror(errno));
    }
    for (size_t at = 0; at < b.len; at += sizeof(zeros)) {
        size_t n = b.len - at < sizeof(zeros) ? b.len - at : sizeof(zeros);

        /* Leave holes, as qemu-img does. */
        if (memcmp(b.data + at, zeros, n) && pwrite(fd, b.data + at, n, (off_t)at) != (ssize_t)n) {
            fail_at(__FILE__, __LINE__, "%s: %s", path, strerror(errno));
        }
    }
    close(fd);
}

void drop(Bytes *b)
{
    free(b->data);
    b->data = NULL;
    b->len = 0;
}

bool same(Bytes a, Bytes b)
{
    return a.len == b.len && (a.len == 0 || memcmp(a.data, b.data, a.len) == 0);
}

uint64_t be(Bytes b, uint64_t offset, int size)
{
    uint64_t v = 0;

    for (int i = 0; i < size; i++) {
        v = v << 8 | (offset + i < b.len ? b.data[offset + i] : 0);
    }
    return v;
}

void put_be(Bytes b, uint64_t offset, int size, uint64_t value)
{
    CHECK(offset + size <= b.len);
    for (int i = size - 1; i >= 0; i--, value >>= 8) {
        b.data[offset + i] = (unsigned char)value;
    }
}

Bytes reference(const char *which)
{
    const char *images = getenv("IMAGES");
    char command[4600];
    FILE *f;
    Bytes b;

    snprintf(command, sizeof(command), "exec gzip -dc '%s/%s.qcow2.gz'", images ? images : "images", which);
    f = popen(command, "r");
    if (!f) {
        fail_at(__FILE__, __LINE__, "cannot run gzip");
    }
    b = read_all(f, which);
    if (pclose(f) != 0) {
        fail_at(__FILE__, __LINE__, "no reference image %s", which);
    }
    return b;
}

const char *fixture(const char *which)
{
    Bytes b = reference(which);

    spew("image.qcow2", b);
    drop(&b);
    return "image.qcow2";
}

/* ---- the snapshot table ---------------------------------------------------------- */

uint32_t table_count(Bytes image)
{
    return (uint32_t)be(image, 60, 4);
}

bool table_entry(Bytes image, uint32_t index, Entry *out)
{
    uint64_t at = be(image, 64, 8);

    if (index >= table_count(image)) {
        return false;
    }
    for (uint32_t i = 0;; i++) {
        at = (at + 7) & ~(uint64_t)7;
        out->extra_size = (uint32_t)be(image, at + 36, 4);
        out->extra = (Bytes){ image.data + at + 40, out->extra_size };
        out->id = (Bytes){ out->extra.data + out->extra.len, (size_t)be(image, at + 12, 2) };
        out->name = (Bytes){ out->id.data + out->id.len, (size_t)be(image, at + 14, 2) };
        if (i == index) {
            break;
        }
        at = (uint64_t)(out->name.data + out->name.len - image.data);
    }
    /* A table behind the end of the file reads as zeros: no ID, no name. */
    if (at + 40 + out->extra_size + out->id.len + out->name.len > image.len) {
        out->extra.len = out->id.len = out->name.len = 0;
    }
    out->l1_offset = be(image, at, 8);
    out->l1_size = (uint32_t)be(image, at + 8, 4);
    out->date_sec = (uint32_t)be(image, at + 16, 4);
    out->date_nsec = (uint32_t)be(image, at + 20, 4);
    out->vm_clock_nsec = be(image, at + 24, 8);
    out->vm_state_size = out->extra_size >= 8 ? be(image, at + 40, 8) : be(image, at + 32, 4);
    out->disk_size = out->extra_size >= 16 ? be(image, at + 48, 8) : be(image, 24, 8);
    out->icount = out->extra_size >= 24 ? be(image, at + 56, 8) : UINT64_MAX;
    return true;
}

static void differ_u64(uint32_t entry, const char *field, uint64_t got, uint64_t want)
{
    if (got != want) {
        printf("#   entry %u: %s is %llu, QEMU has %llu\n", (unsigned)entry, field,
               (unsigned long long)got, (unsigned long long)want);
    }
}

static void differ_bytes(uint32_t entry, const char *field, Bytes got, Bytes want)
{
    if (!same(got, want)) {
        printf("#   entry %u: %s is \"%.*s\" (%zu bytes), QEMU has \"%.*s\" (%zu bytes)\n", (unsigned)entry, field,
               (int)got.len, (char *)got.data, got.len, (int)want.len, (char *)want.data, want.len);
    }
}

static void describe_tables(Bytes got, Bytes want)
{
    uint32_t n = table_count(want);

    if (table_count(got) != n) {
        printf("#   %u snapshots, QEMU has %u\n", (unsigned)table_count(got), (unsigned)n);
    }
    if (be(got, 64, 8) != be(want, 64, 8)) {
        printf("#   the snapshot table is at %#llx, QEMU's at %#llx\n",
               (unsigned long long)be(got, 64, 8), (unsigned long long)be(want, 64, 8));
    }
    for (uint32_t i = 0; i < n && i < table_count(got); i++) {
        Entry g, w;

        table_entry(got, i, &g);
        table_entry(want, i, &w);
        differ_bytes(i, "id_str", g.id, w.id);
        differ_bytes(i, "name", g.name, w.name);
        differ_u64(i, "l1_table_offset", g.l1_offset, w.l1_offset);
        differ_u64(i, "l1_size", g.l1_size, w.l1_size);
        differ_u64(i, "date_sec", g.date_sec, w.date_sec);
        differ_u64(i, "date_nsec", g.date_nsec, w.date_nsec);
        differ_u64(i, "vm_clock_nsec", g.vm_clock_nsec, w.vm_clock_nsec);
        differ_u64(i, "vm_state_size", g.vm_state_size, w.vm_state_size);
        differ_u64(i, "disk_size", g.disk_size, w.disk_size);
        differ_u64(i, "icount", g.icount, w.icount);
        differ_u64(i, "extra_data_size", g.extra_size, w.extra_size);
        if (g.extra_size == w.extra_size && !same(g.extra, w.extra)) {
            printf("#   entry %u: its extra data differs\n", (unsigned)i);
        }
    }
}

/* What a cluster of the wanted image is, as far as its header tells. */
static const char *region(Bytes image, uint64_t at)
{
    uint64_t cs = 1ull << be(image, 20, 4);
    uint64_t l1 = be(image, 40, 8), reftable = be(image, 48, 8), table = be(image, 64, 8);

    if (at < cs) {
        return "header";
    }
    if (at >= l1 && at < l1 + be(image, 36, 4) * 8) {
        return "active L1 table";
    }
    if (at >= reftable && at < reftable + be(image, 56, 4) * cs) {
        return "refcount table";
    }
    for (uint64_t i = 0; i < be(image, 56, 4) * cs / 8; i++) {
        if (be(image, reftable + i * 8, 8) == at / cs * cs) {
            return "refcount block";
        }
    }
    for (uint64_t i = 0; i < be(image, 36, 4); i++) {
        if ((be(image, l1 + i * 8, 8) & 0xfffffffffffe00) == at / cs * cs) {
            return "active L2 table";
        }
    }
    if (table && at / cs == table / cs) {
        return "snapshot table";
    }
    return "snapshot's L1 or L2 table, data, or free";
}

static void describe(Bytes got, Bytes want)
{
    uint64_t cs, shown = 0, bad = 0;
    size_t n = got.len < want.len ? got.len : want.len;

    if (want.len < 72 || be(want, 20, 4) < 9 || be(want, 20, 4) > 21) {
        return;
    }
    cs = 1ull << be(want, 20, 4);
    if (got.len != want.len) {
        printf("#   %zu bytes long, wanted %zu\n", got.len, want.len);
    }
    describe_tables(got, want);
    for (size_t at = 0; at < n; at++) {
        if (got.data[at] != want.data[at]) {
            bad++;
            if (shown++ < 12) {
                printf("#   offset %#zx (cluster %llu, %s): %#llx, wanted %#llx\n", at & ~(size_t)7,
                       (unsigned long long)(at / cs), region(want, at),
                       (unsigned long long)be(got, at & ~(size_t)7, 8), (unsigned long long)be(want, at & ~(size_t)7, 8));
            }
            at |= 7;
        }
    }
    printf("#   %llu words differ\n", (unsigned long long)bad);
}

void check_file_at(const char *file, int line, const char *path, Bytes want)
{
    Bytes got = slurp(path);

    if (!same(got, want)) {
        describe(got, want);
        fail_at(file, line, "%s has not the bytes it must have", path);
    }
    drop(&got);
}

/* ---- handles --------------------------------------------------------------------- */

Qcow2Image *must_open(const char *path, int flags)
{
    Qcow2Image *bs = NULL;
    Qcow2Error *err = NULL;
    int ret = qcow2_open(path, flags, &bs, &err);

    if (ret < 0) {
        fail_at(__FILE__, __LINE__, "open %s: %d: %s", path, ret, take_message(&err));
    }
    CHECK(bs && !err);
    return bs;
}

const char *take_message(Qcow2Error **err)
{
    static char text[1024];
    const char *pretty;

    if (!*err) {
        fail_at(__FILE__, __LINE__, "a call failed and set no error");
    }
    pretty = qcow2_error_get_pretty(*err);
    if (!pretty || !*pretty) {
        fail_at(__FILE__, __LINE__, "an error has no message");
    }
    snprintf(text, sizeof(text), "%s", pretty);
    qcow2_error_free(*err);
    *err = NULL;
    return text;
}

bool has_words(Qcow2Image *bs)
{
    const char *text = qcow2_last_error(bs);

    return text && *text;
}

/* ---- other programs -------------------------------------------------------------- */

int shell(const char *fmt, ...)
{
    char what[8192], command[8300];
    int n;
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(what, sizeof(what), fmt, ap);
    va_end(ap);
    /* The redirection stays here even if the command changes the folder. */
    snprintf(command, sizeof(command), "{ %s\n} > shell.log 2>&1", what);
    n = system(command);
    return WIFEXITED(n) ? WEXITSTATUS(n) : 128;
}

bool have(const char *tool)
{
    return shell("command -v %s", tool) == 0;
}

void need(const char *tool)
{
    if (!have(tool)) {
        skip("no %s here", tool);
    }
}
