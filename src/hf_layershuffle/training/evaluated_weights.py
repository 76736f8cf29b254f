# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Weights that are evaluated and saved in the place of those that are trained: averages over the steps of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EvaluatedWeights:
    """The trained parameters of a model, and other values that stand in their place while it is evaluated and saved.

    Values are changed in place, so that optimizers, DistributedDataParallel and compiled graphs need not know. Of
    parameters that are sharded over processes, each process changes its own part.

    Args:
        model: The model as it is trained.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.is_applied = False
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._training_values: dict[str, torch.Tensor] = {}

    def update(self, step: int) -> None:
        """Takes note of an optimizer step, counted from 1."""

    def _apply(self) -> None:
        raise NotImplementedError

    def _restore(self) -> None:
        raise NotImplementedError

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the weights to evaluate. At its end it has exactly those of training."""
        if self.is_applied:
            yield
            return
        self._gather()
        self._apply()
        self.is_applied = True
        try:
            yield
        finally:
            self._gather()
            self.is_applied = False
            self._restore()

    @torch.no_grad()
    def finish(self) -> None:
        """Leaves the weights to evaluate in the model, at the end of training."""
        self._gather()
        self._apply()

    def training_values(self) -> dict[str, torch.Tensor]:
        """The values of training, by the parameters' names, while others are applied."""
        return self._training_values

    def resume(self, training_values: dict[str, torch.Tensor]) -> None:
        """Goes on from a checkpoint, whose model has the weights to evaluate and is loaded.

        Raises:
            `ValueError`: if the values are of other parameters.
        """
        shapes = {name: value.shape for name, value in training_values.items()}
        if shapes != {name: value.shape for name, value in self._values().items()}:
            raise ValueError("they are of another model, or of other parts of it that are trained")

    def _gather(self) -> None:
        """Makes the parameters of FSDP2 the sharded ones again; an evaluation leaves some whole."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _values(self) -> dict[str, torch.Tensor]:
        """What this process holds of each parameter."""
        values = {name: each.detach() for name, each in self._parameters.items()}
        return {name: each.to_local() if isinstance(each, DTensor) else each for name, each in values.items()}


class MovingAverage(EvaluatedWeights):
    """An exponential moving average of the weights, by PyTorch's `swa_utils`.

    After step n it keeps the share `min(decay, (1 + n) / (10 + n))` of itself, so that the initial weights do not
    count for long in short trainings (as `tf.train.ExponentialMovingAverage` with `num_updates`).

    Args:
        model: The model as it is trained.
        decay: Share in (0, 1) that the average keeps of itself in a step.
        step: Optimizer steps so far.

    Raises:
        `ValueError`: if weights are trained in half precision, in which such small changes are lost.
    """

    def __init__(self, model: nn.Module, decay: float, step: int = 0):
        super().__init__(model)
        self.decay = decay
        self.step = step
        for name, parameter in self._parameters.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"`ema_decay` is {decay}, and '{name}' is trained in {parameter.dtype}, in which an average loses "
                    "small changes. Train weights in float32 (`float32_weights=True`, --dtype float32); mixed "
                    "precision is `bf16`."
                )
        self.average = {name: value.clone() for name, value in self._values().items()}

    def update(self, step: int) -> None:
        if step == self.step:  # nothing was trained since
            return
        self.step = step
        decay = min(self.decay, (1 + step) / (10 + step))
        values = list(self._values().values())
        if values:
            get_ema_multi_avg_fn(decay)(list(self.average.values()), values, step)

    @torch.no_grad()
    def _apply(self) -> None:
        self._exchange()
        self._training_values = self.average

    @torch.no_grad()
    def _restore(self) -> None:
        self._exchange()
        self._training_values = {}

    def _exchange(self) -> None:
        for name, value in self._values().items():
            kept = value.clone()
            value.copy_(self.average[name])
            self.average[name].copy_(kept)

    @torch.no_grad()
    def resume(self, training_values: dict[str, torch.Tensor]) -> None:
        super().resume(training_values)
        for name, value in self._values().items():
            self.average[name].copy_(value)
            value.copy_(training_values[name])


class ScheduleFreeWeights(EvaluatedWeights):
    """The averages that a schedule-free optimizer (arXiv 2405.15682) keeps itself and puts in place by its `eval`.

    Its `train` gives back the weights of training but for their last bits; here they come back exactly.

    Args:
        model: The model as it is trained.
        optimizer: The optimizer, with methods `train` and `eval`.
    """

    def __init__(self, model: nn.Module, optimizer: Any):
        super().__init__(model)
        self.optimizer = optimizer

    @torch.no_grad()
    def _apply(self) -> None:
        self._training_values = {name: value.clone() for name, value in self._values().items()}
        self.optimizer.eval()

    @torch.no_grad()
    def _restore(self) -> None:
        self._put_back(self._training_values)
        self._training_values = {}

    def _put_back(self, training_values: dict[str, torch.Tensor]) -> None:
        self.optimizer.train()
        for name, value in self._values().items():
            value.copy_(training_values[name])

    @torch.no_grad()
    def resume(self, training_values: dict[str, torch.Tensor]) -> None:
        super().resume(training_values)
        self._put_back(training_values)

    @torch.no_grad()
    def finish(self) -> None:
        super().finish()
        self._training_values = {}


def switches_itself(optimizer: Any) -> bool:
    """Whether an optimizer has weights for training and others for evaluation, as schedule-free ones."""
    while hasattr(optimizer, "optimizer"):  # accelerate's is around it
        optimizer = optimizer.optimizer
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
