# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Paths over workers that are planned ahead, so that no two of them meet on a worker."""

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias


class Step(NamedTuple):
    """A layer of a path: on which worker, and from when to when by the plan, in seconds."""

    layer: int
    worker: str
    start: float
    end: float


_Chain: TypeAlias = "tuple[Step, _Chain] | None"  # a path from its last step backwards
_Paths: TypeAlias = dict[tuple[int, int], tuple[float, _Chain]]  # by (skips left, swaps left): where it ends, and how


class Bookings:
    """The times for which a worker is planned already, in order and without overlap."""

    def __init__(self) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []

    def first_gap(self, earliest: float, seconds: float) -> float:
        """When a visit of `seconds` can begin, not before `earliest`."""
        place = bisect.bisect_right(self._ends, earliest)
        start = earliest
        while place < len(self._starts) and self._starts[place] < start + seconds:
            start = max(start, self._ends[place])
            place += 1
        return start

    def book(self, step: Step) -> None:
        place = bisect.bisect_left(self._starts, step.start)
        self._starts.insert(place, step.start)
        self._ends.insert(place, step.end)

    def release(self, step: Step) -> None:
        """Undoes a booking. One that lies in the past may be forgotten already."""
        place = bisect.bisect_left(self._starts, step.start)
        if place < len(self._starts) and self._starts[place] == step.start:
            del self._starts[place], self._ends[place]

    def forget(self, now: float) -> None:
        place = bisect.bisect_right(self._ends, now)
        del self._starts[:place], self._ends[:place]


def earliest_path(
    pending: Sequence[int],
    now: float,
    earliest_step: Callable[[int, float], Step | None],
    skips: int,
    swaps: int,
    first_layer: int,
) -> list[Step] | None:
    """The path over layers that ends first, around what is booked.

    A layer runs, is skipped, or is swapped with the next one. To be earlier at a layer, with as many skips and swaps
    left, is never worse, since a request may wait. So one path for each (layer, skips left, swaps left) is enough: the
    best.

    Args:
        pending: Layers in sequential order.
        now: Seconds; no step begins before.
        earliest_step: Where and when a layer can run, not before a moment; None if no worker has it.
        skips: Most layers that are left out.
        swaps: Most neighbours that are swapped.
        first_layer: Of the model, which is neither skipped nor swapped.

    Returns:
        The path. None if there is none.
    """
    best: list[_Paths] = [{(skips, swaps): (now, None)}, *({} for _ in pending)]
    for place, layer in enumerate(pending):
        has_neighbour = place + 1 < len(pending) and pending[place + 1] == layer + 1
        for (skips_left, swaps_left), (moment, chain) in best[place].items():
            if skips_left and layer != first_layer:
                _keep_better(best[place + 1], (skips_left - 1, swaps_left), (moment, chain))
            step = earliest_step(layer, moment)
            if step is not None:
                _keep_better(best[place + 1], (skips_left, swaps_left), (step.end, (step, chain)))
            if not (has_neighbour and swaps_left) or layer == first_layer:
                continue
            ahead = earliest_step(layer + 1, moment)
            behind = earliest_step(layer, ahead.end) if ahead is not None else None
            if ahead is not None and behind is not None:
                swapped = (behind.end, (behind, (ahead, chain)))
                _keep_better(best[place + 2], (skips_left, swaps_left - 1), swapped)
    if not best[-1]:
        return None
    _, chain = min(best[-1].values(), key=lambda value: value[0])
    path = []
    while chain is not None:
        step, chain = chain
        path.append(step)
    return path[::-1]


def _keep_better(paths: _Paths, left: tuple[int, int], path: tuple[float, _Chain]) -> None:
    if left not in paths or path[0] < paths[left][0]:
        paths[left] = path
