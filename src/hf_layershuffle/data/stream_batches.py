# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Batches of a stream of images, in the place of a batch sampler: what it gives to the workers is read already."""

import itertools
import logging
from collections.abc import Iterator

from torch.utils.data import Sampler

from ..common.checks import check_integers
from .image_stream import ImageStream, Sample


logger = logging.getLogger(__name__)


class StreamBatches(Sampler[list[Sample]]):
    """The batches of one process in the epoch that the stream is told by `set_epoch`.

    Each epoch goes on where the one before ended. To begin elsewhere, as after a resume, images are read and not
    decoded up to there. Passes before the last one are not read, once it is known how long a pass is.

    All processes have the same number of batches.

    Args:
        stream: The stream.
        batch_size: Images a batch, at least 1.
        drop_last: Whether an epoch ends with its last full batch. The next epoch then goes on behind that.
        rank, world_size: The number of this process, and how many there are.

    Raises:
        `ValueError`: in use, if a process has no images, or the stream is not as long as was said.
    """

    def __init__(
        self, stream: ImageStream, batch_size: int, *, drop_last: bool = False, rank: int = 0, world_size: int = 1
    ):
        check_integers(batch_size=(batch_size, 1), rank=(rank, 0), world_size=(world_size, 1))
        self.stream = stream
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.rank, self.world_size = rank, world_size
        self._reader: Iterator[Sample] = iter(())
        self._position = -1  # images that the reader has given since the first pass began
        self._pass_length = stream.pass_length(rank, world_size)
        self._is_said = self._pass_length is not None

    @property
    def num_samples(self) -> int:
        """Images of this process in an epoch."""
        share = -(-len(self.stream) // self.world_size)
        return share // self.batch_size * self.batch_size if self.drop_last else share

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[Sample]]:
        if self.stream.num_samples is None:  # one epoch without end
            self._seek(0)
            while True:
                yield self._take(self.batch_size)
        self._seek(self.stream.epoch * self.num_samples)
        for start in range(0, self.num_samples, self.batch_size):
            yield self._take(min(self.batch_size, self.num_samples - start))

    def _take(self, count: int) -> list[Sample]:
        samples = list(itertools.islice(self._reader, count))
        self._position += len(samples)
        return samples

    def _seek(self, position: int) -> None:
        if position == self._position:
            return
        number, skipped = divmod(position, self._pass_length) if self._pass_length else (0, position)
        self._reader = self._read(number, skipped)
        self._position = position

    def _read(self, number: int, skipped: int) -> Iterator[Sample]:
        """The images from one of a pass on, without end."""
        while True:
            count = 0
            for sample in self.stream.samples(number, self.rank, self.world_size):
                count += 1
                if self._is_said and count > (self._pass_length or 0):
                    self._check_length(count)  # which raises: there are more than was said
                if count > skipped:
                    yield sample
            self._check_length(count)
            passes, skipped = divmod(max(skipped - count, 0), count)
            number += 1 + passes

    def _check_length(self, count: int) -> None:
        if count == 0:
            raise ValueError(
                f"Process {self.rank} of {self.world_size} has no images of the stream: it has no rows, or fewer than "
                "there are processes."
            )
        if self._is_said and count != self._pass_length:
            share = "" if self.world_size == 1 else f" for process {self.rank} of {self.world_size}"
            found = f"at least {count}" if count > (self._pass_length or 0) else str(count)
            raise ValueError(
                f"The stream holds {found} images{share}, and {self._pass_length} were expected from what it says of "
                "itself; give the number of images of an epoch by `num_samples` (--num_train_samples)."
            )
        self._pass_length = count
