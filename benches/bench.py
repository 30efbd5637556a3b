#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Time snapshot verbs: qemu-img, this library (a C program on its C API) and the floor, in turn.

    bench.py BUILD OUT [--dir DIR] [--rounds N] [--only NAME,...] [--quick]

BUILD holds genimage, floor and ours (make bench builds them); OUT is the Markdown page to write, with
a picture beside it. Each round makes a fresh copy of the image for each program and runs create, goto
and delete on it, so every program does equal work; programs alternate within a round. Medians over
rounds. Times depend on the machine and on what else runs there; the ratios of one round do much less.
"""
import argparse, os, shutil, statistics, subprocess, sys, time

VERBS = ("create", "goto", "delete")


def sh(*argv):
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def copy(src, dst):
    """A sparse copy, on stable storage and (again) in the page cache."""
    subprocess.run(["cp", "--sparse=auto", src, dst], check=True)
    fd = os.open(dst, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def cold(path):
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def measure(argv):
    """Run; return wall and CPU seconds, peak KiB, requests and bytes that the kernel counted. Ours also
    says how long it took from before the open to after the close, and its own peak: what the kernel
    says of a child is never below what this script takes."""
    stats = f"/tmp/ours-stats.{os.getpid()}"
    start = time.monotonic()
    p = subprocess.Popen(argv, stdout=subprocess.DEVNULL, env={**os.environ, "OURS_STATS": stats})
    # Wait without reaping, to read what the kernel counted.
    os.waitid(os.P_PID, p.pid, os.WEXITED | os.WNOWAIT)
    wall = time.monotonic() - start
    io = {}
    try:
        for line in open(f"/proc/{p.pid}/io"):
            key, value = line.split(":")
            io[key] = int(value)
    except OSError:
        pass
    _, status, usage = os.wait4(p.pid, 0)
    p.returncode = os.waitstatus_to_exitcode(status)
    if p.returncode:
        raise SystemExit(f"failed ({p.returncode}): {argv}")
    inside, rss = wall, usage.ru_maxrss
    if os.path.exists(stats):
        with open(stats) as f:
            inside, rss = (float(x) for x in f.read().split())
        os.unlink(stats)
    return dict(wall=wall, cpu=usage.ru_utime + usage.ru_stime, rss=rss, inside=inside,
                requests=io.get("syscr", 0) + io.get("syscw", 0),
                read=io.get("rchar", 0), written=io.get("wchar", 0))


def barriers(argv):
    """Barriers of one run, by strace; None where there is no strace."""
    if not shutil.which("strace"):
        return None
    out = subprocess.run(["strace", "-f", "--seccomp-bpf", "-c", "-e", "trace=fdatasync,fsync", *argv],
                         capture_output=True, text=True)
    n = 0
    for line in out.stderr.splitlines():
        words = line.split()
        if words and words[-1] in ("fdatasync", "fsync"):
            n += int(words[3])
    return n


class Bench:
    def __init__(self, build, folder, rounds):
        self.build, self.folder, self.rounds = build, folder, rounds
        self.rows = []          # (image, verb, program, cache, [measurements])
        self.barriers = []      # (image, program, {verb: barriers})
        self.checks = []        # (image, what qemu-img check says)

    def command(self, program, image, verb):
        if program == "qemu-img":
            if verb == "open":
                return ["qemu-img", "info", "--output=json", image]
            flag = {"create": "-c", "goto": "-a", "delete": "-d", "list": "-l"}[verb]
            tail = [] if verb == "list" else ["a"]
            return ["qemu-img", "snapshot", flag, *tail, image] if tail else ["qemu-img", "snapshot", flag, image]
        return [f"{self.build}/{program}", image, verb]

    def image(self, name, make):
        path = f"{self.folder}/{name}.qcow2"
        if not os.path.exists(path):
            print(f"making {name}", flush=True)
            make(path)
        return path

    def gen(self, *args):
        return lambda path: sh(f"{self.build}/genimage", path, *args)

    def run(self, name, path, programs, caches=("warm",), verbs=VERBS, rounds=None):
        rounds = rounds or self.rounds
        results = {}
        for cache in caches:
            for r in range(rounds):
                # Turn the order, so that no program always runs first.
                turn = programs[r % len(programs):] + programs[:r % len(programs)]
                for program in turn:
                    work = f"{self.folder}/work-{program}.qcow2"
                    if set(verbs) & set(VERBS):
                        copy(path, work)
                    else:
                        work = path
                    for verb in verbs:
                        if cache == "cold":
                            cold(work)
                        m = measure(self.command(program, work, verb))
                        results.setdefault((verb, program, cache), []).append(m)
                    if work != path:
                        os.unlink(work)
                print(f"{name} {cache} round {r + 1}: " + ", ".join(
                    f"{p} " + "/".join(f"{results[v, p, cache][-1]['wall']:.3f}" for v in verbs)
                    for p in programs) + " s", flush=True)
        for (verb, program, cache), ms in results.items():
            self.rows.append((name, verb, program, cache, ms))

    def count_barriers(self, name, path, programs):
        work = f"{self.folder}/work-strace.qcow2"
        for program in programs:
            copy(path, work)
            self.barriers.append((name, program, {v: barriers(self.command(program, work, v)) for v in VERBS}))
            os.unlink(work)

    def check(self, name, path):
        """qemu-img's opinion of an image of the generator, and of what each of our verbs leaves."""
        work = f"{self.folder}/work-check.qcow2"
        copy(path, work)
        for verb in (None, *VERBS):
            if verb:
                sh(*self.command("ours", work, verb))
            # With room for all refcounts: with its own 256 KiB a check of 1 TiB in random order takes
            # ten minutes instead of four seconds.
            options = f"driver=qcow2,file.filename={work},refcount-cache-size={64 << 20}"
            p = subprocess.run(["qemu-img", "check", "-q", "--image-opts", options],
                               capture_output=True, text=True)
            self.checks.append((name, verb or "as generated",
                                "no errors" if p.returncode == 0 else f"exit {p.returncode}: {p.stderr.strip()[:200]}"))
            print(f"{name}, {self.checks[-1][1]}: {self.checks[-1][2]}", flush=True)
        os.unlink(work)

    def median(self, name, verb, program, cache, key):
        for row in self.rows:
            if row[:4] == (name, verb, program, cache):
                return statistics.median(m[key] for m in row[4])
        return None

    def ratio(self, name, verb, cache, key, of, by):
        """The median of the ratios of each round."""
        a = [r[4] for r in self.rows if r[:4] == (name, verb, of, cache)]
        b = [r[4] for r in self.rows if r[:4] == (name, verb, by, cache)]
        if not a or not b:
            return None
        least = 1 if key in ("written", "read", "requests") else 1e-4
        return statistics.median(x[key] / max(y[key], least) for x, y in zip(a[0], b[0]))


def mib(n):
    return f"{n / 2**20:.1f}"


def number(x, digits=3):
    return "-" if x is None else f"{x:.{digits}f}"


def table(bench, out):
    out.append("| image | verb | cache | qemu-img wall s | ours wall s | floor wall s | qemu-img / ours | "
               "ours / floor | CPU s qemu-img | CPU s ours | CPU ratio | in-process ms ours | peak MiB ours |")
    out.append("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    seen = []
    for name, verb, _, cache, _ in bench.rows:
        if (name, verb, cache) in seen:
            continue
        seen.append((name, verb, cache))
        get = lambda program, key: bench.median(name, verb, program, cache, key)
        rss = get("ours", "rss")
        out.append(f"| {name} | {verb} | {cache} | {number(get('qemu-img', 'wall'))} | {number(get('ours', 'wall'))} | "
                   f"{number(get('floor', 'wall'))} | {number(bench.ratio(name, verb, cache, 'wall', 'qemu-img', 'ours'), 1)} | "
                   f"{number(bench.ratio(name, verb, cache, 'wall', 'ours', 'floor'), 2)} | {number(get('qemu-img', 'cpu'))} | "
                   f"{number(get('ours', 'cpu'))} | {number(bench.ratio(name, verb, cache, 'cpu', 'qemu-img', 'ours'), 1)} | "
                   f"{number(milli(get('ours', 'inside')), 2)} | "
                   f"{'-' if rss is None else f'{rss / 1024:.0f}'} |")


def milli(seconds):
    return None if seconds is None else seconds * 1000


def targets(bench, out):
    """Each target, what was measured, and whether it is met; nothing for images that were left out."""
    out.append("| target | image | " + " | ".join(VERBS) + " | met |")
    out.append("|---|---|---|---|---|---|")

    def line(what, name, values, good, digits=1):
        if all(v is None for v in values):
            return
        met = all(v is None or good(v) for v in values)
        out.append(f"| {what} | {name} | " + " | ".join(number(v, digits) for v in values) + f" | {'yes' if met else '**no**'} |")

    def ratios(name, key, of, by):
        return [bench.ratio(name, v, "warm", key, of, by) for v in VERBS]

    line("CPU: qemu-img / ours at least 50", "1T", ratios("1T", "cpu", "qemu-img", "ours"), lambda x: x >= 50)
    line("wall: qemu-img / ours at least 40", "1T", ratios("1T", "wall", "qemu-img", "ours"), lambda x: x >= 40)
    for name, most in (("1T", 1.1), ("10T", 2), ("1T-random", 3)):
        line(f"wall: ours / floor at most {most}", name, ratios(name, "wall", "ours", "floor"), lambda x: x <= most, 2)
    line("wall: ours / floor at most 1.2", "1T-2percent",
         [None, None, bench.ratio("1T-2percent", "delete", "warm", "wall", "ours", "floor")], lambda x: x <= 1.2, 2)
    line("wall: qemu-img / ours at least 200", "16G-random", ratios("16G-random", "wall", "qemu-img", "ours"), lambda x: x >= 200)
    for name in ("fresh-10G", "fresh-10G-tmpfs"):
        values = []
        for v in VERBS:
            q = [r[4] for r in bench.rows if r[:4] == (name, v, "qemu-img", "warm")]
            o = [r[4] for r in bench.rows if r[:4] == (name, v, "ours", "warm")]
            values.append(statistics.median(x["wall"] / y["inside"] for x, y in zip(q[0], o[0])) if q and o else None)
        line("qemu-img process / ours in-process at least 5", name, values, lambda x: x >= 5)
    lists = bench.ratio("65536-snapshots", "list", "warm", "wall", "qemu-img", "ours")
    if lists:
        out.append(f"| list: qemu-img / ours at least 10 | 65536-snapshots | {lists:.1f} | | | {'yes' if lists >= 10 else '**no**'} |")
    for name, most in (("1T", 64), ("10T", 64), ("1T-random", 256)):
        peak = [bench.median(name, v, "ours", "warm", "rss") for v in VERBS]
        line(f"peak memory of ours at most {most} MiB", name, [p and p / 1024 for p in peak], lambda x: x <= most, 0)
    for name in dict.fromkeys(r[0] for r in bench.rows if r[2] == "qemu-img" and r[1] in VERBS):
        line("bytes written: ours / qemu-img at most 1.1", name, [
            bench.ratio(name, v, "warm", "written", "ours", "qemu-img") for v in VERBS], lambda x: x <= 1.1, 2)


def requests(bench, out):
    out.append("| image | verb | program | requests | MiB read | MiB written |")
    out.append("|---|---|---|---|---|---|")
    for name, verb, program, cache, ms in bench.rows:
        if cache == "warm":
            mid = lambda key: statistics.median(m[key] for m in ms)
            out.append(f"| {name} | {verb} | {program} | {mid('requests'):.0f} | {mib(mid('read'))} | {mib(mid('written'))} |")


def picture(bench, path, sizes, verb="create"):
    """Wall time against image size, both axes logarithmic."""
    import math
    series = {}
    for program in ("qemu-img", "ours", "floor"):
        points = [(gib, bench.median(name, verb, program, "warm", "wall")) for name, gib in sizes]
        series[program] = [(x, y) for x, y in points if y]
    values = [y for s in series.values() for _, y in s]
    if not values:
        return
    w, h, left, bottom = 640, 400, 70, 50
    x0, x1 = math.log10(min(g for _, g in sizes)), math.log10(max(g for _, g in sizes))
    y0, y1 = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    px = lambda v: left + (math.log10(v) - x0) / max(x1 - x0, 1e-9) * (w - left - 110)
    py = lambda v: h - bottom - (math.log10(v) - y0) / max(y1 - y0, 1e-9) * (h - bottom - 30)
    colour = {"qemu-img": "#c0392b", "ours": "#2471a3", "floor": "#7f8c8d"}
    s = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" font-family="sans-serif" font-size="12">',
         f'<rect width="{w}" height="{h}" fill="white"/>',
         f'<text x="{left}" y="18" font-size="14">{verb}: wall time against mapped disk size (warm cache)</text>']
    for e in range(y0, y1 + 1):
        y = py(10 ** e)
        s.append(f'<line x1="{left}" x2="{w - 110}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
                 f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10 ** e:g} s</text>')
    for name, gib in sizes:
        label = f"{gib // 1024} TiB" if gib >= 1024 else f"{gib} GiB"
        s.append(f'<text x="{px(gib):.1f}" y="{h - bottom + 20}" text-anchor="middle">{label}</text>')
    for program, points in series.items():
        path_points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        s.append(f'<polyline points="{path_points}" fill="none" stroke="{colour[program]}" stroke-width="2"/>')
        for x, y in points:
            s.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{colour[program]}"/>')
        if points:
            x, y = points[-1]
            s.append(f'<text x="{px(x) + 8:.1f}" y="{py(y) + 4:.1f}" fill="{colour[program]}">{program}</text>')
    s.append("</svg>")
    with open(path, "w") as f:
        f.write("\n".join(s) + "\n")


class Copies:
    """Copy the disk of a snapshot out: qemu-img convert and the tool, in memory, on a disk, and on a file system that
    shares blocks; and only read it, through the C API."""

    # The tool waits until the copy is on the disk. In memory there is nothing to wait for; elsewhere qemu-img does so
    # with -t writeback.
    MEMORY = (("copy", "qemu-img", "tool"), ("copy to qcow2", "qemu-img -O qcow2", "tool -O qcow2"),
              ("read only", "qemu-img to null-co", "C API, two handles"))
    DISK = (("copy", "qemu-img -t writeback", "tool"),)

    def __init__(self, bench):
        self.b, self.rows, self.raw = bench, [], f"{bench.folder}/copy-work.raw"

    def fill(self, path, size):
        """What this machine's libraries are made of, end to end: data as real disks hold it."""
        with open(path, "wb") as out:
            while out.tell() < size:
                for folder, folders, files in os.walk("/usr/lib"):
                    folders.sort()
                    for name in sorted(files):
                        name = os.path.join(folder, name)
                        if out.tell() < size and os.path.isfile(name) and not os.path.islink(name):
                            with open(name, "rb") as file:
                                out.write(file.read(size - out.tell()))

    def converted(self, gib, *options):
        def make(path):
            self.fill(self.raw, gib << 30)
            sh("qemu-img", "convert", "-O", "qcow2", *options, self.raw, path)
            os.unlink(self.raw)
            sh("qemu-img", "snapshot", "-c", "s", path)
        return make

    def written(self, size, commands):
        def make(path):
            sh("qemu-img", "create", "-q", "-f", "qcow2", path, size)
            subprocess.run(["qemu-io", path], input="\n".join(commands), text=True, check=True,
                           stdout=subprocess.DEVNULL)
            sh("qemu-img", "snapshot", "-c", "s", path)
        return make

    def command(self, program, path, out):
        convert = ["qemu-img", "convert", "-l", "snapshot.name=s"]
        tool = [f"{self.b.build}/../qcow2-snapshot", "export", "-q"]
        size = os.path.getsize(path) + (1 << 40)
        return {
            "qemu-img": [*convert, "-O", "raw", path, out],
            "qemu-img -t writeback": [*convert, "-O", "raw", "-t", "writeback", path, out],
            "qemu-img -O qcow2": [*convert, "-O", "qcow2", path, out],
            "qemu-img to null-co": [*convert, "-n", "--target-is-zero", "--target-image-opts", path, f"driver=null-co,size={size}"],
            "tool": [*tool, path, "s", out],
            "tool -O qcow2": [*tool, "-O", "qcow2", path, "s", out],
            "C API, two handles": [f"{self.b.build}/ours", path, "read", "s"],
            # As dd would, but for holes.
            "cp": ["sh", "-c", f"cp --sparse=auto {self.raw} {out} && sync -d {out}"],
        }[program]

    def images(self):
        import random
        order = list(range(1 << 14))
        random.Random(1).shuffle(order)
        scattered = [f"write -P {1 + i % 255} {i << 16} 64k" for i in order]
        sparse = [f"write {['-P 7', '-z'][i % 4 == 3]} {i * 32}M 1M" for i in range(1 << 11)]
        for name, what, make in (
                ("data", "2 GiB of files, in order", self.converted(2)),
                ("zlib", "1 GiB of files, compressed with zlib", self.converted(1, "-c")),
                ("zstd", "1 GiB of files, compressed with zstd",
                 self.converted(1, "-c", "-o", "compression_type=zstd")),
                ("random", "1 GiB, clusters in random order", self.written("1G", scattered)),
                ("sparse", "64 GiB: 1.5 GiB of data and 0.5 GiB of zero clusters in pieces of 1 MiB",
                 self.written("64G", sparse))):
            yield name, what, self.b.image(f"copy-{name}", make)

    def run(self):
        for name, what, path in self.images():
            self.pairs("tmpfs", name, what, path, self.MEMORY, "/dev/shm")
            # What the disk allows: the same bytes by cp.
            sh(*self.command("tool", path, self.raw))
            self.pairs("disk", name, what, path, self.DISK, self.b.folder, ("cp",))
            os.unlink(self.raw)
            if name == "data":
                self.shared(name, what, path)

    def pairs(self, place, name, what, path, pairs, folder, also=()):
        """Each pair on a copy of the image in this folder."""
        folder = f"{folder}/copies.{os.getpid()}"
        os.mkdir(folder)
        here, out = f"{folder}/image.qcow2", f"{folder}/out"
        try:
            copy(path, here)
            with open(here, "rb") as image:            # the cache is warm for whoever is first, too
                while image.read(1 << 24):
                    pass
            for kind, *pair in pairs:
                ms = {program: [] for program in (*pair, *also)}
                for r in range(self.b.rounds):
                    for program in list(ms) if r % 2 == 0 else list(ms)[::-1]:
                        # Nobody pays for what the one before left to be written. (Memory that the host of a virtual
                        # machine takes back is another matter: docs/performance.md, "Copies".)
                        os.sync()
                        ms[program].append(measure(self.command(program, here, out)))
                        if os.path.exists(out):
                            os.unlink(out)
                self.rows.append((place, what, kind, *pair, ms))
                print(f"{place}, {name}, {kind}: " + ", ".join(
                    f"{p} " + "/".join(f"{m['wall']:.2f}" for m in ms[p]) for p in ms) + " s", flush=True)
        finally:
            shutil.rmtree(folder)

    def shared(self, name, what, path):
        """On XFS, in a file of the folder, mounted where nobody else sees it."""
        import ctypes
        fs, at = f"{self.b.folder}/copies.xfs", f"{self.b.folder}/copies-xfs"
        CLONE_NEWNS = 0x20000
        if not shutil.which("mkfs.xfs") or ctypes.CDLL(None).unshare(CLONE_NEWNS):
            print("SKIPPED: no XFS can be mounted here (mkfs.xfs, root): copies that share blocks", flush=True)
            return
        with open(fs, "wb") as file:
            file.truncate(12 << 30)
        os.makedirs(at, exist_ok=True)
        try:
            sh("mount", "--make-rprivate", "/")
            sh("mkfs.xfs", "-q", "-f", "-m", "reflink=1", fs)
            sh("mount", "-o", "loop", fs, at)
            try:
                self.pairs("XFS", name, what, path, self.DISK, at)
            finally:
                sh("umount", at)
        finally:
            os.unlink(fs)
            os.rmdir(at)

    @staticmethod
    def ratio(ms, theirs, ours, key):
        return statistics.median(x[key] / max(y[key], 1e-4) for x, y in zip(ms[theirs], ms[ours]))

    def targets(self, out):
        for place, what, kind, theirs, ours, ms in self.rows:
            wall, cpu = (self.ratio(ms, theirs, ours, key) for key in ("wall", "cpu"))
            least, why = {"XFS": (50, ""), "disk": (1.2, "")}.get(place, (1.0 if kind == "read only" else 1.2, ""))
            # Where cp takes as long, the disk is the bound.
            if place == "disk" and self.ratio(ms, "cp", ours, "wall") >= 0.95:
                least, why = 1.0, " (cp is no faster)"
            met = "yes" if wall >= least and cpu >= 1 else "**no**"
            out.append(f"| {kind}, {place}: {theirs} / {ours}: wall at least {least}{why}, CPU at least 1 | {what} | "
                       f"{wall:.2f} | {cpu:.2f} | | {met} |")

    def table(self):
        out = ["| where | disk | what | qemu-img wall s | ours wall s | qemu-img / ours | CPU s qemu-img | CPU s ours | CPU ratio | cp wall s |",
               "|---|---|---|---|---|---|---|---|---|---|"]
        for place, what, kind, theirs, ours, ms in self.rows:
            mid = lambda program, key: statistics.median(m[key] for m in ms[program])
            cp = f"{mid('cp', 'wall'):.2f}" if "cp" in ms else ""
            out.append(f"| {place} | {what} | {kind}: {theirs}; {ours} | {mid(theirs, 'wall'):.2f} | {mid(ours, 'wall'):.2f} | "
                       f"{self.ratio(ms, theirs, ours, 'wall'):.2f} | {mid(theirs, 'cpu'):.2f} | {mid(ours, 'cpu'):.2f} | "
                       f"{self.ratio(ms, theirs, ours, 'cpu'):.2f} | {cp} |")
        return out


class Nbd:
    """nbdcopy of a snapshot from the nbdkit plugin and from qemu-nbd: both servers run already, the copy is thrown away
    or goes to a file. CPU is that of the server."""

    TARGETS = (("thrown away", "null:"), ("to a file", None))

    def __init__(self, bench):
        self.b, self.rows = bench, []

    def copied(self, who, path, target):
        socket = f"{self.b.folder}/nbd-{os.getpid()}"
        library = {**os.environ, "LD_LIBRARY_PATH": f"{self.b.build}/.."}
        server = subprocess.Popen(
            ["nbdkit", "-f", "-U", socket, f"{self.b.build}/../nbdkit-qcow2snap-plugin.so", path, "snapshot=s"]
            if who == "ours" else
            ["qemu-nbd", "-t", "-r", "-e", "8", "-k", socket, "-f", "qcow2", "-l", "snapshot.name=s", path], env=library)
        while not os.path.exists(socket):
            if server.poll() is not None:
                raise SystemExit(f"{who}: the NBD server has ended")
            time.sleep(0.01)
        out = target or f"{self.b.folder}/nbd-work.raw"
        start = time.monotonic()
        sh("nbdcopy", f"nbd+unix:///?socket={socket}", out)
        wall = time.monotonic() - start
        server.terminate()
        usage = os.wait4(server.pid, 0)[2]
        server.returncode = 0
        for name in (socket, out):
            if os.path.exists(name):
                os.unlink(name)
        return dict(wall=wall, cpu=usage.ru_utime + usage.ru_stime)

    def run(self, images):
        for program in ("nbdkit", "qemu-nbd", "nbdcopy"):
            if not shutil.which(program):
                print(f"SKIPPED: no {program} here: copies over NBD were not timed")
                return
        for what, _, path in images:
            for name, target in self.TARGETS:
                ms = {"qemu-nbd": [], "ours": []}
                for r in range(self.b.rounds):
                    for who in sorted(ms, reverse=r % 2 == 1):
                        ms[who].append(self.copied(who, path, target))
                self.rows.append((what, name, ms))
                print(f"nbdcopy {what}, {name}: " + ", ".join(
                    f"{p} " + "/".join(f"{m['wall']:.2f}" for m in ms[p]) for p in ms) + " s", flush=True)

    def table(self):
        out = ["| disk | nbdcopy | qemu-nbd wall s | nbdkit qcow2snap wall s | qemu-nbd / ours | CPU s qemu-nbd | CPU s ours |",
               "|---|---|---|---|---|---|---|"]
        for what, name, ms in self.rows:
            mid = lambda who, key: statistics.median(m[key] for m in ms[who])
            ratio = statistics.median(q["wall"] / o["wall"] for q, o in zip(ms["qemu-nbd"], ms["ours"]))
            out.append(f"| {what} | {name} | {mid('qemu-nbd', 'wall'):.2f} | {mid('ours', 'wall'):.2f} | {ratio:.2f} | "
                       f"{mid('qemu-nbd', 'cpu'):.2f} | {mid('ours', 'cpu'):.2f} |")
        return out


class Changes:
    """What changed between two snapshots of 1 TiB, 1% of it; beside it the maps of both, which are all L2 tables."""

    def __init__(self, bench):
        self.b, self.rows = bench, []

    def changed(self, whole, writes):
        def make(path):
            copy(whole, path)
            sh(f"{self.b.build}/ours", path, "create", "old")
            # Zeros over mapped clusters change the tables and need no room.
            subprocess.run(["qemu-io", path], input="\n".join(writes), text=True, check=True, stdout=subprocess.DEVNULL)
            sh(f"{self.b.build}/ours", path, "create", "new")
        return make

    def run(self, whole):
        import random
        clusters = 1 << 24
        stretch = [f"write -z {300 + n}G 1G" for n in range(10)]
        scattered = [f"write -z {c << 16} 64k" for c in sorted(random.Random(1).sample(range(clusters), clusters // 100))]
        random.Random(2).shuffle(scattered)
        for what, writes in (("in one stretch", stretch), ("scattered", scattered)):
            path = self.b.image(f"1T-changed-{what.split()[-1]}", self.changed(whole, writes))
            ms = {"changes": [], "maps": []}
            for r in range(self.b.rounds):
                for verb in sorted(ms, reverse=r % 2 == 1):
                    ms[verb].append(measure([f"{self.b.build}/ours", path, verb, "old", "new"]))
            self.rows.append((what, ms))
            print(f"changes {what}: " + ", ".join(f"{v} " + "/".join(f"{m['wall']:.3f}" for m in ms[v]) for v in ms), flush=True)

    def table(self):
        out = ["| 1% of 1 TiB changed | program | wall s | CPU s | requests | MiB read | peak MiB |", "|---|---|---|---|---|---|---|"]
        for what, ms in self.rows:
            for verb, says in (("changes", "qcow2_snapshot_next_change in a loop"), ("maps", "the maps of both snapshots")):
                mid = lambda key: statistics.median(m[key] for m in ms[verb])
                out.append(f"| {what} | {says} | {mid('wall'):.3f} | {mid('cpu'):.3f} | {mid('requests'):.0f} | "
                           f"{mib(mid('read'))} | {mid('rss') / 1024:.0f} |")
        return out


class AtOnce:
    """20 snapshots of 1 TiB that share most of their tables, 19 of them deleted: at once, and one by one by qemu-img."""

    def __init__(self, bench):
        self.b, self.rows = bench, []

    def make(self, whole):
        def make(path):
            copy(whole, path)
            for n in range(20):
                writes = [f"write -z {(n * 37 + k * 101) % 1024}G 64k" for k in range(8)]
                subprocess.run(["qemu-io", path], input="\n".join(writes), text=True, check=True, stdout=subprocess.DEVNULL)
                sh(f"{self.b.build}/ours", path, "create", f"s{n}")
        return make

    def run(self, whole):
        path = self.b.image("1T-20-snapshots", self.make(whole))
        work, ours, names = f"{self.b.folder}/at-once.qcow2", f"{self.b.build}/ours", [f"s{n}" for n in range(19)]
        self.ms = ms = {"one by ours": [], "19 at once by ours": [], "usage of 19": [], "du of all 20": [], "19 by qemu-img": []}
        tool = f"{self.b.build}/../qcow2-snapshot"
        for n in range(self.b.rounds):
            for what, args in (("one by ours", ["delete", "s0"]), ("19 at once by ours", ["delete-many", *names]), ("usage of 19", ["usage", *names])):
                copy(path, work)
                ms[what].append(measure([ours, work, *args]))
            # Each, the disk and all together.
            ms["du of all 20"].append(measure([tool, "du", "-q", path]))
            if n == 0:      # minutes: once
                copy(path, work)
                each = [measure(["qemu-img", "snapshot", "-d", name, work]) for name in names]
                ms["19 by qemu-img"].append({key: max(m[key] for m in each) if key == "rss" else sum(m[key] for m in each) for key in each[0]})
        os.unlink(work)
        for what, of in ms.items():
            mid = {key: statistics.median(m[key] for m in of) for key in of[0]}
            self.rows.append((what, mid))
            print(f"at once, {what}: {mid['wall']:.3f} s", flush=True)

    def table(self):
        out = ["| 20 snapshots of 1 TiB | wall s | CPU s | requests | MiB read | peak MiB |", "|---|---|---|---|---|---|"]
        for what, m in self.rows:
            out.append(f"| {what} | {m['wall']:.3f} | {m['cpu']:.3f} | {m['requests']:.0f} | {mib(m['read'])} | {m['rss'] / 1024:.0f} |")
        return out


def target(out, what, name, value, good, digits=1):
    out.append(f"| {what} | {name} | {value:.{digits}f} | | | {'yes' if good(value) else '**no**'} |")


def targets_of_sets(diffs, once, out):
    """Those of next_change, delete_many and usage."""
    for what, ms in diffs.rows:
        for key, says in (("read", "bytes"), ("requests", "requests"), ("inside", "time")):
            share = statistics.median(c[key] / max(m[key], 1e-4) for c, m in zip(ms["changes"], ms["maps"]))
            if what == "in one stretch":
                target(out, f"changes, {says}: next_change / all L2 tables of both at most 0.05", f"1T, 1% {what}", share, lambda x: x <= 0.05, 3)
            else:       # every table differs: each is to be read once
                target(out, f"changes, {says}: next_change / all L2 tables of both at most 1.05", f"1T, 1% {what}", share, lambda x: x <= 1.05, 3)
    mid = {what: statistics.median(m["wall"] for m in of) for what, of in getattr(once, "ms", {}).items()}
    if mid:
        name = "1T, 20 snapshots"
        target(out, "wall: qemu-img's chain of 19 / 19 at once at least 400", name, mid["19 by qemu-img"] / mid["19 at once by ours"], lambda x: x >= 400, 0)
        target(out, "wall: 19 at once / one delete of ours at most 1.5", name, mid["19 at once by ours"] / mid["one by ours"], lambda x: x <= 1.5, 2)
        target(out, "wall: du of 20, the disk and all together at most 10 s", name, mid["du of all 20"], lambda x: x <= 10, 1)


class Checks:
    """A check of 1 TiB, in order and in random order, with 1 and with 20 snapshots between which a few clusters were written.
    qemu-img has room for all refcounts: with its own 256 KiB a check in random order takes many times as long."""

    def __init__(self, bench):
        self.b, self.rows = bench, []

    def make(self, whole, gib, snapshots):
        def make(path):
            copy(whole, path)
            for n in range(snapshots):
                sh(f"{self.b.build}/ours", path, "create", f"s{n}")
                writes = [f"write -z {(n * 37 + k * 101) % gib}G 64k" for k in range(8)]
                subprocess.run(["qemu-io", path], input="\n".join(writes), text=True, check=True, stdout=subprocess.DEVNULL)
        return make

    def run(self, what, whole, gib):
        for snapshots in (1, 20):
            path = self.b.image(f"check-{what}-{snapshots}", self.make(whole, gib, snapshots))
            options = f"driver=qcow2,refcount-cache-size={64 << 20},file.driver=file,file.filename={path}"
            ms = {"qemu-img": [], "ours": []}
            for r in range(self.b.rounds):
                for who in sorted(ms, reverse=r % 2 == 1):
                    argv = ["qemu-img", "check", "-q", "--image-opts", options] if who == "qemu-img" else [f"{self.b.build}/ours", path, "check"]
                    ms[who].append(measure(argv))
            self.rows.append((what, snapshots, ms))
            print(f"check {what}, {snapshots} snapshots: " + ", ".join(f"{v} " + "/".join(f"{m['wall']:.2f}" for m in ms[v]) for v in ms), flush=True)
            os.unlink(path)

    def table(self):
        out = ["| image | snapshots | program | wall s | CPU s | MiB read | peak MiB | times faster |", "|---|---|---|---|---|---|---|---|"]
        for what, snapshots, ms in self.rows:
            faster = statistics.median(q["wall"] / o["wall"] for q, o in zip(ms["qemu-img"], ms["ours"]))
            for who, says in (("qemu-img", "qemu-img check"), ("ours", "qcow2_check")):
                mid = lambda key: statistics.median(m[key] for m in ms[who])
                out.append(f"| {what} | {snapshots} | {says} | {mid('wall'):.2f} | {mid('cpu'):.2f} | {mib(mid('read'))} | "
                           f"{mid('rss') / 1024:.0f} | {faster if who == 'ours' else 1:.2f} |")
        return out


class Flatten:
    """Letting go of the backing file: qemu-img fills the disk only, so the snapshots of the second image are ours alone."""
    def __init__(self, bench):
        self.b, self.rows = bench, []

    def overlay(self, snapshots):
        def make(path):
            base = f"{self.b.folder}/flatten-base.raw"
            sh("sh", "-c", f"head -c 1G /dev/urandom > {base}")
            sh("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
            for n in range(snapshots):
                sh("qemu-io", "-c", f"write -q -P {n + 1} {n * 100}M 64k", path)
                sh(f"{self.b.build}/ours", path, "create", f"s{n}")
        return make

    def run(self):
        for snapshots in (0, 10):
            path = self.b.image(f"flatten-{snapshots}", self.overlay(snapshots))
            work, ms = f"{self.b.folder}/flatten-work.qcow2", {"qemu-img": [], "ours": []}
            for r in range(self.b.rounds):
                for who in sorted(ms, reverse=r % 2 == 1):
                    copy(path, work)
                    sh("sync", work)
                    argv = ["qemu-img", "rebase", "-t", "writeback", "-b", "", work] if who == "qemu-img" else [f"{self.b.build}/ours", work, "flatten"]
                    ms[who].append(measure(argv))
                    os.unlink(work)
            self.rows.append((snapshots, ms))
            print(f"flatten {snapshots}: " + ", ".join(f"{v} " + "/".join(f"{m['wall']:.3f}" for m in ms[v]) for v in ms), flush=True)

    def targets(self, out):
        for snapshots, ms in self.rows:
            faster = statistics.median(q["wall"] / o["wall"] for q, o in zip(ms["qemu-img"], ms["ours"]))
            out.append(f'| flatten: qemu-img rebase -b "" / ours above 1 | 1 GiB, {snapshots} snapshots | {faster:.2f} | | | '
                       f"{'yes' if faster > 1 else '**no**'} |")

    def table(self):
        out = ["| 1 GiB over a raw file | program | wall s | CPU s | MiB written | peak MiB | times faster |", "|---|---|---|---|---|---|---|"]
        for snapshots, ms in self.rows:
            faster = statistics.median(q["wall"] / o["wall"] for q, o in zip(ms["qemu-img"], ms["ours"]))
            for who, says in (("qemu-img", 'qemu-img rebase -b ""' + (" (loses the snapshots)" if snapshots else "")), ("ours", "qcow2_flatten")):
                mid = lambda key: statistics.median(m[key] for m in ms[who])
                out.append(f"| {snapshots} snapshots | {says} | {mid('wall'):.2f} | {mid('cpu'):.2f} | {mib(mid('written'))} | "
                           f"{mid('rss') / 1024:.0f} | {faster if who == 'ours' else 1:.2f} |")
        return out


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("build")
    ap.add_argument("out")
    ap.add_argument("--dir", default="/var/tmp/qcow2-bench")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--only", default="")
    ap.add_argument("--quick", action="store_true", help="small images only")
    a = ap.parse_args()
    os.makedirs(a.dir, exist_ok=True)
    b = Bench(a.build, a.dir, a.rounds)
    only = [x for x in a.only.split(",") if x]
    want = lambda name: (not only or name in only) and not (a.quick and name[0] == "L")
    three, two = ["qemu-img", "ours", "floor"], ["ours", "floor"]

    # (short name, what it is, how it is made, programs, caches). A cold cache is left out where
    # qemu-img takes minutes for each round, and has half the rounds elsewhere.
    def preallocated(size):
        return lambda path: sh("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, size)
    cases = [
        ("fresh-10G", "a fresh 10 GiB image", lambda p: sh("qemu-img", "create", "-q", "-f", "qcow2", p, "10G"), ["qemu-img", "ours"], ("warm", "cold")),
        ("100G", "100 GiB mapped (preallocation=metadata)", preallocated("100G"), three, ("warm", "cold")),
        ("1T-2percent", "1 TiB, 2% mapped, in order", b.gen("1024", "order", "2"), three, ("warm",)),
        ("1T", "1 TiB mapped (preallocation=metadata)", preallocated("1T"), three, ("warm", "cold")),
        ("10T", "10 TiB mapped", b.gen("10240", "order", "100"), two, ("warm", "cold")),
        ("16G-random", "16 GiB in random order", b.gen("16", "random", "100"), three, ("warm",)),
        ("1T-random", "1 TiB in random order", b.gen("1024", "random", "100"), two, ("warm", "cold")),
    ]
    out = []
    for name, what, make, programs, caches in cases:
        if not want(name):
            continue
        path = b.image(name, make)
        if "random" in name or "percent" in name:
            b.check(name, path)
        if name in ("fresh-10G", "100G", "1T"):
            b.count_barriers(name, path, programs)
        # Milliseconds, of which the disk's mood is most.
        b.run(name, path, programs, caches[:1], rounds=a.rounds * (5 if name == "fresh-10G" else 1))
        for cache in caches[1:]:
            b.run(name, path, programs, (cache,), rounds=max(1, a.rounds // 2))
    # On a disk the waiting for it is most of a small verb; in memory there is none.
    if want("fresh-10G") and os.path.isdir("/dev/shm"):
        disk, b.folder = b.folder, "/dev/shm"
        name = "fresh-10G-tmpfs"
        path = b.image(name, lambda p: sh("qemu-img", "create", "-q", "-f", "qcow2", p, "10G"))
        b.run(name, path, ["qemu-img", "ours"], rounds=a.rounds * 5)
        os.unlink(path)
        b.folder = disk
    if want("snapshots"):
        path = b.image("65536-snapshots", b.gen("snapshots", "65536"))
        b.run("65536-snapshots", path, ["qemu-img", "ours"], verbs=("open", "list"))
        path = b.image("65535-snapshots", b.gen("snapshots", "65535"))
        b.run("65535-snapshots", path, ["qemu-img", "ours"], verbs=("create", "delete"))
    if want("many"):
        base = b.image("100G", preallocated("100G"))
        work = f"{a.dir}/many.qcow2"
        copy(base, work)
        n = 0
        for upto in (4, 8, 16, 20):
            while n < upto:
                n += 1
                sh(f"{a.build}/ours", work, "create", f"s{n}")
            b.run(f"100G-{upto}-snapshots", work, three, rounds=max(1, a.rounds // 2), verbs=("create", "goto", "delete"))
        os.unlink(work)

    diffs = Changes(b)
    if want("changes"):
        diffs.run(b.image("1T", preallocated("1T")))

    once = AtOnce(b)
    if want("at-once"):
        once.run(b.image("1T", preallocated("1T")))

    checked = Checks(b)
    if want("check"):
        large = ("1T", preallocated("1T"), 1024), ("1T-random", b.gen("1024", "random", "100"), 1024)
        for what, make, gib in (("16G-random", b.gen("16", "random", "100"), 16),) if a.quick else large:
            checked.run(what, b.image(what, make), gib)

    copies = Copies(b)
    if want("copies"):
        copies.run()

    nbd = Nbd(b)
    if want("nbd"):
        nbd.run(copies.images())

    flattened = Flatten(b)
    if want("flatten"):
        flattened.run()

    targets(b, out)
    # Of these the first number is wall time, the second (copies) processor time.
    flattened.targets(out)
    copies.targets(out)
    targets_of_sets(diffs, once, out)
    out.append("\nMedians, and medians of the ratios of each round:\n")
    table(b, out)
    out.append("\nBarriers (fdatasync, counted by strace):\n\n| image | program | " + " | ".join(VERBS) + " |\n|---|---|---|---|---|")
    for name, program, counts in b.barriers:
        out.append(f"| {name} | {program} | " + " | ".join(str(counts[v]) for v in VERBS) + " |")
    if b.checks:
        out.append("\n`qemu-img check` of generated images, and after each verb of ours:\n")
        out.append("; ".join(f"{name}, {what}: {says}" for name, what, says in b.checks) + ".")
    svg = os.path.splitext(a.out)[0] + ".svg"
    picture(b, svg, [("100G", 100), ("1T", 1024), ("10T", 10240)])
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "?")
    version = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    req = []
    requests(b, req)
    marker = "<!-- made by benches/bench.py -->"
    head = open(a.out).read().split(marker)[0] if os.path.exists(a.out) else "# Performance\n\n"
    with open(a.out, "w") as f:
        f.write(head + marker + "\n\n")
        f.write(f"{time.strftime('%Y-%m-%d')}, commit {commit}, {version}, {os.cpu_count()} x {cpu}, {a.rounds} rounds, medians.\n\n")
        f.write(f"![time against size]({os.path.basename(svg)})\n\n")
        f.write("\n".join(out) + "\n\n")
        f.write("Requests and bytes, as the kernel counts system calls of the process (warm cache):\n\n" + "\n".join(req) + "\n")
        if diffs.rows:
            f.write("\nWhat changed between two snapshots (warm cache, tables only):\n\n" + "\n".join(diffs.table()) + "\n")
        if once.rows:
            f.write("\nDeleting many at once (warm cache):\n\n" + "\n".join(once.table()) + "\n")
        if nbd.rows:
            f.write("\nThe disk of a snapshot copied by nbdcopy, from `nbdkit qcow2snap` and from `qemu-nbd -l` (both run already; CPU "
                    "is the server's):\n\n" + "\n".join(nbd.table()) + "\n")
        if checked.rows:
            f.write("\nChecking (warm cache):\n\n" + "\n".join(checked.table()) + "\n")
        if flattened.rows:
            f.write("\nLetting go of a backing file (what is written is on the disk at the end):\n\n" + "\n".join(flattened.table()) + "\n")
        if copies.rows:
            load = " ".join(f"{x:.0f}" for x in os.getloadavg())
            f.write(f"\nCopying the disk of a snapshot out (disk: {a.dir}), warm cache, {a.rounds} rounds (ratios: medians "
                    f"of those of each round); load of the machine at the end {load}:\n\n")
            f.write("\n".join(copies.table()) + "\n")
    print("wrote", a.out)


if __name__ == "__main__":
    sys.exit(main())
