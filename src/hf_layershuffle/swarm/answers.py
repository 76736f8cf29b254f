# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a swarm says of a request: its answer with what ran where, or why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Skip:
    """A layer that did not run for a request.

    Args:
        reason: Why, in words, such as "worker-2 died".
    """

    layer: int
    reason: str


@dataclass(frozen=True)
class Hop:
    """A layer that ran for a request.

    Args:
        seconds: From sending the hidden states to their return.
    """

    layer: int
    worker: str
    seconds: float


@dataclass(frozen=True)
class SwarmAnswer:
    """The answer to one request.

    Args:
        logits: Of shape `(batch_size, num_labels)`.
        execution_order: Layers by their index, as they ran. The model run locally in this order gives these logits.
        skipped: Layers that did not run.
        trace: Where each layer ran, in the order in which they ran.
        seconds: From the call of `classify` to the answer.
    """

    logits: torch.Tensor
    execution_order: list[int]
    skipped: list[Skip]
    trace: list[Hop]
    seconds: float
    request_id: str = field(default="")


class SwarmError(RuntimeError):
    """A request that has no answer, or a swarm that cannot work."""


class SwarmBusyError(SwarmError):
    """The queue is full. The request was not accepted; send it again later."""


class SwarmClosedError(SwarmError):
    """The swarm takes no more requests: it drains, or is closed."""


class MissingLayersError(SwarmError):
    """Too many layers could not run for a request.

    Args:
        missing: Layers that neither ran nor may be skipped.
    """

    def __init__(self, message: str, missing: Sequence[int] = ()):
        super().__init__(message)
        self.missing = list(missing)


class DeadlineError(MissingLayersError):
    """A request's deadline came with more layers missing than it may skip."""
