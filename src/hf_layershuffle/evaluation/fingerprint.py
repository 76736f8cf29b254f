# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a result belongs to: digests of the inputs and labels that a model saw, and of what made these inputs."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler, Subset
from transformers import ImageProcessingMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.identity import FAMILY_SETTINGS, describe_outputs, weights_digest
from ..checkpoints.processing_classes import ProcessingClass
from ..checkpoints.tokenizers import takes_texts, tokenizer_digest
from ..data.dataloading import MODEL_INPUTS
from ..data.image_dataset import ImageClassificationDataset
from ..data.text_dataset import TextClassificationDataset
from ..layerwise import rows_of
from .report import RobustnessReport


# All fields of an image processor that change pixels. The others differ between versions of transformers
_PIXEL_FIELDS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)
_OTHER = {
    "weights": "it is of other weights",
    "image_processor": "the image processor had other settings",
    "tokenizer": "it was made with another tokenizer",
    "data": "it is of other images or labels, as of another dataset, split or column, or of changed files",
}


def data_digest(loader: DataLoader) -> str:
    """A digest of the labels and of the pixels or tokens as the model gets them, which tells evaluation sets apart.

    Args:
        loader: Batches `{"pixel_values", "labels"}` of any size, as from [`as_dataloader`]. They are read once.

    Returns:
        Sixteen hexadecimal digits.
    """
    inputs: dict[str, int] = {}
    labels = 0
    normalization = torch.zeros(0)
    for batch in _unfinished_batches(loader):
        for name in _told_apart_by(batch):
            inputs[name] = zlib.crc32(_bytes(batch[name]), inputs.get(name, 0))
        labels = zlib.crc32(_bytes(torch.as_tensor(batch["labels"]).long()), labels)
        normalization = batch.get("normalization", [normalization])[0]
    digest: memoryview | bytes = _bytes(normalization)
    for value in inputs.values():
        digest = zlib.crc32(digest, value).to_bytes(4, "big")
    return f"{digest.hex()}{labels:08x}"


def _told_apart_by(batch: dict[str, Any]) -> list[str]:
    """Names of the inputs, and of what is drawn for images."""
    if "pixel_values" not in batch:
        return sorted(batch.keys() - {"labels"})
    drawn = batch.keys() - {"labels", "normalization", "pixel_values"} if "normalization" in batch else ()
    return ["pixel_values", *sorted(drawn)]


def example_digests(loader: DataLoader) -> list[bytes]:
    """A digest of each example's pixels or tokens, without padding and without its label.

    Of images in an [`ImageClassificationDataset`] it is that of the images before they are augmented, but for resized
    crops.

    Args:
        loader: Batches as for [`data_digest`]. They are read once.
    """
    if isinstance(loader.dataset, TextClassificationDataset):
        return [_example_digest(item) for item in _unfinished_batches(loader)]
    found = []
    for batch in _unfinished_batches(loader):
        inputs = {name: batch[name] for name in (*MODEL_INPUTS, "attention_mask") if name in batch}
        rows = range(len(batch["labels"]))
        found += [_example_digest({name: value[row] for name, value in inputs.items()}) for row in rows]
    return found


def _example_digest(inputs: dict[str, torch.Tensor]) -> bytes:
    mask = inputs.get("attention_mask")
    digest = hashlib.blake2b(digest_size=8)
    for name in MODEL_INPUTS:
        value = inputs.get(name)
        if value is not None:
            is_padded = mask is not None and mask.shape == value.shape
            digest.update(_bytes(value[mask.bool()] if mask is not None and is_padded else value))
    return digest.digest()


def _unfinished_batches(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """Batches with images as uint8 where they can be had, which are the same on every machine and fewer bytes.

    Texts come one by one, since their padding depends on the size of a batch.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, TextClassificationDataset):
        for item in map(dataset.__getitem__, rows_of(loader)):
            yield {name: torch.tensor(value, dtype=torch.int64) for name, value in item.items()}
        return
    rows: Any = range(len(dataset))
    while isinstance(dataset, Subset):
        dataset, rows = dataset.dataset, [dataset.indices[row] for row in rows]
    if not (isinstance(dataset, ImageClassificationDataset) and _reads_all_in_order(loader)):
        yield from loader
        return
    for start in range(0, len(rows), 256):
        yield dataset.__getitems__(list(rows[start : start + 256])).unfinished


def _reads_all_in_order(loader: DataLoader) -> bool:
    """Whether no sampler decides which rows come."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    return isinstance(sampler, SequentialSampler) and not loader.drop_last


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def processor_digest(image_processor: ImageProcessingMixin | None) -> str | None:
    """Eight hexadecimal digits that tell image processors apart by what changes pixels. None without one."""
    if image_processor is None:
        return None
    values = image_processor.to_dict()
    kept = {name: values[name] for name in _PIXEL_FIELDS if values.get(name) is not None}
    return f"{zlib.crc32(json.dumps(kept, sort_keys=True, default=_plain).encode()):08x}"


def processing_record(
    processing_class: ProcessingClass | None, config: PreTrainedConfig | None = None
) -> dict[str, str | None]:
    """What a report says of the image processor or the tokenizer that made the inputs of its model."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return {"tokenizer": tokenizer_digest(processing_class)}
    if processing_class is None and config is not None and takes_texts(config):
        return {"tokenizer": None}
    return {"image_processor": processor_digest(processing_class)}


def _plain(value: Any) -> Any:
    """A size as a dictionary of what is set, and numbers of other kinds as Python's."""
    if hasattr(value, "items"):
        return {name: item for name, item in value.items() if item is not None}
    return value.tolist() if hasattr(value, "tolist") else int(value)


def expected_report(
    model: PreTrainedModel, loader: DataLoader, processing_class: ProcessingClass | None, **settings: Any
) -> dict[str, Any]:
    """What a report of `model` on the data of `loader` with these settings would say of itself, for [`other_than`]."""
    dataset: Any = loader.dataset
    return settings | {
        "num_images": len(dataset),
        "weights": weights_digest(model),
        **describe_outputs(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        **processing_record(processing_class, model.config),
        "data": data_digest(loader),
    }


def other_than(report: RobustnessReport, expected: dict[str, Any]) -> str | None:
    """Why a report is not the one that is `expected`, in words. None if it is."""
    found = {**report.to_dict(), **report.config, **report.environment}
    for name, value in expected.items():
        if name in ("image_processor", "tokenizer", "data") and name not in found:
            return "it was made by an earlier version, which did not record of which images it is"
        if name in FAMILY_SETTINGS and name not in found:
            continue  # of an earlier version, which did not record them
        if found.get(name) != value:
            return _OTHER.get(name, f"`{name}` is {found.get(name)!r} there and {value!r} here")
    return None
