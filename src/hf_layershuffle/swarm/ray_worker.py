# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What runs in the process of a Ray actor, and how calls get there and back."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .layer_worker import LayerWorker
from .transport import LayerCall, WorkerFaultError, WorkerInfo
from .trees import map_leaves


@dataclass(frozen=True)
class PackedTensor:
    """A tensor as bytes: numpy arrays travel faster than tensors, and numpy has no bfloat16."""

    content: np.ndarray
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Failure:
    """Why a worker could not do what it was asked. It is returned, since what is raised comes with a traceback."""

    kind: str
    message: str


def pack(value: Any) -> Any:
    """Tensors in tuples, lists and dicts as [`PackedTensor`]s."""
    return map_leaves(_packed, value)


def unpack(value: Any) -> Any:
    """The tensors again, in memory of their own."""
    return map_leaves(_unpacked, value)


def _packed(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    content = leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return PackedTensor(content, str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape))


def _unpacked(leaf: Any) -> Any:
    if not isinstance(leaf, PackedTensor):
        return leaf
    made = torch.empty(leaf.shape, dtype=getattr(torch, leaf.dtype))
    if made.numel():  # else torch does not look at it as bytes
        # A copy, since what comes from the object store is read-only, and is kept there as long as it is used
        made.view(-1).view(torch.uint8).numpy()[:] = leaf.content
    return made


class RayWorker:
    """A [`LayerWorker`] in a process of its own. Nothing is done before `start`, whose failure has words."""

    def __init__(self) -> None:
        self.worker: LayerWorker

    def start(self, checkpoint: str, layers: Sequence[int], num_threads: int, options: Mapping[str, Any]) -> Any:
        def load() -> WorkerInfo:
            torch.set_num_threads(num_threads)
            self.worker = LayerWorker(checkpoint, layers, **options)
            return self._info()

        return _attempt(load)

    def info(self) -> Any:
        return _attempt(self._info)

    def load_layers(self, layers: Sequence[int]) -> Any:
        def load() -> WorkerInfo:
            self.worker.load_layers(layers)
            return self._info()

        return _attempt(load)

    def run(self, fields: Mapping[str, Any]) -> Any:
        def run() -> dict[str, Any]:
            result = self.worker.run(LayerCall(**unpack(fields)))
            return {field.name: pack(getattr(result, field.name)) for field in dataclasses.fields(result)}

        return _attempt(run)

    def _info(self) -> WorkerInfo:
        import ray

        return dataclasses.replace(self.worker.info, process_id=os.getpid(), node=ray.util.get_node_ip_address())


def _attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        if isinstance(error, (ValueError, OSError, WorkerFaultError)):
            return Failure(type(error).__name__, str(error))
        return Failure("WorkerFaultError", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
