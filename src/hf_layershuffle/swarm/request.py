# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a scheduler knows of a request."""

from collections.abc import Hashable, Sequence

from .decisions import Visit


class Request:
    """A request that has no answer yet. It runs (`running` holds its visits) or waits (`waits` is true)."""

    __slots__ = (
        *("name", "number", "missing", "visits", "skipped", "running", "waits", "num_waits"),
        *("max_skips", "attempts", "unreachable", "stuck_since", "ran"),
    )

    def __init__(self, name: Hashable, number: int, layers: Sequence[int], max_skips: int, ran: Sequence[int] = ()):
        self.name = name
        self.number = number  # by age
        self.ran = list(ran)  # before it came here
        self.missing = [layer for layer in layers if layer not in self.ran]
        self.visits: list[tuple[Visit, float]] = []
        self.skipped: dict[int, str] = {}
        self.running: list[Visit] = []
        self.waits = False
        self.num_waits = 0  # tells one time of waiting from the next
        self.max_skips = max_skips
        self.attempts: dict[int, int] = {}  # by layer
        self.unreachable: dict[int, str] = {}  # layers that were tried too often, with the reason
        self.stuck_since: float | None = None  # it waits for layers that no worker holds, and may not skip them

    @property
    def order(self) -> list[int]:
        """Layers as they ran."""
        return [*self.ran, *(visit.layer for visit, _ in self.visits)]

    @property
    def budget(self) -> int:
        return self.max_skips - len(self.skipped)


Entry = tuple[int, int, Request]  # by age, with the number of waits that tells an old entry


def still_waits(entry: Entry) -> bool:
    """Whether a request waits as when the entry was made."""
    _, num_waits, request = entry
    return request.waits and request.num_waits == num_waits
