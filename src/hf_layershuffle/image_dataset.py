# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Labelled images as the models take them: decoded once, augmented and normalised whole batches at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from transformers import default_data_collator

from .augmentation import crop_indices, finish_batch
from .pixel_cache import load_pixels


class ImageClassificationDataset(torch.utils.data.Dataset):
    """Normalised images and labels for the Trainer, decoded once and augmented a batch at a time without torchvision.

    Items are `{"pixel_values": float32 tensor (num_channels, height, width), "labels": int}`. Augmentation (a random crop
    of the padded image, a horizontal flip) is a function of `(seed, epoch, index)`: the same after a resume and for any
    number of workers or processes.

    Decoded images are kept as uint8 in a memory-mapped file beside the dataset's own cache files, which later runs read,
    or in memory, if the dataset has no files, `datasets.disable_caching()` was called or the folder cannot be written.

    Args:
        dataset (`datasets.Dataset`): With the columns `image` and `label`, as from [`load_image_datasets`].
        image_processor: A transformers image processor; resizes, and gives mean and standard deviation.
        num_channels (`int`): 3 to read all images as RGB, 1 as grey.
        augment (`bool`): Whether to augment.
        crop_padding (`int`): Pixels of black on each side before the random crop, at least 0.
        horizontal_flip (`bool`): Whether to mirror half of the images.
        seed (`int`): Seed of the augmentation.
        max_cached_bytes (`int`): Images that take more bytes than this as uint8 (in memory: than 2 GiB) are decoded
            whenever they are read.

    Raises:
        `ValueError`: if an image cannot be read (names its row).
    """

    def __init__(
        self,
        dataset: Dataset,
        image_processor,
        *,
        num_channels: int = 3,
        augment: bool = False,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        seed: int = 0,
        max_cached_bytes: int = 16 * 2**30,
        description: str = "Decoding images",
    ):
        if len(dataset) == 0:
            raise ValueError("The dataset is empty; pass at least one image.")
        if crop_padding < 0:
            raise ValueError(f"`crop_padding` is {crop_padding}; it must be a number of pixels of at least 0.")
        self.dataset = dataset
        self.image_processor = image_processor
        self.mode = {1: "L", 3: "RGB"}.get(num_channels)
        if self.mode is None:
            raise ValueError(f"`num_channels` is {num_channels}; images are read with 1 (grey) or 3 (RGB) channels.")
        self.labels = torch.tensor(dataset["label"][:])
        self.augment, self.crop_padding, self.horizontal_flip, self.seed = augment, crop_padding, horizontal_flip, seed
        # In shared memory, so that workers that outlive an epoch see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._draws = (None, None, None)
        self._normalization = _scale_and_shift(image_processor, num_channels)
        self._pixels = load_pixels(
            dataset,
            self._decode,
            tuple(self._decode([0]).shape[1:]),
            {**image_processor.to_dict(), "num_channels": num_channels},
            max_bytes=max_cached_bytes,
            description=description,
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Moves to another draw of the augmentation."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index}; there are {len(self)}.")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> "ImageBatch":
        rows = torch.as_tensor(indices)
        pixels = self._decode(indices) if self._pixels is None else self._pixels.index_select(0, rows)
        batch = {"pixel_values": pixels, "labels": self.labels[rows]}
        if self.augment:
            offsets, flips = self._epoch_draws()
            batch["crop_rows"], batch["crop_columns"] = crop_indices(offsets[rows], flips[rows], pixels.shape[-2:])
        # One row an image, so that a launcher may cut the batch into parts
        return ImageBatch({**batch, "normalization": self._normalization.expand(len(rows), -1, -1)})

    def _decode(self, indices: list[int]) -> torch.Tensor:
        """uint8 of shape `(len(indices), num_channels, height, width)`, of the image processor's size."""
        try:
            images = [self._to_pil(image) for image in self.dataset[indices]["image"]]
        except Exception as error:  # PIL raises OSError, SyntaxError, DecompressionBombError and more
            if len(indices) > 1:
                return torch.cat([self._decode([index]) for index in indices])
            raise ValueError(
                f"The image in row {indices[0]} cannot be read: {error}. Mend or remove it from the dataset."
            ) from error
        channels = {"input_data_format": "channels_first"} if self.mode == "L" else {}
        arrays = [np.asarray(image)[None] if self.mode == "L" else image for image in images]
        decoded = self.image_processor(
            arrays, do_rescale=False, do_normalize=False, return_tensors="pt", **channels
        ).pixel_values
        return decoded.clamp(0, 255).to(torch.uint8)

    def _to_pil(self, image) -> PILImage.Image:
        if image is None:
            raise ValueError("it is missing")
        if not isinstance(image, PILImage.Image):
            image = PILImage.fromarray(np.asarray(image, dtype=np.uint8))
        return image.convert(self.mode)

    def _epoch_draws(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Crop offsets of shape `(num_images, 2)` and flips of shape `(num_images,)` of the current epoch."""
        epoch = int(self._epoch)
        if self._draws[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offsets = rng.integers(0, 2 * self.crop_padding + 1, size=(len(self), 2)) - self.crop_padding
            flips = (rng.random(len(self)) < 0.5) & self.horizontal_flip
            self._draws = (epoch, torch.from_numpy(offsets), torch.from_numpy(flips))
        return self._draws[1:]


def _scale_and_shift(image_processor, num_channels: int) -> torch.Tensor:
    """The image processor's rescaling and normalisation as `pixels * scale + shift`; shape `(2, num_channels)`."""
    scale, shift = np.ones(num_channels), np.zeros(num_channels)
    if image_processor.do_rescale:
        scale = scale * image_processor.rescale_factor
    if image_processor.do_normalize:
        mean, std = np.asarray(image_processor.image_mean), np.asarray(image_processor.image_std)
        scale, shift = scale / std, shift - mean / std
    return torch.tensor(np.stack(np.broadcast_arrays(scale, shift)), dtype=torch.float32)


class ImageBatch(Sequence):
    """The items of a batch of [`ImageClassificationDataset`]. To a collator that knows it, it gives the whole batch at once.

    Args:
        unfinished (`dict[str, torch.Tensor]`): `pixel_values` as uint8, `labels`, and what [`finish_batch`] needs.
    """

    def __init__(self, unfinished: dict[str, torch.Tensor]):
        self.unfinished = unfinished
        self._items = None

    def __len__(self) -> int:
        return len(self.unfinished["labels"])

    def __getitem__(self, index: int) -> dict:
        if self._items is None:
            batch = finish_batch(self.unfinished)
            self._items = [
                {"pixel_values": image, "labels": label}
                for image, label in zip(batch["pixel_values"], batch["labels"].tolist())
            ]
        return self._items[index]


def collate_images(features) -> dict[str, torch.Tensor]:
    """As transformers' `default_data_collator`, and at once for an [`ImageBatch`]."""
    return finish_batch(features.unfinished) if isinstance(features, ImageBatch) else default_data_collator(features)


def collate_for_device(features) -> dict[str, torch.Tensor]:
    """As [`collate_images`], but images to be augmented stay uint8: a fourth of the bytes to move to the device, where
    [`finish_batch`] augments and normalises them, as [`LayerShuffleTrainer`] does."""
    if isinstance(features, ImageBatch) and "crop_rows" in features.unfinished:
        return features.unfinished
    return collate_images(features)


def as_dataloader(
    data, image_processor=None, *, batch_size: int = 64, max_samples: int | None = None, num_channels: int = 3
) -> torch.utils.data.DataLoader:
    """Batches `{"pixel_values", "labels"}`, always in the same order, of anything that holds labelled images.

    Args:
        data: A `datasets.Dataset` with the columns `image` and `label`, as from [`load_image_datasets`] (needs
            `image_processor`); a sequence of `{"pixel_values", "labels"}` items; or a DataLoader, taken as it is.
        image_processor: A transformers image processor.
        batch_size (`int`): Images a batch, at least 1.
        max_samples (`int`, *optional*): Only the first so many images, at least 1. Not for a DataLoader.
        num_channels (`int`): Of the model; for a `datasets.Dataset`.

    Raises:
        `ValueError`: if there is no image, or an argument is out of range or missing.
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
    if len(data) == 0:
        raise ValueError("The evaluation set is empty; pass at least one image.")
    if isinstance(data, Dataset):
        if image_processor is None:
            raise ValueError("A `datasets.Dataset` of images needs an `image_processor`, as the model's own.")
        data = data.select(range(min(max_samples or len(data), len(data))))
        data = ImageClassificationDataset(data, image_processor, num_channels=num_channels)
    elif max_samples is not None:
        data = torch.utils.data.Subset(data, range(min(max_samples, len(data))))
    return torch.utils.data.DataLoader(data, batch_size=batch_size, collate_fn=collate_images)
