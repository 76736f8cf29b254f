# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The datasets of texts that the arguments of a run describe."""

from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.text_dataset import TextClassificationDataset
from ..data.text_datasets import load_text_datasets
from .data_building import check_num_classes, limit_samples, split_arguments, with_checkpoint_classes
from .text_arguments import TextDataArguments


def load_text_splits(
    args: TextDataArguments, class_names: list[str] | None = None, may_be_others: bool = False
) -> DatasetDict:
    """`{"train", "test"}` with the columns `text` and `label`, of the dataset that the arguments name.

    Args:
        args: The arguments of the run.
        class_names, may_be_others: As for [`load_splits`].
    """
    splits = load_text_datasets(
        **split_arguments(args),
        text_column=args.text_column_name,
        text_pair_column=args.text_pair_column_name,
        class_names=None if may_be_others else class_names,
    )
    return with_checkpoint_classes(splits, class_names, args.dataset_name)


def build_text_datasets(
    args: TextDataArguments,
    splits: DatasetDict,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple[TextClassificationDataset, TextClassificationDataset]:
    """Training texts and evaluation texts, tokenized.

    Raises:
        `ValueError`: if the model has another number of classes, a number is out of range, or a row has no text.
    """
    check_num_classes(args, splits, model.config)
    limit_samples(args, splits, seed)
    train, test = (
        TextClassificationDataset(splits[name], tokenizer, skip_damaged=args.skip_damaged)
        for name in ("train", "test")
    )
    return train, test
