# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A heap of entries that may become outdated."""

import heapq
from collections.abc import Callable
from typing import Any, Generic, TypeVar


Entry = TypeVar("Entry", bound=tuple[Any, ...])
FEW = 64  # entries that are kept without a look at whether they are outdated


class Heap(Generic[Entry]):
    """Gives the least entry that is not outdated.

    Outdated entries are removed once there may be as many of them as of others, so they do not pile up.

    Args:
        is_current: Whether an entry is not outdated. One that is stays so.
    """

    def __init__(self, is_current: Callable[[Entry], bool]):
        self._is_current = is_current
        self._entries: list[Entry] = []
        self._most = FEW

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, entry: Entry) -> None:
        if len(self._entries) >= self._most:
            self._entries = [each for each in self._entries if self._is_current(each)]
            heapq.heapify(self._entries)
            self._most = max(FEW, 2 * len(self._entries))
        heapq.heappush(self._entries, entry)

    def first(self) -> Entry | None:
        while self._entries and not self._is_current(self._entries[0]):
            heapq.heappop(self._entries)
        return self._entries[0] if self._entries else None

    def pop(self) -> None:
        """Removes what `first` gave."""
        heapq.heappop(self._entries)
