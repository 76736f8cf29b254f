# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Batches to evaluate on, of anything that holds labelled images."""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoints.processing_classes import ProcessingClass
from .class_labels import match_labels
from .image_dataset import STREAM, ImageClassificationDataset, collate_images
from .image_reading import draw_rows
from .text_dataset import TextClassificationDataset, padding_collator


TEXT_INPUT = "input_ids"
# What a model takes, as a tokenizer or the processor of images, videos or sounds gives it
MODEL_INPUTS = ("pixel_values", "pixel_values_videos", TEXT_INPUT, "input_values", "input_features")
# What holds labelled images or texts, see [`as_dataloader`]
LabelledData: TypeAlias = (
    Dataset | torch.utils.data.Dataset | torch.utils.data.DataLoader | Sequence[Mapping[str, Any]]
)


def as_dataloader(
    data: LabelledData,
    processing_class: ProcessingClass | None = None,
    *,
    batch_size: int = 64,
    max_samples: int | None = None,
    seed: int = 0,
    num_channels: int | None = 3,
    config: PreTrainedConfig | None = None,
    max_length: int | None = None,
    skip_damaged: bool = False,
) -> torch.utils.data.DataLoader:
    """Batches `{"pixel_values", "labels"}`, always in the same order, of anything that holds labelled images.

    Of labelled texts they are `{"input_ids", "attention_mask", ..., "labels"}`.

    Args:
        data: One of three things. A `datasets.Dataset` has the columns `image` and `label`, as from
            [`load_image_datasets`], or `text` and `label`, as from [`load_text_datasets`] (both need
            `processing_class`), or those of a tokenizer or a feature extractor and `label`. A sequence has
            `{"pixel_values", "labels"}` items, or those with `input_ids`, `input_values` or `input_features`. A
            DataLoader is taken as it is.
        processing_class: The image processor or the tokenizer of the model.
        batch_size: Images or texts a batch, at least 1.
        max_samples: How many of them to take, at least 1, drawn by `seed`; all by default. They are the same rows of a
            `datasets.Dataset` and of a sequence. Not for a DataLoader, whose sampler decides.
        seed: Seed of that draw, at least 0.
        num_channels: Channels of the model's images, for a `datasets.Dataset` of images.
        config: A model's configuration. The labels of a `datasets.Dataset` whose classes have names are then numbered
            as the model's classes (see [`match_labels`]).
        max_length: Tokens after which a text is cut off, as in [`TextClassificationDataset`].
        skip_damaged: Whether to leave out images that cannot be read, as in [`ImageClassificationDataset`], and rows
            without a text.

    Raises:
        `TypeError`: if the data is of another type.
        `ValueError`: if there is no image, the classes are not the model's, or an argument is out of range or missing.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` is {max_samples}; it must be at least 1.")
    if isinstance(data, torch.utils.data.DataLoader):
        if max_samples is not None:
            raise ValueError("`max_samples` does not apply to a DataLoader; give its dataset instead.")
        if len(data) == 0:
            raise ValueError("The DataLoader is empty; pass at least one image.")
        return data
    _check_data(data)
    items: Any = data
    if len(items) == 0:
        raise ValueError("The evaluation set is empty; pass at least one image.")
    rows = None if max_samples is None or max_samples >= len(items) else draw_rows(len(items), max_samples, seed)
    if isinstance(data, Dataset) and _is_prepared(data):
        data = data if rows is None else data.select(rows)
        data = data if "label" in data.column_names else data.rename_column("labels", "label")
        if config is not None and isinstance(data.features["label"], ClassLabel):
            data = match_labels(data, config)
        items = _tokenized(data)
    elif isinstance(data, Dataset):
        _check_processing_class(data, processing_class)
        data = data if rows is None else data.select(rows)
        if config is not None and isinstance(data.features["label"], ClassLabel):
            data = match_labels(data, config)
        if isinstance(processing_class, PreTrainedTokenizerBase):
            texts = TextClassificationDataset(data, processing_class, max_length=max_length, skip_damaged=skip_damaged)
            return torch.utils.data.DataLoader(texts, batch_size=batch_size, collate_fn=texts.collate)
        items = ImageClassificationDataset(
            data, cast(Any, processing_class), num_channels=num_channels, skip_damaged=skip_damaged
        )
    else:
        if isinstance(data, ImageClassificationDataset):
            items = _evaluable(data, config)
        items = items if rows is None else torch.utils.data.Subset(items, rows)
    collate: Any = collate_images
    if isinstance(processing_class, PreTrainedTokenizerBase):  # tokens, of texts that need not be equally long
        collate = padding_collator(processing_class)
    return torch.utils.data.DataLoader(items, batch_size=batch_size, collate_fn=collate)


def _evaluable(images: ImageClassificationDataset, config: PreTrainedConfig | None) -> ImageClassificationDataset:
    """The images with their labels numbered as the model's classes.

    Raises:
        `ValueError`: if images are mixed, so that each is of two classes.
    """
    if images.augmentation is not None and images.augmentation.mixes:
        raise ValueError(
            "`data` mixes images (mixup or CutMix), so each is of two classes; evaluate on images that are not mixed."
        )
    if config is None or not isinstance(images.dataset.features["label"], ClassLabel):
        return images
    matched = copy.copy(images)  # which shares the decoded images
    matched.labels = torch.tensor(match_labels(images.dataset, config)["label"][:])
    return matched


def _check_processing_class(data: Dataset, processing_class: ProcessingClass | None) -> None:
    """Raises a `ValueError` unless what makes the inputs of a model is for what the dataset holds."""
    holds_texts = "image" not in data.column_names
    if processing_class is None:
        if holds_texts:
            raise ValueError("A `datasets.Dataset` of texts needs a `processing_class`, the model's own tokenizer.")
        raise ValueError("A `datasets.Dataset` of images needs an `image_processor`, as the model's own.")
    if isinstance(processing_class, PreTrainedTokenizerBase) != holds_texts:
        held, taken = ("texts", "images") if holds_texts else ("images", "texts")
        raise ValueError(
            f"`data` holds {held}, and a {type(processing_class).__name__} is for {taken}; pass a dataset of {taken}, "
            f"or a model of {held} with what makes its inputs."
        )


def _is_prepared(data: Dataset) -> bool:
    """Whether a dataset holds what a model takes, and labels, and no images of which that is still to be made."""
    columns = set(data.column_names)
    return "image" not in columns and bool(columns & set(MODEL_INPUTS) and {"label", "labels"} & columns)


def _standing_for_images(data: Dataset) -> set[str]:
    """Columns of images that a dataset need not have: it holds texts, or what a model takes."""
    if _is_prepared(data):
        return {"image", "label"}
    return {"image"} if "text" in data.column_names else set()


def _tokenized(data: Dataset) -> Dataset:
    """The columns of numbers of a dataset, as tensors, of which `labels` are the classes."""
    data = data.rename_column("label", "labels")
    words = [
        name for name, feature in data.features.items() if getattr(feature, "dtype", None) in ("string", "binary")
    ]
    return data.remove_columns(words).with_format("torch")


def _check_data(data: Any) -> None:
    """Says what to pass instead of what has no images with labels.

    Raises:
        `TypeError`: if it is of another type.
        `ValueError`: if a dataset lacks the columns, or is a stream.
    """
    allowed = (
        "pass a `datasets.Dataset` with the columns `image` and `label`, or `text` and `label`, a sequence of "
        "{'pixel_values', 'labels'} items, or a DataLoader of such batches"
    )
    if isinstance(data, (IterableDataset, IterableDatasetDict)):
        raise ValueError(STREAM)
    if isinstance(data, DatasetDict):
        raise TypeError(
            f"`data` is a DatasetDict of the splits {', '.join(data)}; pass one of them, such as data['test']."
        )
    if isinstance(data, (str, os.PathLike)):
        raise TypeError(f"`data` is the name {str(data)!r}; load it by `load_image_datasets`, or {allowed}.")
    if not hasattr(data, "__len__") or isinstance(data, dict):
        raise TypeError(f"`data` is a {type(data).__name__}; {allowed}.")
    if isinstance(data, Dataset) and not {"image", "label"} <= set(data.column_names) | _standing_for_images(data):
        raise ValueError(f"`data` has the columns {', '.join(data.column_names)}; {allowed}.")
    if isinstance(data, Sequence) and len(data):
        item = data[0]
        if not (isinstance(item, Mapping) and "labels" in item and set(MODEL_INPUTS) & set(item)):
            raise TypeError(f"`data` holds items of type {type(item).__name__}, or without these keys; {allowed}.")
