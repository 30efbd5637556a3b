"""Reads the log of QEMU's blklogwrites driver (the format of Linux's dm-log-writes) and makes of it the disks
that a power cut could leave: everything up to the last flush, and any of what was written since."""
import os
import struct
from collections import namedtuple

FLUSH, FUA, DISCARD = 1, 2, 4
PIECE = 4096  # what a file system takes for written whole or not at all

Entry = namedtuple('Entry', 'at length flags data')


def read(path):
    """The requests, in the order in which they were done: of each a sector that describes it, and its data."""
    with open(path, 'rb') as f:
        magic, version, count, sector = struct.unpack('<QQQL', f.read(28))
        assert (magic, version) == (0x6A736677736872, 1), 'not a log of blklogwrites'
        entries = []
        f.seek(sector)
        for _ in range(count):
            at, sectors, flags = struct.unpack('<QQQ', f.read(sector)[:24])
            data = None if flags & DISCARD else f.read(sectors * sector)
            entries.append(Entry(at * sector, sectors * sector, flags, data))
        return entries


def pieces(entry):
    """A request torn where pages end. What is discarded reads as zeros."""
    at, end = entry.at, entry.at + entry.length
    while at < end:
        stop = min(end, (at // PIECE + 1) * PIECE)
        yield at, bytes(stop - at) if entry.data is None else entry.data[at - entry.at:stop - entry.at]
        at = stop


class Disk:
    """The disk, forwards in time. `file` holds what no power cut takes away."""

    def __init__(self, entries, path):
        self.entries, self.done, self.size = entries, 0, os.path.getsize(path)
        self.file = os.open(path, os.O_RDWR)

    def flushed(self, end):
        """So many of the first `end` entries are stable in any case."""
        return next((n for n in range(end, 0, -1) if self.entries[n - 1].flags & FLUSH), 0)

    def cut(self, end, stable, keep, out, offset):
        """Write to `out` the disk after a power cut when `end` entries are done and `stable` of them stable.
        `keep` says which of so many pieces of the others are there."""
        for entry in self.entries[self.done:stable]:
            for at, data in pieces(entry):
                os.pwrite(self.file, data, at)
        self.done = max(self.done, stable)
        at = 0
        while at < self.size:
            try:
                at = os.lseek(self.file, at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                break
            stop = os.lseek(self.file, at, os.SEEK_HOLE)
            os.lseek(out, offset + at, os.SEEK_SET)
            while at < stop:
                at += os.sendfile(out, self.file, at, stop - at)
        loose = [(e.flags & FUA, at, data) for e in self.entries[self.done:end] for at, data in pieces(e)]
        kept = keep(len(loose))
        for n, (fua, at, data) in enumerate(loose):
            if fua or n in kept:
                os.pwrite(out, data, offset + at)


def subset(rng):
    """A way to choose among pieces that are not stable."""
    way = rng.choice(['none', 'one', 'all but one', 0.2, 0.5, 0.5, 0.8])

    def keep(count):
        if not count or way == 'none':
            return set()
        if way == 'one':
            return {rng.randrange(count)}
        if way == 'all but one':
            return set(range(count)) - {rng.randrange(count)}
        return {n for n in range(count) if rng.random() < way}

    return keep
