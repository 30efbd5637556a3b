#!/usr/bin/env python3
"""List the snapshots of an image through the C library, with nothing but ctypes.

    list.py LIBRARY IMAGE       LIBRARY: a path, or libqcow2_snapshot.so.0 if it is installed
"""
import ctypes
import sys
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_uint32, c_uint64, c_void_p


class SnapshotInfo(ctypes.Structure):
    """Qcow2SnapshotInfo. The 408 bytes of 2014 would need QCOW2_O_COMPAT_2_1 at open."""

    _fields_ = [
        ("id_str", c_char * 128),
        ("name", c_char * 256),
        ("vm_state_size", c_uint64),
        ("date_sec", c_uint32),
        ("date_nsec", c_uint32),
        ("vm_clock_nsec", c_uint64),
        ("icount", c_uint64),
    ]


def load(path):
    """The library, with what its functions take and return: without it, ctypes cuts pointers to int."""
    lib = ctypes.CDLL(path)
    handle, error = c_void_p, c_void_p
    for name, result, *arguments in [
        ("qcow2_open", c_int, c_char_p, c_int, POINTER(handle), POINTER(error)),
        ("qcow2_close", c_int, handle),
        ("qcow2_snapshot_list", c_int, handle, POINTER(POINTER(SnapshotInfo))),
        ("qcow2_snapshot_list_free", None, POINTER(SnapshotInfo)),
        ("qcow2_error_get_pretty", c_char_p, error),
        ("qcow2_error_free", None, error),
        ("qcow2_last_error", c_char_p, handle),
    ]:
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def snapshots(lib, image):
    """A list of (id, name), or OSError with the library's words."""
    bs, err, table = c_void_p(), c_void_p(), POINTER(SnapshotInfo)()
    ret = lib.qcow2_open(image.encode("utf-8", "surrogateescape"), 0, byref(bs), byref(err))
    if ret < 0:
        words = lib.qcow2_error_get_pretty(err).decode()
        lib.qcow2_error_free(err)
        raise OSError(-ret, words)
    try:
        count = lib.qcow2_snapshot_list(bs, byref(table))
        if count < 0:
            raise OSError(-count, lib.qcow2_last_error(bs).decode())
        return [
            (table[i].id_str.decode("utf-8", "replace"), table[i].name.decode("utf-8", "replace"))
            for i in range(count)
        ]
    finally:
        lib.qcow2_snapshot_list_free(table)
        lib.qcow2_close(bs)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    lib = load(sys.argv[1])
    try:
        for ident, name in snapshots(lib, sys.argv[2]):
            print(ident, name, sep="\t")
    except OSError as e:
        sys.exit(f"{sys.argv[2]}: {e.strerror}")


if __name__ == "__main__":
    main()
