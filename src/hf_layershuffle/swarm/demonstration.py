# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A swarm to watch: workers slow enough for the eye, and labelled images that are sent to it."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..common.checks import check_integers, check_number
from .transport import LayerCall, LayerResult, Transport, WorkerInfo


MOST_RATE = 100.0  # inputs a second
MOST_SENT = 40  # inputs that wait for an answer
TICK = 0.02  # seconds
SLOWEST = 100.0  # times the usual seconds


@dataclass(frozen=True)
class LabelledInput:
    """An input of the model with its true class.

    Args:
        inputs: By name, of a batch of one.
        shown: What a page shows of it.
        label: Name of the class.
    """

    inputs: dict[str, torch.Tensor]
    shown: dict[str, str]
    label: str


class LabelledLoad:
    """Sends labelled inputs one after the other, at a rate that can be changed while it runs.

    At most `MOST_SENT` wait for an answer; beyond them nothing is sent.

    Args:
        items: Sent again and again, in an order drawn by `seed`.
        send: Sends one, and comes back when it is answered. Takes the most layers that it may skip.
        rate: Inputs a second, from 0 to `MOST_RATE`.
        max_skips: Most layers that may be missing in an answer.
        seed: Seed of the order, at least 0.
    """

    def __init__(
        self,
        items: Sequence[LabelledInput],
        send: Callable[[LabelledInput, int], Awaitable[object]],
        *,
        rate: float = 4.0,
        max_skips: int = 0,
        seed: int = 0,
    ):
        if not items:
            raise ValueError("There are no labelled inputs to send; pass at least one.")
        self.send = send
        self._items = itertools.cycle([items[row] for row in np.random.default_rng(seed).permutation(len(items))])
        self.change(rate, max_skips)

    def change(self, rate: float, max_skips: int) -> None:
        """Takes another rate, and another limit of skips for what is sent from now on.

        Raises:
            `ValueError`: if a value is out of range.
        """
        check_integers(max_skips=(max_skips, 0))
        self.rate, self.max_skips = check_number("rate", rate, 0.0, MOST_RATE), max_skips

    async def run(self) -> None:
        """Sends until it is cancelled, and then cancels what has no answer yet."""
        sent: set[asyncio.Task] = set()
        clock = asyncio.get_running_loop().time
        before, owed = clock(), 0.0
        try:
            while True:
                await asyncio.sleep(TICK)
                now = clock()
                # After a pause it does not send at once all that it would have sent
                owed = min(owed + (now - before) * self.rate, 1 + 2 * TICK * self.rate)
                before = now
                while owed >= 1 and len(sent) < MOST_SENT:
                    owed -= 1
                    task = asyncio.ensure_future(self.send(next(self._items), self.max_skips))
                    sent.add(task)
                    task.add_done_callback(sent.discard)
        finally:
            for task in sent:
                task.cancel()
            await asyncio.gather(*sent, return_exceptions=True)


class PacedTransport:
    """Workers that take some time for each layer, as those of a larger model or on slower machines.

    Args:
        transport: That reaches the workers.
        layer_seconds: That a layer takes longer, at least 0: the mean of an exponential distribution.
        seed: Seed of the draws, at least 0.
    """

    def __init__(self, transport: Transport, layer_seconds: float, seed: int = 0):
        self.transport = transport
        self.layer_seconds = check_number("layer_seconds", layer_seconds, 0.0, 60.0)
        self.factors: dict[str, float] = {}
        self._random = np.random.default_rng(seed)

    def slow_down(self, name: str, factor: float) -> None:
        """Lets a worker take this many times as long, from 1 (as at first) to `SLOWEST`."""
        self.factors[name] = check_number("factor", factor, 1.0, SLOWEST)

    async def call(self, name: str, call: LayerCall) -> LayerResult:
        """As of the transport, and later."""
        await asyncio.sleep(self._random.exponential(self.layer_seconds) * self.factors.get(name, 1.0))
        return await self.transport.call(name, call)

    async def open(self) -> None:
        await self.transport.open()

    async def start_worker(self, name: str, layers: Sequence[int]) -> WorkerInfo:
        return await self.transport.start_worker(name, layers)

    async def load_layers(self, name: str, layers: Sequence[int]) -> WorkerInfo:
        return await self.transport.load_layers(name, layers)

    async def ping(self, name: str) -> WorkerInfo:
        return await self.transport.ping(name)

    async def stop_worker(self, name: str, force: bool = False) -> None:
        await self.transport.stop_worker(name, force)

    async def close(self) -> None:
        await self.transport.close()
