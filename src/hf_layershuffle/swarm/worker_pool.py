# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Which workers there are, what layers they hold, and which of them are free."""

from collections.abc import Collection, Sequence

from .decisions import Visit


class _Worker:
    def __init__(self, layers: list[int]):
        self.layers = layers
        self.visit: Visit | None = None  # a late one too: the worker is busy with it
        self.is_paused = False


class WorkerPool:
    """The workers of a scheduler.

    Args:
        layers: Those that requests run. Workers may hold further ones, which do not count.
    """

    def __init__(self, layers: Sequence[int]):
        self._workers: dict[str, _Worker] = {}
        self._holders: dict[int, set[str]] = {layer: set() for layer in layers}
        self._idle: dict[int, dict[str, None]] = {layer: {} for layer in layers}  # the longest idle first
        self.why_gone = dict.fromkeys(layers, "no worker holds it")  # by layer that has no holder
        self.newly_idle: dict[str, None] = {}  # workers that were offered no request since they became free

    def __contains__(self, name: str) -> bool:
        return name in self._workers

    def put(self, name: str, layers: Collection[int]) -> bool:
        """A worker with these layers, new or known. Returns whether a layer has its first or lost its last holder."""
        before = self._held()
        counted = sorted(layer for layer in layers if layer in self._holders)
        if name in self._workers:
            self._leave(name, "no worker holds it")
            self._workers[name].layers = counted
        else:
            self._workers[name] = _Worker(counted)
        for layer in self.layers_of(name):
            self._holders[layer].add(name)
        self._note(name)
        return self._held() != before

    def remove(self, name: str, reason: str) -> tuple[Visit | None, bool]:
        """Removes a worker. Returns what it was busy with, and whether a layer lost its last holder."""
        if name not in self._workers:
            return None, False
        before = self._held()
        self._leave(name, reason)
        return self._workers.pop(name).visit, self._held() != before

    def _leave(self, name: str, reason: str) -> None:
        for layer in self.layers_of(name):
            self._idle[layer].pop(name, None)
            self._holders[layer].discard(name)
            self.why_gone[layer] = reason
        self.newly_idle.pop(name, None)

    def _held(self) -> list[bool]:
        return [bool(holders) for holders in self._holders.values()]

    def layers_of(self, name: str) -> list[int]:
        """The layers of a worker that requests run."""
        return self._workers[name].layers

    def is_held(self, layer: int) -> bool:
        """Whether a worker holds a layer, be it busy or paused."""
        return bool(self._holders[layer])

    def idle_holder(self, layer: int) -> str | None:
        """The worker that holds a layer and is idle for the longest time."""
        return next(iter(self._idle[layer]), None)

    def visit_of(self, name: str) -> Visit | None:
        """What a worker is busy with; None also of one that is not there."""
        worker = self._workers.get(name)
        return None if worker is None else worker.visit

    def set_visit(self, name: str, visit: Visit | None) -> None:
        self._workers[name].visit = visit
        self._note(name)

    def set_paused(self, name: str, is_paused: bool) -> None:
        self._workers[name].is_paused = is_paused
        self._note(name)

    def _note(self, name: str) -> None:
        """Notes whether a worker is idle."""
        worker = self._workers[name]
        is_idle = worker.visit is None and not worker.is_paused
        for layer in worker.layers:
            if is_idle:
                self._idle[layer].setdefault(name)
            else:
                self._idle[layer].pop(name, None)
        if is_idle:
            self.newly_idle[name] = None
        else:
            self.newly_idle.pop(name, None)
