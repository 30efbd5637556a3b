/* SPDX-License-Identifier: MIT */
/*
 * The floor of the benchmark: for each verb the least that any program must do that keeps the contract.
 * That is: it looks at everything before its first write (an error has changed nothing), so it goes
 * over the L2 tables once to count, and again to write flags, for it does not hold them in memory;
 * counts go up before the publish and down after it; three barriers. And nothing more: no checks, no
 * formats but 64 KiB clusters and 16-bit refcounts, no copy in user space, requests as large as the
 * library's, one snapshot made by itself or by one of the others. It does not make a snapshot that QEMU
 * could use in every case; it tells what the disk and one core allow.
 *
 *   floor FILE create|goto|delete
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <endian.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CB 16
#define CS (1ull << CB)
#define PER_BLOCK (CS / 2)
#define OFFSET 0x00fffffffffffe00ull
#define COPIED (1ull << 63)
#define AHEAD 32 /* clusters in one request: 2 MiB */

static int fd;
static uint16_t **block;
static unsigned char *dirty;
static uint64_t *reftable, nb_blocks;

static void io(int write, uint64_t offset, void *buf, size_t n)
{
    char *p = buf;
    while (n) {
        ssize_t r = write ? pwrite(fd, p, n, (off_t)offset) : pread(fd, p, n, (off_t)offset);
        if (r < 0) {
            perror("floor");
            exit(1);
        }
        if (r == 0) {
            memset(p, 0, n);
            return;
        }
        p += r, offset += (uint64_t)r, n -= (size_t)r;
    }
}

static void *load(uint64_t offset, size_t n)
{
    void *p = malloc(n);
    if (!p) {
        exit(1);
    }
    io(0, offset, p, n);
    return p;
}

static uint64_t be64(const unsigned char *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return be64toh(v);
}

static uint32_t be32(const unsigned char *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return be32toh(v);
}

static uint16_t *count_of(uint64_t cluster)
{
    uint64_t b = cluster / PER_BLOCK;
    if (!block[b]) {
        block[b] = load(be64toh(reftable[b]), CS);
    }
    return &block[b][cluster % PER_BLOCK];
}

static uint16_t add(uint64_t cluster, int by)
{
    uint16_t *p = count_of(cluster), v = be16toh(*p);
    v = (uint16_t)(v + by);
    *p = htobe16(v);
    dirty[cluster / PER_BLOCK] |= by != 0;
    return v;
}

static void write_blocks(void)
{
    for (uint64_t b = 0; b < nb_blocks; b++) {
        if (dirty[b]) {
            io(1, be64toh(reftable[b]), block[b], CS);
            dirty[b] = 0;
        }
    }
}

/*
 * Add `by` to the count of everything that an L1 table reaches, and note in the table in memory what
 * COPIED is to be there; with `flags` write it into the L2 tables too, as the counts say.
 */
static void walk(uint64_t *l1, uint32_t n, int by, int flags)
{
    static uint64_t buf[AHEAD * CS / 8];
    for (uint32_t i = 0; i < n;) {
        uint64_t at = be64toh(l1[i]) & OFFSET;
        uint32_t k = 1;
        if (!at) {
            i++;
            continue;
        }
        while (k < AHEAD && i + k < n && (be64toh(l1[i + k]) & OFFSET) == at + k * CS) {
            k++;
        }
        io(0, at, buf, k * CS);
        int changed = 0;
        for (uint64_t j = 0; j < k * CS / 8; j++) {
            uint64_t e = be64toh(buf[j]);
            if (e & OFFSET) {
                uint16_t count = add((e & OFFSET) >> CB, by);
                uint64_t want = (e & ~COPIED) | (count == 1 ? COPIED : 0);
                if (want != e) {
                    buf[j] = htobe64(want), changed = 1;
                }
            }
        }
        if (flags && changed) {
            io(1, at, buf, k * CS);
        }
        for (uint32_t j = 0; j < k; j++) {
            uint16_t count = add((at >> CB) + j, by);
            l1[i + j] = htobe64((at + j * CS) | (count == 1 ? COPIED : 0));
        }
        i += k;
    }
}

static void barrier(void)
{
    if (fdatasync(fd) < 0) {
        perror("fdatasync");
        exit(1);
    }
}

int main(int argc, char **argv)
{
    unsigned char h[112], sn[64] = { 0 };
    if (argc != 3 || (fd = open(argv[1], O_RDWR)) < 0) {
        fprintf(stderr, "usage: floor FILE create|goto|delete\n");
        return 2;
    }
    io(0, 0, h, sizeof(h));
    uint32_t l1_size = be32(h + 36);
    uint64_t l1_at = be64(h + 40);
    nb_blocks = be32(h + 56) * CS / 8;
    reftable = load(be64(h + 48), be32(h + 56) * CS);
    block = calloc(nb_blocks, sizeof(*block));
    dirty = calloc(nb_blocks, 1);
    uint64_t *l1 = load(l1_at, l1_size * 8ull);

    struct stat st;
    fstat(fd, &st);
    if (!strcmp(argv[2], "create")) {
        uint64_t end = ((uint64_t)st.st_size + CS - 1) / CS, copies = (l1_size * 8ull + CS - 1) / CS;
        for (uint64_t c = 0; c < copies + 1; c++) {
            add(end + c, 1);
        }
        uint64_t *before = load(l1_at, l1_size * 8ull);
        walk(l1, l1_size, 1, 0);
        io(1, end * CS, before, l1_size * 8ull);
        write_blocks();
        walk(l1, l1_size, 0, 1);
        io(1, l1_at, l1, l1_size * 8ull);
        uint64_t q = htobe64(end * CS);
        uint32_t w = htobe32(l1_size);
        memcpy(sn, &q, 8), memcpy(sn + 8, &w, 4);
        io(1, (end + copies) * CS, sn, sizeof(sn));
        barrier();
        w = htobe32(1), q = htobe64((end + copies) * CS);
        memcpy(h + 60, &w, 4), memcpy(h + 64, &q, 8);
        io(1, 60, h + 60, 12);
        barrier();
        barrier();
        return 0;
    }
    uint64_t table = be64(h + 64);
    io(0, table, sn, sizeof(sn));
    uint32_t n = be32(sn + 8);
    uint64_t *copy = load(be64(sn), n * 8ull);
    if (!strcmp(argv[2], "goto")) {
        walk(copy, n, 1, 0);
        barrier();
        walk(l1, l1_size, -1, 0);
        barrier();
        barrier();
        return 0;
    }
    walk(copy, n, -1, 0);
    for (uint64_t c = 0; c < (n * 8ull + CS - 1) / CS; c++) {
        add(be64(sn) / CS + c, -1);
    }
    add(table / CS, -1);
    barrier();
    memset(h + 60, 0, 12);
    io(1, 60, h + 60, 12);
    barrier();
    write_blocks();
    walk(copy, n, 0, 1);
    io(1, l1_at, copy, l1_size * 8ull);
    barrier();
    return 0;
}
