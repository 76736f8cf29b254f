# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The splits of a dataset as they are stored: on the Hub, or in a folder whose layout is told from its files."""

import glob
import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DownloadMode,
    Features,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import metadata_load

from ..checkpoints.hub_errors import check_hub_answers
from ..checkpoints.locations import is_local
from .array_datasets import load_digits_dataset, load_idx_folder
from .class_labels import quoted, unformatted
from .folder_layouts import (
    IMAGE_SUFFIXES,
    SPLIT_OF,
    TABLES,
    image_files,
    is_one_folder_a_class,
    split_folders,
    tables_of_images,
)
from .python_docs import load_python_docs


logger = logging.getLogger(__name__)
_BUILDER_ARGUMENTS = ("data_dir", "data_files", "cache_dir", "features", "revision", "token", "storage_options")


# Datasets that every installation has, by name
BUILT_IN = {"digits": load_digits_dataset, "python-docs": load_python_docs}
_TO_PASS = {
    "image": "'digits', a folder of Parquet files, images or IDX files, or a dataset id on the Hub",
    "text": "'python-docs', a CSV, JSON or Parquet file or a folder of such files, what `save_to_disk` wrote, or a "
    "dataset id on the Hub",
}


def is_found_by_name(dataset_name: str) -> bool:
    """Whether a recorded name is that of a dataset which is built in, lies here, or may be on the Hub."""
    if dataset_name in BUILT_IN or Path(dataset_name).expanduser().exists():
        return True
    return dataset_name.count("/") == 1 and not dataset_name.startswith((".", "/", "~"))


def load_splits(
    dataset_name: str, config_name: str | None, load_kwargs: dict, input_kind: str = "image"
) -> tuple[dict[str, Dataset], list[str]]:
    """All splits that a dataset has, and the names of those of a folder that were left out since they have no labels.

    Args:
        dataset_name, config_name, load_kwargs: As for [`load_image_datasets`].
        input_kind: What is looked for, "image" or "text", for messages.

    Raises:
        `ValueError`: if there is no such dataset, or it cannot be read.
    """
    if dataset_name in BUILT_IN:
        return {"train": BUILT_IN[dataset_name]()}, []
    folder = Path(dataset_name).expanduser()
    is_table = folder.suffix.lower() in TABLES and folder.is_file()
    if not folder.is_dir() and not is_table and is_local(dataset_name):
        raise ValueError(f"There is no dataset folder '{dataset_name}'.")
    if folder.is_dir() and any(folder.glob("*-idx3-ubyte*")):
        return load_idx_folder(folder), []
    unlabelled: list[str] = []
    try:
        if is_table:
            loaded = _load_each({"train": [folder.resolve()]}, load_kwargs)
        elif not folder.is_dir():
            if not datasets.config.HF_HUB_OFFLINE:
                check_hub_answers(dataset_name)
            loaded = load_dataset(dataset_name, config_name, **load_kwargs)
        elif (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            loaded = load_from_disk(str(folder))
        else:
            loaded, unlabelled = _load_folder(folder, config_name, load_kwargs)
    except Exception as error:  # the errors of a dozen readers and of the network share no base class
        raise ValueError(
            f"Dataset '{dataset_name}' cannot be loaded: {first_line(error).rstrip('.!')}. Pass "
            f"{_TO_PASS[input_kind]}."
        ) from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    for split in splits.values():
        if not isinstance(split, Dataset):
            raise ValueError(
                f"Dataset '{dataset_name}' was loaded as a stream, which has no length and cannot be shuffled or "
                "held out; load it without `streaming=True`."
            )
    if folder.is_dir() and all(split.info.builder_name == "imagefolder" for split in splits.values()):
        _check_all_images_load(folder, splits, unlabelled)
    return {name: unformatted(split) for name, split in splits.items()}, unlabelled


def first_line(error: Exception) -> str:
    """The first line of an error's text; of an error in a dataset's files, that of its cause."""
    while isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _load_folder(folder: Path, config_name: str | None, load_kwargs: dict) -> tuple[Dataset | DatasetDict, list[str]]:
    """The splits of a folder, and the names of those that were left out."""
    tables = tables_of_images(folder)
    if tables:
        return _load_each(tables, load_kwargs), []
    if is_one_folder_a_class(folder):
        # With a pattern, or the names of some files and classes (train, test11.png) would be taken for splits
        return _load_image_folders({"train": [folder.resolve()]}, load_kwargs), []
    labelled, unlabelled = split_folders(folder)
    if labelled and unlabelled:
        logger.warning(
            "The images in %s lie in no class folders, so they have no labels and are left out.",
            ", ".join(f"'{path}'" for path in unlabelled),
        )
        folders: dict[str, list[Path]] = {}
        for path in labelled:
            folders.setdefault(SPLIT_OF[path.name.lower()], []).append(path.resolve())
        return _load_image_folders(folders, load_kwargs), [SPLIT_OF[path.name.lower()] for path in unlabelled]
    return _load_by_format(folder, config_name, load_kwargs), []


def _load_image_folders(folders: dict[str, list[Path]], load_kwargs: dict) -> Any:
    files = {split: [str(Path(glob.escape(str(path)), "**")) for path in paths] for split, paths in folders.items()}
    return load_dataset("imagefolder", drop_labels=False, **{"data_files": files} | load_kwargs)


def files_of_folder(folder: Path) -> dict[str, Any]:
    """Arguments for `datasets` by which it finds the files of a folder whose path it would take for a pattern.

    Raises:
        `ValueError`: for such a folder whose README.md says which files are of which split: that would not be read.
    """
    base = glob.escape(str(folder.resolve()))
    if base == str(folder.resolve()):
        return {}
    readme = folder / "README.md"
    if readme.is_file() and "configs" in (metadata_load(readme) or {}):
        raise ValueError(
            f"'{readme}' names the files of each split (`configs`), and the path of '{folder}' holds one of the "
            "characters *, ? and [, by which no file would be found; rename the folder, or remove `configs`."
        )
    found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    return {"data_files": {split: escaped(paths) for split, paths in found.items()}}


def escaped(paths: Iterable[str | Path]) -> list[str]:
    """Paths of files as `datasets` takes them, which would find nothing by a name such as `cats [old].csv`."""
    return [str(path) if "://" in str(path) else glob.escape(str(path)) for path in paths]


def _load_by_format(folder: Path, config_name: str | None, load_kwargs: dict) -> Any:
    """Loads as `load_dataset` does, but with the class names of each Parquet file and never from an older cache."""
    if not {"data_dir", "data_files"} & set(load_kwargs):
        load_kwargs = {**files_of_folder(folder), **load_kwargs}
    arguments = {name: load_kwargs[name] for name in _BUILDER_ARGUMENTS if name in load_kwargs}
    builder = load_dataset_builder(str(folder), config_name, **arguments)
    files = {split: [Path(path) for path in paths] for split, paths in (builder.config.data_files or {}).items()}
    if _is_older(Path(builder.cache_dir) / "dataset_info.json", files):
        load_kwargs = {"download_mode": DownloadMode.REUSE_CACHE_IF_EXISTS} | load_kwargs
    if "split" not in load_kwargs and all(
        path.suffix.lower() == ".parquet" for path in itertools.chain(*files.values())
    ):
        features = [features_of_files(paths) for paths in files.values()]
        if any(each != features[0] for each in features):  # `datasets` would read all splits with those of the first
            return _load_each(files, load_kwargs)
    return load_dataset(str(folder), config_name, **load_kwargs)


def _load_each(files: dict[str, list[Path]], load_kwargs: dict) -> DatasetDict:
    """Splits that need not have the same columns and classes, from tables of one kind."""
    splits = {}
    for split, paths in files.items():
        arguments = {"split": split} | load_kwargs | {"data_files": {split: escaped(paths)}}
        splits[split] = load_dataset(TABLES[paths[0].suffix.lower()], **arguments)
    return DatasetDict(splits)


def _is_older(cache: Path, files: dict[str, list[Path]]) -> bool:
    """Whether a file was replaced after a cache was written.

    `datasets` looks at modification times only, which copying may preserve. Image files do not count: the cache holds
    their names, not what is in them.
    """
    if not cache.exists():
        return False
    changes = [
        path.stat().st_ctime_ns
        for path in itertools.chain(*files.values())
        if path.suffix.lower() not in IMAGE_SUFFIXES and path.exists()
    ]
    return max(changes, default=0) > cache.stat().st_mtime_ns


def features_of_files(paths: list[Path]) -> Features:
    """The features of the Parquet files of a split, of which no more is read than what they say of their columns.

    Raises:
        `ValueError`: if their classes differ.
    """
    first = Features()
    schema = None
    for path in paths:
        previous, schema = schema, pq.read_schema(path)
        if previous is not None and schema.equals(previous, check_metadata=True):
            continue
        features = Features.from_arrow_schema(schema)
        first = first or features
        for name, feature in features.items():
            if isinstance(feature, ClassLabel) and feature != first.get(name):
                raise ValueError(
                    f"the column '{name}' has the classes {quoted(feature.names, 5)} in '{path.name}' and "
                    f"{quoted(getattr(first.get(name), 'names', []), 5)} in '{paths[0].name}', which belong to one "
                    f"split"
                )
    return first


def _check_all_images_load(folder: Path, splits: dict[str, Dataset], unlabelled: list[str]) -> None:
    images = [path for path in image_files(folder) if SPLIT_OF.get(path.parts[0].lower()) not in unlabelled]
    num_rows = sum(len(split) for split in splits.values())
    if num_rows < len(images) and not any(folder.glob("**/metadata.*")):
        raise ValueError(
            f"Only {num_rows} of the {len(images)} images in '{folder}' were found, in the splits {quoted(splits)}. "
            "Give each class a folder that holds its images; where there are splits, put these folders into 'train', "
            "'validation' and 'test' and nothing beside them."
        )
