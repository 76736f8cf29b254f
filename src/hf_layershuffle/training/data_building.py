# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The datasets that the arguments of a run describe."""

import inspect

import numpy as np

from ..data import ImageClassificationDataset, load_image_datasets
from .script_arguments import DataArguments


def typical_image_size(dataset) -> tuple[int, int]:
    """Median height and width, in pixels, of up to 32 images spread over the dataset."""
    # Stands in for `hf_layershuffle.data.typical_image_size`, which replaces it
    rows = np.unique(np.linspace(0, len(dataset) - 1, 32).astype(int)).tolist()
    shapes = [np.asarray(image).shape[:2] for image in dataset[rows]["image"]]
    return tuple(int(np.median(sizes)) for sizes in zip(*shapes))


def load_splits(args: DataArguments):
    """`{"train", "test"}` with the columns `image` and `label`, of the dataset that the arguments name."""
    if args.skip_damaged and not (_skipping(load_image_datasets, args) or _skipping(ImageClassificationDataset, args)):
        raise ValueError("`skip_damaged` is not possible with the installed hf-layershuffle; leave it out.")
    return load_image_datasets(
        args.dataset_name,
        args.dataset_config_name,
        image_column=args.image_column_name,
        label_column=args.label_column_name,
        train_split=args.train_split,
        eval_split=args.eval_split,
        eval_fraction=args.eval_fraction,
        **_skipping(load_image_datasets, args),
    )


def _skipping(function, args: DataArguments) -> dict:
    """`skip_damaged` for a function that has such an argument."""
    return (
        {"skip_damaged": True}
        if args.skip_damaged and "skip_damaged" in inspect.signature(function).parameters
        else {}
    )


def build_datasets(args: DataArguments, splits, model, image_processor, seed: int):
    """Training images, augmented, and evaluation images, as they are.

    Raises:
        `ValueError`: if the model has another number of classes, or a number is out of range.
    """
    config = model.config
    if config.num_labels != splits["train"].features["label"].num_classes:
        raise ValueError(
            f"The model has {config.num_labels} classes and dataset '{args.dataset_name}' has "
            f"{splits['train'].features['label'].num_classes}; add --ignore_mismatched_sizes to start a new classifier."
        )
    for name, limit in (("train", args.max_train_samples), ("test", args.max_eval_samples)):
        if limit is not None:
            if limit < 1:
                raise ValueError(f"The number of {name} samples is {limit}; it must be at least 1.")
            splits[name] = splits[name].shuffle(seed=seed).select(range(min(limit, len(splits[name]))))
    size = config.image_size if isinstance(config.image_size, int) else min(config.image_size)
    padding = (size // 8 if size >= 16 else 0) if args.crop_padding is None else args.crop_padding
    is_colour = np.asarray(splits["train"][0]["image"]).ndim == 3
    flip = is_colour if args.horizontal_flip is None else args.horizontal_flip
    augmentation = {"augment": True, "crop_padding": padding, "horizontal_flip": flip, "seed": seed}
    if args.max_cached_gib < 0:
        raise ValueError(f"`max_cached_gib` is {args.max_cached_gib}; it must be at least 0.")
    common = {
        "image_processor": image_processor,
        "num_channels": config.num_channels,
        "max_cached_bytes": int(args.max_cached_gib * 2**30),
        **_skipping(ImageClassificationDataset, args),
    }
    return (
        ImageClassificationDataset(splits["train"], **common, **augmentation, description="Decoding training images"),
        ImageClassificationDataset(splits["test"], **common, description="Decoding evaluation images"),
    )
