# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What commands write and print: output folders, names and tables. Nothing heavy is imported at module level."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import typer


if TYPE_CHECKING:
    from rich.table import Table

SPACE_NEEDED = 2**20  # bytes; more than reports and pictures take


@contextmanager
def new_folder(output_dir: Path) -> Iterator[Path]:
    """A temporary folder that becomes `output_dir` at the end, so that nothing half-written is ever there.

    Raises:
        `ValueError`: if `output_dir` is there and not an empty folder.
    """
    from hf_layershuffle.common.files import remove_leftovers, replaced_folder

    output_dir = Path(output_dir)
    check_can_be_written(output_dir)
    remove_leftovers(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"The output folder '{output_dir}' is there already and not empty; choose another --output_dir."
        )
    with replaced_folder(output_dir) as folder:
        yield folder


def short_name(name_or_path: str) -> str:
    """The name for tables and files: a folder's last part, or a Hub id."""
    path = Path(name_or_path)
    return path.resolve().name if path.is_dir() else name_or_path


def print_table(table: "Table") -> None:
    """Prints a table as wide as the terminal, or, into a file, as wide as the table."""
    from rich.console import Console

    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(width=160, markup=False)
    console.print(table)


def distinct_names(names_or_paths: list[str]) -> list[str]:
    """Short names, or the names as they were given if two short ones were the same.

    Raises:
        `ValueError`: if a model is given twice.
    """
    places = {Path(name).resolve() if Path(name).is_dir() else name for name in names_or_paths}
    if len(places) < len(names_or_paths):
        raise ValueError(f"A model is given twice: {', '.join(names_or_paths)}.")
    names = [short_name(name) for name in names_or_paths]
    return names if len(set(names)) == len(names) else list(names_or_paths)


def distinct_folders(output_dir: Path, names: list[str]) -> list[Path]:
    """A folder in `output_dir` for each name, numbered from 2 where it is another one's."""
    found: list[Path] = []
    for name in names:
        short = name.strip("./").replace("/", "--") or Path(name).resolve().name
        numbered = (output_dir / (short if number == 1 else f"{short}-{number}") for number in count(1))
        found.append(next(folder for folder in numbered if folder not in found))
    return found


def check_can_be_written(output_dir: Path) -> None:
    """Finds before any work that an output folder cannot be made or written, and leaves nothing behind.

    Raises:
        `ValueError`: if it, or what it is to stand in, is a file.
        `OSError`: if nothing can be written there, or the disk is full.
    """
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(
            f"The output folder '{output_dir}' cannot be made: '{there}' is a file; choose another --output_dir."
        )
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(SPACE_NEEDED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"The output folder '{output_dir}' cannot be written ({error.strerror or error}); choose another "
            "--output_dir, or make room."
        ) from error


@contextmanager
def shown_before(table: "Table", output_dir: Path) -> Iterator[None]:
    """Prints the table, and then runs the block that saves it.

    So what was computed is seen even where it cannot be saved.

    Raises:
        `OSError`: if it cannot.
    """
    print_table(table)
    try:
        yield
    except OSError as error:
        raise OSError(f"The numbers above could not be saved in '{output_dir}': {error}") from error
    print(f"Saved to {output_dir}")


def claim(context: typer.Context, *folders: Path, **kwargs: str) -> None:
    """Claims folders for this process until the command ends; see [`~hf_layershuffle.common.claims.claimed_folder`].

    Raises:
        `ValueError`: if another process writes into one of them.
    """
    from hf_layershuffle.common.claims import claimed_folder

    for folder in dict.fromkeys(folders):
        context.with_resource(claimed_folder(folder, **kwargs))


def check_output_dir(folder: Path, holds: str) -> Path:
    """Refuses an output folder that holds anything but an earlier output of the same kind.

    Args:
        folder: The output folder.
        holds: Name of a file by which such an output is told.

    Raises:
        `ValueError`: if the folder is not empty and holds no such file.
    """
    folder = Path(folder)
    check_can_be_written(folder)
    is_used = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if is_used and not any(folder.rglob(holds)):
        raise ValueError(
            f"The output folder '{folder}' is not empty and holds no '{holds}'; choose another --output_dir."
        )
    return folder
