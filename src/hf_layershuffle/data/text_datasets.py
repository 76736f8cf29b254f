# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Text classification data: by name, Hub id, or files of CSV, JSON or Parquet."""

from typing import Any

from datasets import Dataset, DatasetDict, Features, Value

from .class_labels import LABEL_COLUMNS, quoted
from .labelled_splits import InputKind, find_column, find_label_column, load_labelled_splits, standard_columns


TEXT_COLUMNS = ("text", "sentence", "content", "review", "review_body", "comment", "document", "utterance", "question")
# Columns of pairs of texts, as the datasets of GLUE and of entailment name them
PAIR_COLUMNS = (
    ("text", "text_pair"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
)


def load_text_datasets(
    dataset_name: str,
    dataset_config_name: str | None = None,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    **kwargs: Any,
) -> DatasetDict:
    """Loads a dataset as `{"train", "test"}` with the columns `text` and `label`, both with the same `ClassLabel`.

    Args:
        dataset_name: `"python-docs"` (3,200 passages of the documentation in Python's standard library, by subject, no
            download), a CSV, JSON, JSON Lines or Parquet file, a folder of such files, a folder that `save_to_disk`
            wrote, or a dataset id on the Hub.
        dataset_config_name: Configuration of a Hub dataset, such as `"sst2"` of `glue`.
        text_column: Column of texts. If it is not given, it is found by usual names, such as `text`, `sentence` and
            `content`, or it is the only column of texts beside the labels.
        text_pair_column: Column of the second texts, if the model classifies pairs, which then become the column
            `text_pair`. If neither column is given, usual pairs are found, such as `sentence1` and `sentence2` or
            `premise` and `hypothesis`.
        kwargs: As for [`load_image_datasets`]: `label_column`, `train_split`, `eval_split`, `eval_fraction`, `seed`,
            `class_names`, `evaluation_only`, and what is passed to `datasets.load_dataset`.

    Raises:
        `ValueError`: as in [`load_image_datasets`].

    ```python
    >>> from hf_layershuffle import load_text_datasets

    >>> splits = load_text_datasets("python-docs")
    >>> splits["train"].column_names
    ['text', 'label']
    ```
    """

    def find_columns(features: Features, name: str) -> dict[str, str]:
        return _find_text_columns(features, text_column, text_pair_column, kwargs.get("label_column"), name)

    return load_labelled_splits(
        InputKind("text", find_columns, _checked_texts), dataset_name, dataset_config_name, **kwargs
    )


def _find_text_columns(
    features: Features, text_column: str | None, pair_column: str | None, label_column: str | None, dataset_name: str
) -> dict[str, str]:
    """The columns of the texts and, where there are any, of the second texts, by their standard names."""
    texts = Features({name: each for name, each in features.items() if is_text(each) and name != label_column})
    if text_column is None and pair_column is None:
        for first, second in PAIR_COLUMNS:
            if first in texts and second in texts:
                return {"text": first, "text_pair": second}
    if text_column is None and not any(name in texts for name in TEXT_COLUMNS):
        _check_one_text(texts, features, pair_column, dataset_name)
        texts = Features({name: each for name, each in texts.items() if name not in (*LABEL_COLUMNS, pair_column)})
    columns = {
        "text": find_column(
            features if text_column else texts, text_column, TEXT_COLUMNS, is_text, "text", dataset_name
        )
    }
    if pair_column is not None:
        columns["text_pair"] = find_column(features, pair_column, (), is_text, "text_pair", dataset_name)
    return columns


def _check_one_text(texts: Features, features: Features, pair_column: str | None, dataset_name: str) -> None:
    """Refuses a dataset of whose columns none, or more than one, could be that of the texts."""
    candidates = [name for name in texts if name not in (*LABEL_COLUMNS, pair_column)]
    if len(candidates) == 1:
        return
    found = f"the columns of texts {quoted(candidates)}" if candidates else f"the columns {quoted(features)}"
    images = [name for name, each in features.items() if type(each).__name__ in ("Image", "Array2D", "Array3D")]
    remedy = "Name the column by `text_column` (--text_column_name)."
    if images and not candidates:
        remedy = f"Column '{images[0]}' holds images, which are for a model of images."
    raise ValueError(
        f"Dataset '{dataset_name}' has no text column that could be told by its name; it has {found}. {remedy}"
    )


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _checked_texts(split: Dataset, dataset_name: str) -> Dataset:
    for name in ("text", "text_pair"):
        if name in split.features and not is_text(split.features[name]):
            kind = getattr(split.features[name], "dtype", type(split.features[name]).__name__)
            raise ValueError(
                f"The {name} column of dataset '{dataset_name}' holds values of type {kind}; choose a column of texts "
                f"with `{name}_column` (--{name}_column_name)."
            )
    return split


def with_text_columns(dataset: Dataset, name: str) -> Dataset:
    """A dataset with the columns `text` (and `text_pair`) and `label`, which are found by names and types.

    Raises:
        `ValueError`: naming the dataset, if there are no such columns.
    """
    columns = _find_text_columns(dataset.features, None, None, None, name)
    columns["label"] = find_label_column(dataset.features, None, name)
    return _checked_texts(standard_columns(dataset, columns, name), name)
