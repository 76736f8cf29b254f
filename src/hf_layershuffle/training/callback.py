# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The order stream of a training run: the same on every process and after a resume."""

from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.execution_order import ExecutionOrderStream


class LayerShuffleCallback(TrainerCallback):
    """Gives a model's random execution orders to it as a function of the seed, the step and the micro-batch.

    So they are the same on every process, as sharded training needs, and the same after a resume.

    It also tells the training dataset its epoch, and every dataset inside it (of a `Subset`, `ConcatDataset` or
    wrapper of your own), where they have `set_epoch`. Accelerate tells the outermost one only, and on one process.
    It tells the sampler too. Where that is not PyTorch's, accelerate does not reach it after a resume in several
    processes.

    [`LayerShuffleTrainer`] adds it. Add it yourself to another `Trainer`.

    Args:
        seed: Seed of the orders, at least 0. Defaults to the training arguments' `seed`.
    """

    def __init__(self, seed: int | None = None):
        self.seed = seed
        self._streams: list[ExecutionOrderStream] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        modules = [] if model is None else model.modules()
        self._streams = [
            cast(ExecutionOrderStream, module.execution_order_stream)
            for module in modules
            if hasattr(module, "execution_order_stream")
        ]
        if not self._streams:
            raise ValueError(
                f"LayerShuffleCallback found no LayerShuffle model in {type(model).__name__}; train a "
                "LayerShuffleViT* or LayerShuffleDeiT* model, or remove the callback."
            )
        self._seek(args, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seek(args, state)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        epoch = int((state.epoch or 0) + 1e-6)  # the fraction of a resumed epoch may lack a last bit
        for dataset in nested_datasets(getattr(train_dataloader, "dataset", None)):
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:  # batches of a process, of batches, of rows
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))

    def _seek(self, args: TrainingArguments, state: TrainerState) -> None:
        for stream in self._streams:
            stream.seek(args.seed if self.seed is None else self.seed, state.global_step)


def nested_datasets(outermost: object) -> list:
    """A dataset and those that it holds in its attributes, alone or in lists and dictionaries, at any depth."""
    found: list[Any] = []
    waiting: list[object] = [outermost]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if _is_like_a_dataset(value):
            found.append(value)
            waiting.extend(vars(value).values())
        elif isinstance(value, (list, tuple, dict)):
            items = list(value.values()) if isinstance(value, dict) else value
            # The first one tells: the indices of a subset may be a million numbers
            waiting.extend(items if items and _is_like_a_dataset(items[0]) else ())
    return found


def _is_like_a_dataset(value: object) -> bool:
    """Whether a value is a dataset. Not all are subclasses of PyTorch's."""
    has_items = isinstance(value, Dataset) or hasattr(value, "__getitem__") or hasattr(value, "set_epoch")
    return has_items and hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, type))
