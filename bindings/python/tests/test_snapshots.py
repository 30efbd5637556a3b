from __future__ import annotations

import errno
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import qcow2_snapshot
from conftest import qemu_img, qemu_io
from qcow2_snapshot import Flags, Outcome, Stage


def test_what_is_made_here_is_what_qemu_img_lists(disk: Path) -> None:
    date = datetime(2026, 1, 2, 3, 4, 5, 678000, timezone.utc)
    with qcow2_snapshot.open(disk, write=True) as image:
        assert image.create("first", date=date, vm_clock_nsec=7) == "1"
        assert image.create("second", id="own") == "own"
        listed = image.snapshots
    info = json.loads(qemu_img("info", "--output=json", disk))["snapshots"]
    assert [(s["id"], s["name"]) for s in info] == [("1", "first"), ("own", "second")]
    assert (info[0]["date-sec"], info[0]["date-nsec"]) == (int(date.timestamp()), 678000000)
    assert listed[0] == qcow2_snapshot.Snapshot("1", "first", date, 0, 7, None, 4 << 20)
    assert abs(listed[1].date - datetime.now(timezone.utc)) < timedelta(minutes=1)


def test_revert_brings_back_the_bytes(disk: Path) -> None:
    with qcow2_snapshot.open(disk, write=True) as image:
        image.create("before")
    qemu_io(disk, "write -q -P 0x22 64k 128k")
    with qcow2_snapshot.open(disk, write=True) as image:
        assert image.read(64 << 10, 4) == b"\x22" * 4
        image.revert("before")
        assert image.last_outcome is Outcome.DONE
        assert image.read(64 << 10, 4) == b"\x11" * 4
        assert image.read(128 << 10, 4) == bytes(4)
    assert "No errors" in qemu_img("check", disk)


def test_delete_takes_all_or_none(disk: Path) -> None:
    with qcow2_snapshot.open(disk, write=True) as image:
        for name in "abc":
            image.create(name)
        with pytest.raises(FileNotFoundError):
            image.delete("a", "nobody")
        assert [s.name for s in image.snapshots] == ["a", "b", "c"]
        image.delete("a", "3")
        assert [s.name for s in image.snapshots] == ["b"]
        image.delete_exact(name="b")
        assert image.snapshots == []


def test_rename_keeps_everything_else(disk: Path) -> None:
    with qcow2_snapshot.open(disk, write=True) as image:
        image.create("old")
        (before,) = image.snapshots
        image.rename("old", "new")
        (after,) = image.snapshots
    assert after.name == "new"
    assert (after.id, after.date, after.disk_size) == (before.id, before.date, before.disk_size)


def test_a_snapshot_is_read_without_reverting(disk: Path) -> None:
    with qcow2_snapshot.open(disk, write=True) as image:
        image.create("1000")
    qemu_io(disk, "write -q -P 0x33 0 64k")
    with qcow2_snapshot.open(disk) as image:
        assert image.read(0, 1) == b"\x33"
        image.show("1000")
        buffer = bytearray(6)
        image.readinto((64 << 10) - 2, memoryview(buffer)[1:5])
        assert buffer == b"\0\x11\x11\x11\x11\0"


def test_extents_are_those_of_qemu_img_map(disk: Path) -> None:
    with qcow2_snapshot.open(disk) as image:
        ours = [(e.start, e.length, bool(e.flags & Flags.DATA), e.host_offset) for e in image.extents()]
    theirs = json.loads(qemu_img("map", "--output=json", disk))
    assert ours == [(e["start"], e["length"], e["data"], e.get("offset")) for e in theirs]


def test_changes_name_what_was_written(disk: Path) -> None:
    with qcow2_snapshot.open(disk, write=True) as image:
        image.create("before")
    qemu_io(disk, "write -q -P 0x44 66k 1k", "write -q -P 0x11 0 4k", "write -q -P 1 1M 64k")
    with qcow2_snapshot.open(disk) as image:
        by_tables = list(image.changes("before"))
        exact = list(image.changes("before", compare=True))
        assert list(image.changes(None, None)) == []
    assert [(c.start, c.length) for c in by_tables] == [(0, 128 << 10), (1 << 20, 64 << 10)]
    assert [(c.start, c.length) for c in exact] == [(66 << 10, 1 << 10), (1 << 20, 64 << 10)]
    assert by_tables[0].to_flags & Flags.DATA and not by_tables[1].from_flags & Flags.DATA


def test_usage_says_what_a_delete_frees(disk: Path) -> None:
    with qcow2_snapshot.open(disk, write=True) as image:
        image.create("all")
    qemu_io(disk, "write -q -P 0x55 0 64k")
    with qcow2_snapshot.open(disk, write=True) as image:
        held = image.usage("all")
        # One data cluster, the L2 table and the L1 table.
        assert held.exclusive == 3 << 16 and held.tables == 2 << 16
        assert image.usage().referenced == 4 << 16


def test_check_finds_nothing_in_a_sound_image(disk: Path) -> None:
    with qcow2_snapshot.open(disk, check=True) as image:
        result = image.check()
    theirs = json.loads(qemu_img("check", "--output=json", disk))
    assert result.clean and result.findings == ()
    assert result.image_end_offset == theirs["image-end-offset"]
    assert result.allocated_clusters == theirs["allocated-clusters"]


def test_flatten_keeps_the_snapshot(disk: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", overlay)
    with qcow2_snapshot.open(overlay, write=True) as image:
        image.create("inside")
        assert image.flatten_estimate() >= 128 << 10
        image.flatten()
    disk.unlink()
    with qcow2_snapshot.open(overlay) as image:
        image.show("inside")
        assert image.read(0, 128 << 10) == b"\x11" * (128 << 10)


def test_names_that_are_not_utf8_come_back_as_they_are(disk: Path) -> None:
    name = b"caf\xe9 \xf0\x9f\x98\x80".decode("utf-8", "surrogateescape")
    with qcow2_snapshot.open(disk, write=True) as image:
        image.create(name)
        assert image.snapshots[0].name == name
        image.revert(name)


class TestFailures:
    def test_errno_words_and_path(self, tmp_path: Path) -> None:
        missing = tmp_path / "nowhere"
        with pytest.raises(FileNotFoundError) as caught:
            qcow2_snapshot.open(missing)
        assert caught.value.errno == errno.ENOENT and caught.value.filename == str(missing)
        assert caught.value.strerror

    def test_an_image_in_use(self, disk: Path) -> None:
        with qcow2_snapshot.open(disk, write=True):
            with pytest.raises(BlockingIOError):
                qcow2_snapshot.open(disk, write=True)

    def test_a_read_only_image_does_not_change(self, disk: Path) -> None:
        with qcow2_snapshot.open(disk) as image, pytest.raises(PermissionError):
            image.create("no")

    def test_a_closed_image(self, disk: Path) -> None:
        image = qcow2_snapshot.open(disk)
        image.close()
        image.close()
        with pytest.raises(ValueError):
            image.snapshots

    def test_values_that_do_not_fit(self, disk: Path) -> None:
        with qcow2_snapshot.open(disk, write=True) as image:
            with pytest.raises(ValueError):
                image.create("x" * 256)
            with pytest.raises(ValueError):
                image.create("nul\0")
            with pytest.raises(OverflowError):
                image.create("x", vm_state_size=-1)
            with pytest.raises(ValueError):
                image.create("x", date=datetime(1969, 1, 1, tzinfo=timezone.utc))
            with pytest.raises(OSError):
                image.read(4 << 20, 1)
            with pytest.raises(OverflowError):
                image.read(1 << 63, 1)
            assert image.snapshots == []

    def test_the_end_of_64_bits_is_a_size(self, disk: Path) -> None:
        with qcow2_snapshot.open(disk, write=True) as image, pytest.raises(OSError) as caught:
            image.create("x", vm_state_size=2**64 - 1)
        assert caught.value.errno == errno.EINVAL


class TestProgress:
    def test_it_is_told_all_stages(self, disk: Path) -> None:
        seen: list[Stage] = []
        with qcow2_snapshot.open(disk, write=True) as image:
            image.progress = lambda stage, done, total: seen.append(stage)
            image.create("x")
        assert set(seen) == set(Stage) and seen == sorted(seen)

    def test_it_cancels(self, disk: Path) -> None:
        with qcow2_snapshot.open(disk, write=True) as image:
            image.progress = lambda stage, done, total: False
            with pytest.raises(OSError) as caught:
                image.create("x")
            assert caught.value.errno == errno.ECANCELED
            assert image.last_outcome is Outcome.UNCHANGED
            image.progress = None
            image.create("y")

    def test_an_exception_comes_out_of_the_verb(self, disk: Path) -> None:
        def interrupt(stage: Stage, done: int, total: int) -> None:
            raise KeyboardInterrupt

        with qcow2_snapshot.open(disk, write=True) as image:
            image.progress = interrupt
            with pytest.raises(KeyboardInterrupt):
                image.create("x")
            assert image.snapshots == []


def test_threads_share_an_image(disk: Path) -> None:
    import threading

    failures: list[BaseException] = []

    def reader() -> None:
        try:
            for _ in range(50):
                assert image.read(0, 4096) == b"\x11" * 4096
        except BaseException as error:
            failures.append(error)

    with qcow2_snapshot.open(disk) as image:
        threads = [threading.Thread(target=reader) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
