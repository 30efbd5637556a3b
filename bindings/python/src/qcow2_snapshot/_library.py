"""The C library: finding it, and what its functions take and return (include/qcow2_snapshot.h)."""

from __future__ import annotations

import ctypes
import os
import re
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any, Iterator

#: Versions of the library that this module knows how to call: from the first up to, but not
#: including, the second. The soname libqcow2_snapshot.so.0 stands for all of them.
ABI = ((0, 2), (1, 0))

SONAME = "libqcow2_snapshot.so.0"


class SnapshotInfo(Structure):
    """Qcow2SnapshotInfo: 416 bytes."""

    _fields_ = [
        ("id_str", c_char * 128),
        ("name", c_char * 256),
        ("vm_state_size", c_uint64),
        ("date_sec", c_uint32),
        ("date_nsec", c_uint32),
        ("vm_clock_nsec", c_uint64),
        ("icount", c_uint64),
    ]


class Extent(Structure):
    """Qcow2Extent."""

    _fields_ = [
        ("start", c_uint64),
        ("length", c_uint64),
        ("host_offset", c_uint64),
        ("flags", c_uint32),
        ("depth", c_uint32),
        ("filename", c_char_p),
        ("reserved", c_uint64 * 3),
    ]


class Change(Structure):
    """Qcow2Change."""

    _fields_ = [
        ("start", c_uint64),
        ("length", c_uint64),
        ("from_flags", c_uint32),
        ("to_flags", c_uint32),
        ("reserved", c_uint64 * 4),
    ]


class Usage(Structure):
    """Qcow2Usage."""

    _fields_ = [
        ("referenced", c_uint64),
        ("exclusive", c_uint64),
        ("tables", c_uint64),
        ("vm_state", c_uint64),
        ("allocated", c_uint64),
        ("reserved", c_uint64 * 3),
    ]


class CheckResult(Structure):
    """Qcow2CheckResult."""

    _fields_ = [
        ("corruptions", c_uint64),
        ("leaks", c_uint64),
        ("check_errors", c_uint64),
        ("corruptions_fixed", c_uint64),
        ("leaks_fixed", c_uint64),
        ("image_end_offset", c_uint64),
        ("total_clusters", c_uint64),
        ("allocated_clusters", c_uint64),
        ("fragmented_clusters", c_uint64),
        ("compressed_clusters", c_uint64),
        ("reserved", c_uint64 * 6),
    ]


class SnapshotLayout(Structure):
    """Qcow2SnapshotLayout."""

    _fields_ = [
        ("id", c_char_p),
        ("name", c_char_p),
        ("l1_table_offset", c_uint64),
        ("disk_size", c_uint64),
        ("vm_state_size", c_uint64),
        ("l1_size", c_uint32),
        ("extra_data_size", c_uint32),
        ("unknown_extra_data", c_void_p),
        ("reserved", c_uint64 * 4),
    ]


ProgressFunc = CFUNCTYPE(c_int, c_void_p, c_int, c_uint64, c_uint64)
CheckFunc = CFUNCTYPE(None, c_void_p, c_char_p)

# Handles and error objects are opaque; without argtypes ctypes would cut pointers to int.
_HANDLE = c_void_p
_ERRP = POINTER(c_void_p)
_TEXTS = POINTER(c_char_p)

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "qcow2_version": (c_char_p,),
    "qcow2_open": (c_int, c_char_p, c_int, POINTER(_HANDLE), _ERRP),
    "qcow2_open_fd": (c_int, c_int, c_int, POINTER(_HANDLE), _ERRP),
    "qcow2_close": (c_int, _HANDLE),
    "qcow2_read_snapshots": (c_int, _HANDLE),
    "qcow2_snapshot_create": (c_int, _HANDLE, POINTER(SnapshotInfo)),
    "qcow2_snapshot_goto": (c_int, _HANDLE, c_char_p),
    "qcow2_snapshot_delete": (c_int, _HANDLE, c_char_p, c_char_p, _ERRP),
    "qcow2_snapshot_delete_many": (c_int, _HANDLE, _TEXTS, c_size_t, _ERRP),
    "qcow2_snapshot_rename": (c_int, _HANDLE, c_char_p, c_char_p, _ERRP),
    "qcow2_snapshot_list": (c_int, _HANDLE, POINTER(POINTER(SnapshotInfo))),
    "qcow2_snapshot_list_free": (None, POINTER(SnapshotInfo)),
    "qcow2_snapshot_layout": (c_int, _HANDLE, c_size_t, POINTER(SnapshotLayout), _ERRP),
    "qcow2_snapshot_load_tmp": (c_int, _HANDLE, c_char_p, c_char_p, _ERRP),
    "qcow2_snapshot_next_change": (
        c_int, _HANDLE, c_char_p, c_char_p, c_int64, c_int64, c_int, POINTER(Change), _ERRP,
    ),
    "qcow2_snapshot_usage": (c_int, _HANDLE, _TEXTS, c_size_t, POINTER(Usage), _ERRP),
    "qcow2_check": (c_int, _HANDLE, c_int, POINTER(CheckResult), CheckFunc, c_void_p, _ERRP),
    "qcow2_flatten": (c_int, _HANDLE, _ERRP),
    "qcow2_flatten_estimate": (c_int, _HANDLE, POINTER(c_uint64), _ERRP),
    "qcow2_getlength": (c_int64, _HANDLE),
    "qcow2_pread": (c_int, _HANDLE, c_int64, c_void_p, c_size_t, _ERRP),
    "qcow2_load_vmstate": (c_int, _HANDLE, c_int64, c_void_p, c_size_t, _ERRP),
    "qcow2_block_status": (c_int, _HANDLE, c_int64, c_int64, POINTER(Extent), _ERRP),
    "qcow2_set_progress": (c_int, _HANDLE, ProgressFunc, c_void_p),
    "qcow2_last_error": (c_char_p, _HANDLE),
    "qcow2_last_outcome": (c_int, _HANDLE),
    "qcow2_error_get_pretty": (c_char_p, c_void_p),
    "qcow2_error_free": (None, c_void_p),
}


class Library:
    """The loaded library. Its functions are attributes, without the prefix ``qcow2_``."""

    def __init__(self, path: str) -> None:
        self._cdll = ctypes.CDLL(path)
        self.path = path
        try:
            text = self.version().decode("ascii")
        except AttributeError:
            raise ImportError(f"{path} is not libqcow2_snapshot: it has no qcow2_version()") from None
        match = re.match(r"(\d+)\.(\d+)", text)
        version = (int(match[1]), int(match[2])) if match else (0, 0)
        if not ABI[0] <= version < ABI[1]:
            raise ImportError(
                f"{path} is version {text} of libqcow2_snapshot; this module works with "
                f"{ABI[0][0]}.{ABI[0][1]} and newer, up to {ABI[1][0]}.{ABI[1][1]}. "
                "Install a fitting one, or name it in QCOW2_SNAPSHOT_LIBRARY"
            )

    def __getattr__(self, name: str) -> Any:
        symbol = f"qcow2_{name}"
        result, *arguments = _SIGNATURES[symbol]
        try:
            function = getattr(self._cdll, symbol)
        except AttributeError:
            raise AttributeError(
                f"{self.path} has no {symbol}(): it is older than this module"
            ) from None
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)
        return function


def _places() -> Iterator[str]:
    """Where the library may be, the first that exists is taken."""
    named = os.environ.get("QCOW2_SNAPSHOT_LIBRARY")
    if named:
        # Only this one: a wrong name is an error, not a reason to look elsewhere.
        yield named
        return
    beside = Path(__file__).parent / SONAME
    if beside.exists():
        yield str(beside)
        return
    yield SONAME  # where the system's loader finds it: ldconfig, LD_LIBRARY_PATH
    for folder in ("/usr/local/lib", "/usr/lib"):
        path = Path(folder) / SONAME
        if path.exists():
            yield str(path)


def load() -> Library:
    """Load the library: ``QCOW2_SNAPSHOT_LIBRARY``, else beside this module, else installed."""
    tried = []
    for place in _places():
        try:
            return Library(place)
        except OSError as error:
            tried.append(f"{place}: {error}")
    raise ImportError(
        f"{SONAME} cannot be loaded ({'; '.join(tried)}). Install it, or name the file "
        "in the environment variable QCOW2_SNAPSHOT_LIBRARY"
    )
