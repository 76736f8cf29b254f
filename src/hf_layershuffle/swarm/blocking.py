# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A swarm for programs without an event loop."""

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError
from typing import Any, TypeVar

import torch

from .answers import SwarmAnswer, SwarmClosedError, SwarmError


Result = TypeVar("Result")
START_TIMEOUT = 60.0  # seconds that a thread's event loop may take to begin


class BlockingSwarm:
    """A [`Swarm`] whose methods wait for what they give. It runs in an event loop in a thread of its own.

    Several threads may use it at the same time. Made by [`Swarm.blocking`].

    ```python
    >>> with Swarm.from_pretrained(folder).blocking() as swarm:
    ...     answer = swarm.classify(pixel_values)
    ```
    """

    def __init__(self, swarm: Any):
        self.swarm = swarm
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._is_up = threading.Event()
        self._lock = threading.Lock()  # nothing is given to a loop that ends
        self._is_over = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "BlockingSwarm":
        if self._thread is not None:
            raise SwarmError("A swarm is started once; make another one with `Swarm.from_pretrained`.")
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="hf-layershuffle-swarm")
        try:
            self._thread.start()  # Ctrl-C may come in it too
            self._is_up.wait()
            self._run(self.swarm.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._is_over:
            return
        try:
            self._run(self.swarm.__aexit__(kind, *exception))
        finally:
            self._end()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._is_up.set()
        await self._stop.wait()

    def _end(self) -> None:
        """Ends the loop, which first lets what was cancelled clean up."""
        if self._thread is None:
            return
        if not self._is_up.wait(START_TIMEOUT):
            return  # the thread was not started
        with self._lock:
            self._is_over = True
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        with self._lock:
            if self._thread is None or self._is_over:
                coroutine.close()
                if self._thread is None:
                    raise SwarmError("The swarm was not started; use it in `with`.")
                raise SwarmClosedError("The swarm is closed.")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError:  # it came when the loop was about to end
            raise SwarmClosedError("The swarm is closed.") from None
        except BaseException:  # Ctrl-C: the request is given up
            future.cancel()
            raise

    def _ask(self, function: Callable[[], Result]) -> Result:
        """Calls a function in the loop's thread, where nothing changes meanwhile."""
        if self._thread is None or self._is_over:
            return function()

        async def asked() -> Result:
            return function()

        return self._run(asked())

    def classify(
        self,
        inputs: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        *,
        deadline: float | None = None,
        max_skips: int | None = None,
        request_id: str | None = None,
        **named_inputs: Any,
    ) -> SwarmAnswer:
        """See [`Swarm.classify`]."""
        return self._run(
            self.swarm.classify(inputs, deadline=deadline, max_skips=max_skips, request_id=request_id, **named_inputs)
        )

    def answer(self, request_id: str) -> SwarmAnswer:
        """See [`Swarm.answer`]."""
        return self._run(self.swarm.answer(request_id))

    @property
    def request_ids(self) -> list[str]:
        """See [`Swarm.request_ids`]."""
        return self._ask(lambda: self.swarm.request_ids)

    def drain(self) -> None:
        """See [`Swarm.drain`]."""
        self._run(self.swarm.drain())

    def restart_router(self) -> None:
        """See [`Swarm.restart_router`]."""
        self._run(self.swarm.restart_router())

    def add_worker(self, layers: Collection[int] | None = None) -> str:
        """See [`Swarm.add_worker`]."""
        return self._run(self.swarm.add_worker(layers))

    def remove_worker(self, name: str, drain: bool = True, *, force: bool = False, rebalance: bool = False) -> None:
        """See [`Swarm.remove_worker`]."""
        self._run(self.swarm.remove_worker(name, drain, force=force, rebalance=rebalance))

    def kill_worker(self, name: str) -> None:
        """See [`Swarm.kill_worker`]."""
        self._run(self.swarm.kill_worker(name))

    def rebalance(self) -> None:
        """See [`Swarm.rebalance`]."""
        self._run(self.swarm.rebalance())

    def status(self) -> dict[str, Any]:
        """See [`Swarm.status`]."""
        return self._ask(self.swarm.status)

    def metrics(self) -> dict[str, Any]:
        """See [`Swarm.metrics`]."""
        return self._ask(self.swarm.metrics)

    def prometheus(self) -> str:
        """See [`Swarm.prometheus`]."""
        return self._ask(self.swarm.prometheus)

    def subscribe(self) -> Iterator[dict]:
        """What happens from now on. See [`Swarm.subscribe`]."""
        listener = self._ask(self.swarm.subscribe)

        def events() -> Iterator[dict]:
            while True:
                try:
                    yield self._run(listener.__anext__())
                except (StopAsyncIteration, SwarmClosedError):
                    return

        return events()
