# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Workers in the router's own process, one thread each: for tests, and for trials on one machine."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from .answers import SwarmError
from .layer_worker import LayerWorker
from .transport import LayerCall, LayerResult, WorkerFaultError, WorkerGoneError, WorkerInfo


Result = TypeVar("Result")


class LocalTransport:
    """A [`Transport`] whose workers are threads.

    A layer that hangs cannot be ended, as that of a process could. Its worker can: it counts as gone then, and its
    thread ends with the layer.

    Args:
        checkpoint: Folder or Hub id.
        kwargs: Passed to each [`LayerWorker`], such as `device` and `dtype`.
    """

    def __init__(self, checkpoint: str | os.PathLike, **kwargs: Any):
        self.checkpoint = checkpoint
        self.kwargs = kwargs
        self._workers: dict[str, _Thread] = {}
        self._ending: dict[_Thread, asyncio.Task] = {}  # threads whose last layer still runs

    def make_worker(self, name: str, layers: Sequence[int]) -> Any:
        """The worker itself; called in its thread."""
        return LayerWorker(self.checkpoint, layers, name=name, **self.kwargs)

    async def open(self) -> None:
        """Nothing is needed beside the workers."""

    async def start_worker(self, name: str, layers: Sequence[int]) -> WorkerInfo:
        await self.stop_worker(name, force=True)
        thread = self._workers[name] = _Thread(name)
        try:
            thread.worker = await thread.run(lambda: self.make_worker(name, list(layers)))
        except BaseException as error:
            await asyncio.shield(self._end(thread))
            if isinstance(error, (SwarmError, ValueError)) or not isinstance(error, Exception):
                raise
            raise SwarmError(f"{name} could not load layers {list(layers)}: {error}") from error
        return await self.ping(name)

    async def load_layers(self, name: str, layers: Sequence[int]) -> WorkerInfo:
        thread = self._thread(name)
        await thread.run(lambda: thread.worker.load_layers(list(layers)))
        return await self.ping(name)

    async def call(self, name: str, call: LayerCall) -> LayerResult:
        thread = self._thread(name)
        try:
            return await thread.run(lambda: thread.worker.run(call))
        except (SwarmError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise WorkerFaultError(f"{name} failed in layer {call.layer}: {error}") from error

    async def ping(self, name: str) -> WorkerInfo:
        thread = self._thread(name)
        return replace(await thread.run(lambda: thread.worker.info), name=name, process_id=None)

    async def stop_worker(self, name: str, force: bool = False) -> None:
        thread = self._workers.get(name)
        if thread is None:
            return
        if not force:
            await thread.finish()
        await self._end(thread, wait=not force)

    async def close(self) -> None:
        for thread in list(self._workers.values()):
            await self._end(thread, wait=False)
        while self._ending:
            thread, ending = next(iter(self._ending.items()))
            await asyncio.wait([ending])
            await self._finish(thread)  # also if all tasks were cancelled, as by Ctrl-C

    def _thread(self, name: str) -> "_Thread":
        if name not in self._workers:
            raise WorkerGoneError(f"{name} is not running")
        return self._workers[name]

    async def _end(self, thread: "_Thread", wait: bool = True) -> None:
        if self._workers.get(thread.name) is thread:
            del self._workers[thread.name]
        thread.leave()
        if thread not in self._ending:
            self._ending[thread] = asyncio.create_task(self._finish(thread))
        if wait:
            await asyncio.wait([self._ending[thread]])

    async def _finish(self, thread: "_Thread") -> None:
        await thread.finish()
        self._ending.pop(thread, None)


class _Thread:
    """A worker's thread. It runs one function after the other."""

    def __init__(self, name: str):
        self.name = name
        self.worker: Any = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"hf-layershuffle-{name}")
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_over = False

    async def run(self, function: Callable[[], Result]) -> Result:
        if self._gone.done():
            raise WorkerGoneError(f"{self.name} was stopped")
        future = asyncio.get_running_loop().run_in_executor(self._executor, function)
        try:
            both: set[asyncio.Future[Any]] = {future, self._gone}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not future.done():
                future.cancel()  # what has begun goes on, and nobody waits for it
        if self._gone.done() or future.cancelled():
            raise WorkerGoneError(f"{self.name} was stopped")
        return future.result()

    def leave(self) -> None:
        """Lets what waits for the worker see that it is gone."""
        if not self._gone.done():
            self._gone.set_result(None)

    async def finish(self) -> None:
        """Waits for the end of what runs, and then of the thread, if the worker is gone."""
        if self._is_over:
            return
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._executor, _nothing))
        if self._gone.done():
            self._is_over = True
            self._executor.shutdown()


def _nothing() -> None:
    pass
