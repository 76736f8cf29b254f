# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The datasets that the arguments of a run describe."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from datasets import DatasetDict
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from ..checkpoints.image_size import as_pair, image_size_of
from ..data.class_labels import quoted
from ..data.datasets import ImageClassificationDataset, load_image_datasets, match_labels
from ..data.image_reading import are_mostly_grey
from ..data.image_stream import ImageStream
from ..data.streamed_splits import load_image_stream
from ..models.configuration_layershuffle import num_channels_of
from .augmentation_arguments import augmentation_of
from .script_arguments import DataArguments
from .stream_building import StreamedDatasets, build_stream


def load_splits(args: DataArguments, class_names: list[str] | None = None, may_be_others: bool = False) -> DatasetDict:
    """`{"train", "test"}` with the columns `image` and `label`, of the dataset that the arguments name.

    Args:
        args: The arguments of the run.
        class_names: Names of the classes of the checkpoint that is fine-tuned. The same classes in another order are
            numbered as the checkpoint numbers them, since its classifier goes on. Integers without names are taken for
            its class indices.
        may_be_others: Whether such integers are not, since the classifier may start anew for other classes.
    """
    meant = None if may_be_others else class_names
    if args.streaming:
        arguments = split_arguments(args)
        del arguments["eval_fraction"]  # of a stream nothing is held out
        streamed = load_image_stream(**arguments, image_column=args.image_column_name, class_names=meant)
        classes = DatasetDict({"train": streamed.known, "test": streamed.test})
        classes = with_checkpoint_classes(classes, class_names, args.dataset_name)
        return StreamedDatasets(replace(streamed, known=classes["train"], test=classes["test"]))
    splits = load_image_datasets(**split_arguments(args), image_column=args.image_column_name, class_names=meant)
    return with_checkpoint_classes(splits, class_names, args.dataset_name)


def split_arguments(args: DataArguments) -> dict[str, Any]:
    """Which dataset and splits are loaded, by the names of [`load_image_datasets`]."""
    return {
        "dataset_name": args.dataset_name,
        "dataset_config_name": args.dataset_config_name,
        "label_column": args.label_column_name,
        "train_split": args.train_split,
        "eval_split": args.eval_split,
        "eval_fraction": args.eval_fraction,
    }


def with_checkpoint_classes(splits: DatasetDict, class_names: list[str] | None, dataset_name: str) -> DatasetDict:
    """The splits numbered as a checkpoint numbers its classes, if they have the same ones.

    Raises:
        `ValueError`: if there are fewer than two classes.
    """
    names = splits["train"].features["label"].names
    if len(names) < 2:
        raise ValueError(
            f"Dataset '{dataset_name}' has one class only, {quoted(names)}; training needs at least two. Give each "
            "class a folder or a label of its own, or name another column by --label_column_name."
        )
    if class_names is None or set(names) != set(class_names) or len(names) != len(class_names):
        return splits
    # As much of a configuration as numbers classes
    known = SimpleNamespace(id2label=dict(enumerate(class_names)), num_labels=len(class_names))
    config = cast(PreTrainedConfig, known)
    return DatasetDict({name: match_labels(split, config, dataset_name) for name, split in splits.items()})


def build_datasets(
    args: DataArguments,
    splits: DatasetDict,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    seed: int,
) -> tuple[ImageClassificationDataset | ImageStream, ImageClassificationDataset]:
    """Training images, augmented, and evaluation images, as they are.

    Raises:
        `ValueError`: if the model has another number of classes, or a number is out of range.
    """
    config = model.config
    check_num_classes(args, splits, config)
    limit_samples(args, splits, seed)
    is_colour = not are_mostly_grey(splits["train"])
    augmentation = augmentation_of(args).resolved(as_pair(image_size_of(config) or 0), is_colour)
    if args.max_cached_gib < 0:
        raise ValueError(f"`max_cached_gib` is {args.max_cached_gib}; it must be at least 0.")
    common: dict[str, Any] = {
        "image_processor": image_processor,
        "num_channels": num_channels_of(config),
        "max_cached_bytes": int(args.max_cached_gib * 2**30),
        "skip_damaged": args.skip_damaged,
    }
    test = ImageClassificationDataset(splits["test"], **common, description="Decoding evaluation images")
    if isinstance(splits, StreamedDatasets):
        del common["max_cached_bytes"]
        return build_stream(args, splits, augmentation, seed, **common), test
    training = {**common, "augmentation": augmentation, "seed": seed, "description": "Decoding training images"}
    return ImageClassificationDataset(splits["train"], **training), test


def check_num_classes(args: DataArguments, splits: DatasetDict, config: PreTrainedConfig) -> None:
    """Raises a `ValueError` if the model has another number of classes than the dataset."""
    if config.num_labels != splits["train"].features["label"].num_classes:
        raise ValueError(
            f"The model has {config.num_labels} classes and dataset '{args.dataset_name}' has "
            f"{splits['train'].features['label'].num_classes}; add --ignore_mismatched_sizes to start a new "
            "classifier."
        )


def limit_samples(args: DataArguments, splits: DatasetDict, seed: int) -> None:
    """Keeps as many rows of the splits as the arguments say, drawn by `seed`.

    Raises:
        `ValueError`: if a number is out of range.
    """
    for name, limit in (("train", args.max_train_samples), ("test", args.max_eval_samples)):
        if limit is not None:
            if limit < 1:
                raise ValueError(f"The number of {name} samples is {limit}; it must be at least 1.")
            splits[name] = splits[name].shuffle(seed=seed).select(range(min(limit, len(splits[name]))))
