# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The random draw of a merge's layers (arXiv 2407.04513)."""

from collections.abc import Mapping

import numpy as np


def draw_layers(
    depths: Mapping[str, int], seed: int, num_layers: int, any_layer: bool = False
) -> list[tuple[str, int]]:
    """Draws a source and one of its layers for each position.

    Args:
        depths: Number of layers of each source by name.
        seed, num_layers, any_layer: As for [`MergePlan.random`].

    Raises:
        `ValueError`: if a number is out of range, or a source has fewer layers than the result.
    """
    for name, value, least in (("seed", seed, 0), ("num_layers", num_layers, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")
    rng = np.random.default_rng(seed)
    if any_layer:
        pool = [(name, layer) for name, depth in depths.items() for layer in range(depth)]
        return [pool[index] for index in rng.integers(len(pool), size=num_layers).tolist()]
    for name, depth in depths.items():
        if depth < num_layers:
            raise ValueError(
                f"Source '{name}' has {depth} layers, fewer than the {num_layers} of the result. Pass a smaller "
                "`num_layers`, or `any_layer=True` (--any_layer) to let any layer stand anywhere."
            )
    names = list(depths)
    return [(names[index], layer) for layer, index in enumerate(rng.integers(len(names), size=num_layers).tolist())]
