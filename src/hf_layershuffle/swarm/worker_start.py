# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a worker has to show before it gets requests: the right weights, and a first run of each layer."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from .answers import SwarmError
from .router import Router
from .transport import LayerCall, Transport, WorkerFaultError, WorkerInfo, check_result


Result = TypeVar("Result")


class WorkerStart:
    """Starts workers, lets them load layers, and tries them out.

    Args:
        model: A [`SplitModel`], or an object like one.
        timeout: Seconds that a worker has to load its layers, and again to run each of them for the first time, which
            takes longer than later.
    """

    def __init__(self, model: Any, router: Router, transport: Transport, timeout: float):
        self.model = model
        self.router = router
        self.transport = transport
        self.timeout = timeout
        self._example: Any = None

    async def prepare(self) -> None:
        """Embeds the example that workers are tried out with."""
        self._example = await self.router.embed(self.model.example_inputs())

    async def start(self, name: str, layers: Sequence[int]) -> WorkerInfo:
        """Starts a worker that is ready for requests when this comes back.

        Raises:
            `SwarmError`: if it does not start, holds other weights than the router, or cannot run a layer.
        """
        info = await self._in_time(self.transport.start_worker(name, layers), f"{name} did not start")
        self.check(info, name, layers)
        await self.warm_up(name, layers)
        return info

    async def load(self, name: str, layers: Sequence[int], new: Sequence[int]) -> WorkerInfo:
        """Lets a worker hold these layers, of which `new` are new to it."""
        info = await self._in_time(self.transport.load_layers(name, layers), f"{name} did not load layers {layers}")
        self.check(info, name, layers)
        await self.warm_up(name, new)
        return info

    async def warm_up(self, name: str, layers: Sequence[int]) -> None:
        """Lets a worker run layers once.

        Raises:
            `WorkerFaultError`: if a result cannot be right.
        """
        for layer in layers:
            args, kwargs = self._example.call(layer)
            call = LayerCall("warm-up", layer, 0, self._example.hidden_states, args, kwargs)
            what = f"{name} did not run layer {layer}"
            check_result(call, await self._in_time(self.transport.call(name, call), what))

    async def _in_time(self, awaitable: Awaitable[Result], what: str) -> Result:
        try:
            return await asyncio.wait_for(awaitable, self.timeout)
        except asyncio.TimeoutError:
            raise SwarmError(f"{what} within {self.timeout:g} s (`start_timeout`).") from None

    def check(self, info: WorkerInfo, name: str, layers: Sequence[int]) -> None:
        """Compares a worker's weights with those that the router's checkpoint holds.

        Raises:
            `SwarmError`: naming the worker and the layer.
        """
        if not isinstance(info, WorkerInfo):
            raise WorkerFaultError(f"{name} said {info!r:.200} of itself")
        if sorted(info.layers) != sorted(layers):
            raise WorkerFaultError(f"{name} holds layers {sorted(info.layers)}, not {sorted(layers)}")
        expected = self.model.digests
        parts: tuple[int | str, ...] = (*layers, "depth_embedding")
        for what in parts:
            if what in expected and info.digests.get(what) != expected[what]:
                part = f"layer {what}" if isinstance(what, int) else "the depth embedding"
                raise SwarmError(
                    f"{name} on {info.node} holds another checkpoint than the router: {part} has the digest "
                    f"{info.digests.get(what)}, not {expected[what]}. Let all workers read the same revision."
                )
