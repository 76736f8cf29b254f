# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a swarm does, as those who watch it are told: events as they happen, and numbers for each second."""

import asyncio
import json
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .events import Listener


Event = dict[str, Any]
BATCH_SECONDS = 0.04  # events are sent in batches, so that a browser draws each batch once
MOST_WAITING = 2000  # events of a slow listener
THROUGHPUT_WINDOW, LATENCY_WINDOW = 3.0, 10.0  # seconds


def working_layers(status: Mapping[str, Any]) -> set[int]:
    """Layers that a healthy worker holds, by `Swarm.status`."""
    return {layer for worker in status["workers"] if worker["state"] == "healthy" for layer in worker["layers"]}


def layers_without_worker(status: Mapping[str, Any]) -> list[int]:
    """Layers of the model that no healthy worker holds, by `Swarm.status`."""
    there = working_layers(status)
    return [layer for layer in status["layers"] if layer not in there]


@dataclass(frozen=True)
class Outcome:
    """How one request ended.

    Args:
        time: When, of `time.monotonic`.
        seconds: From acceptance to the answer.
        is_failed: Whether there is no answer.
    """

    time: float
    seconds: float = 0.0
    is_failed: bool = False


class LiveNumbers:
    """Throughput, latency and accuracy of the last requests.

    Args:
        num_labelled: Labelled inputs of which the accuracy is.
        clock: Seconds of any clock that does not go back.
    """

    def __init__(self, num_labelled: int = 200, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.totals: Counter[str] = Counter(answered=0, failed=0, refused=0)
        self._right: deque[bool] = deque(maxlen=num_labelled)
        self._recent: deque[Outcome] = deque()

    def add(self, seconds: float, is_right: bool | None = None) -> None:
        """Counts an answer."""
        self.totals["answered"] += 1
        self._recent.append(Outcome(self.clock(), seconds))
        if is_right is not None:
            self._right.append(is_right)

    def add_failure(self, kind: str) -> None:
        """Counts a request without an answer, by kind: "failed" or "refused"."""
        self.totals[kind] += 1
        self._recent.append(Outcome(self.clock(), is_failed=True))

    def summary(self) -> dict[str, Any]:
        """Answers a second of the last three, quantiles of the latency in seconds of the last ten, and accuracy in
        [0, 1].

        What there is no answer for is None.
        """
        now = self.clock()
        while self._recent and self._recent[0].time < now - LATENCY_WINDOW:
            self._recent.popleft()
        last = [each for each in self._recent if each.time > now - THROUGHPUT_WINDOW]
        latencies = sorted(each.seconds for each in self._recent if not each.is_failed)
        return {
            "throughput": sum(not each.is_failed for each in last) / THROUGHPUT_WINDOW,
            "failures": sum(each.is_failed for each in last) / THROUGHPUT_WINDOW,
            "p50": quantile(latencies, 0.5),
            "p95": quantile(latencies, 0.95),
            "accuracy": statistics.fmean(self._right) if self._right else None,
            "num_labelled": len(self._right),
            "totals": dict(self.totals),
        }


def quantile(ascending: Sequence[float], fraction: float) -> float | None:
    """The smallest value that at least this fraction of the values does not exceed; None of no values."""
    if not ascending:
        return None
    return ascending[max(0, math.ceil(fraction * len(ascending)) - 1)]


class LiveEvents:
    """Hands events on to those who listen. A slow one loses events, and nobody waits for it.

    Args:
        most_listeners: At the same time.
    """

    def __init__(self, most_listeners: int = 32):
        self.most_listeners = most_listeners
        self.is_closed = False
        self._listeners: list[Listener] = []

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    def publish(self, event: Event) -> None:
        for listener in self._listeners:
            listener.put(event)

    def close(self) -> None:
        """Ends what listeners hear."""
        self.is_closed = True
        for listener in self._listeners:
            listener.close()

    async def listen(self, first: Callable[[], Event]) -> AsyncIterator[list[Event]]:
        """Batches of events, of which the first is what `first` gives at the beginning."""
        listener = Listener(MOST_WAITING)
        if self.is_closed:
            listener.close()
        self._listeners.append(listener)
        try:
            yield [first()]
            async for event in listener:
                await asyncio.sleep(BATCH_SECONDS)
                yield [event, *listener.take_all()]
        finally:
            self._listeners.remove(listener)


def as_server_sent(events: Collection[Event]) -> str:
    """Events as one message of a `text/event-stream`."""
    return f"data: {json.dumps(list(events), allow_nan=False)}\n\n"
