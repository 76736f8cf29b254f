# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The execution orders of an evaluation."""

import numpy as np

from ..models.execution_order import arbitrary_execution_orders


def plan_orders(num_layers: int, num_orders: int, num_subsets: int, seed: int) -> dict[str, list[list[int]]]:
    """The execution orders of a robustness evaluation, by what they are for.

    "arbitrary k", "random k" and "evenly_spaced k" are those of k layers.
    """
    sequential = list(range(num_layers))
    arbitrary = arbitrary_execution_orders(num_layers, num_orders, seed)
    plan = {"sequential": [sequential], "reversed": [sequential[::-1]], "arbitrary": arbitrary}
    plan["leave_one_out"] = [sequential[:i] + sequential[i + 1 :] for i in sequential if num_layers > 1]
    plan["neighbour_swaps"] = [[*sequential[:i], i + 1, i, *sequential[i + 2 :]] for i in range(num_layers - 1)]
    for k in range(1, num_layers + 1):
        rng = np.random.default_rng((seed, k))
        plan[f"arbitrary {k}"] = [order[:k] for order in arbitrary]
        plan[f"random {k}"] = [
            np.sort(rng.permutation(num_layers)[:k]).tolist() for _ in range(num_subsets if k < num_layers else 1)
        ]
        plan[f"evenly_spaced {k}"] = [evenly_spaced_layers(num_layers, k)]
    return plan


def evenly_spaced_layers(num_layers: int, num_kept: int) -> list[int]:
    """The first, the last and evenly spaced layers between them, ascending. If one layer is kept, it is the first."""
    return np.linspace(0, num_layers - 1, num_kept).round().astype(int).tolist()


def balanced_execution_orders(num_layers: int, num_orders: int, seed: int = 0) -> list[list[int]]:
    """Random permutations of the layers in which each layer runs equally often at each position.

    They are the rows of random Latin squares (a cyclic square with rows, columns and symbols permuted). So each order
    by itself is uniform over permutations. Unlike in independent draws, no (layer, position) pair is left out.

    Args:
        num_layers: Number of layers of the model.
        num_orders: How many orders, at least 1. It is rounded up to a multiple of `num_layers`.
        seed: Seed of the random draw, at least 0.
    """
    orders: list[list[int]] = []
    positions = np.arange(num_layers)
    for square in range(-(-num_orders // num_layers)):
        rng = np.random.default_rng((seed, square))
        rows, columns, layers = (rng.permutation(num_layers) for _ in range(3))
        orders += layers[(rows[:, None] + columns[positions]) % num_layers].tolist()
    return orders
