# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Labelled images as the models take them: decoded once, or whenever read, augmented whole batches at a time."""

import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import ImageProcessingMixin, default_data_collator

from .augmentation import MIXING, finish_batch
from .augmentation_settings import Augmentation
from .class_labels import unformatted
from .image_decoding import ImageDecoder, open_image
from .image_reading import damaged_message, read_images, to_pil, undecoded
from .pixel_cache import CHUNK, DamagedImagesError, load_pixels


logger = logging.getLogger(__name__)
_PLAIN = {"pixel_values", "labels", "normalization"}  # keys of a batch that is not augmented
STREAM = (
    "A streaming dataset has no length and no rows to be drawn by number, which training in epochs and evaluation "
    "need. Load it without `streaming=True`, train on it by `ImageStream`, or keep a part of it: "
    "Dataset.from_list(list(dataset.take(10000)), features=dataset.features)."
)


class ImageClassificationDataset(torch.utils.data.Dataset):
    """Normalised images and labels for the Trainer, decoded once and augmented a batch at a time without torchvision.

    Items are `{"pixel_values": float32 tensor (num_channels, height, width), "labels": int}`. Augmentation is a
    function of `(seed, epoch, index)`: the same after a resume and for any number of workers or processes. Where
    images are mixed, items also say how (`mixing`, `mixing_boxes`), since that is done when a batch is there: with a
    collator of this package and [`LayerShuffleTrainer`].

    With resized crops (`Augmentation.resized_crop_scale`), images are decoded whenever they are read, since each crop
    is taken from the image in its own size. Otherwise decoded images are kept as uint8 in a memory-mapped file beside
    the dataset's own cache files, which later runs read. They are kept in memory if the dataset has no files,
    `datasets.disable_caching()` was called or the folder cannot be written.

    Args:
        dataset: A dataset with the columns `image` and `label`, as from [`load_image_datasets`].
        image_processor: The image processor that resizes the images and says their mean and standard deviation.
        num_channels: 3 to read all images as RGB, 1 as grey.
        augmentation: What is done to the images at random, see [`Augmentation`].
        augment: Short for an `augmentation` of the next two arguments.
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
        augmentation: Augmentation | None = None,
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
        if augmentation is not None and (augment or crop_padding or horizontal_flip):
            raise ValueError(
                "`augmentation` is given beside `augment`, `crop_padding` or `horizontal_flip`; put them into it: "
                "Augmentation(crop_padding=..., horizontal_flip=...)."
            )
        settings = Augmentation(crop_padding=crop_padding, horizontal_flip=horizontal_flip)
        self.augmentation = settings if augment else augmentation
        self.dataset = unformatted(dataset)
        self.image_processor: Any = image_processor
        self._decoder = ImageDecoder(image_processor, num_channels)
        self.seed = seed
        # In shared memory, so that workers that outlive an epoch see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._shape = (cast(int, num_channels), 1, 1)  # until one image is decoded
        kept = {**image_processor.to_dict(), "num_channels": num_channels}
        most = 0 if self._takes_parts else max_cached_bytes
        self._pixels, self._pixel_rows = self._load_pixels(kept, most, skip_damaged, description)
        self._stored = undecoded(self.dataset)
        self.labels = torch.tensor(self.dataset["label"][:])

    @property
    def _takes_parts(self) -> bool:
        """Whether each epoch takes other parts of the images, in their own sizes."""
        return self.augmentation is not None and self.augmentation.resized_crop_scale is not None

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
            message = damaged_message(dataset, damaged, self._decoder.mode)
            logger.warning("%s %s left out.", message, "It is" if len(damaged) == 1 else "They are")
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
        message = damaged_message(self.dataset, rows, self._decoder.mode)
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
        epoch = int(self._epoch)
        if self._takes_parts:
            pixels = self._decode_parts(indices, epoch)
        elif self._pixels is None:
            pixels = self._decode(indices)
        else:
            pixels = self._pixels.index_select(0, self._pixel_rows[rows])
        batch = {"pixel_values": pixels, "labels": self.labels[rows]}
        if self.augmentation is not None:
            batch |= self.augmentation.draw(self.seed, epoch, rows.numpy(), self._shape)
        # One row an image, so that a launcher may cut the batch into parts; each in memory of its own, to be pinned
        return ImageBatch({**batch, "normalization": self._decoder.normalization.repeat(len(rows), 1, 1)})

    def _decode_parts(self, indices: list[int], epoch: int) -> torch.Tensor:
        """Parts of the images, resized, as [`_decode`] gives the whole."""

        def boxes_of(sizes: np.ndarray) -> np.ndarray:
            return cast(Augmentation, self.augmentation).crop_boxes(self.seed, epoch, np.asarray(indices), sizes)

        try:
            images = [open_image(image) for image in read_images(self._stored, indices)]
            return self._decoder.parts(images, boxes_of, self._shape[1:])
        except Exception as error:  # PIL raises OSError, SyntaxError, DecompressionBombError and more
            damaged = self._read_one_by_one(indices)[1]
            if not damaged:
                raise
            raise ValueError(self._damaged_message(damaged)) from error

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
            images = [to_pil(image, self._decoder.mode) for image in read_images(self.dataset, indices)]
        except Exception:  # PIL raises OSError, SyntaxError, DecompressionBombError and more
            images, damaged = self._read_one_by_one(indices)
        if len(damaged) == len(indices):
            return torch.zeros(len(indices), *self._shape, dtype=torch.uint8), damaged
        return self._decoder.whole(images), damaged

    def _read_one_by_one(self, indices: list[int]) -> tuple[list, list[int]]:
        images = {}
        damaged = []
        for index in indices:
            try:
                images[index] = to_pil(read_images(self.dataset, [index])[0], self._decoder.mode)
            except Exception:  # as above
                damaged.append(index)
        stand_in = next(iter(images.values()), None)
        return [images.get(index, stand_in) for index in indices], damaged


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
            batch = finish_batch({name: each for name, each in self.unfinished.items() if name not in MIXING})
            kept = {name: self.unfinished[name] for name in MIXING if name in self.unfinished}
            self._items = [
                {"pixel_values": image, "labels": label, **{name: each[row] for name, each in kept.items()}}
                for row, (image, label) in enumerate(zip(batch["pixel_values"], batch["labels"].tolist()))
            ]
        return self._items[index]


def collate_images(features: Any) -> dict[str, Any]:
    """Makes a batch as transformers' `default_data_collator` does, and at once of an [`ImageBatch`]."""
    return finish_batch(features.unfinished if isinstance(features, ImageBatch) else default_data_collator(features))


def collate_for_device(features: Any) -> dict[str, Any]:
    """Makes a batch as [`collate_images`] does, but images to be augmented stay uint8.

    That is a fourth of the bytes to move to the device. There [`finish_batch`] augments and normalises them, as in
    [`LayerShuffleTrainer`].
    """
    if not isinstance(features, ImageBatch):
        return default_data_collator(features)  # of items of several datasets, of which mixing is left to do
    return features.unfinished if features.unfinished.keys() - _PLAIN else collate_images(features)
