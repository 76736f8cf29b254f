# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Datasets of the `datasets` library as a model takes them, where they hold images or texts as they are."""

from typing import Any, cast

import datasets
import torch
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.tokenizers import check_tokenizer, longest_text, takes_texts
from ..data.dataloading import MODEL_INPUTS
from ..data.datasets import match_labels, with_standard_columns
from ..data.image_dataset import ImageClassificationDataset
from ..data.text_dataset import TextClassificationDataset
from ..data.text_datasets import with_text_columns
from ..models.configuration_layershuffle import num_channels_of


def as_model_inputs(dataset: Any, processing_class: object, model: Any, name: str) -> Any:
    """The dataset, or one made of it, whose items hold `pixel_values` or `input_ids`.

    Args:
        dataset: A `datasets.Dataset` of images or texts and labels, or with a transform (`with_transform`), or a
            dictionary of such. All else comes back as it is, also what holds token ids or features of sounds.
        processing_class: The model's image processor or tokenizer, or None.
        model: The model, whose configuration gives the number of channels and the numbers of the classes. If its
            classes have no names, they get those of the dataset. Texts are cut off after the tokens that it takes.
        name: Name for messages, such as `"train_dataset"`.

    Raises:
        `ValueError`: if there are images and no image processor, texts and no tokenizer, or a transform that gives no
            `pixel_values`.
    """
    if isinstance(dataset, dict):
        return {
            key: as_model_inputs(each, processing_class, model, f"{name}['{key}']") for key, each in dataset.items()
        }
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return dataset
    columns = dataset.column_names or ["pixel_values"]  # a stream that was mapped does not know its columns
    if set(MODEL_INPUTS) & set(columns):
        return dataset
    config: PreTrainedConfig | None = getattr(model, "config", None)
    if config is not None and takes_texts(config):
        return _as_tokens(dataset, processing_class, model, name)
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        return TransformedImages(dataset, name)
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            f"`{name}` is a stream with the columns {', '.join(columns)} and no `pixel_values`. To train on it, pass "
            "an `ImageStream(dataset, image_processor)` of hf_layershuffle.data, or let it make `pixel_values` and "
            "`labels` (`map`); to evaluate, load it without `streaming=True`."
        )
    if not isinstance(processing_class, BaseImageProcessor):
        raise ValueError(
            f"`{name}` has the columns {', '.join(columns)} and no `pixel_values`. Pass the model's image processor "
            "as `processing_class`, or an `ImageClassificationDataset(dataset, image_processor)`; or give the "
            "dataset a transform that makes `pixel_values` and `labels` (`with_transform`), with "
            "`remove_unused_columns=False` for another Trainer."
        )
    dataset = with_standard_columns(dataset, name)
    known = cast(PreTrainedConfig, config)
    dataset = _number_classes(dataset, known, name)
    return ImageClassificationDataset(dataset, processing_class, num_channels=num_channels_of(known))


def _as_tokens(dataset: Any, processing_class: object, model: PreTrainedModel, name: str) -> Any:
    """A dataset that is tokenized already, or has a transform, as it is, and one of texts tokenized."""
    columns = dataset.column_names
    is_stream = isinstance(dataset, datasets.IterableDataset)
    if "input_ids" in columns or (not is_stream and dataset.format["type"] == "custom"):
        return dataset
    if is_stream or not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            f"`{name}` has the columns {', '.join(columns)} and no `input_ids`. Pass the model's tokenizer as "
            "`processing_class`, or a dataset that is tokenized: dataset.map(lambda rows: tokenizer(rows['text'], "
            "truncation=True), batched=True)."
        )
    check_tokenizer(processing_class, model.config)
    dataset = _number_classes(with_text_columns(dataset, name), model.config, name)
    return TextClassificationDataset(dataset, processing_class, max_length=longest_text(processing_class, model))


def _number_classes(dataset: datasets.Dataset, config: PreTrainedConfig, name: str) -> datasets.Dataset:
    """The dataset with class names matched to the model's.

    Integers without names are taken for the model's class numbers.
    """
    feature = dataset.features["label"]
    if not isinstance(feature, datasets.ClassLabel):
        values = set(dataset.unique("label"))
        if all(isinstance(value, int) for value in values):
            return dataset
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"`{name}` has the label {min(map(repr, values))}; labels are class names or integers.")
        dataset = dataset.cast_column("label", datasets.ClassLabel(names=sorted(values)))
    _name_classes(config, dataset.features["label"].names)
    return match_labels(dataset, config, name)


def _name_classes(config: PreTrainedConfig, names: list[str]) -> None:
    """Gives a model whose classes have no names the names of its first dataset.

    So the next datasets are matched by name.
    """
    id2label = cast(dict[int, str], config.id2label)
    unnamed = [f"LABEL_{index}" for index in range(len(id2label))]
    known = [str(id2label[index]) for index in range(len(id2label))]
    if known == unnamed and len(names) <= len(known) and not all(name.isdecimal() for name in names):
        config.id2label = dict(enumerate([*names, *unnamed[len(names) :]]))
        config.label2id = {name: index for index, name in config.id2label.items()}


def keep_class_names(before: PreTrainedConfig | None, config: PreTrainedConfig | None) -> None:
    """Gives a new model the class names of the one in whose place it stands, as the datasets are numbered by them."""
    if before is not None and config is not None and before.num_labels == config.num_labels:
        id2label = cast(dict[int, str], before.id2label)
        _name_classes(config, [str(id2label[index]) for index in range(len(id2label))])


class TransformedImages(torch.utils.data.Dataset):
    """A `datasets.Dataset` with a transform. The Trainer would take away the columns that the transform reads."""

    def __init__(self, dataset: datasets.Dataset, name: str):
        self.dataset = dataset
        given = dataset[0] if len(dataset) else {"pixel_values": None}
        if "pixel_values" not in given:
            raise ValueError(
                f"The transform of `{name}` gives {', '.join(given)}; it must give `pixel_values` of shape "
                "(num_images, num_channels, height, width) and `labels`, as an image processor makes them with "
                "return_tensors='pt'."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return self.dataset.__getitems__(indices)
