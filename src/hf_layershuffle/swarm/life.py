# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The life of workers: health checks, suspicion, restart, and whose layers go to others."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common.checks import check_seconds
from .answers import SwarmClosedError, SwarmError
from .decisions import Visit
from .events import Events
from .placement import Placement
from .router import Router
from .transport import Transport, WorkerGoneError, WorkerInfo
from .worker_start import WorkerStart


logger = logging.getLogger(__name__)
MOST_FAULTS = 2  # calls in a row that a worker may fail before it is restarted, if it was not restarted lately
MOST_RESTARTS = 5  # of a worker within `RESTARTS_COUNT_FOR` seconds, before its layers go to others
RESTARTS_COUNT_FOR = 60.0
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0  # seconds before the second restart, and before later ones at most
STOP_TIMEOUT = 10.0  # seconds
PING_TIMEOUT = 1.0  # seconds at least


@dataclass(eq=False)
class Worker:
    """A worker as the router's side knows it.

    Args:
        state: "starting", "healthy", "suspect" (it gets no calls until it answers), "draining" or "dead".
        num_calls, seconds: Of calls whose results count.
        faults: Calls in a row that it failed.
        restarts: When it was restarted lately.
        is_killed: Whether it was ended on purpose, so that no request is the cause.
        is_given_up: Whether it failed so often that it is tried again only after a long pause.
        is_loading: Whether it loads layers, and so may not answer a ping.
        care: The task that checks or restarts it.
    """

    name: str
    layers: tuple[int, ...]
    state: str = "starting"
    info: WorkerInfo | None = None
    num_calls: int = 0
    seconds: float = 0.0
    faults: int = 0
    restarts: list[float] = field(default_factory=list)
    is_killed: bool = False
    is_given_up: bool = False
    is_loading: bool = False
    care: asyncio.Task | None = None
    ping: asyncio.Task | None = None

    @property
    def is_up(self) -> bool:
        return self.state in ("healthy", "suspect")


class Life:
    """Looks after the workers of a router, which tells it what it sees of them.

    Args:
        restart: Whether dead workers are started again, and the layers of those that do not start given to others.
        health_interval: Seconds between two pings of a worker that has nothing to do.
        suspect_timeout: Seconds that a worker has to answer, once it missed a ping or a call's timeout, before it is
            ended.
        start_timeout: Seconds that a worker has to load its layers, and again for the first run of each.
    """

    def __init__(
        self,
        router: Router,
        transport: Transport,
        events: Events,
        *,
        restart: bool = True,
        health_interval: float = 1.0,
        suspect_timeout: float = 10.0,
        start_timeout: float = 300.0,
    ):
        check_seconds(health_interval=health_interval, suspect_timeout=suspect_timeout, start_timeout=start_timeout)
        self.router = router
        self.transport = transport
        self.starting = WorkerStart(router.model, router, transport, start_timeout)
        self.events = events
        self.restart = restart
        self.health_interval = health_interval
        self.suspect_timeout = suspect_timeout
        self.workers: dict[str, Worker] = {}
        self.num_restarts = 0
        self.when_given_up: Any = None  # called when a worker was given up, and when one came after that
        self._tasks: set[asyncio.Task] = set()
        self._is_closed = False
        router.watcher = self

    async def start(self, placement: Placement) -> None:
        """Starts all workers, and comes back when all are ready.

        Raises:
            `SwarmError`: if one does not start.
        """
        await self.starting.prepare()
        tasks = [asyncio.create_task(self.bring_up(name, layers)) for name, layers in placement.items()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.spawn(self._watch_health())

    async def bring_up(self, name: str, layers: Sequence[int]) -> None:
        """Starts a new worker. If it does not start, it is as if it had never been.

        Raises:
            `SwarmClosedError`: if the swarm ended.
            `SwarmError`, `ValueError`: if it does not start.
        """
        if self._is_closed:
            raise SwarmClosedError("The swarm is closed.")
        worker = self.workers[name] = Worker(name, tuple(layers))
        self.tell(worker, None)
        try:
            worker.info = await self.starting.start(name, worker.layers)
        except BaseException as error:
            del self.workers[name]
            await self.end(name)
            if isinstance(error, (SwarmError, ValueError)) or not isinstance(error, Exception):
                raise
            raise SwarmError(f"{name} did not start: {error}") from error
        self._admit(worker)

    async def close(self) -> None:
        """Ends what looks after the workers, but not the workers."""
        self._is_closed = True
        self.restart = False
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # What the router sees

    def succeeded(self, worker: str, seconds: float) -> None:
        known = self.workers.get(worker)
        if known is not None:  # else it was removed meanwhile
            known.num_calls += 1
            known.seconds += seconds
            known.faults = 0

    def timed_out(self, worker: str, reason: str) -> None:
        if worker in self.workers:
            self.suspect(self.workers[worker], reason)

    def faulted(self, visit: Visit, reason: str) -> None:
        worker = self.workers.get(visit.worker)
        if worker is None or not worker.is_up:
            return
        worker.faults += 1
        # One that passes its trials may have met requests that fail on any worker. They shall not end it over and over
        was_restarted = any(time.monotonic() - each < RESTARTS_COUNT_FOR for each in worker.restarts)
        if worker.faults >= MOST_FAULTS and not was_restarted:
            self._lose(worker, f"{worker.name} failed {worker.faults} calls in a row: {reason}")
        else:
            self.suspect(worker, reason, visit)

    def gone(self, worker: str, reason: str) -> None:
        known = self.workers.get(worker)
        if known is not None and (known.is_up or known.state == "draining"):
            self._lose(known, f"{worker} died ({reason})")

    # Health

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(self.health_interval)
            for worker in self.workers.values():
                self.look_at(worker)

    def look_at(self, worker: Worker) -> None:
        """Pings a worker. One that has a call to answer is watched by the call's timeout."""
        is_pinged = worker.ping is not None and not worker.ping.done()
        if worker.state == "healthy" and not is_pinged and not self._is_busy(worker):
            worker.ping = self.spawn(self._ping(worker))

    def _is_busy(self, worker: Worker) -> bool:
        return worker.is_loading or bool(self.router.calls_of(worker.name))

    async def _ping(self, worker: Worker) -> None:
        timeout = max(PING_TIMEOUT, self.health_interval)
        try:
            info = await asyncio.wait_for(self.transport.ping(worker.name), timeout)
            self.starting.check(info, worker.name, info.layers)
        except asyncio.TimeoutError:
            if not self._is_busy(worker):  # else the ping waits behind what it does
                self.suspect(worker, f"{worker.name} did not answer a ping within {timeout:g} s")
        except WorkerGoneError as error:
            self.gone(worker.name, str(error))
        except Exception as error:
            if worker.is_up:
                self._lose(worker, f"{worker.name} failed a ping: {error}")

    def suspect(self, worker: Worker, reason: str, visit: Visit | None = None) -> None:
        """Gives a worker no calls until it has shown that it can run one."""
        if worker.state == "healthy":
            worker.state = "suspect"
            self.tell(worker, reason)
            self.router.pause(worker.name, "it is suspected")
            worker.care = self.spawn(self._examine(worker, reason, visit))

    async def _examine(self, worker: Worker, reason: str, visit: Visit | None) -> None:
        try:
            await asyncio.wait_for(self._prove(worker, visit), self.suspect_timeout)
        except asyncio.TimeoutError:
            self._lose(worker, f"{reason}, and it did not recover within {self.suspect_timeout:g} s")
        except WorkerGoneError as error:
            self.gone(worker.name, str(error))
        except Exception as error:
            self._lose(worker, f"{reason}, and then: {error}")
        else:
            worker.state = "healthy"
            self.tell(worker, "it recovered")
            self.router.resume(worker.name, "it is suspected")
            if visit is not None:  # the worker can run the layer, so perhaps the fault is the request's
                self.router.blame(visit, reason)

    async def _prove(self, worker: Worker, visit: Visit | None) -> None:
        await self.transport.ping(worker.name)
        await self.router.until_idle(worker.name)  # a call that timed out may still run
        layers = worker.layers[:1] if visit is None or visit.layer not in worker.layers else [visit.layer]
        await self.starting.warm_up(worker.name, layers)

    # Death

    def _lose(self, worker: Worker, reason: str) -> None:
        """Ends a worker, and starts it again."""
        logger.warning("%s", reason)
        self.router.remove_worker(worker.name, reason, blame=not worker.is_killed)
        is_removed = worker.state == "draining"
        worker.state = "dead"
        self.tell(worker, reason)
        if worker.care is not None and worker.care is not asyncio.current_task():
            worker.care.cancel()
        if not is_removed:
            worker.care = self.spawn(self._revive(worker, reason))

    async def _revive(self, worker: Worker, reason: str) -> None:
        await self.end(worker.name)
        while self.restart:
            now = time.monotonic()
            worker.restarts = [each for each in worker.restarts if now - each < RESTARTS_COUNT_FOR]
            if len(worker.restarts) >= MOST_RESTARTS:
                self._give_up(worker, reason)
                await asyncio.sleep(RESTARTS_COUNT_FOR)
                continue
            pause = FIRST_PAUSE * 2 ** (len(worker.restarts) - 1)
            await asyncio.sleep(min(pause, LONGEST_PAUSE) if worker.restarts else 0.0)
            if not worker.is_killed:
                worker.restarts.append(time.monotonic())
            self.num_restarts += 1
            worker.state, worker.is_killed = "starting", False
            self.tell(worker, f"it is restarted: {reason}")
            try:
                worker.info = await self.starting.start(worker.name, worker.layers)
            except Exception as error:
                reason = f"{worker.name} did not start again: {error}"
                logger.warning("%s", reason)
                worker.state = "dead"
                self.tell(worker, reason)
                await self.end(worker.name)
            else:
                self._admit(worker)
                return

    def _give_up(self, worker: Worker, reason: str) -> None:
        again = (
            f"it was restarted {len(worker.restarts)} times, and is tried again in {RESTARTS_COUNT_FOR:g} s: {reason}"
        )
        logger.error("%s: %s", worker.name, again)
        worker.is_given_up = True
        self.tell(worker, again)
        self._call_when_given_up()

    def _admit(self, worker: Worker) -> None:
        worker.state, worker.faults, worker.is_given_up = "healthy", 0, False
        self.tell(worker, "it is ready")
        self.router.add_worker(worker.name, worker.layers)
        if any(each.is_given_up for each in self.workers.values()):
            self._call_when_given_up()

    def _call_when_given_up(self) -> None:
        if self.when_given_up is not None and self.restart:
            self.spawn(self.when_given_up())

    async def end(self, name: str) -> None:
        """Ends a worker's process at once."""
        try:
            await asyncio.wait_for(self.transport.stop_worker(name, force=True), STOP_TIMEOUT)
        except Exception as error:  # a transport ends all it started when it is closed
            logger.warning("%s could not be ended: %s", name, str(error) or repr(error))

    def spawn(self, coroutine: Coroutine) -> asyncio.Task:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("A task that looks after workers failed.", exc_info=task.exception())

    def tell(self, worker: Worker, reason: str | None) -> None:
        self.events.emit("worker", worker=worker.name, state=worker.state, layers=list(worker.layers), reason=reason)
