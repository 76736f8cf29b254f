# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Output folders into which one process at a time writes."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .files import describe_process, in_use_by, remove_leftovers, write_text


logger = logging.getLogger(__name__)
# Hidden, and so not published
LOCK_FILE = ".in_use.lock"
OWNER_FILE = ".in_use.json"
CLAIM_FILES = {LOCK_FILE, OWNER_FILE}


@contextmanager
def claimed_folder(folder: Path, remedy: str = "choose another --output_dir") -> Iterator[Path]:
    """Holds an output folder for this process alone.

    The folder is made if it is missing, and removed again if it was made and stays empty. What dead writers left in it
    is removed.

    Args:
        remedy: What the messages advise where the folder cannot be had.

    Raises:
        `ValueError`: if another process writes into the folder, or it is a file.
        `OSError`: if the folder cannot be written into.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"The output folder '{folder}' cannot be made: '{there}' is a file; {remedy}.")
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(lock, folder, remedy)
        remove_leftovers(folder)
        write_text(folder / OWNER_FILE, json.dumps(describe_process()) + "\n")
    except OSError as error:
        _give_back(lock, [folder / name for name in CLAIM_FILES if lock.is_locked], new)
        raise OSError(
            f"The output folder '{folder}' cannot be written into ({error.strerror or error}); {remedy}."
        ) from error
    try:
        yield folder
    finally:
        _give_back(lock, [folder / name for name in CLAIM_FILES], new)


def _give_back(lock: FileLock, files: list[Path], new_folders: list[Path]) -> None:
    """Ends a claim, and removes its files and those of the new folders that are empty."""
    for file in files:
        file.unlink(missing_ok=True)  # while the lock is held: who waits for it makes a new one
    lock.release()
    for path in new_folders:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _acquire(lock: FileLock, folder: Path, remedy: str) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"The folder {in_use_by(folder, folder / OWNER_FILE)}, or {remedy}.") from None
    except NotImplementedError:
        logger.warning("'%s' is on a file system without locks; take care that no other run writes there.", folder)
