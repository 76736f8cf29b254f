# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Whether a loss holds a part of the model's output already: read from the graph that `backward` will follow."""

from collections.abc import Iterable

import torch


def depends_on(
    loss: torch.Tensor, tensors: Iterable[torch.Tensor | None], *, stop_at: Iterable[torch.Tensor | None] = ()
) -> bool:
    """Whether the gradient of a loss reaches one of these tensors.

    Args:
        loss: The loss, a scalar.
        tensors: The tensors that are asked for. None is passed over.
        stop_at: Where the search ends, such as at the logits, below which lies the whole model.
    """
    wanted, ends = _edges(tensors), _edges(stop_at)
    # An edge is a node and which of its results: DistributedDataParallel has one node for all that a model returns
    edges = list(_edges([loss]))
    seen: set = set()
    while edges:
        edge = edges.pop()
        if edge in wanted:
            return True
        if edge not in ends and edge[0] not in seen:
            seen.add(edge[0])
            edges.extend(each for each in edge[0].next_functions if each[0] is not None)
    return False


def _edges(tensors: Iterable[torch.Tensor | None]) -> set:
    return {
        (tensor.grad_fn, tensor.output_nr)
        for tensor in tensors
        if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None
    }
