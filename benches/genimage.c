/* SPDX-License-Identifier: MIT */
/*
 * Make the large images of the benchmark: a qcow2 file whose disk is mapped, but whose data clusters
 * are holes. qemu-img cannot make most of these in reasonable time; it can check them.
 *
 *   genimage FILE GIB order|random PERCENT     64 KiB clusters, 16-bit refcounts
 *   genimage FILE snapshots N                  an empty disk with N snapshots of long names
 *
 * "order": each L2 table is followed by its data clusters, as after preallocation=metadata.
 * "random": data clusters in random order over the whole file, as after random guest writes.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <endian.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CB 16
#define CS (1ull << CB)
#define PER_L2 (CS / 8)
#define PER_BLOCK (CS / 2)
#define COPIED (1ull << 63)

static int fd;

static void put(uint64_t offset, const void *buf, size_t n)
{
    const char *p = buf;
    while (n) {
        ssize_t w = pwrite(fd, p, n, (off_t)offset);
        if (w <= 0) {
            perror("pwrite");
            exit(1);
        }
        p += w, offset += (uint64_t)w, n -= (size_t)w;
    }
}

static void *need(void *p)
{
    if (!p) {
        perror("malloc");
        exit(1);
    }
    return p;
}

static uint64_t seed = 88172645463325252ull;
static uint64_t rnd(void)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed;
}

static void header(uint64_t size, uint64_t l1, uint64_t l1_size, uint64_t rt, uint64_t rt_clusters,
                   uint64_t nb, uint64_t snapshots)
{
    unsigned char h[112] = "QFI\xfb";
    uint32_t w;
    uint64_t q;
#define W(at, v) (w = htobe32((uint32_t)(v)), memcpy(h + (at), &w, 4))
#define Q(at, v) (q = htobe64(v), memcpy(h + (at), &q, 8))
    W(4, 3), W(20, CB), Q(24, size), W(36, l1_size), Q(40, l1), Q(48, rt), W(56, rt_clusters);
    W(60, nb), Q(64, snapshots), W(96, 4), W(100, 112);
    put(0, h, sizeof(h));
}

/* Counts of 1 for clusters 0 to n, and the table of the blocks; blocks stand at `blocks`. */
static void refcounts(uint64_t n, uint64_t rt, uint64_t blocks, const uint64_t *free_from_to)
{
    uint64_t nb = (n + PER_BLOCK - 1) / PER_BLOCK;
    uint64_t *table = need(calloc(nb, 8));
    uint16_t *block = need(malloc(CS));
    for (uint64_t b = 0; b < nb; b++) {
        for (uint64_t i = 0; i < PER_BLOCK; i++) {
            uint64_t c = b * PER_BLOCK + i;
            int used = c < n && !(free_from_to && c >= free_from_to[0] && c < free_from_to[1]);
            block[i] = htobe16(used ? 1 : 0);
        }
        put((blocks + b) * CS, block, CS);
        table[b] = htobe64((blocks + b) * CS);
    }
    put(rt * CS, table, nb * 8);
    free(block);
    free(table);
}

static int mapped(uint64_t gib, int random_order, unsigned percent)
{
    uint64_t size = gib << 30, guest = size / CS, l2s = (guest + PER_L2 - 1) / PER_L2;
    uint64_t used = 0;
    unsigned char *here = need(malloc(guest));
    for (uint64_t i = 0; i < guest; i++) {
        used += here[i] = percent >= 100 || rnd() % 100 < percent;
    }
    uint64_t l1_clusters = (l2s * 8 + CS - 1) / CS;
    /* Header, table, blocks, L1, then L2 tables and data. Blocks count themselves: two rounds settle it. */
    uint64_t blocks = 0, rt_clusters = 1, total = 0;
    for (int round = 0; round < 4; round++) {
        total = 1 + rt_clusters + blocks + l1_clusters + l2s + used;
        blocks = (total + PER_BLOCK - 1) / PER_BLOCK;
        rt_clusters = (blocks * 8 + CS - 1) / CS;
    }
    total = 1 + rt_clusters + blocks + l1_clusters + l2s + used;
    uint64_t rt = 1, rb = rt + rt_clusters, l1 = rb + blocks, first = l1 + l1_clusters;

    uint32_t *place = NULL;
    uint64_t data0 = first + l2s;
    if (random_order) {
        place = need(malloc(used * sizeof(*place)));
        for (uint64_t i = 0; i < used; i++) {
            place[i] = (uint32_t)i;
        }
        for (uint64_t i = used - 1; i > 0; i--) {
            uint64_t j = rnd() % (i + 1);
            uint32_t t = place[i];
            place[i] = place[j], place[j] = t;
        }
    }
    uint64_t *table = need(malloc(CS)), *l1_table = need(calloc(l1_clusters, CS));
    uint64_t next = first, n = 0;
    for (uint64_t t = 0; t < l2s; t++) {
        uint64_t at = random_order ? first + t : next++;
        for (uint64_t i = 0; i < PER_L2; i++) {
            uint64_t g = t * PER_L2 + i;
            table[i] = 0;
            if (g < guest && here[g]) {
                uint64_t c = random_order ? data0 + place[n] : next++;
                table[i] = htobe64(c * CS | COPIED);
                n++;
            }
        }
        put(at * CS, table, CS);
        l1_table[t] = htobe64(at * CS | COPIED);
    }
    put(l1 * CS, l1_table, l2s * 8);
    refcounts(total, rt, rb, NULL);
    header(size, l1 * CS, l2s, rt * CS, rt_clusters, 0, 0);
    return ftruncate(fd, (off_t)(total * CS));
}

/* Snapshots of an empty disk: entries with an L1 table of one zero entry each, at a cluster of their own. */
static int snapshots(uint64_t n)
{
    size_t entry = 40 + 24 + 8 + 240, bytes = n * entry;
    uint64_t clusters = (bytes + CS - 1) / CS, total = 0, blocks = 0, rt_clusters = 1;
    for (int round = 0; round < 4; round++) {
        total = 1 + rt_clusters + blocks + 1 + clusters + n;
        blocks = (total + PER_BLOCK - 1) / PER_BLOCK;
    }
    uint64_t rt = 1, rb = 2, l1 = rb + blocks, at = l1 + 1, copies = at + clusters;
    unsigned char *buf = need(calloc(1, bytes)), *p = buf;
    for (uint64_t i = 0; i < n; i++, p += entry) {
        uint32_t w;
        uint64_t q;
        uint16_t s;
        char text[24];
#define PW(o, v) (w = htobe32((uint32_t)(v)), memcpy(p + (o), &w, 4))
#define PQ(o, v) (q = htobe64(v), memcpy(p + (o), &q, 8))
#define PS(o, v) (s = htobe16((uint16_t)(v)), memcpy(p + (o), &s, 2))
        PQ(0, (copies + i) * CS), PW(8, 1), PS(12, 8), PS(14, 240), PW(16, 1700000000 + i), PW(36, 24), PQ(48, 1 << 20);
        snprintf(text, sizeof(text), "%08llu", (unsigned long long)(i + 1));
        memcpy(p + 64, text, 8);
        memset(p + 72, 'n', 240);
        memcpy(p + 72, text, 8);
    }
    put(at * CS, buf, bytes);
    refcounts(total, rt, rb, NULL);
    header(1 << 20, l1 * CS, 1, rt * CS, rt_clusters, n, at * CS);
    return ftruncate(fd, (off_t)(total * CS));
}

int main(int argc, char **argv)
{
    if (argc < 4) {
        fprintf(stderr, "usage: %s FILE GIB order|random PERCENT | FILE snapshots N\n", argv[0]);
        return 2;
    }
    fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (fd < 0) {
        perror(argv[1]);
        return 1;
    }
    int ret = !strcmp(argv[2], "snapshots")
                  ? snapshots(strtoull(argv[3], NULL, 10))
                  : mapped(strtoull(argv[2], NULL, 10), !strcmp(argv[3], "random"),
                           argc > 4 ? (unsigned)atoi(argv[4]) : 100);
    return ret < 0 || close(fd) < 0;
}
