# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are complete or not there.

What is written lies in a hidden folder beside its target, `.<name>.partial-<random>`, until it is complete. The writer
holds a lock in that folder. A process that was killed loses its lock, whatever its number was. So the next writer of
the same target knows which of these folders are left over from the dead, and removes them.
"""

import errno
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import ModuleType


fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # on Windows names are as unique, but leftovers stay
    fcntl = None

DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # or a limit is reached
LOCK_FILE = ".hf-layershuffle.lock"
_REPLACED = ".replaced"


@contextmanager
def temporary_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Makes a hidden folder beside `target`, on the same file system, and removes it at the end.

    The folder of `target` is made if it is missing. What dead writers of the same target left behind is removed.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    lock = None
    try:
        lock = _hold_lock(folder)
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:  # also if Ctrl-C came meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


@contextmanager
def replaced_file(target: str | os.PathLike) -> Iterator[Path]:
    """Gives a path to write to, whose file takes the place of `target` at the end.

    After an exception `target` is as it was.
    """
    target = Path(target)
    with temporary_folder(target) as folder:
        yield folder / target.name
        os.replace(folder / target.name, target)


@contextmanager
def replaced_folder(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write to, which becomes the folder `target` at the end.

    After an exception `target` is as it was.

    Args:
        overwrite: Whether it takes the place of a folder that holds something.

    Raises:
        `ValueError`: if another process is writing `target`, and it may not be replaced.
        `OSError`: if `target` holds something at the end and may not be replaced.
    """
    target = Path(target)
    if not overwrite:
        refuse_second_writer(target)
    with temporary_folder(target) as folder:
        content = folder / target.name
        replaced = folder / _REPLACED
        content.mkdir()
        yield content
        if not target.is_dir():
            content.rename(target)
        elif not any(target.iterdir()):
            target.rmdir()
            content.rename(target)
        elif not overwrite:
            raise OSError(
                f"'{target}' was empty and is not any more: somebody else writes there; choose another folder."
            )
        else:
            target.rename(replaced)
            try:
                content.rename(target)
            except OSError:
                replaced.rename(target)
                raise


@contextmanager
def without_new_folders(folder: str | os.PathLike) -> Iterator[None]:
    """After an exception the folders up to `folder` that were not there are gone again, if they are empty."""
    missing = [each for each in (Path(folder), *Path(folder).parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):
                each.rmdir()
        raise


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Writes a file in UTF-8 completely or not at all, and its folder if that is missing; returns its path."""
    path = Path(path)
    with replaced_file(path) as partial:
        partial.write_bytes(text.encode("utf-8"))
    return path


def remove_leftovers(folder: str | os.PathLike, name: str | None = None) -> None:
    """Removes what writers that are surely dead left in `folder`: all of it, or that of the target `name`."""
    folder = Path(folder)
    for path, target in _partial_folders(folder, name).items():
        lock = _take_dead_lock(path / LOCK_FILE)
        if lock is not None:
            # The writer was killed between the two steps of a replacement: its folder is complete
            if (path / _REPLACED).exists() and (path / target).exists() and not (folder / target).exists():
                (path / target).rename(folder / target)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _partial_folders(folder: Path, name: str | None) -> dict[Path, str]:
    """The hidden folders of writers, dead or living, and their targets."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        target, _, random = path.name.removeprefix(".").rpartition(".partial-")
        is_ours = path.name.startswith(".") and target and random and not path.is_symlink()
        if is_ours and name in (None, target):
            found[path] = target
    return found


def describe_process() -> dict:
    """This process, as others are told of it: its number, machine and time."""
    return {"pid": os.getpid(), "host": platform.node(), "since": datetime.now().isoformat(" ", "seconds")}


def in_use_by(folder: Path, owner_file: Path) -> str:
    """The beginning of a message that names the owner, whom [`describe_process`] described in `owner_file`."""
    try:
        owner = json.loads(owner_file.read_bytes())
        who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # on Windows a locked file cannot be read
        who = "another process"
    return f"'{folder}' is in use by {who}; wait for it"


def refuse_second_writer(target: Path) -> None:
    """Checks that no living process writes the folder `target` by [`replaced_folder`].

    Raises:
        `ValueError`: if one does.
    """
    for path in _partial_folders(target.parent, target.name):
        lock = _take_dead_lock(path / LOCK_FILE)
        if lock is not None:
            os.close(lock)
        elif (path / LOCK_FILE).exists():
            raise ValueError(f"The folder {in_use_by(target, path / LOCK_FILE)}, or choose another.")


def _hold_lock(folder: Path) -> int | None:
    """Puts a locked file into the folder; None, and no file, where files cannot be locked."""
    if fcntl is None:
        return None
    unnamed = folder / f"{LOCK_FILE}.new"
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, json.dumps(describe_process()).encode())
        unnamed.rename(folder / LOCK_FILE)  # under the name that others look at it is locked from the start
    except OSError:  # some network file systems
        os.close(descriptor)
        unnamed.unlink()
        return None
    return descriptor


def _take_dead_lock(path: Path) -> int | None:
    """The lock, if there is one that no living process holds."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
