from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def qemu_img(*arguments: object) -> str:
    """Run qemu-img; its standard output."""
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", *arguments, str(path)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image of 4 MiB with 128 KiB of 0x11 at its start."""
    if shutil.which("qemu-img") is None:
        pytest.skip("SKIPPED: no qemu-img here: nothing was compared with it")
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_io(path, "write -q -P 0x11 0 128k")
    return path
