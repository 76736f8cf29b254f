# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Class labels: all splits of a dataset get one numbering, that of the training split or of a model's classes."""

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import PreTrainedConfig


logger = logging.getLogger(__name__)
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls")
_REMEDY = "Leave these rows out, or choose another split or label column."


def quoted(names: Iterable, limit: int | None = None) -> str:
    """Names for a message, at most `limit` of them."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:limit]) or "none"
    return f"{shown}, ..." if limit is not None and len(names) > limit else shown


def unformatted(dataset: Dataset) -> Dataset:
    """The dataset with rows of Python objects, whatever `set_format` made of them. A transform stays."""
    return dataset if dataset.format["type"] == "custom" else dataset.with_format(None)


def with_class_labels(
    splits: Mapping[str, Dataset],
    dataset_name: str,
    class_names: Sequence[str] | None = None,
    input_kind: str = "image",
) -> dict[str, Dataset]:
    """The splits with one and the same `ClassLabel`, that of the training split, or of the only one.

    A split whose `ClassLabel` has the same names in another order, or whose labels are names, is renumbered by name.
    Integers beside named classes are class indices. Where all splits hold integers, they are class indices if
    `class_names` says what they stand for; otherwise each value is a class, named by its digits.

    Args:
        splits: Datasets with a column `label`. One of them is "train", or there is one only.
        dataset_name: The dataset's name, for messages.
        class_names: Names of the classes 0, 1, ..., where labels are integers. Names that are numbers themselves are
            not used, since the values say as much.
        input_kind: What is labelled, "image" or "text", for messages.

    Raises:
        `ValueError`: if labels are missing, of different kinds or outside the classes, or if a split holds a class
            that the training split lacks.
    """
    labels = {
        name: _read_labels(split, f"the split used for '{name}' of dataset '{dataset_name}'")
        for name, split in splits.items()
    }
    first = "train" if "train" in splits else next(iter(splits))
    feature = splits[first].features["label"]
    train = labels[first]
    if isinstance(feature, ClassLabel):
        names = feature.names
        if splits[first].info.builder_name == "imagefolder":  # which takes the folders of all splits together
            present = set(train)
            names = [name for name in names if name in present]
    elif _are_numbers(train) and class_names and not all(name.isdecimal() for name in class_names):
        names = list(class_names)
        logger.warning(
            "The labels of dataset '%s' are integers; they are taken for the classes 0: %s, 1: %s, ...", dataset_name,
            names[0], names[1 % len(names)],
        )  # fmt: skip
    else:
        names = sorted(set(train))
    numbers_are_indices = isinstance(names[0], str) and (isinstance(feature, ClassLabel) or _are_numbers(train))
    numbered = {}
    for name, values in labels.items():
        where = f"the split used for '{name}' of dataset '{dataset_name}'"
        if not numbers_are_indices and _are_numbers(values) != _are_numbers(train):
            raise ValueError(
                f"The labels of dataset '{dataset_name}' are {_kind(train)} in the split used for 'train' and "
                f"{_kind(values)} in the one used for '{name}'; both must be of one kind."
            )
        if numbers_are_indices and _are_numbers(values):
            _check_range(values, len(names), where)
            numbered[name] = values
        else:
            numbered[name] = _number_by_name(values, names, where, input_kind)
    feature = ClassLabel(names=[str(name) for name in names])
    return {name: replace_labels(split, numbered[name], feature) for name, split in splits.items()}


def has_labels(split: Dataset, label_column: str) -> bool:
    """Whether a split has this column and any label in it. The Hub's test splits often hold -1 only."""
    if label_column not in split.features:
        return False
    return any(label is not None and label != -1 for label in split[label_column][:])


def _read_labels(split: Dataset, where: str) -> list:
    """All labels as class names, or as integers where there are no names.

    Raises:
        `ValueError`: if one is missing or neither.
    """
    feature = split.features["label"]
    values = split["label"][:]
    if isinstance(feature, ClassLabel):
        _check_range(values, feature.num_classes, where)
        return [feature.names[value] for value in values]
    missing = [row for row, value in enumerate(values) if value is None or _is_nan(value)]
    if missing:
        words = ""
        if split.info.builder_name == "csv":
            words = (
                "In a CSV file the words None, NA, null and nan are read as no label, too; if one is a class, give it "
                "another name. "
            )
        raise ValueError(f"Row {missing[0]} of {where} has no label{_others(missing)}. {words}{_REMEDY}")
    strange = next((value for value in values if not isinstance(value, (str, int))), None)
    if strange is not None:
        raise ValueError(f"The label column of {where} holds {strange!r}; labels are class names or integers.")
    if not _are_numbers(values):
        return [str(value) for value in values]
    negative = [row for row, value in enumerate(values) if value < 0]
    if negative:
        raise ValueError(
            f"Row {negative[0]} of {where} has the label {values[negative[0]]}{_others(negative)}; labels are class "
            f"names or integers of at least 0. {_REMEDY}"
        )
    return values


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _others(rows: list[int]) -> str:
    return f", as have {len(rows) - 1} others" if len(rows) > 1 else ""


def _are_numbers(values: list) -> bool:
    return not isinstance(values[0], (str, bool))


def _kind(values: list) -> str:
    return f"{'integers' if _are_numbers(values) else 'names'} such as {values[0]!r}"


def _check_range(values: list, num_classes: int, where: str) -> None:
    outside = [row for row, value in enumerate(values) if value is None or not 0 <= value < num_classes]
    if outside:
        raise ValueError(
            f"Row {outside[0]} of {where} has the label {values[outside[0]]}{_others(outside)}; labels are integers "
            f"from 0 to {num_classes - 1}. {_REMEDY}"
        )


def _number_by_name(values: list, names: Sequence, where: str, input_kind: str) -> list[int]:
    index_of = {name: index for index, name in enumerate(names)}
    unknown = [row for row, value in enumerate(values) if value not in index_of]
    if unknown:
        found = sorted({str(values[row]) for row in unknown})
        raise ValueError(
            f"In {where} {len(unknown)} rows, first row {unknown[0]}, are of classes that the split used for 'train' "
            f"lacks: {quoted(found, 5)}; it has {quoted(names, 10)}. Leave these rows out, or add such "
            f"{input_kind}s to the training split."
        )
    return [index_of[value] for value in values]


def replace_labels(dataset: Dataset, labels: list[int], feature: ClassLabel) -> Dataset:
    """The dataset with other labels.

    Rows that were selected or shuffled stay a selection. So no image is copied, and messages name the same rows as
    before.
    """
    if dataset.features["label"] == feature and dataset["label"][:] == labels:
        return dataset
    if dataset._indices is None:
        return dataset.remove_columns("label").add_column("label", labels, feature=feature)
    rows = dataset._indices.column(0).to_numpy()
    whole = copy.copy(dataset)
    whole._indices = None
    labels_of_whole = np.zeros(len(whole), dtype=np.int64)  # rows that are not selected get any class
    labels_of_whole[rows] = labels
    return replace_labels(whole, labels_of_whole.tolist(), feature).select(rows)


def match_labels(
    dataset: Dataset, config: PreTrainedConfig | SimpleNamespace, dataset_name: str = "the dataset"
) -> Dataset:
    """The dataset with its labels numbered as the model's classes.

    1. Where the model knows the names of all classes that the dataset has images of, names decide.
    2. Where the model's classes have no names of their own (`LABEL_0`, `LABEL_1`, ...) and those of the dataset are
       numbers, a class is the model's class of that number: "3" is `LABEL_3`, whichever classes the dataset has.
       Classes with names are taken in the dataset's order.
    3. Where the dataset's classes are called `LABEL_0`, ..., they are class indices for any model.

    Nothing else is matched: not numbers with names, nor by position, since a wrong match looks like a bad model.

    Args:
        dataset: A dataset with a `ClassLabel` column `label`, as from [`load_image_datasets`].
        config: A model's configuration, or an object with its `id2label` and `num_labels`.
        dataset_name: The dataset's name, for messages.

    Raises:
        `ValueError`: if a label is outside the dataset's classes, or the dataset has images of a class that the model
            does not know.
    """
    dataset = unformatted(dataset)
    names = dataset.features["label"].names
    labels = dataset["label"][:]
    id2label: Any = config.id2label
    model_names = [str(id2label[index]) for index in range(config.num_labels or 0)]
    _check_range(labels, len(names), f"dataset '{dataset_name}'")
    used = [names[label] for label in sorted(set(labels))]
    # ImageNet has two classes "crane", which a name cannot tell apart
    counts = Counter(model_names)
    index_of = by_name = {name: index for index, name in enumerate(model_names) if counts[name] == 1}
    unique = [name if counts[name] == 1 else f"{name} ({index})" for index, name in enumerate(model_names)]
    if not set(used) <= set(index_of):
        index_of = _unnamed_classes(names, used, model_names)
    if not set(used) <= set(index_of):
        raise ValueError(_mismatch(dataset_name, [name for name in names if name not in by_name], used, model_names))
    return replace_labels(dataset, [index_of[names[label]] for label in labels], ClassLabel(names=unique))


def _unnamed_classes(names: list[str], used: list[str], model_names: list[str]) -> dict[str, int]:
    """The model's class for each of the dataset's, where one of the two has classes without names; else empty."""
    indices = range(len(model_names))
    if model_names == [f"LABEL_{index}" for index in indices]:
        if all(name.isdecimal() for name in used):
            return {name: int(name) for name in used if int(name) in indices}
        return dict(zip(names, indices))
    if names == [f"LABEL_{index}" for index in range(len(names))]:
        return dict(zip(names, indices))
    return {}


def _mismatch(dataset_name: str, unknown: list[str], used: list[str], model_names: list[str]) -> str:
    problem = (
        f"Dataset '{dataset_name}' has the classes {quoted(unknown, 5)}, which the model does not know; it knows "
        f"{len(model_names)}: {quoted(model_names, 10)}. "
    )
    if all(name.isdecimal() for name in used) and not all(name.isdecimal() for name in model_names):
        return problem + (
            "Numbers are not matched with names. If the numbers mean the model's classes, give them their names: "
            "rename the folders, or load the dataset with `dataset.cast_column('label', ClassLabel(names=[...]))`. "
            "Otherwise use the dataset that the model was trained on."
        )
    return problem + "Evaluate it on the dataset it was trained on."
