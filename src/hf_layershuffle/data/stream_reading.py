# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Reads the rows of a stream with their images as the files hold them, and names the file where that fails."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets import Image as ImageFeature
from datasets import IterableDataset

from .class_labels import quoted


logger = logging.getLogger(__name__)
MAX_PIECES = 1024  # into which a stream is divided to be shuffled
_SHOWN = 2  # files that a message names
_REMEDY = "cast its column before (`dataset.cast_column(name, Image(decode=False))`) and these steps keep the files"


class StreamReader:
    """The rows of a stream, `image` and `label`, with image files as `{"bytes", "path"}`.

    Args:
        dataset: A stream with these columns. It is read in pieces, which are its shards, up to 1,024.
        files: The files of its shards, for messages.
    """

    def __init__(self, dataset: IterableDataset, files: Sequence[str] = ()):
        if _decodes(dataset):
            logger.warning(
                "The stream decodes each image where it was renamed, mapped or filtered, in the process that trains, "
                "and images that were mapped are encoded anew, with loss; %s.", _REMEDY,
            )  # fmt: skip
        self.dataset = _undecoded(dataset)
        self.num_pieces = min(self.dataset.num_shards, MAX_PIECES)
        self._files = list(files) if len(files) == self.dataset.num_shards else []

    def rows(self, pieces: Iterable[int] | None = None, number: int = 0) -> Iterator[dict[str, Any]]:
        """The rows of some pieces, or of all, one after the other.

        Args:
            pieces: The pieces.
            number: Which pass, for a stream that is shuffled already.

        Raises:
            `OSError`, `ValueError`: naming the file, if it cannot be read.
        """
        for piece in range(self.num_pieces) if pieces is None else pieces:
            last = None
            try:
                rows = self.dataset.shard(self.num_pieces, piece, contiguous=False)
                rows.set_epoch(number)
                for row in rows:
                    yield row
                    last = row
            except Exception as error:  # the errors of a dozen readers and of the network share no base class
                kind = OSError if isinstance(error, OSError) else ValueError
                raise kind(self._message(piece, last, error)) from error

    def _message(self, piece: int, last: dict[str, Any] | None, error: Exception) -> str:
        files = self._files[piece :: self.num_pieces]
        where = quoted(files, _SHOWN) if files else f"Part {piece} of {self.num_pieces} of the stream"
        path = last["image"].get("path") if last is not None and isinstance(last["image"], dict) else None
        place = "at its first image" if last is None else f"behind the image {path!r}" if path else "behind an image"
        reason = str(error).strip().rstrip(".") or type(error).__name__
        return f"{where} cannot be read {place}: {reason}. Mend the file or leave it out."


def _undecoded(dataset: IterableDataset) -> IterableDataset:
    dataset = dataset.with_format(None).select_columns(["image", "label"])
    feature = dataset.features["image"]
    return dataset.cast_column("image", ImageFeature(decode=False)) if isinstance(feature, ImageFeature) else dataset


def _decodes(dataset: IterableDataset) -> bool:
    """Whether a step that was put upon the stream takes all images decoded. `datasets` has no public way to know."""
    waiting = [dataset._ex_iterable]
    while waiting:
        step = waiting.pop()
        features = getattr(step, "features", None) or {}
        images = [feature for feature in features.values() if isinstance(feature, ImageFeature)]
        if images and all(feature.decode for feature in images):  # others than the one in use may be decoded
            return True
        waiting += [*getattr(step, "ex_iterables", []), *filter(None, [getattr(step, "ex_iterable", None)])]
    return False
