# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The labelled splits of a dataset, of images or of texts: which to take, which columns, and one numbering."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, concatenate_datasets

from .class_labels import LABEL_COLUMNS, has_labels, quoted, with_class_labels
from .dataset_files import load_splits


logger = logging.getLogger(__name__)
_FIELDS = tuple(f"json.{name}" for name in LABEL_COLUMNS)  # of the JSON files of WebDataset
EVALUATION_SPLITS = ("validation", "valid", "val", "test")
_Split = TypeVar("_Split", Dataset, IterableDataset)


@dataclass(frozen=True)
class InputKind:
    """What is labelled: images or texts.

    Args:
        name: "image" or "text".
        find_columns: Takes the features of a split and the dataset's name, and gives the columns of the inputs by
            their standard names.
        prepare: Takes a split with standard columns and the dataset's name, and gives it as the models' datasets
            take it.
    """

    name: str
    find_columns: Callable[[Features, str], dict[str, str]]
    prepare: Callable[[Dataset, str], Dataset]


def load_labelled_splits(
    kind: InputKind,
    dataset_name: str,
    dataset_config_name: str | None = None,
    *,
    label_column: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.2,
    seed: int = 0,
    class_names: list[str] | None = None,
    evaluation_only: bool = False,
    **load_kwargs: Any,
) -> DatasetDict:
    """`{"train", "test"}` with the standard columns of the inputs and `label`, both with the same `ClassLabel`.

    Args:
        kind: What is labelled.
        dataset_name, dataset_config_name, label_column, train_split, eval_split, eval_fraction, seed, class_names,
            evaluation_only, load_kwargs: As for [`load_image_datasets`].

    Raises:
        `ValueError`: as in [`load_image_datasets`].
    """
    if not 0 < eval_fraction < 1:
        raise ValueError(f"`eval_fraction` is {eval_fraction}; it must be a fraction in (0, 1).")
    splits, unlabelled = load_splits(dataset_name, dataset_config_name, load_kwargs, kind.name)
    has_no_training = evaluation_only and train_split not in splits
    for requested in (None if has_no_training else train_split, eval_split):
        if requested in unlabelled:
            raise ValueError(
                f"The {kind.name}s in split '{requested}' of dataset '{dataset_name}' lie in no class folders, so "
                f"they have no labels. Choose another split; splits with labels: {quoted(splits)}."
            )
        if requested is not None and requested not in splits:
            raise ValueError(f"Dataset '{dataset_name}' has no split '{requested}'; it has {quoted(splits)}.")
    first = train_split
    if has_no_training:
        found = eval_split or _default_eval_split(splits, label_column, dataset_name)
        if found is None:
            raise ValueError(
                f"Dataset '{dataset_name}' has none of the splits {quoted((train_split, *EVALUATION_SPLITS))} with "
                f"labels; it has {quoted(splits)}. Choose one with labels by `eval_split` (--eval_split)."
            )
        first = eval_split = found
    features = splits[first].features
    columns = kind.find_columns(features, dataset_name)
    columns["label"] = find_label_column(features, label_column, dataset_name)
    eval_split = eval_split or _default_eval_split(splits, columns["label"], dataset_name) or train_split
    chosen = {} if has_no_training else {"train": splits[train_split]}
    chosen |= {} if eval_split == train_split else {"test": splits[eval_split]}
    for name, split in chosen.items():
        if len(split) == 0:
            raise ValueError(f"Dataset '{dataset_name}' is empty in the split used for '{name}'.")
    chosen = {name: standard_columns(split, columns, name) for name, split in chosen.items()}
    chosen = {name: kind.prepare(split, dataset_name) for name, split in chosen.items()}
    chosen = with_class_labels(chosen, dataset_name, class_names, kind.name)
    if "test" not in chosen:
        chosen = _with_held_out(chosen["train"], eval_fraction, seed, kind, dataset_name)
        logger.info(
            "%d of the %d %ss of split '%s' are held out for evaluation.",
            *(len(chosen["test"]), len(chosen["train"]) + len(chosen["test"]), kind.name, train_split),
        )
    return DatasetDict(chosen)


def _with_held_out(
    train: Dataset, eval_fraction: float, seed: int, kind: InputKind, dataset_name: str
) -> dict[str, Dataset]:
    """`{"train", "test"}` of which the second is a part of the split."""
    try:
        return dict(train.train_test_split(eval_fraction, seed=seed, stratify_by_column="label"))
    except ValueError as error:
        raise ValueError(
            f"Dataset '{dataset_name}' has one split only, and {eval_fraction:.0%} of it cannot be held out for "
            f"evaluation: {error} Give an evaluation split, or more {kind.name}s of each class."
        ) from error


def _default_eval_split(splits: dict[str, Dataset], label_column: str | None, dataset_name: str) -> str | None:
    """The first usual split with labels, in `label_column` if it is given. None if there is no such split."""
    for name in EVALUATION_SPLITS:
        if name not in splits:
            continue
        column = label_column or _likely_label_column(splits[name].features)
        if len(splits[name]) == 0 or (column is not None and has_labels(_with_field(splits[name], column), column)):
            return name
        logger.warning("Split '%s' of dataset '%s' has no labels and is left out.", name, dataset_name)
    return None


def find_label_column(features: Features, requested: str | None, dataset_name: str) -> str:
    """The column of labels: the requested one, or the one found by its type, then by usual names.

    A field of a column of fields counts as one where it is requested. Where no column could be meant, those of JSON
    files with a usual name (`json.label`) do too.
    """
    # So that a message names all columns and fields
    every = Features({**_fields_of(features), **features})
    found = requested or _likely_label_column(features)
    return find_column(every, found, (), _is_nothing, "label", dataset_name)


def _likely_label_column(features: Features) -> str | None:
    fields = _fields_of(features)
    usual_fields = {name: fields[name] for name in _FIELDS if name in fields}
    found = _candidates(features, LABEL_COLUMNS, _is_class_label) or _candidates(
        usual_fields, _FIELDS, _is_class_label
    )
    return next(iter(found), None)


def _fields_of(features: Features) -> dict[str, Any]:
    """The fields of columns of fields, as `column.field`."""
    return {
        f"{column}.{field}": feature
        for column, of_column in features.items()
        if isinstance(of_column, dict)
        for field, feature in of_column.items()
    }


def _is_class_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel)


def _is_nothing(feature: Any) -> bool:
    return False


def _candidates(features: Mapping[str, Any], usual_names: Sequence[str], has_type: Callable[[Any], bool]) -> list[str]:
    """Columns that could be meant, the likeliest first."""
    by_name = [name for name in usual_names if name in features]
    by_type = [name for name, feature in features.items() if has_type(feature)]
    # A usual name of the right type, else the one column of that type, else a usual name
    return [name for name in by_name if name in by_type] or by_type or by_name


def find_column(
    features: Features,
    requested: str | None,
    usual_names: Sequence[str],
    has_type: Callable[[Any], bool],
    kind: str,
    dataset_name: str,
) -> str:
    """The requested column, or the one found by its type, then by usual names.

    Raises:
        `ValueError`: if there is none.
    """
    if requested is not None:
        if requested not in features:
            raise ValueError(f"Dataset '{dataset_name}' has no column '{requested}'; it has {quoted(features)}.")
        return requested
    candidates = _candidates(features, usual_names, has_type)
    if not candidates:
        folders = ""
        if set(features) == {"image"}:
            folders = ", or put the images into one folder for each class, of which there must be two at least"
        raise ValueError(
            f"Dataset '{dataset_name}' has no {kind} column that could be told by its type or name; it has "
            f"{quoted(features)}. Name it with `{kind}_column` (--{kind}_column_name){folders}."
        )
    return candidates[0]


def standard_columns(split: _Split, columns: dict[str, str], name: str) -> _Split:
    """The split with these columns only, under their standard names, which are the keys."""
    for column in columns.values():
        split = _with_field(split, column)
        if column not in split.features:
            raise ValueError(f"The split used for '{name}' has no column '{column}'; it has {quoted(split.features)}.")
    split = split.select_columns([*columns.values()])
    renamed = {old: new for new, old in columns.items() if old != new}
    return split.rename_columns(renamed) if renamed else split


def _with_field(split: _Split, column: str) -> _Split:
    """The split with a field of a column, such as `json.label`, as a column of its own, if there is such a field."""
    structs = {name: each for name, each in split.features.items() if isinstance(each, dict)}
    # Not by the first dot: the names of columns of tar files hold dots themselves, such as `meta.json`
    found = next(
        ((name, field) for name, each in structs.items() for field in each if column == f"{name}.{field}"), None
    )
    if column in split.features or found is None:
        return split
    outer, field = found
    if isinstance(split, Dataset):  # without going through the other columns, of images
        return concatenate_datasets([split, split.select_columns([outer]).flatten().select_columns([column])], axis=1)

    def lift(row: dict[str, Any]) -> dict[str, Any]:
        return {column: None if row[outer] is None else row[outer][field]}

    return split.map(lift, features=Features({**split.features, column: structs[outer][field]}))
