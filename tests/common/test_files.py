"""What is written is complete or not there, also after a kill, and whatever the number of the process is."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from hf_layershuffle.common.files import (
    LOCK_FILE,
    remove_leftovers,
    replaced_file,
    replaced_folder,
    temporary_folder,
    write_text,
)


def leftovers(folder) -> list:
    return [path for path in folder.iterdir() if ".partial-" in path.name]


def test_a_file_and_a_folder_appear_when_they_are_complete(tmp_path):
    with replaced_file(tmp_path / "new" / "a.txt") as file, replaced_folder(tmp_path / "b") as folder:
        file.write_text("a")
        (folder / "c").write_text("c")
        assert not (tmp_path / "new/a.txt").exists() and not (tmp_path / "b").exists()
    assert (tmp_path / "new/a.txt").read_text() == "a" and os.listdir(tmp_path / "b") == ["c"]
    assert sorted(os.listdir(tmp_path)) == ["b", "new"] and os.listdir(tmp_path / "new") == ["a.txt"]
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_all_is_as_it_was(tmp_path, error):
    write_text(tmp_path / "a", "old")
    (tmp_path / "b").mkdir()
    write_text(tmp_path / "b" / "c", "old")
    for context in (replaced_file(tmp_path / "a"), replaced_folder(tmp_path / "b", overwrite=True)):
        with pytest.raises(type(error)), context as partial:
            write_text(partial / "d" if partial.is_dir() else partial, "half")
            raise error
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "c").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and os.listdir(tmp_path / "b") == ["c"]


def test_a_folder_replaces_another_only_if_told(tmp_path):
    (tmp_path / "a").mkdir()
    with replaced_folder(tmp_path / "a") as folder:
        write_text(folder / "b", "first")
    with pytest.raises(OSError, match="somebody else writes there"), replaced_folder(tmp_path / "a") as folder:
        write_text(folder / "b", "second")
    assert (tmp_path / "a" / "b").read_text() == "first"
    with replaced_folder(tmp_path / "a", overwrite=True) as folder:
        write_text(folder / "c", "third")
    assert os.listdir(tmp_path / "a") == ["c"] and os.listdir(tmp_path) == ["a"]


def test_two_writers_of_the_same_number_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    with replaced_file(tmp_path / "a") as first, replaced_file(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert os.listdir(tmp_path) == ["a"]


WRITER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from files import replaced_folder
with replaced_folder(Path(sys.argv[1], "a"), overwrite=True) as folder:
    (folder / "half").write_text("half")
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def start_writer(folder) -> subprocess.Popen:
    """A process that writes the folder `a`, and has begun."""
    import hf_layershuffle.common.files as files

    module = os.path.dirname(files.__file__)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, folder, module], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline()
    return writer


def test_the_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead, living = start_writer(tmp_path), start_writer(tmp_path)
    try:
        dead.kill()
        dead.wait()
        assert len(leftovers(tmp_path)) == 2
        write_text(tmp_path / "other", "")  # of another target
        assert len(leftovers(tmp_path)) == 2
        with pytest.raises(
            ValueError, match=f"in use by process {living.pid} on .* since 20.*; wait for it, or choose"
        ):
            with replaced_folder(tmp_path / "a"):
                pass
        with replaced_folder(tmp_path / "a", overwrite=True) as folder:
            assert len(leftovers(tmp_path)) == 2  # the living one's and ours
            write_text(folder / "whole", "")
        (left,) = leftovers(tmp_path)
        assert (left / "a" / "half").exists() and os.listdir(tmp_path / "a") == ["whole"]
    finally:
        living.send_signal(signal.SIGKILL)
        living.wait()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "other"]


def test_what_was_killed_between_the_steps_of_a_replacement_is_finished(tmp_path):
    (tmp_path / ".a.partial-xyz" / "a").mkdir(parents=True)
    (tmp_path / ".a.partial-xyz" / ".replaced").mkdir()
    write_text(tmp_path / ".a.partial-xyz" / "a" / "new", "")
    (tmp_path / ".a.partial-xyz" / LOCK_FILE).touch()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["new"]


def test_ctrl_c_while_a_written_file_is_cleared_up_leaves_nothing(tmp_path, monkeypatch):
    rmtree, stopped = shutil.rmtree, []

    def stopped_once(*args, **kwargs):
        if not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        rmtree(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", stopped_once)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_nobody_elses_files_are_taken_for_leftovers(tmp_path):
    outside = tmp_path / "outside"
    (outside / "a").mkdir(parents=True)
    (outside / LOCK_FILE).touch()
    folder = tmp_path / "folder"
    for name in (".a.partial-mine", "a.partial-b", ".a.partial-", ".partial-b"):
        (folder / name / "a").mkdir(parents=True)  # without our lock
    (folder / "a.partial-b" / LOCK_FILE).touch()
    (folder / ".a.partial-link").symlink_to(outside)
    before = sorted(os.listdir(folder))
    remove_leftovers(folder)
    assert sorted(os.listdir(folder)) == before and (outside / "a").exists()


def test_where_files_cannot_be_locked_nothing_is_taken_for_dead(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with temporary_folder(tmp_path / "a") as folder:
        assert os.listdir(folder) == []
        remove_leftovers(tmp_path)
        assert folder.exists()
    assert os.listdir(tmp_path) == []
