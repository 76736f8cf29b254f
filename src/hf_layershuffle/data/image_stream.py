# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Labelled images that are read one after the other: read in the process that trains, decoded in its workers."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from datasets import IterableDataset
from transformers import ImageProcessingMixin

from ..common.checks import check_integers
from .augmentation_settings import Augmentation
from .class_labels import quoted
from .draws import uniform
from .image_dataset import ImageBatch
from .image_decoding import ImageDecoder, decode_image, open_image
from .image_reading import reason_of
from .stream_reading import StreamReader


logger = logging.getLogger(__name__)
LOOKED_AT = 100  # images of which the first that can be read tells the size
MAX_DIFFERENCE = 0.01  # of the images of processes that read files of their own
Label: TypeAlias = int | str


class Sample(NamedTuple):
    """An image of a stream, not decoded.

    Args:
        number: Which pass over the stream it is of, from 0.
        place: Its place in that pass, counted over all processes.
        image: As [`open_image`] takes it.
        label: As the stream holds it.
    """

    number: int
    place: int
    image: Any
    label: Label | None


class ImageStream(torch.utils.data.Dataset):
    """Labelled images of a `datasets.IterableDataset` for [`LayerShuffleTrainer`].

    The images are read, not decoded, by the process that trains, and decoded, cropped and resized by the workers of
    its DataLoader. So the order is the same for any number of workers. The order and the augmentation of a pass are a
    function of the seed and the pass.

    An epoch is `num_samples` images. Where a pass over the stream ends, the next one begins, also in the middle of an
    epoch: no image comes twice before all have come once.

    Args:
        dataset: A stream with the columns `image` and `label`, as from [`load_image_stream`]. It is read in pieces,
            which are its shards (files), up to 1,024. One of your own that is renamed, mapped or filtered should hold
            its images undecoded before: `dataset.cast_column("image", Image(decode=False))`.
        image_processor: The image processor that resizes the images and says their mean and standard deviation.
        num_samples: Images of an epoch, at least 1. None for a stream whose length is not known, which then is one
            epoch without end: give the Trainer `max_steps`.
        is_length: Whether `num_samples` is how many images the stream holds. It is then checked.
        num_channels: 3 to read all images as RGB, 1 as grey.
        augmentation: What is done to the images at random, see [`Augmentation`].
        seed: Seed of the order and of the augmentation, at least 0.
        shuffle_buffer_size: Images, not decoded, among which the next one is drawn, at least 0. The pieces are
            shuffled too. 0 shuffles nothing.
        class_numbers: The class of each label as the stream holds it. By default labels are classes.
        skip_damaged: Whether to leave out images that cannot be read, with a warning. Their batches are smaller, and
            each must keep one image.
        files: The files of the stream's shards, for messages.
        rows_of_files: How many images each of the shards holds, where that is known. Several processes then read
            shards of their own, see [`own_pieces`].

    Raises:
        `ValueError`: if an argument is out of range, or none of the first images can be read.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        image_processor: ImageProcessingMixin,
        *,
        num_samples: int | None = None,
        is_length: bool = False,
        num_channels: int | None = 3,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle_buffer_size: int = 1000,
        class_numbers: Mapping[Label, int] | None = None,
        skip_damaged: bool = False,
        files: Sequence[str] = (),
        rows_of_files: Sequence[int] = (),
    ):
        check_integers(seed=(seed, 0), shuffle_buffer_size=(shuffle_buffer_size, 0))
        if num_samples is not None:
            check_integers(num_samples=(num_samples, 1))
        missing = [name for name in ("image", "label") if name not in (dataset.features or {})]
        if missing:
            raise ValueError(
                f"The stream has the columns {quoted(dataset.features or {})} and no '{missing[0]}'; load it by "
                "`load_image_stream`, or cast the images to `Image(decode=False)` and name the columns by "
                "`rename_columns`."
            )
        self._reader = StreamReader(dataset, files)
        self._rows = list(rows_of_files) if len(rows_of_files) == dataset.num_shards else []
        self._dtype = getattr(dataset.features["image"], "dtype", None)
        self.num_samples = num_samples
        self.is_length = is_length and num_samples is not None
        self.image_processor: Any = image_processor
        self._decoder = ImageDecoder(image_processor, num_channels)
        self.augmentation = augmentation
        self.seed = seed
        self.shuffle_buffer_size = shuffle_buffer_size
        self.class_numbers = class_numbers
        self.skip_damaged = skip_damaged
        self.epoch = 0
        self._shape = self._image_shape()

    def __len__(self) -> int:
        if self.num_samples is None:
            raise TypeError("The length of the stream is not known; give `num_samples`, or the Trainer `max_steps`.")
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def num_pieces(self) -> int:
        return self._reader.num_pieces

    def own_pieces(self, rank: int, world_size: int) -> list[int] | None:
        """The pieces that no other process reads, or None where each process reads all of them.

        Each has its own where it is known that they then have as many images, to within 1 %. All take as many in an
        epoch, so a process with fewer images would take them more often.
        """
        if not self._rows:
            return None
        shares = [self._num_rows(range(first, self.num_pieces, world_size)) for first in range(world_size)]
        if max(shares) - min(shares) > MAX_DIFFERENCE * max(shares):
            return None
        return list(range(rank, self.num_pieces, world_size))

    def pass_length(self, rank: int, world_size: int) -> int | None:
        """Images of a process in a pass, where it is known how many the stream holds."""
        if not self.is_length:
            return None
        own = self.own_pieces(rank, world_size)
        return -(-(len(self) - rank) // world_size) if own is None else self._num_rows(own)

    def _num_rows(self, pieces: Iterable[int]) -> int:
        return sum(sum(self._rows[piece :: self.num_pieces]) for piece in pieces)

    def samples(self, number: int, rank: int = 0, world_size: int = 1) -> Iterator[Sample]:
        """The images of a pass in its order, not decoded: all, or a process's share.

        A process that has no pieces of its own reads all of them and keeps every `world_size`-th image.

        Args:
            number: Which pass, from 0.
            rank, world_size: Which share of how many.
        """
        own = self.own_pieces(rank, world_size)
        pieces = np.arange(self.num_pieces) if own is None else np.array(own)
        if self.shuffle_buffer_size:
            pieces = pieces[uniform(self.seed, number, pieces, "piece")[:, 0].argsort(kind="stable")]
        place, step = (0, 1) if own is None else (rank, world_size)
        rows = self._reader.rows(pieces.tolist(), number)
        for count, row in enumerate(self._shuffled(rows, number, 0 if own is None else rank)):
            if own is not None or count % world_size == rank:
                yield Sample(number, place + step * count, row["image"], row["label"])

    def _shuffled(self, rows: Iterator[dict[str, Any]], number: int, rank: int) -> Iterator[dict[str, Any]]:
        """The next row takes the place of one that is drawn from a buffer."""
        if self.shuffle_buffer_size < 2:
            yield from rows
            return
        rng = np.random.default_rng((self.seed, number, rank))
        buffer: list[dict[str, Any]] = []
        for row in rows:
            if len(buffer) < self.shuffle_buffer_size:
                buffer.append(row)
                continue
            place = int(rng.integers(len(buffer)))
            row, buffer[place] = buffer[place], row
            yield row
        yield from (buffer[place] for place in rng.permutation(len(buffer)))

    # --- Decoding ---

    def __getitem__(self, sample: Sample) -> dict:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: list[Sample]) -> ImageBatch:
        """A batch of images, decoded and with what is drawn for them."""
        other = next((sample for sample in samples if not isinstance(sample, Sample)), None)
        if other is not None:
            raise ValueError(
                f"An ImageStream was asked for image {other!r}, but it gives its images one after the other, as "
                "LayerShuffleTrainer draws them to train. Train with that. For all else, as to evaluate, load the "
                "split as a whole (`load_image_datasets`)."
            )
        try:
            return self._batch(samples)
        except Exception:  # PIL raises OSError, SyntaxError, DecompressionBombError and more
            intact = self._intact(samples)
            if len(intact) == len(samples):
                raise
            return self._batch(intact)

    def _batch(self, samples: list[Sample]) -> ImageBatch:
        parts: dict[str, list[torch.Tensor]] = {}
        for number in dict.fromkeys(sample.number for sample in samples):  # one, or two where a pass ends
            for name, values in self._augmented([each for each in samples if each.number == number], number).items():
                parts.setdefault(name, []).append(values)
        batch = {name: torch.cat(values) for name, values in parts.items()}
        batch["labels"] = torch.tensor([self._class_of(sample) for sample in samples])
        return ImageBatch({**batch, "normalization": self._decoder.normalization.repeat(len(samples), 1, 1)})

    def _augmented(self, samples: list[Sample], number: int) -> dict[str, torch.Tensor]:
        """uint8 pixels of images of one pass, and what is drawn for them."""
        settings = self.augmentation
        indices = np.array([sample.place for sample in samples])
        if settings is not None and settings.resized_crop_scale is not None:
            pixels = self._decoder.parts(
                [open_image(self._array(sample.image)) for sample in samples],
                lambda sizes: settings.crop_boxes(self.seed, number, indices, sizes),
                self._shape[1:],
            )
        else:
            pixels = self._decoder.whole([self._decode(sample.image) for sample in samples])
        drawn = {} if settings is None else settings.draw(self.seed, number, indices, self._shape)
        return {"pixel_values": pixels, **drawn}

    def _decode(self, stored: Any) -> Any:
        return decode_image(self._array(stored), self._decoder.mode)

    def _array(self, stored: Any) -> Any:
        """What a stream gives as lists, as an array of the type that it was stored with."""
        return np.asarray(stored, dtype=self._dtype) if isinstance(stored, (list, np.ndarray)) else stored

    def _class_of(self, sample: Sample) -> int:
        label = sample.label
        if self.class_numbers is not None:
            known = self.class_numbers.get(label) if label is not None else None
        else:
            known = label if isinstance(label, int) and label >= 0 else None
        if known is None:
            of = "integers of at least 0" if self.class_numbers is None else quoted(self.class_numbers, 10)
            raise ValueError(
                f"{_named(sample)} has the label {label!r}; the labels of this stream are {of}. Leave such images "
                "out of the stream (`dataset.filter`), or see that the evaluation split holds each class."
            )
        return known

    def _intact(self, samples: list[Sample]) -> list[Sample]:
        """Those that can be read.

        Raises:
            `ValueError`: if one cannot be read and `skip_damaged` is false, or none can.
        """
        intact = []
        for sample in samples:
            try:
                self._decode(sample.image)
                intact.append(sample)
            except Exception as error:  # as above
                message = f"{_named(sample)} cannot be read: {reason_of(error)}."
                if not self.skip_damaged:
                    raise ValueError(
                        f"{message} Mend or remove it, or leave it out with `skip_damaged=True` (--skip_damaged)."
                    ) from error
                logger.warning("%s It is left out.", message)
        if not intact:
            raise ValueError(
                f"None of the {len(samples)} images of a batch can be read, the last is: {message} Mend them, or take "
                "larger batches."
            )
        return intact

    def _image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width that the image processor gives, by the first image that can be read."""
        for row in itertools.islice(self._reader.rows(), LOOKED_AT):
            try:
                image = self._decode(row["image"])
            except Exception:  # as above
                continue
            _, num_channels, height, width = self._decoder.whole([image]).shape
            return num_channels, height, width
        raise ValueError(f"None of the first {LOOKED_AT} images of the stream can be read.")


def _named(sample: Sample) -> str:
    path = sample.image.get("path") if isinstance(sample.image, dict) else None
    return f"Image {sample.place} of pass {sample.number} over the stream" + (f" ({path!r})" if path else "")
