"""Bytes from one file into another, in each of the ways, and where the system answers as it rarely does."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from hf_layershuffle.common import file_ranges
from hf_layershuffle.common.file_ranges import copy_range


CONTENT = bytes(range(256)) * 5000  # more than one buffer
WAYS = ("copy_file_range", "sendfile", "read and write")


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    """Only this way and those after it."""
    for name in WAYS[: WAYS.index(request.param)]:
        monkeypatch.delattr(os, name)
    if request.param != "read and write" and not hasattr(os, request.param):
        pytest.skip(f"there is no os.{request.param} here")
    return request.param


def copied(source: Path, target: Path, start: int, num_bytes: int, before: bytes = b"head") -> tuple[bytes, list[int]]:
    """What is in the target then, and the steps that were told."""
    steps: list[int] = []
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as written:
        written.write(before)
        copy_range(read, start, num_bytes, written, steps.append)
        written.write(b"tail")
    return target.read_bytes(), steps


@pytest.mark.parametrize(("start", "num_bytes"), [(0, len(CONTENT)), (13, 1_100_001), (len(CONTENT) - 1, 1), (7, 0)])
def test_a_range_is_appended(source, tmp_path, way, start, num_bytes):
    found, steps = copied(source, tmp_path / "target", start, num_bytes)
    assert found == b"head" + CONTENT[start : start + num_bytes] + b"tail"
    assert sum(steps) == num_bytes


def test_steps_are_seen(source, tmp_path, way, monkeypatch):
    monkeypatch.setattr(file_ranges, "STEP", 100_000)
    found, steps = copied(source, tmp_path / "target", 5, 450_000)
    assert found == b"head" + CONTENT[5:450_005] + b"tail"
    assert len(steps) >= 5 and max(steps) <= 100_000


@pytest.mark.parametrize("name", ["copy_file_range", "sendfile"])
def test_short_copies_go_on_where_they_ended(source, tmp_path, monkeypatch, name):
    real = getattr(os, name)
    calls = []

    def short(first, second, third, fourth):
        calls.append(name)
        if name == "copy_file_range":  # (source, target, count, offset)
            return real(first, second, min(third, 70_001), fourth)
        return real(first, second, third, min(fourth, 70_001))  # (target, source, offset, count)

    if name == "sendfile":
        monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(os, name, short)
    found, _ = copied(source, tmp_path / "target", 3, 500_000)
    assert found == b"head" + CONTENT[3:500_003] + b"tail"
    assert len(calls) == 8


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
@pytest.mark.parametrize("after", [0, 300_000], ids=["at once", "in the middle"])
def test_where_the_system_cannot_the_next_way_goes_on(source, tmp_path, monkeypatch, number, after):
    real, done = os.copy_file_range, []

    def until(source, target, count, offset):
        if sum(done) >= after:
            raise OSError(number, os.strerror(number))
        done.append(real(source, target, min(count, 150_000), offset))
        return done[-1]

    def sendfile(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", until)
    monkeypatch.setattr(os, "sendfile", sendfile)
    found, steps = copied(source, tmp_path / "target", 3, 500_000)
    assert found == b"head" + CONTENT[3:500_003] + b"tail"
    assert sum(steps) == 500_000


def test_a_system_that_copies_nothing_without_an_error(source, tmp_path, monkeypatch):
    """As copy_file_range does of some file systems that are no real ones."""
    monkeypatch.setattr(os, "copy_file_range", lambda *args: 0)
    found, _ = copied(source, tmp_path / "target", 3, 500_000)
    assert found == b"head" + CONTENT[3:500_003] + b"tail"


def test_a_source_that_is_too_short_is_an_error(source, tmp_path, way):
    with pytest.raises(OSError, match="source' became shorter while it was read"):
        copied(source, tmp_path / "target", 1000, len(CONTENT))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_a_full_disk_is_not_tried_in_another_way(source, tmp_path, monkeypatch, number):
    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", full)
    monkeypatch.setattr(os, "sendfile", lambda *args: pytest.fail("it went on"))
    with pytest.raises(OSError) as raised:
        copied(source, tmp_path / "target", 0, 1000)
    assert raised.value.errno == number


def test_a_disk_that_is_full_in_truth(source, way):
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("there is no /dev/full here")
    with open(source, "rb", buffering=0) as read, open("/dev/full", "wb", buffering=0) as full:
        with pytest.raises(OSError) as raised:
            copy_range(read, 0, 1000, full)
    assert raised.value.errno == errno.ENOSPC


def test_across_file_systems(source, tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or os.stat(other).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system here")
    folder = other / f"layershuffle-{os.getpid()}"
    folder.mkdir()
    try:
        found, _ = copied(source, folder / "target", 11, 700_000)
        assert found == b"head" + CONTENT[11:700_011] + b"tail"
        back, _ = copied(folder / "target", tmp_path / "back", 4, 700_000)
        assert back == b"head" + CONTENT[11:700_011] + b"tail"
    finally:
        shutil.rmtree(folder)
