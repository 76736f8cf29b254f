# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Which worker holds which layers."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from ..common.checks import check_integers


Placement = dict[str, tuple[int, ...]]  # layers by the name of their worker


def worker_name(number: int) -> str:
    return f"worker-{number}"


def place_evenly(layers: Sequence[int], workers: int, replicas: int = 1) -> Placement:
    """Deals the layers out to `workers` workers, the copies of a layer to different ones.

    Raises:
        `ValueError`: if a layer has more copies than there are workers, or a worker would hold nothing.
    """
    check_integers(workers=(workers, 1), replicas=(replicas, 1))
    if replicas > workers:
        raise ValueError(
            f"`replicas` is {replicas}, more than the {workers} `workers`: the copies of a layer stand on different "
            f"workers. Take at most {workers} replicas, or more workers."
        )
    if workers > len(layers) * replicas:
        raise ValueError(
            f"`workers` is {workers}, but there are {len(layers)} layers in {replicas} replica(s), so that some "
            f"workers would hold nothing. Take at most {len(layers) * replicas} workers, or more replicas."
        )
    held: dict[str, list[int]] = {worker_name(number): [] for number in range(workers)}
    for copy in range(replicas):
        for number, layer in enumerate(layers):
            # In a ring: with the same two layers on the same two workers, a slow one would slow both layers
            ring = [worker_name((number + copy + step) % workers) for step in range(workers)]
            held[_least_loaded(held, [name for name in ring if layer not in held[name]])].append(layer)
    return {name: tuple(sorted(own)) for name, own in held.items()}


def check_plan(plan: Mapping[str, Collection[int]] | Sequence[Collection[int]], layers: Sequence[int]) -> Placement:
    """A placement as given: layers by the name of their worker, or a list of them for each worker.

    Raises:
        `ValueError`: if a worker holds nothing, the same layer twice or one that the model does not run, or nobody
            holds a layer.
    """
    if not isinstance(plan, (Mapping, list, tuple)):
        raise ValueError(
            f"`placement` is {plan!r}; pass the layers of each worker, such as {{'worker-0': [0, 1], "
            "'worker-1': [2]} or [[0, 1], [2]]."
        )
    named = dict(plan) if isinstance(plan, Mapping) else {worker_name(i): own for i, own in enumerate(plan)}
    placement = {name: check_layers(own, layers, f"`placement` of {name!r}") for name, own in named.items()}
    for name in placement:
        if not isinstance(name, str) or not name:
            raise ValueError(f"`placement` names a worker {name!r}; names must be texts.")
    missing = unheld(placement, layers)
    if missing:
        raise ValueError(f"`placement` gives layers {missing} to no worker; each layer needs one.")
    return placement


def check_layers(held: Collection[int], layers: Sequence[int], what: str) -> tuple[int, ...]:
    """The layers of one worker, sorted.

    Raises:
        `ValueError`: if there is none, one stands there twice, or one is none of `layers`.
    """
    own = list(held) if isinstance(held, (list, tuple, set, frozenset, range)) else []
    if not own:
        raise ValueError(f"{what} is {held!r}; it must be a list of at least one layer.")
    for layer, number in Counter(own).items():
        if isinstance(layer, bool) or not isinstance(layer, int) or layer not in layers:
            raise ValueError(f"{what} holds {layer!r}; the layers that run are {list(layers)}.")
        if number > 1:
            raise ValueError(f"{what} holds layer {layer} {number} times; once is enough.")
    return tuple(sorted(own))


def unheld(placement: Mapping[str, Collection[int]], layers: Sequence[int]) -> list[int]:
    """Layers that no worker holds."""
    held = {layer for own in placement.values() for layer in own}
    return [layer for layer in layers if layer not in held]


def layers_for_new_worker(placement: Mapping[str, Collection[int]], layers: Sequence[int]) -> tuple[int, ...]:
    """What a further worker should hold: layers that nobody holds, and of those with the fewest copies as many as
    others hold on average."""
    copies = Counter(layer for own in placement.values() for layer in own)
    share = max(1, round(sum(copies.values()) / max(1, len(placement) + 1)))
    rarest = sorted(layers, key=lambda layer: (copies[layer], -_crowd(placement, layer), layer))
    return tuple(sorted(rarest[: max(share, len(unheld(placement, layers)))]))


def rebalanced(placement: Mapping[str, Collection[int]], layers: Sequence[int], even: bool = True) -> Placement:
    """A placement over the same workers in which each layer is held.

    What nobody holds goes to the workers that hold least. Little is moved: each worker keeps what it has, unless
    another one holds at least two layers less.

    Args:
        even: Whether to move layers from workers with many to workers with few, and not only to add those that nobody
            holds.

    Raises:
        `ValueError`: if there is no worker.
    """
    if not placement:
        raise ValueError("There is no worker that could hold the layers; add one.")
    held = {name: list(own) for name, own in placement.items()}
    for layer in unheld(held, layers):
        held[_least_loaded(held, list(held))].append(layer)
    while even and _move_one(held):
        pass
    return {name: tuple(sorted(own)) for name, own in held.items()}


def _move_one(held: dict[str, list[int]]) -> bool:
    """Moves a layer from a worker that holds at least two more than another, which lacks it; says whether it could."""
    for giver in sorted(held, key=lambda name: -len(held[name])):
        for taker in sorted(held, key=lambda name: len(held[name])):
            movable = [layer for layer in held[giver] if layer not in held[taker]]
            if len(held[giver]) - len(held[taker]) >= 2 and movable:
                held[giver].remove(movable[-1])
                held[taker].append(movable[-1])
                return True
    return False


def _least_loaded(held: Mapping[str, Collection[int]], names: Sequence[str]) -> str:
    return min(names, key=lambda name: len(held[name]))


def _crowd(placement: Mapping[str, Collection[int]], layer: int) -> int:
    """How many layers the least loaded of a layer's workers holds: the more, the longer a request waits for it."""
    return min((len(own) for own in placement.values() if layer in own), default=0)
