# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What happens in a swarm, told to whoever listens."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakSet


# Reasons for which a layer's result does not count, though its worker did nothing wrong
TOO_LATE, ROUTER_RESTARTED = "it came too late", "the router was restarted"
MOST_EVENTS = 1000  # that a listener may be behind before it loses the oldest


class Listener:
    """Events as an async iterator. It ends with the swarm.

    Args:
        num_lost: Events that were lost since the listener was too slow.
    """

    def __init__(self, most: int = MOST_EVENTS):
        self.num_lost = 0
        self._events: deque[dict] = deque(maxlen=most)
        self._is_closed = False
        self._news = asyncio.Event()

    def put(self, event: dict) -> None:
        self.num_lost += len(self._events) == self._events.maxlen
        self._events.append(event)
        self._news.set()

    def close(self) -> None:
        self._is_closed = True
        self._news.set()

    def __aiter__(self) -> "Listener":
        return self

    async def __anext__(self) -> dict:
        while not self._events:
            if self._is_closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()

    def take_all(self) -> list[dict]:
        """The events that are there now."""
        events = list(self._events)
        self._events.clear()
        return events


class Events:
    """Tells each event to functions at once, and to listeners when they ask."""

    def __init__(self) -> None:
        self.sinks: list[Callable[[dict], None]] = []
        self._listeners: WeakSet[Listener] = WeakSet()  # who no longer listens is forgotten
        self._is_closed = False

    def emit(self, name: str, /, **fields: Any) -> None:
        event = {"type": name, "time": time.time(), **fields}
        for sink in self.sinks:
            sink(event)
        for listener in list(self._listeners):
            listener.put(event)

    def subscribe(self) -> Listener:
        listener = Listener()
        if self._is_closed:
            listener.close()
        self._listeners.add(listener)
        return listener

    def close(self) -> None:
        self._is_closed = True
        for listener in list(self._listeners):
            listener.close()
