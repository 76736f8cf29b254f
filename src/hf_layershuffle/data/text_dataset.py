# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Labelled texts as the models take them: tokens, padded a batch at a time."""

import copy
import logging
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerBase

from ..checkpoints.tokenizers import length_limit
from .class_labels import quoted, unformatted


logger = logging.getLogger(__name__)
CHUNK = 1000  # texts that are tokenized at once
STREAM = (
    "A streaming dataset has no length and no rows to be drawn by number. Load it without `streaming=True`, or keep a "
    "part of it: Dataset.from_list(list(dataset.take(10000)), features=dataset.features)."
)


class TextClassificationDataset(torch.utils.data.Dataset):
    """Tokens and labels for the Trainer, tokenized once. `collate` pads a batch to its longest text.

    Items are `{"input_ids", "attention_mask", ..., "labels"}`: lists of integers of one length, and the class as an
    integer. Which inputs there are, the tokenizer says.

    Args:
        dataset: A dataset with the columns `text` and `label`, and for pairs of texts `text_pair`, as from
            [`load_text_datasets`].
        tokenizer: The model's tokenizer.
        max_length: Tokens after which a text is cut off, at least 1, with the special ones. Defaults to the
            tokenizer's `model_max_length`. Of a pair, the longer text is cut.
        skip_damaged: Whether to leave out rows without a text, with a warning that names them.

    Raises:
        `ValueError`: if there is no text, or a row has none.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        skip_damaged: bool = False,
    ):
        if isinstance(dataset, IterableDataset):
            raise ValueError(STREAM)
        if len(dataset) == 0:
            raise ValueError("The dataset is empty; pass at least one text.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` is {max_length}; it must be a number of tokens of at least 1.")
        self.columns = [name for name in ("text", "text_pair") if name in dataset.column_names]
        self.dataset = self._without_missing(unformatted(dataset), skip_damaged)
        self.tokenizer = tokenizer
        self._pad = padding_collator(tokenizer)
        self.max_length = max_length or length_limit(tokenizer)
        self.labels: list[int] = self.dataset["label"][:]
        self._inputs: dict[str, list[list[int]]] = {}
        for start in range(0, len(self.dataset), CHUNK):
            rows = self.dataset[start : start + CHUNK]
            for name, values in self._tokenize([rows[column] for column in self.columns]).items():
                self._inputs.setdefault(name, []).extend(values)

    def _without_missing(self, dataset: Dataset, skips: bool) -> Dataset:
        columns = [dataset[name][:] for name in self.columns]
        missing = [row for row, texts in enumerate(zip(*columns)) if None in texts]
        if not missing:
            return dataset
        if len(missing) == len(dataset):
            raise ValueError(f"No row of the dataset has a text in {quoted(self.columns)}; choose another column.")
        where = f"{len(missing)} of {len(dataset)} rows have no text, first row {missing[0]}."
        if not skips:
            raise ValueError(
                f"{where} Mend or remove them, or leave them out with `skip_damaged=True` (--skip_damaged)."
            )
        logger.warning("%s They are left out.", where)
        left_out = set(missing)
        return dataset.select([row for row in range(len(dataset)) if row not in left_out])

    def _tokenize(self, texts: list[list[str]]) -> BatchEncoding:
        return self.tokenizer(*texts, truncation=self.max_length is not None, max_length=self.max_length)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no text {index}; there are {len(self)}.")
        return {name: values[index] for name, values in self._inputs.items()} | {"labels": self.labels[index]}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch of tensors of shape `(batch_size, tokens)`, padded to its longest text, and `labels`."""
        return dict(self._pad(items))


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """Makes batches that are padded on the right, wherever the tokenizer pads.

    On the left, a text's tokens would stand at other positions in a batch than alone, and the first would be padding.
    """
    if tokenizer.padding_side != "right":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "right"
    return DataCollatorWithPadding(tokenizer)
