# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""How a router reaches its workers: what it asks of them, what they say, and how they fail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .answers import SwarmError


@dataclass(frozen=True)
class LayerCall:
    """What a worker is asked: to run one layer at one position.

    Args:
        hidden_states: Of shape `(batch_size, tokens, hidden_size)`.
        args, kwargs: What the model passes to this layer beside them, such as attention masks. Tensors in it may stand
            in tuples, lists and dicts.
    """

    request_id: str
    layer: int
    position: int
    hidden_states: torch.Tensor
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerResult:
    """What a worker gives back.

    Args:
        layer, position: Those that ran; a router compares them with what it asked for.
        hidden_states: Of the shape and dtype of those it got.
        seconds: That the layer took, without the way to the worker and back.
    """

    layer: int
    position: int
    hidden_states: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself.

    Args:
        layers: Those whose weights it holds.
        digests: Of the weights of each layer, and of the depth embedding by the name `"depth_embedding"`. Workers
            and router must agree on them.
        process_id: Of the operating system; None of a worker in the router's own process.
        node: Name or address of its machine.
    """

    name: str
    layers: tuple[int, ...]
    digests: Mapping[int | str, str]
    device: str = "cpu"
    process_id: int | None = None
    node: str = "local"


class WorkerGoneError(SwarmError):
    """The worker died or cannot be reached any more. What it held of a request is lost."""


class WorkerFaultError(SwarmError):
    """The worker is there, but could not do what it was asked, or gave back what cannot be right."""


class Transport(Protocol):
    """Starts, reaches and ends workers. All methods may run at the same time for several workers."""

    async def open(self) -> None:
        """Starts what workers need. Raises [`SwarmError`] if it cannot, and then leaves nothing running."""

    async def start_worker(self, name: str, layers: Sequence[int]) -> WorkerInfo:
        """Starts a worker with the weights of these layers. Comes back when it is ready to run them.

        A worker of this name that still runs is ended first.
        """

    async def load_layers(self, name: str, layers: Sequence[int]) -> WorkerInfo:
        """Lets a worker hold these layers and no others, without a new start."""

    async def call(self, name: str, call: LayerCall) -> LayerResult:
        """Runs a layer on a worker.

        Raises:
            `WorkerGoneError`: if the worker died.
            `WorkerFaultError`: if it refuses the call, or fails in it.
        """

    async def ping(self, name: str) -> WorkerInfo:
        """What a worker says of itself now. Raises as `call`. A stopped process does not answer: use a timeout."""

    async def stop_worker(self, name: str, force: bool = False) -> None:
        """Ends a worker: at once with `force`, else after the call that it is in. Ending one twice is no error."""

    async def close(self) -> None:
        """Ends all workers and what `open` started. Closing twice is no error."""


def check_result(call: LayerCall, result: LayerResult) -> None:
    """Refuses a result that cannot be that of the call.

    Raises:
        `WorkerFaultError`: if there is none, layer, position, shape or dtype are others, or numbers are not finite.
    """
    if not isinstance(result, LayerResult):
        raise WorkerFaultError(f"asked for layer {call.layer}, it gave {result!r:.200}, which is no result")
    sent, given = call.hidden_states, result.hidden_states
    if (result.layer, result.position) != (call.layer, call.position):
        raise WorkerFaultError(
            f"asked for layer {call.layer} at position {call.position}, it ran layer {result.layer} at position "
            f"{result.position}"
        )
    if not isinstance(given, torch.Tensor) or given.shape != sent.shape or given.dtype != sent.dtype:
        what = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
        raise WorkerFaultError(
            f"layer {call.layer} gave hidden states of {what[:200]}, not {sent.dtype} of shape {tuple(sent.shape)}"
        )
    if not bool(torch.isfinite(given).all()):
        raise WorkerFaultError(f"layer {call.layer} gave hidden states that are not finite")
