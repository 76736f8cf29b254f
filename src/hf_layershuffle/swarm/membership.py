# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Workers that come and go while requests run, and layers that move between them."""

import asyncio
import logging
from collections.abc import Collection, Sequence
from itertools import count
from typing import Any

from .answers import SwarmError
from .life import Life, Worker
from .placement import check_layers, layers_for_new_worker, rebalanced, unheld, worker_name
from .transport import WorkerGoneError


logger = logging.getLogger(__name__)


class Membership:
    """Adds, removes and kills workers, and moves layers. One such change at a time.

    Args:
        layers: Those that requests run.
        drain_timeout: Seconds that a worker has to end its call before it is removed or loads other layers.
    """

    def __init__(self, life: Life, layers: Sequence[int], drain_timeout: float):
        self.life = life
        self.router = life.router
        self.layers = list(layers)
        self.drain_timeout = drain_timeout
        self._lock = asyncio.Lock()
        life.when_given_up = self.give_away

    async def add(self, layers: Collection[int] | None = None) -> str:
        """Starts a further worker, and returns its name when it is ready.

        Args:
            layers: Those that it holds; None for those that need it most.

        Raises:
            `ValueError`: if a layer is none of the model's.
            `SwarmError`: if it does not start, or holds another checkpoint.
        """
        async with self._lock:
            held = {worker.name: worker.layers for worker in self._staying()}
            if layers is None:
                own = layers_for_new_worker(held, self.layers)
            else:
                own = check_layers(layers, self.layers, "`layers`")
            name = next(name for name in map(worker_name, count()) if name not in self.life.workers)
            await self.life.bring_up(name, own)
            return name

    async def remove(self, name: str, drain: bool = True, force: bool = False, rebalance: bool = False) -> None:
        """Ends a worker for good.

        Args:
            drain: Whether it may finish its call first.
            force: Whether it goes even if a layer is held by it alone.
            rebalance: Whether others load such layers before it goes.

        Raises:
            `ValueError`: if there is no such worker.
            `SwarmError`: if it alone holds a layer.
        """
        async with self._lock:
            worker = self.find(name)
            if self._held_alone(worker) and rebalance:
                await self._rebalance(False, without=worker)
            alone = self._held_alone(worker)
            if alone and not force:
                raise SwarmError(
                    f"{name} alone holds the layers {alone}, without which requests cannot be answered. Let others "
                    "load them (`rebalance=True`), add a worker that holds them, or remove it with `force=True`."
                )
            if self.life.workers.get(name) is worker:
                await self._end(worker, drain)

    def _held_alone(self, worker: Worker) -> list[int]:
        """Layers that nobody holds when this worker has gone, and somebody did before."""
        others = {other.name: other.layers for other in self._staying() if other is not worker}
        own = [layer for layer in worker.layers if layer in self.layers]
        return unheld(others, own) if worker in self._staying() else []

    async def _end(self, worker: Worker, drain: bool) -> None:
        if worker.care is not None:
            worker.care.cancel()
        if worker.is_up:
            worker.state = "draining"
            self.life.tell(worker, "it is removed")
            self.router.pause(worker.name, "it is removed")
            if drain:
                await self._until_idle(worker)
        self.router.remove_worker(worker.name, f"{worker.name} was removed", blame=False)
        del self.life.workers[worker.name]
        await self.life.end(worker.name)
        worker.state = "dead"
        self.life.tell(worker, "it was removed")

    async def kill(self, name: str) -> None:
        """Ends a worker's process as a crash would.

        Raises:
            `ValueError`: if there is no such worker.
        """
        worker = self.find(name)
        worker.is_killed = True
        await self.life.end(name)
        self.life.look_at(worker)

    def find(self, name: str) -> Worker:
        if name not in self.life.workers:
            raise ValueError(f"There is no worker {name!r}; there are {', '.join(sorted(self.life.workers))}.")
        return self.life.workers[name]

    async def rebalance(self) -> None:
        """Lets workers load the layers that nobody holds, and evens out how many each holds.

        Raises:
            `SwarmError`: if no worker is there, or one could not load its layers.
        """
        async with self._lock:
            await self._rebalance(True)

    async def give_away(self) -> None:
        """Gives the layers of workers that were given up to others."""
        async with self._lock:
            if unheld({worker.name: worker.layers for worker in self._staying()}, self.layers):
                try:
                    await self._rebalance(False)
                except SwarmError as error:
                    logger.error("Layers that nobody holds could not be given to other workers: %s", error)

    def _staying(self) -> list[Worker]:
        """Workers that are there or will be."""
        is_coming = self.life.restart
        return [
            worker
            for worker in self.life.workers.values()
            if worker.is_up
            or worker.state == "starting"
            or (worker.state == "dead" and is_coming and not worker.is_given_up)
        ]

    async def _rebalance(self, even: bool, without: Worker | None = None) -> None:
        staying = [worker for worker in self._staying() if worker is not without]
        held = {worker.name: worker.layers for worker in staying if worker.is_up}
        coming = {layer for worker in staying if not worker.is_up for layer in worker.layers}
        own = {layer for layers in held.values() for layer in layers}
        if not held:
            raise SwarmError("No worker is there that could hold further layers; add one.")
        target = rebalanced(held, [layer for layer in self.layers if layer in own or layer not in coming], even)
        # First all that is added: no layer is without a worker in between
        for name, layers in target.items():
            await self._load(name, sorted({*held[name], *layers}))
        for name, layers in target.items():
            worker = self.life.workers.get(name)
            if worker is not None and worker is not without:  # who should hold the layer now may have died meanwhile
                await self._load(name, sorted({*layers, *self._held_alone(worker)}))

    async def _load(self, name: str, layers: Sequence[int]) -> None:
        worker = self.life.workers.get(name)
        if worker is None or not worker.is_up or list(worker.layers) == list(layers):
            return
        self.router.pause(name, "it loads layers")
        worker.is_loading = True
        try:
            await self._until_idle(worker)
            new = [layer for layer in layers if layer not in worker.layers]
            worker.info = await self.life.starting.load(name, layers, new)
            if worker.is_up:
                worker.layers = tuple(layers)
                self.router.add_worker(name, layers)
                self.life.tell(worker, f"it holds layers {list(layers)} now")
        except WorkerGoneError as error:
            self.life.gone(name, str(error))
        except (OSError, ValueError) as error:
            raise SwarmError(f"{name} could not load layers {list(layers)}: {error}") from error
        finally:
            worker.is_loading = False
            self.router.resume(name, "it loads layers")

    async def _until_idle(self, worker: Worker) -> None:
        try:
            await asyncio.wait_for(self.router.until_idle(worker.name), self.drain_timeout)
        except asyncio.TimeoutError:
            logger.warning("%s did not end its call within %g s.", worker.name, self.drain_timeout)

    def status(self) -> list[dict[str, Any]]:
        """Each worker in types of JSON."""
        return [self._describe(worker) for worker in self.life.workers.values()]

    def _describe(self, worker: Worker) -> dict[str, Any]:
        calls = self.router.calls_of(worker.name)
        info = worker.info
        return {
            "name": worker.name,
            "layers": list(worker.layers),
            "state": worker.state,
            "device": None if info is None else info.device,
            "process_id": None if info is None else info.process_id,
            "node": None if info is None else info.node,
            "busy_with": {"request": calls[0].request.name, "layer": calls[0].layer} if calls else None,  # type: ignore
            "num_calls": worker.num_calls,
            "mean_seconds": worker.seconds / worker.num_calls if worker.num_calls else None,
        }
