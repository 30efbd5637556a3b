from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import qcow2_snapshot
from qcow2_snapshot import _library


def import_with(library: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QCOW2_SNAPSHOT_LIBRARY": library}
    environment["PYTHONPATH"] = str(Path(qcow2_snapshot.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", "import qcow2_snapshot"],
        env=environment, capture_output=True, text=True,
    )


def test_every_function_that_is_declared_is_there() -> None:
    library = _library.load()
    for symbol in _library._SIGNATURES:
        getattr(library, symbol[len("qcow2_"):])


def test_the_structs_have_the_sizes_of_the_header() -> None:
    import ctypes

    sizes = {
        _library.SnapshotInfo: 416, _library.Extent: 64, _library.Change: 56, _library.Usage: 64,
        _library.CheckResult: 128, _library.SnapshotLayout: 88,
    }
    for struct, size in sizes.items():
        assert ctypes.sizeof(struct) == size


def test_a_name_that_is_wrong_is_an_error() -> None:
    done = import_with("/nowhere/libqcow2_snapshot.so.0")
    assert done.returncode == 1 and "QCOW2_SNAPSHOT_LIBRARY" in done.stderr


def test_another_library_is_refused() -> None:
    done = import_with("libc.so.6")
    assert done.returncode == 1 and "is not libqcow2_snapshot" in done.stderr


def test_another_abi_is_refused(tmp_path: Path) -> None:
    source, library = tmp_path / "old.c", tmp_path / "old.so"
    source.write_text('const char *qcow2_version(void) { return "1.0.0"; }\n')
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    done = import_with(str(library))
    assert done.returncode == 1 and "is version 1.0.0" in done.stderr
