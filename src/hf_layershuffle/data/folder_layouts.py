# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""How images lie in a folder: in folders of classes or of splits, or named by a table that tells their classes."""

import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .class_labels import LABEL_COLUMNS, quoted


logger = logging.getLogger(__name__)
# What `datasets` takes for splits
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)
TABLES = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
IMAGE_COLUMNS = ("image", "img", "pixel_values")
PATH_COLUMNS = ("file_name", "filename", "file", "path", "filepath", "image_path", "image_file")


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and below it, relative to it. Hidden files and folders do not count."""
    paths = (
        Path(parent, name).relative_to(folder)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )
    return [path for path in paths if not any(part.startswith(".") for part in path.parts)]


def find_images(paths: Iterable[str | None], folder: Path, files: Iterable[Path]) -> list[Path | None]:
    """The images that a table names by paths, or None where there is no such image.

    A path is relative to the folder or the current one, or the name alone of one image below the folder. Where no path
    of a table leads to an image, and the folder that it names is not there, it was written elsewhere: its name counts.

    Args:
        paths: The table's paths.
        folder: The folder of the images.
        files: The images below it, relative to it.
    """
    paths = list(paths)
    # No other text: the bytes of an image are too long for a path
    of_images = [path for path in dict.fromkeys(paths) if path and Path(path).suffix.lower() in IMAGE_SUFFIXES]
    found = {path: _as_written(path, folder) for path in of_images}
    are_moved = not any(image for path, image in found.items() if len(Path(path).parts) > 1)
    by_name: dict[str, list[Path]] = {}
    for file in files:
        by_name.setdefault(file.name, []).append(folder / file)
    missing = [path for path, image in found.items() if image is None]
    counts = Counter(Path(path).name for path in missing)
    for path in missing:
        named = by_name.get(Path(path).name, [])
        is_name = len(Path(path).parts) == 1 or (are_moved and not (folder / path).parent.is_dir())
        if is_name and len(named) == counts[Path(path).name] == 1:
            found[path] = named[0]
    return [None if path is None else found.get(path) for path in paths]


def _as_written(path: str, folder: Path) -> Path | None:
    return next((each for each in (folder / path, Path(path)) if each.is_file()), None)


def tables_of_images(folder: Path) -> dict[str, list[Path]]:
    """Tables in a folder by split, where they, and not the names of folders, tell the classes of the images below."""
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLES and path.stem != "metadata"]
    splits = {path: _split_named_in(path.stem) for path in tables}
    if any(splits.values()):  # not of a sample_submission.csv
        tables = [path for path in tables if splits[path]]
    images = image_files(folder) if tables else []
    if _in_class_folders(images):
        tables = _tables_of_other_classes(tables, folder, images)
    if not images or len({path.suffix.lower() for path in tables}) > 1:
        return {}
    found: dict[str, list[Path]] = {}
    for path in tables:
        found.setdefault(splits[path] or "train", []).append(path)
    return found


def _tables_of_other_classes(tables: list[Path], folder: Path, images: list[Path]) -> list[Path]:
    """The CSV files with labels, if they name all images in class folders and tell other classes than these."""
    in_classes = {folder / path for path in _in_class_folders(images)}
    labels: dict[Path, str] = {}
    told = []
    for table in tables:
        pairs = _paths_and_labels(table) if table.suffix.lower() == ".csv" else []
        found = find_images([path for path, _ in pairs], folder, images)
        labels |= {image: label for image, (_, label) in zip(found, pairs) if image in in_classes}
        told += [table] if pairs else []
    if not labels:
        return []
    both = {(image.parent.name, label) for image, label in labels.items()}
    if len(both) == len({name for name, _ in both}) == len({label for _, label in both}):
        return []  # the same classes
    names = quoted(path.name for path in told)
    are_split = any(image.relative_to(folder).parts[0].lower() in SPLIT_OF for image in labels)
    reason = f"name {len(labels)} of the {len(in_classes)} images" if len(labels) < len(in_classes) else ""
    reason = reason or ("name no split" if are_split and not all(_split_named_in(path.stem) for path in told) else "")
    if reason:
        logger.warning("The classes in '%s' are the names of its folders; the labels in %s %s.", folder, names, reason)
        return []
    logger.warning("The classes in '%s' are the labels in %s, not the names of its folders.", folder, names)
    return told


def _paths_and_labels(table: Path) -> list[tuple[str, str]]:
    """What a CSV file holds in the columns of paths and labels that are found by usual names; nothing of another."""
    try:
        with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            path, label = (
                next((header.index(name) for name in names if name in header), None)
                for names in ((*IMAGE_COLUMNS, *PATH_COLUMNS), LABEL_COLUMNS)
            )
            if path is None or label is None:
                return []
            return [(row[path], row[label]) for row in rows if len(row) > max(path, label) and row[label]]
    except (OSError, csv.Error):  # such as a field of a hundred thousand letters
        return []


def _split_named_in(stem: str) -> str | None:
    return next((SPLIT_OF[word] for word in re.split(r"[^a-z]+", stem.lower()) if word in SPLIT_OF), None)


def _in_class_folders(images: list[Path]) -> list[Path]:
    """The images in folders that are not splits, if there are two or more such folders."""
    found = [path for path in images if path.parts[:-1] and path.parent.name.lower() not in SPLIT_OF]
    return found if len({path.parent for path in found}) > 1 else []


def is_one_folder_a_class(folder: Path) -> bool:
    """Whether all images lie in subfolders that are not splits, and no other file tells of their labels."""
    if any(folder.glob("**/metadata.*")):
        return False
    images = image_files(folder)
    classes = {path.parts[0].lower() for path in images}
    return bool(images) and all(len(path.parts) == 2 for path in images) and not classes <= SPLIT_OF.keys()


def split_folders(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders of splits whose images lie in class folders, and those whose images do not.

    There are none of either if there are images elsewhere, or other files that tell of labels.
    """
    images = image_files(folder)
    if any(folder.glob("**/metadata.*")) or not all(path.parts[0].lower() in SPLIT_OF for path in images):
        return [], []
    depths: dict[str, set[int]] = {}
    for path in images:
        depths.setdefault(path.parts[0], set()).add(len(path.parts))
    labelled = [folder / name for name in sorted(depths) if depths[name] == {3}]
    return labelled, [folder / name for name in sorted(depths) if depths[name] == {2}]
