# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Image classification data: by name, Hub id, Parquet or image folder, or MNIST-style IDX files."""

from pathlib import Path
from typing import Any

from datasets import Array2D, Array3D, Dataset, DatasetDict, Features, Image, Value

from ..checkpoints.image_processors import load_image_processor
from .class_labels import match_labels
from .dataloading import as_dataloader
from .folder_layouts import IMAGE_COLUMNS, PATH_COLUMNS, find_images, image_files
from .image_dataset import ImageClassificationDataset
from .image_reading import typical_image_size
from .labelled_splits import InputKind, find_column, find_label_column, load_labelled_splits, standard_columns


__all__ = [
    "ImageClassificationDataset",
    "as_dataloader",
    "load_image_datasets",
    "load_image_processor",
    "match_labels",
    "typical_image_size",
]


def load_image_datasets(
    dataset_name: str,
    dataset_config_name: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.2,
    seed: int = 0,
    class_names: list[str] | None = None,
    evaluation_only: bool = False,
    **load_kwargs: Any,
) -> DatasetDict:
    """Loads a dataset as `{"train", "test"}` with the columns `image` and `label`, both with the same `ClassLabel`.

    Args:
        dataset_name: `"digits"` (scikit-learn's 1,797 hand-written digits, 8×8, no download), a folder, or a dataset
            id on the Hub. The folder holds Parquet or CSV files, images in one folder a class, MNIST-style IDX files
            (plain or gzipped), or what `save_to_disk` wrote.
        dataset_config_name: Configuration of a Hub dataset.
        image_column: Column of images, of type `Image` or an array; or of the bytes, `{"bytes", "path"}` or paths of
            image files, relative to the folder. If it is not given, it is found by its type, then by usual names.
        label_column: Column of labels, found as `image_column` is, or a field of one: `json.label`. See
            [`with_class_labels`] for what it may hold.
        train_split: Split to train on.
        eval_split: Split to evaluate on. Defaults to the first of `validation`, `valid`, `val` and `test` that is
            there and has labels. Without any, or where it is `train_split`, `eval_fraction` of the training split is
            held out.
        eval_fraction: Fraction in (0, 1), stratified by class.
        seed: Seed of the held-out part.
        class_names: Names of the classes 0, 1, ..., where labels are integers, such as those of the model to evaluate.
            Without them each integer is a class, named by its digits.
        evaluation_only: Whether a dataset without `train_split` is loaded too, as `{"test"}` alone.
        load_kwargs: Passed to `datasets.load_dataset`.

    Raises:
        `ValueError`: if there is no such dataset, split or column, if a split is empty, or labels are missing, outside
            the classes, or of a class that the training split lacks.
    """

    def find_columns(features: Features, name: str) -> dict[str, str]:
        return {"image": find_image_column(features, image_column, name)}

    return load_labelled_splits(
        InputKind("image", find_columns, with_images), dataset_name, dataset_config_name, label_column=label_column,
        train_split=train_split, eval_split=eval_split, eval_fraction=eval_fraction, seed=seed,
        class_names=class_names, evaluation_only=evaluation_only, **load_kwargs,
    )  # fmt: skip


def find_image_column(features: Features, requested: str | None, dataset_name: str) -> str:
    names = (*IMAGE_COLUMNS, *PATH_COLUMNS) if requested is None else IMAGE_COLUMNS
    return find_column(features, requested, names, _holds_images, "image", dataset_name)


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, (Image, Array2D, Array3D)) or _is_binary(feature) or _is_file_struct(feature)


def _is_binary(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def _is_file_struct(feature: Any) -> bool:
    return isinstance(feature, dict) and "bytes" in feature and set(feature) <= {"bytes", "path"}


def with_standard_columns(dataset: Dataset, name: str) -> Dataset:
    """A dataset with the columns `image` and `label`, which are found by types and names.

    Raises:
        `ValueError`: naming the dataset, if there are no such columns.
    """
    image_column = find_image_column(dataset.features, None, name)
    columns = {"image": image_column, "label": find_label_column(dataset.features, None, name)}
    return with_images(standard_columns(dataset, columns, name), name)


def with_images(split: Dataset, dataset_name: str) -> Dataset:
    """The split with the feature `Image`, where it holds files of images in one of the ways of pandas and pyarrow."""
    feature = split.features["image"]
    if _is_binary(feature) or _is_file_struct(feature):
        return split.cast_column("image", Image())
    if isinstance(feature, Value):
        if feature.dtype not in ("string", "large_string"):
            raise ValueError(
                f"The image column of dataset '{dataset_name}' holds values of type {feature.dtype}, such as "
                f"{split[0]['image']!r}; choose a column of images with `image_column` (--image_column_name)."
            )
        paths = _resolve_paths(split["image"][:], Path(dataset_name).expanduser(), dataset_name)
        split = split.remove_columns("image").add_column("image", paths, feature=Value("string"))
        return split.cast_column("image", Image()).select_columns(["image", "label"])
    return split


def _resolve_paths(paths: list[str | None], folder: Path, dataset_name: str) -> list[str | None]:
    """Paths of images as they can be opened, see [`find_images`].

    Raises:
        `ValueError`: if there is no such file.
    """
    if folder.is_file():
        folder = folder.parent
    found = find_images(paths, folder, image_files(folder) if folder.is_dir() else ())
    resolved = [
        path if path is not None and "://" in path else None if image is None else str(image.resolve())
        for path, image in zip(paths, found)
    ]
    missing = {row: path for row, path in enumerate(paths) if path is not None and resolved[row] is None}
    if missing:
        row, path = next(iter(missing.items()))
        shown = path if len(path) <= 80 else path[:77] + "..."
        raise ValueError(
            f"The image column of dataset '{dataset_name}' holds no path of an image that is there in "
            f"{len(missing)} of {len(paths)} rows, first in row {row}: {shown!r}. Give paths relative to the "
            "dataset's folder; a CSV file cannot hold the images themselves, a Parquet file can."
        )
    return resolved
