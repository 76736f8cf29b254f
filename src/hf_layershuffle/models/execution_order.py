# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Execution orders: check and draw them.

An *execution order* is a sequence of layer indices: which layer of the checkpoint runs at each position. A permutation
is shuffling (LayerShuffle, arXiv 2407.04513), a subset is pruning, a repeat is looping.

This file travels to the Hub beside the weights, so it imports nothing from this package.
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


SHUFFLE_MODES = ("none", "arbitrary", "window")
EXECUTION_ORDERS = ("sequential", "arbitrary")

# The index of the layer at each position: a list or tuple, or a one-dimensional tensor or array of integers
ExecutionOrder = Sequence[int] | torch.Tensor | np.ndarray


def check_execution_order(execution_order: str | ExecutionOrder, num_layers: int) -> list[int]:
    """Returns `execution_order` as a list of Python integers, or says what is wrong with it.

    Args:
        execution_order: Layer indices in the order in which they run. Repeats and subsets are allowed.
        num_layers: Number of layers of the model. Each index must be in `[0, num_layers)`.

    Raises:
        `ValueError`: if the order is empty, is not a one-dimensional sequence, or holds other than integers in range.
    """
    allowed = f"a non-empty list of integers from 0 to {num_layers - 1}"
    values: object = execution_order
    if isinstance(values, (torch.Tensor, np.ndarray)):
        if values.ndim != 1:
            raise ValueError(
                f"`execution_order` has shape {tuple(values.shape)}; pass a tensor of shape `(positions,)` or "
                f"{allowed}."
            )
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise ValueError(
            f"`execution_order` is {execution_order!r} ({type(execution_order).__name__}); pass {allowed}, "
            f"or one of {', '.join(map(repr, EXECUTION_ORDERS))}."
        )
    if not values:
        raise ValueError(f"`execution_order` is empty; pass {allowed}.")
    return [_check_layer_index(value, position, num_layers) for position, value in enumerate(values)]


def _check_layer_index(value: Any, position: int, num_layers: int) -> int:
    allowed = f"layer indices are integers from 0 to {num_layers - 1}"
    try:
        if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        index = operator.index(value)
    except TypeError:
        raise ValueError(
            f"`execution_order` holds {value!r} ({type(value).__name__}) at position {position}; {allowed}."
        ) from None
    if not 0 <= index < num_layers:
        raise ValueError(f"`execution_order` holds {index} at position {position}; {allowed} in this model.")
    return index


def parse_execution_order(
    text: str, argument: str = "execution_order", names: tuple[str, ...] = EXECUTION_ORDERS
) -> str | list[int]:
    """The execution order that a text says: one of `names`, or layer indices such as "2,0,1".

    Args:
        text: What to read.
        argument: Name of the argument, for the message.
        names: Names that are allowed.

    Raises:
        `ValueError`: if the text is neither.
    """
    if text in names:
        return text
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        allowed = f"{', '.join(names)} or layer indices" if names else "layer indices"
        raise ValueError(f"`{argument}` is '{text}'; it must be {allowed} such as 2,0,1.") from None


def draw_execution_order(
    num_layers: int,
    rng: np.random.Generator,
    shuffle_mode: str = "arbitrary",
    shuffle_window: int | None = None,
    layerdrop: float = 0.0,
) -> list[int]:
    """Draws one execution order for training.

    Args:
        num_layers: Number of layers of the model.
        rng: The only source of randomness.
        shuffle_mode: `"none"` (sequential), `"arbitrary"` (a uniform permutation, LayerShuffle) or `"window"`
            (a uniform permutation among those that move no layer by more than `shuffle_window` positions).
        shuffle_window: Positions, at least 1; for `"window"` only.
        layerdrop: Probability in `[0, 1)` with which each layer is left out (LayerDrop, Fan et al. 2019,
            arXiv 1909.11556). At least one layer always stays.
    """
    if shuffle_mode == "none":
        order = list(range(num_layers))
    elif shuffle_mode == "window" and shuffle_window is None:
        raise ValueError("`shuffle_mode='window'` needs `shuffle_window`, an integer of at least 1.")
    elif shuffle_mode == "window" and shuffle_window is not None and shuffle_window < num_layers - 1:
        order = _draw_window_permutation(num_layers, shuffle_window, rng)
    elif shuffle_mode in ("arbitrary", "window"):
        order = rng.permutation(num_layers).tolist()
    else:
        raise ValueError(f"`shuffle_mode` is {shuffle_mode!r}; choose one of {', '.join(map(repr, SHUFFLE_MODES))}.")
    if layerdrop > 0.0:
        kept = [index for index, keep in zip(order, rng.random(num_layers) >= layerdrop) if keep]
        order = kept or [order[rng.integers(num_layers)]]
    return order


def _draw_window_permutation(num_layers: int, window: int, rng: np.random.Generator) -> list[int]:
    """Uniform over the permutations with `|order[p] - p| <= window`, by a random walk of swaps inside that set.

    Swapping an inverted neighbouring pair never moves a layer further out of its window, so bubble sort stays in the
    set and connects all of it; the proposals are symmetric and some are refused, so the walk converges to the uniform
    distribution. `4 * num_layers**2` proposals are many times what a chi-square test on 10,000 draws can tell apart.
    """
    order = list(range(num_layers))
    num_swaps = 4 * num_layers**2
    firsts = rng.integers(num_layers, size=num_swaps).tolist()
    distances = rng.integers(1, window + 1, size=num_swaps).tolist()
    for first, distance in zip(firsts, distances):
        second = first + distance
        if second < num_layers and abs(order[first] - second) <= window and abs(order[second] - first) <= window:
            order[first], order[second] = order[second], order[first]
    return order


def arbitrary_execution_orders(num_layers: int, num_orders: int, seed: int = 0) -> list[list[int]]:
    """`num_orders` uniform permutations of the layers, the same for the same `seed`.

    The first k do not depend on `num_orders`, so a longer evaluation extends a shorter one.
    """
    return [draw_execution_order(num_layers, np.random.default_rng((seed, index))) for index in range(num_orders)]


class ExecutionOrderStream:
    """Where a model's random orders come from.

    Once seeded, the order of a forward pass is a pure function of `(seed, step, forwards since that step began)`: the
    same on every process without communication, whatever else used random numbers, and the same after a resume.
    Unseeded, it follows PyTorch's global random state (`torch.manual_seed`), which is right for one process only.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.step = 0
        self._num_forwards = {"training": 0, "evaluation": 0}

    def seek(self, seed: int, step: int = 0) -> None:
        """Goes to the first forward of optimizer step `step` in the stream of `seed`. Both are at least 0."""
        for name, value in (("seed", seed), ("step", step)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` of an execution order stream is {value!r}; pass an integer of at least 0.")
        self.seed = seed
        self.step = step
        self._num_forwards = {"training": 0, "evaluation": 0}

    def next_generator(self, training: bool) -> np.random.Generator:
        """The generator for the next forward; evaluation has a count of its own, so that it never moves training."""
        if self.seed is None:
            return np.random.default_rng(int(torch.randint(2**62, ())))
        kind = "training" if training else "evaluation"
        entropy = (self.seed, self.step, int(training), self._num_forwards[kind])
        self._num_forwards[kind] += 1
        return np.random.default_rng(entropy)
