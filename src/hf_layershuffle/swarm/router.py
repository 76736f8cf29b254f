# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Sends the hidden states of requests from worker to worker, as a scheduler decides."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

from .answers import Hop, Skip, SwarmAnswer, SwarmError
from .decisions import Decision, Failed, Finished, Start, TimedOut, Visit
from .events import ROUTER_RESTARTED, TOO_LATE, Events
from .policy import Policy
from .routed_request import RoutedRequest, named, request_of
from .scheduling import Scheduler
from .transport import LayerCall, Transport, WorkerGoneError, check_result


Result = TypeVar("Result")
Inputs = Mapping[str, torch.Tensor]
logger = logging.getLogger(__name__)
AT_ONCE = 1e-6  # seconds until a deadline that has passed


class Watcher(Protocol):
    """Whom a router tells what it sees of its workers."""

    def succeeded(self, worker: str, seconds: float) -> None: ...

    def timed_out(self, worker: str, reason: str) -> None: ...

    def faulted(self, visit: Visit, reason: str) -> None: ...

    def gone(self, worker: str, reason: str) -> None: ...


class Router:
    """Runs requests over workers.

    Embedding and classification run in a thread of their own. All else runs in the event loop.

    Args:
        model: A [`SplitModel`], or an object like one.
    """

    watcher: Watcher

    def __init__(self, model: Any, transport: Transport, policy: Policy, events: Events):
        self.model = model
        self.transport = transport
        self.policy = policy
        self.events = events
        self._layers: dict[str, tuple[int, ...]] = {}  # by worker
        self._pauses: dict[str, set[str]] = {}  # why a worker gets no calls
        self._calls: dict[str, dict[Visit, asyncio.Task]] = {}  # by worker; late ones too
        self._requests: set[RoutedRequest] = set()
        self._open: set[Visit] = set()  # whose end was not told yet
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="hf-layershuffle-router")
        self._scheduler = Scheduler(model.layers, policy)
        self._wake = asyncio.Event()
        self._driver: asyncio.Task | None = None
        self._is_closed = False

    def start(self) -> None:
        self._driver = asyncio.create_task(self._drive(), name="hf-layershuffle-router")
        self._driver.add_done_callback(self._driver_ended)

    async def close(self) -> None:
        """Ends the calls that are under way, and the thread."""
        tasks = [task for calls in self._calls.values() for task in calls.values()]
        tasks += [] if self._driver is None else [self._driver]
        self._calls.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not self._is_closed:
            await self.in_thread(lambda: None)  # so that the shutdown has nothing to wait for
            self._is_closed = True
            self._executor.shutdown()

    def restart(self) -> None:
        """Begins anew with the same workers. Requests go on from the hidden states that they have."""
        if self._driver is not None:
            self._driver.cancel()
        self._scheduler = Scheduler(self.model.layers, self.policy)
        self._wake = asyncio.Event()
        self.start()
        loop = asyncio.get_running_loop()
        for worker, layers in self._layers.items():
            self._scheduler.add_worker(worker, layers)
            for visit in self._calls[worker]:
                self._pauses[worker].add("an earlier call")
                due = max(0.0, visit.started + self.policy.call_timeout - time.monotonic())
                loop.call_later(due, self._time_out_earlier, visit)
            if self._pauses[worker]:
                self._scheduler.pause_worker(worker)
        for visit in list(self._open):
            self._report_hop(visit, ROUTER_RESTARTED)
        for request in sorted(self._requests, key=lambda request: request.accepted):
            if not request.end.done():
                self._accept(request)

    def _time_out_earlier(self, visit: Visit) -> None:
        """Suspects a worker that did not end a call of before the restart, of which the scheduler does not know."""
        if visit in self._calls.get(visit.worker, ()):
            self.watcher.timed_out(visit.worker, self._too_long(visit))

    def _too_long(self, visit: Visit) -> str:
        return f"{visit.worker} took longer than {self.policy.call_timeout:g} s for layer {visit.layer}"

    async def in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    # Requests

    async def embed(self, inputs: Inputs) -> Any:
        """A request's part of the model.

        Raises:
            `ValueError`: if the model does not take such inputs.
        """
        return await self.in_thread(self.model.request, inputs)

    async def answer(
        self, name: str, split: Any, accepted: float, deadline: float | None = None, max_skips: int | None = None
    ) -> SwarmAnswer:
        """Runs a request. If this is cancelled, so is the request.

        Args:
            split: From `embed`.
            accepted: When it came, in seconds of `time.monotonic`. The deadline counts from then.

        Raises:
            `SwarmError`: if it gets no answer.
        """
        deadline = self.policy.deadline if deadline is None else deadline
        max_skips = self.policy.max_skips if max_skips is None else max_skips
        end: asyncio.Future[Finished] = asyncio.get_running_loop().create_future()
        request = RoutedRequest(name, split, split.hidden_states, accepted, deadline, max_skips, end)
        self._requests.add(request)
        try:
            if self._driver is None or self._driver.done():
                raise SwarmError("The router has ended by a fault of its own; see the log.")
            self._accept(request)
            finished = await end
            logits = await self.in_thread(split.classify, request.hidden_states)
        finally:
            self._requests.discard(request)
            self._scheduler.cancel(request)
            request.release()
            self._wake.set()
        skipped = [Skip(layer, reason) for layer, reason in sorted(finished.skipped.items())]
        for skip in skipped:
            self.events.emit("skipped", request=name, layer=skip.layer, reason=skip.reason)
        return SwarmAnswer(logits, request.order, skipped, request.hops, time.monotonic() - accepted, name)

    def _accept(self, request: RoutedRequest) -> None:
        now = time.monotonic()
        left = None if request.deadline is None else max(AT_ONCE, request.accepted + request.deadline - now)
        self._scheduler.accept(request, now, left, request.max_skips, request.order)
        self._wake.set()

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    # Workers

    def add_worker(self, worker: str, layers: Collection[int]) -> None:
        """A worker that is ready, or one that is known and holds these layers now."""
        self._layers[worker] = tuple(layers)
        self._pauses.setdefault(worker, set())
        self._calls.setdefault(worker, {})
        self._scheduler.add_worker(worker, layers)
        self._wake.set()

    def remove_worker(self, worker: str, reason: str, blame: bool = True) -> None:
        """A worker that is gone.

        Args:
            blame: Whether the request that it was busy with may be the cause.
        """
        if worker not in self._layers:
            return
        del self._layers[worker], self._pauses[worker]
        calls = self._calls.pop(worker)
        self._scheduler.remove_worker(worker, reason)
        for visit, task in calls.items():
            task.cancel()
            self._report_hop(visit, reason)
            if blame:
                self.blame(visit, reason)
        self._wake.set()

    def pause(self, worker: str, reason: str) -> None:
        """Sends a worker no further call until the same reason is taken back by `resume`."""
        if worker in self._layers:
            self._pauses[worker].add(reason)
            self._scheduler.pause_worker(worker)

    def resume(self, worker: str, reason: str) -> None:
        if worker in self._layers:
            self._pauses[worker].discard(reason)
            if not self._pauses[worker]:
                self._scheduler.resume_worker(worker)
                self._wake.set()

    def calls_of(self, worker: str) -> list[Visit]:
        """What a worker was asked and has not answered, late or not."""
        return list(self._calls.get(worker, ()))

    async def until_idle(self, worker: str) -> None:
        while calls := self._calls.get(worker):
            await asyncio.wait(calls.values())

    def blame(self, visit: Visit, reason: str) -> None:
        """Notes that a request may have harmed a worker. One that harmed `max_attempts` of them fails."""
        request = request_of(visit)
        request.blamed.add(visit)
        if len(request.blamed) >= self.policy.max_attempts:
            self._scheduler.cancel(request)
            request.give_up(reason)

    # The driver

    async def _drive(self) -> None:
        loop = asyncio.get_running_loop()
        scheduler, wake = self._scheduler, self._wake
        while True:
            wake.clear()
            for decision in scheduler.decide(time.monotonic()):
                self._follow(decision)
            check = scheduler.next_check()
            timer = None if check is None else loop.call_later(max(0.0, check - time.monotonic()), wake.set)
            try:
                await wake.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    def _driver_ended(self, driver: asyncio.Task) -> None:
        error = None if driver.cancelled() else driver.exception()
        if error is not None:  # nobody waits in vain
            logger.error("The router ended by a fault of its own.", exc_info=error)
            for request in self._requests:
                request.fail(SwarmError(f"The router ended by a fault of its own: {error!r}"))

    def _follow(self, decision: Decision) -> None:
        if isinstance(decision, Start):
            self._start_call(decision.visit)
        elif isinstance(decision, TimedOut):
            visit = decision.visit
            reason = self._too_long(visit)
            self._report_hop(visit, reason)
            self.watcher.timed_out(visit.worker, reason)
            self.blame(visit, reason)  # until it answers
        else:
            request = request_of(decision)
            if isinstance(decision, Failed):
                request.fail(request.error_of(decision, len(self.model.layers)))
            elif not request.end.done():
                request.end.set_result(decision)

    def _start_call(self, visit: Visit) -> None:
        request = request_of(visit)
        if request.end.done():  # it was given up for what a decision before this one says
            self._scheduler.failed(visit, time.monotonic(), "its request was given up")
            return
        try:
            args, kwargs = request.split.call(visit.layer)
        except Exception as error:  # the others go on
            self._scheduler.failed(visit, time.monotonic(), str(error))
            self._scheduler.cancel(request)
            request.fail(error)
            return
        call = LayerCall(request.name, visit.layer, visit.position, request.hidden_states, args, kwargs)
        waited = request.stop_waiting(visit.started)
        self._open.add(visit)
        self.events.emit("hop_started", **named(visit), waited=waited)
        task = asyncio.create_task(self._call(self._scheduler, visit, call))
        self._calls[visit.worker][visit] = task

    async def _call(self, scheduler: Scheduler, visit: Visit, call: LayerCall) -> None:
        fault = None
        result = None
        try:
            result = await self.transport.call(visit.worker, call)
            check_result(call, result)
        except WorkerGoneError as error:
            if visit in self._calls.get(visit.worker, ()):
                self.watcher.gone(visit.worker, str(error))
            return
        except asyncio.CancelledError:
            if visit not in self._calls.get(visit.worker, ()):  # else it was not cancelled here
                raise
            fault = "the call was cancelled"
        except Exception as error:  # whatever a transport or a worker brings up, the request goes on
            fault = str(error) or repr(error)
        finally:
            self._calls.get(visit.worker, {}).pop(visit, None)
        self._wake.set()
        now = time.monotonic()
        if fault is None:
            counts = scheduler.arrived(visit, now)
        else:
            counts = scheduler.failed(visit, now, f"{visit.worker}: {fault}")
        if not counts or scheduler is not self._scheduler:
            self._end_late(visit, fault)
        elif fault is None:
            self._take(visit, result)
        else:
            self._report_hop(visit, fault)
        if fault is not None:
            self.watcher.faulted(visit, fault)

    def _take(self, visit: Visit, result: Any) -> None:
        """A result that counts."""
        request = request_of(visit)
        now = time.monotonic()
        request.hidden_states = result.hidden_states
        request.waits_since = now
        request.hops.append(Hop(visit.layer, visit.worker, now - visit.started))
        self._report_hop(visit, None, now - visit.started)
        self.watcher.succeeded(visit.worker, now - visit.started)

    def _end_late(self, visit: Visit, fault: str | None) -> None:
        """A result that no longer counts, or a fault in its place. Its worker lives, so its request did it no harm."""
        request_of(visit).blamed.discard(visit)
        self._report_hop(visit, fault or TOO_LATE)
        if not self._calls.get(visit.worker):
            self.resume(visit.worker, "an earlier call")

    def _report_hop(self, visit: Visit, reason: str | None, seconds: float | None = None) -> None:
        """Tells the end of a visit, once: after a late end nothing more is told."""
        if visit in self._open:
            self._open.discard(visit)
            request_of(visit).wait()
            self.events.emit("hop_ended", **named(visit), seconds=seconds, reason=reason)
