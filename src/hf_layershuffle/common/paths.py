# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Paths that stay where they belong.

No file from outside a model's folder gets into a result, and no path of this machine.
"""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath


def inside(folder: str | os.PathLike, name: str | os.PathLike) -> Path:
    """The path of the file `name` in `folder`, which may be missing.

    A snapshot of the Hub's cache consists of links to the `blobs` beside it; these count as inside.

    Raises:
        `ValueError`: if the name, or where its links lead, is not in the folder.
    """
    folder = Path(folder)
    text = os.fspath(name) if isinstance(name, (str, os.PathLike)) else None
    if not text or "\0" in text or _is_outside(PurePosixPath(text)) or _is_outside(PureWindowsPath(text)):
        raise ValueError(f"{name!r} is not the name of a file inside '{folder}'; give one without '..' or a root.")
    path = folder / text
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ValueError(f"'{path}' is a link that leads nowhere ({error}); remove it.") from error
    if not real.is_relative_to(folder.resolve()) and not _is_blob(folder.absolute(), real):
        raise ValueError(
            f"'{path}' is a link to '{real}', which is outside of the folder. Files from elsewhere are not taken "
            "into a result: put a copy of the file in the place of the link, if it belongs there."
        )
    return path


def check_links(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Checks by [`inside`] that each of the files is in the folder.

    Raises:
        `ValueError`: if one is not in the folder.
    """
    for name in names:
        inside(folder, name)


def public_name(name_or_path: str | os.PathLike | None) -> str | None:
    """A Hub id as it is; of a folder its name, without the path to it."""
    if not name_or_path:
        return None
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if path.exists():
        return path.resolve().name or text
    is_path = path.is_absolute() or PureWindowsPath(text).drive or text.startswith((".", "~")) or text.count("/") > 1
    return (PureWindowsPath(text).name or text) if is_path else text


def public_dataset(name_or_path: str | os.PathLike | None) -> str | None:
    """The name of a dataset for a record.

    A folder in the current directory is named `./path`: a command started there finds it again, and nobody takes it
    for a Hub id. All else is named as by [`public_name`].
    """
    if name_or_path and "/" in os.fspath(name_or_path) and Path(name_or_path).expanduser().is_dir():
        path = public_path(name_or_path)
        return f"./{path}" if "/" in path else path
    return public_name(name_or_path)


def public_path(path: str | os.PathLike) -> str:
    """A path for a record that others read: relative to here if it lies here, else its name alone."""
    real = Path(path).expanduser().resolve()
    here = Path.cwd().resolve()
    return real.relative_to(here).as_posix() if real.is_relative_to(here) and real != here else real.name


def _is_outside(path: PurePosixPath | PureWindowsPath) -> bool:
    return bool(path.anchor) or ".." in path.parts


def _is_blob(folder: Path, real: Path) -> bool:
    """Whether `folder` is in a snapshot of the Hub's cache, `<cache>/models--org--name/snapshots/<commit>`, and `real`
    is one of its blobs. Blobs lie in the repository, or where all repositories of the cache share them."""
    for parent in (folder, *folder.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and "--" in repository.name:
            stores = [repository.resolve() / "blobs", repository.parent.resolve() / "blobs"]
            return any(real.is_relative_to(store) for store in stores)
    return False
