"""Internal snapshots of qcow2 images, in this process and byte for byte as QEMU makes them.

    import qcow2_snapshot

    with qcow2_snapshot.open("disk.qcow2", write=True) as image:
        image.create("before-upgrade")
        for snapshot in image.snapshots:
            print(snapshot.id, snapshot.name, snapshot.date)
        image.revert("before-upgrade")

Sizes and offsets are bytes. Failures are ``OSError`` with the library's errno and words
(``FileNotFoundError``, ``PermissionError``, ``BlockingIOError`` for an image in use, ...).
Names and IDs are ``str``; bytes in them that are not UTF-8 are kept as in file names
(``surrogateescape``). A *state* of the disk is named by a snapshot's ID, else its name;
``None`` is the active disk.
"""

from __future__ import annotations

import ctypes
import enum
import os
import threading
from ctypes import byref, c_char_p, c_int64, c_uint64, c_void_p
from dataclasses import dataclass, fields
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Iterator, Optional, Union

from . import _library

__all__ = [
    "Change", "CheckResult", "Extent", "Flags", "Image", "Outcome", "Snapshot", "Stage", "Usage",
    "library_version", "open",
]

_RDWR = 0x0002
_CHECK = 0x1000
_FORCE_SHARE = 0x01000000
_NO_LOCK = 0x02000000
_NO_DISCARD = 0x04000000
_NO_FLUSH = 0x0200
_NO_BACKING = 0x20000000

_COMPARE = 0x1
_FIX = {None: 0, "leaks": 0x1, "all": 0x3}
_TO_THE_END = 2**63 - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

_lib = _library.load()

Path = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]
Buffer = Union[bytearray, memoryview, Any]


class Flags(enum.IntFlag):
    """What a run of bytes is made of."""

    DATA = 0x01  #: bytes are stored for it
    ZERO = 0x02  #: it reads as zeros
    OFFSET_VALID = 0x04  #: ``host_offset`` says where
    ALLOCATED = 0x10  #: in the file at ``depth``, nothing shows through from behind
    COMPRESSED = 0x80  #: stored compressed
    BEYOND = 0x100  #: past the end of that state of the disk (changes only)


class Stage(enum.IntEnum):
    """What a verb is at, for a progress function."""

    CHECK = 1  #: it looks; nothing has been written
    PREPARE = 2  #: it writes what nothing refers to yet
    RECLAIM = 3  #: it has taken effect and cannot be cancelled any more


class Outcome(enum.IntEnum):
    """What the last changing verb did to the image."""

    NONE = 0  #: no verb yet
    UNCHANGED = 1  #: disk and snapshots are what they were
    DONE = 2  #: it took effect
    UNKNOWN = 3  #: before or after: open the image again to know


#: Called with the stage, what is done and the total in bytes of tables; ``False`` cancels the verb.
Progress = Callable[[Stage, int, int], Optional[bool]]


@dataclass(frozen=True)
class Snapshot:
    """One entry of the snapshot table."""

    id: str
    name: str
    date: datetime  #: UTC, to the microsecond
    vm_state_size: int  #: bytes; 0: a snapshot of the disk only
    vm_clock_nsec: int  #: nanoseconds on the guest's clock
    icount: int | None  #: instructions under record/replay
    disk_size: int  #: bytes


@dataclass(frozen=True)
class Extent:
    """A run of bytes of one kind: an entry of ``qemu-img map``."""

    start: int
    length: int
    flags: Flags
    depth: int  #: the file that has it: 0 the image, 1 its backing file, ...
    host_offset: int | None  #: where it stands in ``filename``
    filename: str | None


@dataclass(frozen=True)
class Change:
    """A run of bytes in which two states (may) differ."""

    start: int
    length: int
    from_flags: Flags
    to_flags: Flags


@dataclass(frozen=True)
class Usage:
    """What a set of states holds, in bytes of whole clusters."""

    referenced: int  #: all that the set refers to, tables included
    exclusive: int  #: of these, what nothing else refers to: deleting the set frees it
    tables: int  #: of ``exclusive``: L1 and L2 tables
    vm_state: int  #: of ``referenced``: what only VM state occupies
    allocated: int  #: of ``referenced``: what the host's file system has really allocated


@dataclass(frozen=True)
class CheckResult:
    """The numbers of ``qemu-img check``, and its findings in words."""

    corruptions: int
    leaks: int
    check_errors: int
    corruptions_fixed: int
    leaks_fixed: int
    image_end_offset: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int
    findings: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Nothing is wrong."""
        return not (self.corruptions or self.leaks or self.check_errors)


def library_version() -> str:
    """The version of the C library, as ``"0.2.0"``."""
    return _text(_lib.version())


def open(
    path: Path,
    write: bool = False,
    *,
    force_share: bool = False,
    check: bool = False,
    lock: bool = True,
    discard: bool = True,
    flush: bool = True,
    backing: bool = True,
) -> Image:
    """Open an image; close it by ``with`` or :meth:`Image.close`.

    ``write``: for changing it. ``force_share``: read beside a running guest. ``check``: accept an
    image that needs repair (:meth:`Image.check`). ``lock=False``: take no image lock, keeping
    others out is then your duty. ``discard=False``: punch no holes. ``flush=False``: never wait for
    stable storage. ``backing=False``: never open a backing file (for images that are not trusted).
    """
    flags = 0
    for wanted, flag in (
        (write, _RDWR), (force_share, _FORCE_SHARE), (check, _CHECK), (not lock, _NO_LOCK),
        (not discard, _NO_DISCARD), (not flush, _NO_FLUSH), (not backing, _NO_BACKING),
    ):
        flags |= flag if wanted else 0
    return Image(path, flags)


class Image:
    """One open image, from :func:`open`. Threads may share it: calls wait for each other."""

    def __init__(self, path: Path, flags: int) -> None:
        self._handle: c_void_p | None = None
        self._lock = threading.RLock()
        self._raised: BaseException | None = None
        self.path = os.fsdecode(path)
        #: Called while a verb is at work; see :data:`Progress`.
        self.progress: Progress | None = None
        handle, err = c_void_p(), c_void_p()
        ret = _lib.open(os.fsencode(path), flags, byref(handle), byref(err))
        if ret < 0:
            raise self._error(ret, err)
        self._handle = handle
        # Always there, so that Ctrl-C cancels a verb; kept, since C calls it.
        self._hook = _library.ProgressFunc(self._on_progress)
        self._call("set_progress", self._hook, None)

    # Life and errors

    def close(self) -> None:
        """Close the image. Nothing is written. A second time is fine."""
        with self._lock:
            if self._handle is None:
                return
            ret = _lib.close(self._handle)
            if ret == -16:  # EBUSY: from inside a call on this image; it stays open
                raise OSError(-ret, "The image is at work", self.path)
            self._handle = None
            if ret < 0:
                raise OSError(-ret, os.strerror(-ret), self.path)

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            _lib.close(self._handle)
            self._handle = None

    def __repr__(self) -> str:
        state = "closed" if self._handle is None else "open"
        return f"<qcow2_snapshot.Image {self.path!r}, {state}>"

    def _open_handle(self) -> c_void_p:
        if self._handle is None:
            raise ValueError("The image is closed")
        return self._handle

    def _error(self, ret: int, err: c_void_p | None) -> OSError:
        if err:
            words = _text(_lib.error_get_pretty(err))
            _lib.error_free(err)
        else:
            message = _lib.last_error(self._handle)
            words = _text(message) if message else os.strerror(-ret)
        return OSError(-ret, words, self.path)

    def _call(self, name: str, *arguments: object, errp: bool = False) -> int:
        """Call a function; -errno becomes an OSError, an exception of a callback goes first."""
        with self._lock:
            handle, err = self._open_handle(), c_void_p()
            ret: int = getattr(_lib, name)(handle, *arguments, *((byref(err),) if errp else ()))
            raised, self._raised = self._raised, None
            error = self._error(ret, err if errp else None) if ret < 0 else None
        if raised is not None:
            raise raised
        if error is not None:
            raise error
        return ret

    def _on_progress(self, _opaque: object, stage: int, done: int, total: int) -> int:
        try:
            if self.progress is not None and self.progress(Stage(stage), done, total) is False:
                return 1
        except BaseException as exception:  # goes on in _call: it must not pass through C
            self._raised = self._raised or exception
            return 1
        return 0

    # Snapshots

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots, in the order of the image's table."""
        table = ctypes.POINTER(_library.SnapshotInfo)()
        with self._lock:
            count = self._call("snapshot_list", byref(table))
            try:
                return [self._snapshot(i, table[i]) for i in range(count)]
            finally:
                _lib.snapshot_list_free(table)

    def _snapshot(self, index: int, info: _library.SnapshotInfo) -> Snapshot:
        layout = _library.SnapshotLayout()
        self._call("snapshot_layout", index, byref(layout), errp=True)
        moment = timedelta(seconds=info.date_sec, microseconds=info.date_nsec // 1000)
        return Snapshot(
            id=_text(layout.id),
            name=_text(layout.name),
            date=_EPOCH + moment,
            vm_state_size=info.vm_state_size,
            vm_clock_nsec=info.vm_clock_nsec,
            icount=None if info.icount == 2**64 - 1 else info.icount,
            disk_size=layout.disk_size,
        )

    def create(
        self,
        name: str,
        *,
        id: str = "",
        date: datetime | None = None,
        vm_state_size: int = 0,
        vm_clock_nsec: int = 0,
        icount: int | None = None,
    ) -> str:
        """Take a snapshot of the disk as it is now. Returns its ID.

        ``id``: the next free number if empty. ``date``: now if ``None``; one without a time zone is
        local time. ``vm_state_size``: bytes that a virtual machine has saved behind the disk.
        """
        moment = (date or datetime.now(timezone.utc)).astimezone(timezone.utc) - _EPOCH
        seconds = moment // timedelta(seconds=1)
        if not 0 <= seconds < 2**32:
            raise ValueError("The date is not between 1970 and 2106")
        info = _library.SnapshotInfo(
            id_str=_fitting(id, 127, "ID"),
            name=_fitting(name, 255, "name"),
            vm_state_size=_uint64(vm_state_size),
            date_sec=seconds,
            date_nsec=moment.microseconds * 1000,
            vm_clock_nsec=_uint64(vm_clock_nsec),
            icount=2**64 - 1 if icount is None else _uint64(icount),
        )
        self._call("snapshot_create", byref(info))
        return _text(info.id_str)

    def revert(self, snapshot: str) -> None:
        """Make the disk what the snapshot with this ID, else this name, holds; its size too."""
        self._call("snapshot_goto", _bytes(snapshot))

    def delete(self, *snapshots: str) -> None:
        """Delete snapshots, named by ID or else by name: all of them or, on a failure, none."""
        self._call("snapshot_delete_many", _texts(snapshots), len(snapshots), errp=True)

    def delete_exact(self, *, id: str | None = None, name: str | None = None) -> None:
        """Delete the snapshot with this ID, the first with this name, or the one with both."""
        self._call("snapshot_delete", _optional(id), _optional(name), errp=True)

    def rename(self, snapshot: str, new_name: str) -> None:
        """Give the snapshot with this ID, else this name, another name."""
        self._call("snapshot_rename", _bytes(snapshot), _bytes(new_name), errp=True)

    def show(self, snapshot: str | None = None, *, name: str | None = None) -> None:
        """Read from a snapshot instead of the disk from now on (read-only images).

        ``snapshot``: an ID, else a name. ``name``: only a name.
        """
        if snapshot is None or name is not None:
            self._call("snapshot_load_tmp", _optional(snapshot), _optional(name), errp=True)
            return
        try:
            self._call("snapshot_load_tmp", _bytes(snapshot), None, errp=True)
        except FileNotFoundError:
            self._call("snapshot_load_tmp", None, _bytes(snapshot), errp=True)

    def reload(self) -> None:
        """Load the snapshot table from the image again."""
        self._call("read_snapshots")

    @property
    def last_outcome(self) -> Outcome:
        """What the last changing verb did; needed after a failure only."""
        with self._lock:
            return Outcome(_lib.last_outcome(self._open_handle()))

    @property
    def remark(self) -> str | None:
        """What there is to know about how the last call was done, usually nothing."""
        with self._lock:
            message = _lib.last_error(self._open_handle())
            return _text(message) if message else None

    # Reading

    @property
    def size(self) -> int:
        """Bytes of the disk now seen, as a guest would."""
        with self._lock:
            size: int = _lib.getlength(self._open_handle())
        if size < 0:
            raise OSError(-size, os.strerror(-size), self.path)
        return size

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes of the disk (or the snapshot shown) at ``offset``."""
        buffer = bytearray(length)
        self.readinto(offset, buffer)
        return bytes(buffer)

    def readinto(self, offset: int, buffer: Buffer) -> None:
        """Fill a writable buffer (``bytearray``, ``memoryview``, array, ...) from ``offset`` on."""
        self._fill("pread", offset, buffer)

    def read_vm_state(self, offset: int, length: int) -> bytes:
        """``length`` bytes of the VM state at ``offset`` from its start."""
        buffer = bytearray(length)
        self._fill("load_vmstate", offset, buffer)
        return bytes(buffer)

    def _fill(self, function: str, offset: int, buffer: Buffer) -> None:
        with memoryview(buffer) as view, view.cast("B") as plain:
            if len(plain) == 0:
                self._call(function, c_int64(_int64(offset)), None, 0, errp=True)
                return
            room = (ctypes.c_char * len(plain)).from_buffer(plain)
            try:
                self._call(function, c_int64(_int64(offset)), room, len(plain), errp=True)
            finally:
                del room  # it holds the buffer

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """What the disk now seen is made of: the entries of ``qemu-img map``."""
        at, end = offset, self.size if length is None else min(offset + length, self.size)
        while at < end:
            found = _library.Extent()
            self._call("block_status", c_int64(at), c_int64(end - at), byref(found), errp=True)
            if found.length == 0:
                return
            flags = Flags(found.flags)
            yield Extent(
                start=found.start,
                length=found.length,
                flags=flags,
                depth=found.depth,
                host_offset=found.host_offset if flags & Flags.OFFSET_VALID else None,
                filename=None if found.filename is None else os.fsdecode(found.filename),
            )
            at += found.length

    def changes(
        self,
        from_state: str | None,
        to_state: str | None = None,
        *,
        compare: bool = False,
        offset: int = 0,
        length: int | None = None,
    ) -> Iterator[Change]:
        """The runs in which ``to_state`` may differ from ``from_state``; in no run: equal for certain.

        By the tables alone, whose runs are clusters; with ``compare`` the bytes are read and the
        runs are exact, in sectors of 512 bytes.
        """
        flags = _COMPARE if compare else 0
        at, end = offset, _TO_THE_END if length is None else offset + length
        while at < end:
            found = _library.Change()
            self._call(
                "snapshot_next_change", _optional(from_state), _optional(to_state),
                c_int64(at), c_int64(end - at), flags, byref(found), errp=True,
            )
            if found.length == 0:
                return
            yield Change(
                found.start, found.length, Flags(found.from_flags), Flags(found.to_flags)
            )
            at = found.start + found.length

    def usage(self, *snapshots: str) -> Usage:
        """What these snapshots hold, taken together; without any, the active disk."""
        found = _library.Usage()
        self._call("snapshot_usage", _texts(snapshots), len(snapshots), byref(found), errp=True)
        return Usage(
            found.referenced, found.exclusive, found.tables, found.vm_state, found.allocated
        )

    # The image as a whole

    def check(self, repair: str | None = None) -> CheckResult:
        """Check the image as ``qemu-img check`` does; ``repair``: ``"leaks"`` or ``"all"``."""
        if repair not in _FIX:
            raise ValueError("repair is None, 'leaks' or 'all'")
        found, findings = _library.CheckResult(), []

        def report(_opaque: object, finding: bytes) -> None:
            findings.append(_text(finding))

        self._call(
            "check", _FIX[repair], byref(found), _library.CheckFunc(report), None, errp=True
        )
        names = (f.name for f in fields(CheckResult) if f.name != "findings")
        return CheckResult(**{n: getattr(found, n) for n in names}, findings=tuple(findings))

    def flatten(self) -> None:
        """Copy in what the backing file shows, in the disk and in every snapshot, and let go of it."""
        self._call("flatten", errp=True)

    def flatten_estimate(self) -> int:
        """The most bytes that :meth:`flatten` would copy."""
        found = c_uint64()
        self._call("flatten_estimate", byref(found), errp=True)
        return found.value


def _bytes(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise ValueError("A name or an ID cannot contain a NUL")
    return data


def _fitting(text: str, most: int, what: str) -> bytes:
    data = _bytes(text)
    if len(data) > most:
        raise ValueError(f"The {what} is longer than {most} bytes")
    return data


def _optional(text: str | None) -> bytes | None:
    return None if text is None else _bytes(text)


def _texts(names: tuple[str, ...]) -> Any:
    return (c_char_p * len(names))(*map(_bytes, names))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _uint64(value: int) -> int:
    # ctypes would cut it without a word.
    if not 0 <= value < 2**64:
        raise OverflowError(f"{value} does not fit 64 bits")
    return value


def _int64(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise OverflowError(f"{value} does not fit 64 bits")
    return value
