# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The stream to train on that the arguments of a run describe."""

from typing import Any

from datasets import DatasetDict

from ..data.augmentation_settings import Augmentation
from ..data.image_stream import ImageStream
from ..data.streamed_splits import StreamedSplits
from .script_arguments import DataArguments


class StreamedDatasets(DatasetDict):
    """`{"train", "test"}`, where "train" holds the first images of the stream only.

    Args:
        splits: What was loaded.
    """

    def __init__(self, splits: StreamedSplits):
        super().__init__({"train": splits.head(), "test": splits.test})
        self.streamed = splits


def build_stream(
    args: DataArguments, splits: StreamedDatasets, augmentation: Augmentation, seed: int, **common: Any
) -> ImageStream:
    """The stream to train on.

    Args:
        args: The arguments of the run.
        splits: What was loaded.
        augmentation, seed, common: As for [`ImageStream`].
    """
    streamed = splits.streamed
    return ImageStream(
        streamed.stream,
        num_samples=args.num_train_samples or streamed.num_samples,
        is_length=args.num_train_samples in (None, streamed.num_samples),
        augmentation=augmentation,
        seed=seed,
        shuffle_buffer_size=args.shuffle_buffer_size,
        class_numbers=streamed.class_numbers,
        files=streamed.files,
        rows_of_files=streamed.rows_of_files,
        **common,
    )


def check_length(dataset: Any, max_steps: int) -> None:
    """Raises a `ValueError` for a stream of which neither an epoch nor the training has a length."""
    if isinstance(dataset, ImageStream) and dataset.num_samples is None and max_steps <= 0:
        raise ValueError(
            "The stream does not say how many images it holds; give the images of an epoch by --num_train_samples, or "
            "the steps of the training by --max_steps."
        )


def num_samples_of(dataset: Any, images_of_training: int) -> int:
    """Images of an epoch, or of the training where an epoch has no end."""
    return images_of_training if getattr(dataset, "num_samples", 0) is None else len(dataset)
