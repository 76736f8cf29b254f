# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Labelled images as the models take them: decoded once, augmented and normalised whole batches at a time."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import ImageProcessingMixin, default_data_collator

from .augmentation import crop_indices, finish_batch
from .image_reading import damaged_message, read_images, to_pil
from .pixel_cache import CHUNK, DamagedImagesError, load_pixels, unequal_sizes


logger = logging.getLogger(__name__)
STREAM = (
    "A streaming dataset has no length and no rows to be drawn by number, which training in epochs and evaluation "
    "need. Load it without `streaming=True`, or keep a part of it: Dataset.from_list(list(dataset.take(10000)), "
    "features=dataset.features)."
)


class ImageClassificationDataset(torch.utils.data.Dataset):
    """Normalised images and labels for the Trainer, decoded once and augmented a batch at a time without torchvision.

    Items are `{"pixel_values": float32 tensor (num_channels, height, width), "labels": int}`. Augmentation (a random
    crop of the padded image, a horizontal flip) is a function of `(seed, epoch, index)`: the same after a resume and
    for any number of workers or processes.

    Decoded images are kept as uint8 in a memory-mapped file beside the dataset's own cache files, which later runs
    read. They are kept in memory if the dataset has no files, `datasets.disable_caching()` was called or the folder
    cannot be written.

    Args:
        dataset: A dataset with the columns `image` and `label`, as from [`load_image_datasets`].
        image_processor: The image processor that resizes the images and says their mean and standard deviation.
        num_channels: 3 to read all images as RGB, 1 as grey.
        augment: Whether to augment.
        crop_padding: Pixels of black on each side before the random crop, at least 0.
        horizontal_flip: Whether to mirror half of the images.
        seed: Seed of the augmentation.
        max_cached_bytes: Images that take more bytes than this as uint8 (in memory: than 2 GiB) are decoded whenever
            they are read.
        skip_damaged: Whether to leave out images that cannot be read, with a warning that names them. They are looked
            for when the dataset is made. Where images are not kept, that reads all of them once more.
        description: Text beside the progress bar.

    Raises:
        `ValueError`: if images cannot be read: how many, their files and their rows in the dataset as it was loaded.
            Where images are not kept, this is raised for the first that is read.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_processor: ImageProcessingMixin,
        *,
        num_channels: int | None = 3,
        augment: bool = False,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        seed: int = 0,
        max_cached_bytes: int = 16 * 2**30,
        skip_damaged: bool = False,
        description: str = "Decoding images",
    ):
        if isinstance(dataset, IterableDataset):
            raise ValueError(STREAM)
        if len(dataset) == 0:
            raise ValueError("The dataset is empty; pass at least one image.")
        if crop_padding < 0:
            raise ValueError(f"`crop_padding` is {crop_padding}; it must be a number of pixels of at least 0.")
        self.dataset = dataset
        self.image_processor: Any = image_processor
        if num_channels not in (1, 3):
            raise ValueError(f"`num_channels` is {num_channels}; images are read with 1 (grey) or 3 (RGB) channels.")
        self.mode = "L" if num_channels == 1 else "RGB"
        self.augment = augment
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        # In shared memory, so that workers that outlive an epoch see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._draws: tuple[int, torch.Tensor, torch.Tensor] | None = None  # an epoch, and its offsets and flips
        self._shape = (num_channels, 1, 1)  # until one image is decoded
        self._normalization = _scale_and_shift(image_processor, num_channels)
        settings = {**image_processor.to_dict(), "num_channels": num_channels}
        self._pixels, self._pixel_rows = self._load_pixels(settings, max_cached_bytes, skip_damaged, description)
        self.labels = torch.tensor(self.dataset["label"][:])

    def _load_pixels(
        self, settings: dict, max_bytes: int, skip_damaged: bool, description: str
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The images that are kept, or None, and which of these each item is.

        Leaves damaged images out of `self.dataset`.

        Raises:
            `ValueError`: if there are damaged images and `skip_damaged` is false, or all are damaged.
        """
        dataset = self.dataset
        self._shape = self._image_shape()
        try:
            loaded = load_pixels(
                dataset, self._decode_intact, self._shape, settings, max_bytes=max_bytes, keep_damaged=skip_damaged,
                description=description,
            )  # fmt: skip
        except DamagedImagesError as error:
            raise ValueError(self._damaged_message(error.rows)) from error
        if loaded is not None:
            pixels, damaged = loaded
        else:
            pixels = None
            damaged = self._find_damaged() if skip_damaged else []
        rows = np.delete(np.arange(len(dataset)), damaged)
        if damaged:
            logger.warning("%s They are left out.", damaged_message(dataset, damaged, self.mode))
            self.dataset = dataset.select(rows)
        return pixels, torch.from_numpy(rows)

    def _image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width that the image processor gives, by the first image that can be read."""
        for row in range(len(self.dataset)):
            pixels, damaged = self._decode_intact([row])
            if not damaged:
                _, num_channels, height, width = pixels.shape
                return num_channels, height, width
        raise ValueError(self._damaged_message(list(range(len(self.dataset)))))

    def _damaged_message(self, rows: list[int]) -> str:
        message = damaged_message(self.dataset, rows, self.mode)
        return (
            f"{message} Mend or remove what cannot be read, or leave it out with `skip_damaged=True` (--skip_damaged)."
        )

    def _find_damaged(self) -> list[int]:
        found = []
        for start in tqdm(range(0, len(self.dataset), CHUNK), desc="Looking for damaged images"):
            rows = list(range(start, min(start + CHUNK, len(self.dataset))))
            found += self._decode_intact(rows)[1]
        return found

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
        if self._pixels is None:
            pixels = self._decode(indices)
        else:
            pixels = self._pixels.index_select(0, self._pixel_rows[rows])
        batch = {"pixel_values": pixels, "labels": self.labels[rows]}
        if self.augment:
            offsets, flips = self._epoch_draws()
            height, width = pixels.shape[-2:]
            batch["crop_rows"], batch["crop_columns"] = crop_indices(offsets[rows], flips[rows], (height, width))
        # One row an image, so that a launcher may cut the batch into parts; each in memory of its own, to be pinned
        return ImageBatch({**batch, "normalization": self._normalization.repeat(len(rows), 1, 1)})

    def _decode(self, indices: list[int]) -> torch.Tensor:
        """uint8 of shape `(len(indices), num_channels, height, width)`, of the image processor's size."""
        pixels, damaged = self._decode_intact(indices)
        if damaged:
            raise ValueError(self._damaged_message(damaged))
        return pixels

    def _decode_intact(self, indices: list[int]) -> tuple[torch.Tensor, list[int]]:
        """The images as [`_decode`] gives them, and the indices of those that cannot be read.

        Another image stands in for one that cannot be read.
        """
        damaged: list[int] = []
        try:
            images = [to_pil(image, self.mode) for image in read_images(self.dataset, indices)]
        except Exception:  # PIL raises OSError, SyntaxError, DecompressionBombError and more
            images, damaged = self._read_one_by_one(indices)
        if len(damaged) == len(indices):
            return torch.zeros(len(indices), *self._shape, dtype=torch.uint8), damaged
        channels = {"input_data_format": "channels_first"} if self.mode == "L" else {}
        arrays = [np.asarray(image)[None] if self.mode == "L" else image for image in images]
        return self._processed(arrays, channels).clamp(0, 255).to(torch.uint8), damaged

    def _processed(self, arrays: list, channels: dict[str, str]) -> torch.Tensor:
        """Resized and cropped, of shape `(len(arrays), num_channels, height, width)`.

        Raises:
            `ValueError`: if the image processor does not bring all images to one size.
        """
        settings = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt", **channels}
        try:
            pixels = self.image_processor(arrays, **settings).pixel_values
        except ValueError as error:
            shapes = sorted(
                {tuple(self.image_processor([each], **settings).pixel_values.shape[1:]) for each in arrays}
            )
            if len(shapes) == 1:
                raise
            raise ValueError(unequal_sizes(shapes[0], shapes[-1])) from error
        if pixels.ndim != 4:
            raise ValueError(
                f"{type(self.image_processor).__name__} makes lists of patches of images, which are not taken here; "
                "take a model of images of one size, such as a ViT or a SigLIP, and its image processor."
            )
        return pixels

    def _read_one_by_one(self, indices: list[int]) -> tuple[list, list[int]]:
        images = {}
        damaged = []
        for index in indices:
            try:
                images[index] = to_pil(read_images(self.dataset, [index])[0], self.mode)
            except Exception:  # as above
                damaged.append(index)
        stand_in = next(iter(images.values()), None)
        return [images.get(index, stand_in) for index in indices], damaged

    def _epoch_draws(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Crop offsets of shape `(num_images, 2)` and flips of shape `(num_images,)` of the current epoch."""
        epoch = int(self._epoch)
        if self._draws is None or self._draws[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offsets = rng.integers(0, 2 * self.crop_padding + 1, size=(len(self), 2)) - self.crop_padding
            flips = (rng.random(len(self)) < 0.5) & self.horizontal_flip
            self._draws = (epoch, torch.from_numpy(offsets), torch.from_numpy(flips))
        return self._draws[1:]


def _scale_and_shift(image_processor: Any, num_channels: int) -> torch.Tensor:
    """The image processor's rescaling and normalisation as `pixels * scale + shift`; shape `(2, num_channels)`."""
    scale = np.ones(num_channels)
    shift = np.zeros(num_channels)
    if image_processor.do_rescale:
        scale = scale * image_processor.rescale_factor
    if image_processor.do_normalize:
        mean = np.asarray(image_processor.image_mean)
        std = np.asarray(image_processor.image_std)
        scale = scale / std
        shift = shift - mean / std
    return torch.tensor(np.stack(np.broadcast_arrays(scale, shift)), dtype=torch.float32)


class ImageBatch(Sequence):
    """The items of a batch of [`ImageClassificationDataset`]. A collator that knows it takes the whole batch at once.

    Args:
        unfinished: `pixel_values` as uint8, `labels`, and what [`finish_batch`] needs.
    """

    def __init__(self, unfinished: dict[str, torch.Tensor]):
        self.unfinished = unfinished
        self._items: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.unfinished["labels"])

    def __getitem__(self, index: Any) -> Any:
        if self._items is None:
            batch = finish_batch(self.unfinished)
            self._items = [
                {"pixel_values": image, "labels": label}
                for image, label in zip(batch["pixel_values"], batch["labels"].tolist())
            ]
        return self._items[index]


def collate_images(features: Any) -> dict[str, Any]:
    """Makes a batch as transformers' `default_data_collator` does, and at once of an [`ImageBatch`]."""
    return finish_batch(features.unfinished) if isinstance(features, ImageBatch) else default_data_collator(features)


def collate_for_device(features: Any) -> dict[str, Any]:
    """Makes a batch as [`collate_images`] does, but images to be augmented stay uint8.

    That is a fourth of the bytes to move to the device. There [`finish_batch`] augments and normalises them, as in
    [`LayerShuffleTrainer`].
    """
    if isinstance(features, ImageBatch) and "crop_rows" in features.unfinished:
        return features.unfinished
    return collate_images(features)
