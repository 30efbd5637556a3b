#!/usr/bin/env python3
"""Make what qemu-img cannot: patch fields of a qcow2 image in place.

make-images calls this for the cases that need foreign or damaged metadata. Offsets
and names are those of the qcow2 specification. Nothing here allocates clusters: a
changed snapshot table must fit into the clusters that the old one occupies.
"""
import os
import struct
import subprocess
import sys

KNOWN_EXTRA = 24


class Image:
    def __init__(self, path):
        self.path = path
        with open(path, "rb") as f:
            self.b = bytearray(f.read())
        self.version, = struct.unpack_from(">I", self.b, 4)
        self.cb, = struct.unpack_from(">I", self.b, 20)
        self.cs = 1 << self.cb
        self.l1_size, self.l1_offset = struct.unpack_from(">IQ", self.b, 36)
        self.reftable, self.reftable_clusters = struct.unpack_from(">QI", self.b, 48)
        self.nb_snapshots, self.snapshots = struct.unpack_from(">IQ", self.b, 60)
        self.order, = struct.unpack_from(">I", self.b, 96) if self.version > 2 else (4,)
        self.header_length, = struct.unpack_from(">I", self.b, 100) if self.version > 2 else (72,)

    def save(self):
        with open(self.path, "wb") as f:
            f.write(self.b)

    def u64(self, off):
        return struct.unpack_from(">Q", self.b, off)[0] if off + 8 <= len(self.b) else 0

    def refcounts(self):
        """Yield (cluster, refcount) for every counted cluster."""
        bits = 1 << self.order
        per_block = self.cs * 8 // bits
        for i in range(self.reftable_clusters * self.cs // 8):
            block = self.u64(self.reftable + 8 * i)
            if not block:
                continue
            for j in range(per_block):
                if bits < 8:
                    at = block + j * bits // 8
                    v = self.b[at] >> (j * bits % 8) & ((1 << bits) - 1) if at < len(self.b) else 0
                else:
                    at = block + j * bits // 8
                    v = int.from_bytes(self.b[at:at + bits // 8], "big")
                if v:
                    yield i * per_block + j, v

    def top(self):
        """One more than the highest cluster in use."""
        return max(c for c, _ in self.refcounts()) + 1

    def holes(self):
        used = {c for c, _ in self.refcounts()}
        return [c for c in range(max(used)) if c not in used]

    # -- snapshot table -------------------------------------------------------
    def table(self):
        out, at = [], self.snapshots
        for _ in range(self.nb_snapshots):
            at = (at + 7) & ~7
            l1, l1n, idn, nn, sec, nsec, clock, vm, xn = struct.unpack_from(">QIHHIIQII", self.b, at)
            at += 40
            extra = bytes(self.b[at:at + xn])
            at += xn
            ident = bytes(self.b[at:at + idn])
            at += idn
            name = bytes(self.b[at:at + nn])
            at += nn
            out.append(dict(l1_offset=l1, l1_size=l1n, date_sec=sec, date_nsec=nsec, vm_clock_nsec=clock,
                            vm_state_size=vm, extra=extra, id=ident, name=name))
        self.table_end = at
        return out

    def put_table(self, entries):
        old_clusters = -(-(self.table_end - self.snapshots) // self.cs)
        at = self.snapshots
        # Old bytes go, as if the table had been written into a fresh cluster.
        self.b[at:self.table_end] = bytes(self.table_end - at)
        for e in entries:
            at = (at + 7) & ~7
            raw = struct.pack(">QIHHIIQII", e["l1_offset"], e["l1_size"], len(e["id"]), len(e["name"]),
                              e["date_sec"], e["date_nsec"], e["vm_clock_nsec"], e["vm_state_size"],
                              len(e["extra"])) + e["extra"] + e["id"] + e["name"]
            if at + len(raw) > len(self.b):
                self.b.extend(bytes(at + len(raw) - len(self.b)))
            self.b[at:at + len(raw)] = raw
            at += len(raw)
        if -(-(at - self.snapshots) // self.cs) > old_clusters:
            sys.exit("craft: the table does not fit into its clusters")
        struct.pack_into(">I", self.b, 60, len(entries))

    # -- header extensions ----------------------------------------------------
    def extensions(self):
        """Bytes of the extension area without the end marker, and where it begins."""
        at = start = self.header_length if self.version > 2 else 72
        while True:
            magic, n = struct.unpack_from(">II", self.b, at)
            if magic == 0:
                return start, bytes(self.b[start:at]), at + 8
            at += 8 + ((n + 7) & ~7)

    def put_extensions(self, start, raw, old_end):
        backing, = struct.unpack_from(">Q", self.b, 8)
        if backing:
            sys.exit("craft: will not move a backing file name")
        end = start + len(raw) + 8
        if end > self.cs:
            sys.exit("craft: extensions do not fit into the header cluster")
        self.b[start:max(end, old_end)] = raw + bytes(8) + bytes(max(0, old_end - end))


def edit_table(img, edits):
    entries = img.table()
    for edit in edits:
        where, value = edit.split("=", 1)
        index, field = where.split(":")
        e = entries[int(index)]
        if field == "extra":          # a length: cut, or continue with recognisable bytes
            n = int(value)
            e["extra"] = (e["extra"] + bytes((0xA0 + i) & 0xFF for i in range(n)))[:n]
        elif field == "disk_size":
            e["extra"] = e["extra"][:8] + struct.pack(">Q", int(value)) + e["extra"][16:]
        elif field in ("id", "name"):
            e[field] = value.encode("latin-1").decode("unicode_escape").encode("latin-1")
        else:
            e[field] = int(value, 0)
    img.put_table(entries)


def fill(path, start, target):
    """Write guest clusters upwards from START until exactly TARGET host clusters are in use."""
    guest = int(start)
    while True:
        img = Image(path)
        left = int(target) - img.top()
        if left == 0 and img.holes():
            sys.exit(f"craft: {path} is filled, but for {img.holes()}")
        if left == 0:
            return
        if left < 0:
            sys.exit(f"craft: fill missed {target} by {-left}")
        n = max(1, left * 7 // 8 - 4) if left > 8 and not img.holes() else 1
        subprocess.run(["qemu-io", "-f", "qcow2", "-c",
                        f"write -P 0x5f {guest * img.cs} {n * img.cs}", path],
                       check=True, stdout=subprocess.DEVNULL)
        guest += n


def main(argv):
    cmd, path, args = argv[1], argv[2], argv[3:]
    if cmd == "fill":
        return fill(path, *args)
    img = Image(path)
    if cmd == "show":                 # ID, name, date and state of every entry
        for e in img.table():
            print(e["id"], e["name"], e["date_sec"], e["date_nsec"], e["vm_clock_nsec"], e["extra"].hex())
        return None
    if cmd == "date":                 # what the last entry carries, for the ops file
        e = img.table()[-1]
        return print(e["date_sec"], e["date_nsec"])
    if cmd == "top":
        return print(img.top())
    if cmd == "get":                  # OFFSET SIZE
        at, n = int(args[0], 0), int(args[1])
        return print(int.from_bytes(img.b[at:at + n], "big"))
    if cmd == "poke":                 # OFFSET SIZE VALUE
        at, n = int(args[0], 0), int(args[1])
        img.b[at:at + n] = (int(args[2], 0) & (256 ** n - 1)).to_bytes(n, "big")
    elif cmd == "l1":                 # print L1 entry N
        return print(img.u64(img.l1_offset + 8 * int(args[0])))
    elif cmd == "table":
        edit_table(img, args)
    elif cmd == "append-empty":       # an entry with no L1: deleting it rewrites the table and nothing else
        entries, n = img.table(), len(img.b)
        entries.append(dict(l1_offset=0, l1_size=0, date_sec=0, date_nsec=0, vm_clock_nsec=0,
                            vm_state_size=0, extra=bytes(KNOWN_EXTRA), id=b"4000", name=args[0].encode()))
        img.put_table(entries)
        if len(img.b) != n:
            sys.exit("craft: the table is at the end of the file; the length would change")
    elif cmd == "extension":          # MAGIC HEXDATA, put before the others
        start, raw, end = img.extensions()
        data = bytes.fromhex(args[1])
        new = struct.pack(">II", int(args[0], 0), len(data)) + data + bytes(-len(data) % 8)
        img.put_extensions(start, new + raw, end)
    elif cmd == "feature":            # TYPE BIT NAME: name a feature in a table of our own
        start, raw, end = img.extensions()
        data = bytes([int(args[0]), int(args[1])]) + args[2].encode().ljust(46, b"\0")
        img.put_extensions(start, struct.pack(">II", 0x6803F857, len(data)) + data, end)
    elif cmd == "header-length":
        n = int(args[0])
        start, raw, end = img.extensions()
        img.b[min(104, n):end] = bytes(end - min(104, n))
        img.b[112:n] = bytes(0xC0 + i for i in range(n - 112))
        struct.pack_into(">I", img.b, 100, n)
        img.put_extensions(n, raw, end)
    elif cmd == "truncate":           # bytes, or -N to cut N
        n = int(args[0])
        del img.b[n if n >= 0 else len(img.b) + n:]
    elif cmd == "append":             # HEXDATA
        img.b += bytes.fromhex(args[0])
    else:
        sys.exit(f"craft: unknown command {cmd}")
    img.save()
    return None


if __name__ == "__main__":
    if main(sys.argv) is not None:
        sys.exit(1)
