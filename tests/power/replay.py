"""Reads the log of QEMU's blklogwrites driver (the format of Linux's dm-log-writes) and makes of it the disks
that a power cut could leave: everything up to the last flush, and any of what was written since."""
import os
import struct

FLUSH, FUA, DISCARD = 1, 2, 4
PIECE = 4096  # what a file system takes for written whole or not at all


class Entry:
    def __init__(self, at, length, flags, data):
        self.at, self.length, self.flags, self.data = at, length, flags, data


def read(path):
    """Entries in the order in which they were carried out. A log sector with the header, then the data."""
    with open(path, 'rb') as f:
        magic, version, count, sector = struct.unpack('<QQQL', f.read(28))
        assert (magic, version) == (0x6A736677736872, 1), 'not a log of blklogwrites'
        entries = []
        f.seek(sector)
        for _ in range(count):
            at, sectors, flags, _ = struct.unpack('<QQQQ', f.read(sector)[:32])
            has_data = sectors and not flags & DISCARD
            data = f.read(sectors * sector) if has_data else None
            entries.append(Entry(at * sector, sectors * sector, flags, data))
        return entries


def pieces(entry):
    """A request torn where pages end."""
    at, end = entry.at, entry.at + entry.length
    while at < end:
        stop = min(end, (at // PIECE + 1) * PIECE)
        data = entry.data[at - entry.at:stop - entry.at] if entry.data else bytes(stop - at)
        yield at, data
        at = stop


class Disk:
    """The disk, forwards in time. `stable` is a file that holds what no power cut takes away."""

    def __init__(self, entries, stable, size, drop_flushes_from=None):
        self.entries, self.size, self.done = entries, size, 0
        self.file = os.open(stable, os.O_RDWR)
        self.drop = drop_flushes_from  # from here on a flush does nothing

    def flushed(self, end):
        """How many entries are stable in any case, of the first `end`."""
        for n in range(end, 0, -1):
            if self.entries[n - 1].flags & FLUSH and not (self.drop is not None and n > self.drop):
                return n
        return 0 if self.drop is None else min(end, self.drop)

    def cut(self, end, keep, out, offset):
        """Write the disk after the power went with `end` entries done to `out`. `keep`: which of so many
        pieces that are not stable are there nevertheless. Returns how many there were and are."""
        flushed = max(self.flushed(end), self.done)
        for entry in self.entries[self.done:flushed]:
            for at, data in pieces(entry):
                os.pwrite(self.file, data, at)
        self.done = flushed
        at = 0
        while at < self.size:
            try:
                at = os.lseek(self.file, at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                break
            stop = min(os.lseek(self.file, at, os.SEEK_HOLE), self.size)
            os.lseek(out, offset + at, os.SEEK_SET)
            while at < stop:
                at += os.sendfile(out, self.file, at, stop - at)
        loose = []
        for entry in self.entries[flushed:end]:
            for at, data in pieces(entry):
                if at + len(data) <= self.size:
                    loose.append((at, data, bool(entry.flags & FUA)))
        kept = keep(len(loose))
        there = [p for n, p in enumerate(loose) if n in kept or p[2]]
        for at, data, _ in there:
            os.pwrite(out, data, offset + at)
        return len(loose), len(there)


def subset(rng):
    """A way to choose among pieces that are not stable."""
    way = rng.choice(['none', 'one', 'all but one', 'some', 'some', 'few', 'most'])

    def keep(count):
        everything = set(range(count))
        if not count or way == 'none':
            return set()
        if way == 'one':
            return {rng.randrange(count)}
        if way == 'all but one':
            return everything - {rng.randrange(count)}
        share = {'few': 0.2, 'some': 0.5, 'most': 0.8}[way]
        return {n for n in everything if rng.random() < share}

    return keep
