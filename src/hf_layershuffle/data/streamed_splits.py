# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A dataset whose training split is a stream, and whose evaluation split lies on the disk."""

import itertools
import logging
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetBuilder, Features, Image, IterableDataset, Value, load_dataset
from datasets import load_dataset_builder as load_builder

from ..checkpoints.hub_errors import check_hub_answers
from ..checkpoints.locations import is_local
from .class_labels import quoted, with_class_labels
from .dataset_files import BUILT_IN, escaped, features_of_files, files_of_folder, first_line
from .datasets import find_image_column, with_images
from .folder_layouts import tables_of_images
from .image_stream import LOOKED_AT, Label
from .labelled_splits import EVALUATION_SPLITS, find_label_column, standard_columns
from .stream_reading import StreamReader


logger = logging.getLogger(__name__)


@dataclass
class StreamedSplits:
    """A stream to train on, with what is known of it, and the images to evaluate on.

    Args:
        stream: Images and labels, with the columns `image` and `label`. Images are files, not decoded.
        test: The images to evaluate on, whose labels are classes.
        known: One row for each label that the stream may hold, as its class. The same classes as those of `test`.
        stored_labels: These labels as the stream stores them.
        num_samples: How many images the stream holds, or None where that is not known.
        files: The files of the stream, for messages.
        rows_of_files: How many images each of them holds, or nothing where that is not known.
    """

    stream: IterableDataset
    test: Dataset
    known: Dataset
    stored_labels: list[Label]
    num_samples: int | None = None
    files: Sequence[str] = ()
    rows_of_files: Sequence[int] = ()

    @property
    def class_numbers(self) -> dict[Label, int]:
        """The class of each label as the stream stores it."""
        return dict(zip(self.stored_labels, self.known["label"][:]))

    def head(self) -> Dataset:
        """The first images of the stream, with their classes."""
        rows = list(itertools.islice(StreamReader(self.stream, self.files).rows(), LOOKED_AT))
        if not rows:
            raise ValueError("The stream to train on holds no images.")
        numbers = self.class_numbers
        rows = [row | {"label": numbers.get(row["label"], 0)} for row in rows]  # an unknown one is named in training
        image = self.stream.features["image"]
        image = Image() if isinstance(image, Image) else image
        features = Features({"image": image, "label": self.known.features["label"]})
        return Dataset.from_list(rows, features=features)


def load_image_stream(
    dataset_name: str,
    dataset_config_name: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    class_names: Sequence[str] | None = None,
) -> StreamedSplits:
    """Loads a dataset of which the training split is read as a stream, and only the evaluation split is stored.

    Args:
        dataset_name: A folder of Parquet files, of tar files (WebDataset) or of images, or a dataset id on the Hub.
            Files are told to be of a split by their names, such as `train-00000.tar`.
        dataset_config_name: Configuration of a Hub dataset.
        image_column, label_column: As for [`load_image_datasets`]. Of tar files they are the names' last parts: `jpg`
            and `cls`, or a field of a JSON file: `json.label`.
        train_split: Split to train on.
        eval_split: Split to evaluate on, another one. Defaults to the first of `validation`, `valid`, `val` and
            `test`.
        class_names: Names of the classes 0, 1, ..., where labels are integers.

    Raises:
        `ValueError`: if there is no such dataset, split or column, or what there is cannot be streamed.
    """
    builder = _builder_of(dataset_name, dataset_config_name)
    files: Mapping[Any, Any] = builder.config.data_files or {}
    names = [str(name) for name in files]
    if eval_split is None:
        eval_split = next((name for name in EVALUATION_SPLITS if name in names), None)
    _check_splits(dataset_name, names, train_split, eval_split)
    stream, test = _read(builder, dataset_name, train_split, str(eval_split))
    columns = {
        "image": find_image_column(stream.features, image_column, dataset_name),
        "label": find_label_column(stream.features, label_column, dataset_name),
    }
    stream = standard_columns(_undecoded(stream, columns["image"], dataset_name), columns, "train")
    test = with_images(standard_columns(test, columns, "test"), dataset_name)
    known = _known_labels(stream.features["label"], test, class_names)
    stored = known["label"][:]
    numbered = with_class_labels({"train": known, "test": test}, dataset_name, class_names)
    paths = [str(path) for path in files[train_split]]
    rows = _rows_of(paths)
    num_samples = sum(rows) or _described_length(builder, train_split)
    return StreamedSplits(stream, numbered["test"], numbered["train"], stored, num_samples, paths, rows)


def _builder_of(dataset_name: str, config_name: str | None) -> DatasetBuilder:
    folder = Path(dataset_name).expanduser()
    remedy = "leave out --streaming, with which nothing would be won"
    if dataset_name in BUILT_IN:
        raise ValueError(f"Dataset '{dataset_name}' comes with its library and cannot be streamed; {remedy}.")
    if not folder.is_dir() and is_local(dataset_name):
        raise ValueError(f"There is no dataset folder '{dataset_name}'.")
    if folder.is_dir() and any(
        [*folder.glob("*-idx3-ubyte*"), *folder.glob("dataset_dict.json"), *folder.glob("state.json")]
    ):
        raise ValueError(
            f"'{dataset_name}' holds IDX files or what `save_to_disk` wrote, which are read at any row; {remedy}."
        )
    try:
        if not folder.is_dir() and not datasets.config.HF_HUB_OFFLINE:
            check_hub_answers(dataset_name)
        if folder.is_dir():
            builder = load_builder(str(folder), config_name, **files_of_folder(folder))
        else:
            builder = load_builder(dataset_name, config_name)
    except Exception as error:  # the errors of a dozen readers and of the network share no base class
        raise ValueError(
            f"Dataset '{dataset_name}' cannot be streamed: {first_line(error).rstrip('.!')}. Pass a folder of Parquet "
            "files, of tar files (WebDataset) or of images, or a dataset id on the Hub."
        ) from error
    tables = tables_of_images(folder) if _kind_of(builder) == "imagefolder" and folder.is_dir() else {}
    if tables:
        names = quoted(path.name for paths in tables.values() for path in paths)
        raise ValueError(
            f"The labels of the images in '{dataset_name}' are in {names}, and paths in tables cannot be streamed; "
            "leave out --streaming, or put the images into Parquet or tar files."
        )
    return builder


def _kind_of(builder: DatasetBuilder) -> str:
    """The kind of its files, by the names of `datasets`: "parquet", "webdataset", "imagefolder", ..."""
    return type(builder).__module__.rpartition(".")[2]


def _check_splits(dataset_name: str, names: list[str], train_split: str, eval_split: str | None) -> None:
    found = f"it has {quoted(names)}. Splits are told by the names of files and folders, such as train-00000.tar."
    if train_split not in names:
        raise ValueError(f"Dataset '{dataset_name}' has no split '{train_split}'; {found}")
    if eval_split is None:
        remedy = "Give one by `eval_split` (--eval_split)."
        if names == [train_split]:
            remedy = "Add files of a split `test`, or leave out --streaming, without which a part is held out."
        raise ValueError(
            f"Dataset '{dataset_name}' has no split to evaluate on, and no part of a stream can be held out; {found} "
            f"{remedy}"
        )
    if eval_split not in names:
        raise ValueError(f"Dataset '{dataset_name}' has no split '{eval_split}'; {found}")
    if eval_split == train_split:
        raise ValueError(
            f"`eval_split` is '{eval_split}', which is trained on; no part of a stream can be held out. {found}"
        )


def _read(
    builder: DatasetBuilder, dataset_name: str, train_split: str, eval_split: str
) -> tuple[IterableDataset, Dataset]:
    """The training split as a stream, and the evaluation split, of which alone the files are loaded."""
    kind = _kind_of(builder)
    files = {str(name): list(paths) for name, paths in (builder.config.data_files or {}).items()}
    described: dict[str, Any] = {} if builder.info.features is None else {"features": builder.info.features}

    def read(split: str, streaming: bool, **columns: Any) -> Any:
        paths = {split: escaped(files[split])}
        return load_dataset(kind, data_files=paths, split=split, streaming=streaming, **columns)

    try:
        # Else the classes of the first file would be taken for those of all
        for split in (train_split, eval_split) if kind == "parquet" else ():
            features_of_files([Path(path) for path in files[split] if Path(path).is_file()])
        columns = dict.fromkeys((train_split, eval_split), described)
        if kind == "webdataset" and not described:
            columns = {split: _columns_of_tars(files[split]) for split in columns}
        stream, test = read(train_split, True, **columns[train_split]), read(eval_split, False, **columns[eval_split])
        if stream.features is None:  # those of a CSV or JSON file are not known before it is read
            stream = read(train_split, True, features=test.features)
    except Exception as error:  # as above
        raise ValueError(f"Dataset '{dataset_name}' cannot be streamed: {first_line(error)}") from error
    if len(test) == 0:
        raise ValueError(f"Dataset '{dataset_name}' is empty in the split used for 'test'.")
    return stream, test


def _columns_of_tars(paths: list[str]) -> dict[str, Any]:
    """The columns of tar files of which the first is empty; `datasets` would look at that one. Else nothing."""
    for number, path in enumerate(paths):
        if not Path(path).is_file() or _holds_files(path):
            if number == 0:
                return {}
            stream = load_dataset("webdataset", data_files=escaped([path]), split="train", streaming=True)
            return {"features": stream.features}
    raise ValueError(f"all tar files of a split are empty: {quoted(paths, 2)}")


def _holds_files(path: str) -> bool:
    try:
        with tarfile.open(path) as file:
            return any(member.isfile() for member in file)
    except (tarfile.TarError, OSError) as error:
        reason = first_line(error) if Path(path).stat().st_size else "it is empty, without even a tar file's end"
        raise ValueError(f"'{path}' cannot be read: {reason.rstrip(':')}") from error


def _undecoded(stream: IterableDataset, column: str, dataset_name: str) -> IterableDataset:
    """The stream with its images as files, before anything else: `datasets` renames decoded images, encoded anew."""
    feature = stream.features[column]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        raise ValueError(
            f"The image column of dataset '{dataset_name}' holds paths, which cannot be streamed; leave out "
            "--streaming, or put the images into Parquet or tar files."
        )
    is_binary = isinstance(feature, Value) and "binary" in feature.dtype
    is_file = is_binary or isinstance(feature, (dict, Image))
    return stream.cast_column(column, Image(decode=False)) if is_file else stream


def _known_labels(feature: Any, test: Dataset, class_names: Sequence[str] | None) -> Dataset:
    """One row for each label that a stream may hold.

    They are those with a name, or else those of the evaluation split. If `class_names` holds all of these, they are
    all of its classes, since the evaluation split may lack some.
    """
    stored = feature if isinstance(feature, ClassLabel) else test.features["label"]
    if isinstance(stored, ClassLabel):  # integers of the stream, if it does not know the names, are class indices
        values = list(range(stored.num_classes))
    else:
        values = _with_named({value for value in test["label"][:] if value is not None}, class_names)
    # With a column beside the labels, which are replaced, since a table without columns has no rows
    features = Features({"label": stored, "row": Value("int64")})
    return Dataset.from_dict({"label": values, "row": list(range(len(values)))}, features=features)


def _with_named(labels: set[Any], class_names: Sequence[str] | None) -> list[Any]:
    """Labels of an evaluation split, or the labels of all named classes, if these are among them."""
    named: set[Any] = set(class_names or ())
    if class_names and all(type(label) is int for label in labels):
        are_numbers = all(name.isdecimal() for name in class_names)
        named = {int(name) for name in class_names} if are_numbers else set(range(len(class_names)))
    return sorted(named if labels <= named else labels)


def _rows_of(paths: list[str]) -> list[int]:
    """How many rows each file holds, if they say so at once. Else nothing."""
    if all(path.endswith(".parquet") and Path(path).is_file() for path in paths):
        return [pq.read_metadata(path).num_rows for path in paths]
    return []


def _described_length(builder: DatasetBuilder, split: str) -> int | None:
    """How many images a split holds, if its description says so."""
    described = (builder.info.splits or {}).get(split)
    return None if described is None else described.num_examples or None
