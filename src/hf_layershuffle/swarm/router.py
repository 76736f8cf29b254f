# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Sends the hidden states of requests from worker to worker, as a scheduler decides."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from .answers import DeadlineError, Hop, MissingLayersError, Skip, SwarmAnswer, SwarmError
from .decisions import Decision, Failed, Finished, Start, TimedOut, Visit
from .events import Events
from .policy import Policy
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


@dataclass(eq=False)
class Request:
    """A request on its way. Its hidden states stay here, so the death of a worker loses nothing of it.

    Args:
        split: Its part of the model: embedded inputs, calls of layers, classification.
        end: What the scheduler says of its end.
        blamed: Visits that may have ended their workers.
    """

    name: str
    split: Any
    hidden_states: torch.Tensor
    accepted: float
    waits_since: float
    deadline: float | None
    max_skips: int
    end: "asyncio.Future[Finished]"
    hops: list[Hop] = field(default_factory=list)
    blamed: set[Visit] = field(default_factory=set)

    def fail(self, error: Exception) -> None:
        if not self.end.done():
            self.end.set_exception(error)


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
        self._requests: dict[str, Request] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="hf-layershuffle-router")

    def start(self) -> None:
        self._scheduler = Scheduler(self.model.layers, self.policy)
        self._wake = asyncio.Event()
        self._driver = asyncio.create_task(self._drive(), name="hf-layershuffle-router")
        self._driver.add_done_callback(self._driver_ended)

    async def close(self) -> None:
        """Ends the calls that are under way, and the thread."""
        tasks = [self._driver, *(task for calls in self._calls.values() for task in calls.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.in_thread(_nothing)  # so that the shutdown has nothing to wait for
        self._executor.shutdown()

    def restart(self) -> None:
        """Begins anew with the same workers. Requests go on from the hidden states that they have."""
        self._driver.cancel()
        self.start()
        for worker, layers in self._layers.items():
            self._scheduler.add_worker(worker, layers)
            if self._calls[worker]:
                self._pauses[worker].add("an earlier call")
            if self._pauses[worker]:
                self._scheduler.pause_worker(worker)
        for request in self._requests.values():
            if not request.end.done():
                self._accept(request)

    async def in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    # Requests

    async def answer(self, name: str, inputs: Inputs, deadline: float | None, max_skips: int | None) -> SwarmAnswer:
        """Runs a request. If this is cancelled, so is the request.

        Raises:
            `SwarmError`: if it gets no answer.
        """
        accepted = time.monotonic()
        split = await self.in_thread(self.model.request, inputs)
        deadline = self.policy.deadline if deadline is None else deadline
        max_skips = self.policy.max_skips if max_skips is None else max_skips
        end: asyncio.Future[Finished] = asyncio.get_running_loop().create_future()
        request = Request(name, split, split.hidden_states, accepted, accepted, deadline, max_skips, end)
        self._requests[name] = request
        try:
            if self._driver.done() and not self._driver.cancelled():
                raise SwarmError("The router has ended by a fault of its own; see the log.")
            self._accept(request)
            finished = await end
            logits = await self.in_thread(split.classify, request.hidden_states)
        finally:
            del self._requests[name]
            self._scheduler.cancel(name)
            self._wake.set()
        skipped = [Skip(layer, reason) for layer, reason in sorted(finished.skipped.items())]
        order = [hop.layer for hop in request.hops]
        return SwarmAnswer(logits, order, skipped, request.hops, time.monotonic() - accepted, name)

    def _accept(self, request: Request) -> None:
        now = time.monotonic()
        left = None if request.deadline is None else max(AT_ONCE, request.accepted + request.deadline - now)
        ran = [hop.layer for hop in request.hops]
        self._scheduler.accept(request.name, now, left, request.max_skips, ran=ran)
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
        request = self._requests.get(visit.request)  # type: ignore[call-overload]
        if request is None:
            return
        request.blamed.add(visit)
        if len(request.blamed) >= self.policy.max_attempts:
            self._scheduler.cancel(request.name)
            at = ", ".join(sorted({f"layer {each.layer} on {each.worker}" for each in request.blamed}))
            request.fail(
                SwarmError(
                    f"The request '{request.name}' was given up, since {len(request.blamed)} workers failed in it "
                    f"({at}), the last one for this reason: {reason}. Its inputs may be the cause."
                )
            )

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
            for request in self._requests.values():
                request.fail(SwarmError(f"The router ended by a fault of its own: {error!r}"))

    def _follow(self, decision: Decision) -> None:
        if isinstance(decision, Start):
            self._start_call(decision.visit)
        elif isinstance(decision, TimedOut):
            visit = decision.visit
            reason = f"{visit.worker} took longer than {self.policy.call_timeout:g} s for layer {visit.layer}"
            self._report_hop(visit, reason)
            self.watcher.timed_out(visit.worker, reason)
            self.blame(visit, reason)  # until it answers
        else:
            request = self._requests[decision.request]  # type: ignore[index]
            if isinstance(decision, Failed):
                request.fail(_missing_layers(request, decision, len(self.model.layers)))
            elif not request.end.done():
                request.end.set_result(decision)

    def _start_call(self, visit: Visit) -> None:
        request = self._requests[visit.request]  # type: ignore[index]
        args, kwargs = request.split.call(visit.layer)
        call = LayerCall(request.name, visit.layer, visit.position, request.hidden_states, args, kwargs)
        waited = time.monotonic() - request.waits_since
        self.events.emit("hop_started", **_named(visit), waited=waited)
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
        except Exception as error:  # whatever a transport or a worker brings up, the request goes on
            fault = str(error) or repr(error)
        finally:
            self._calls.get(visit.worker, {}).pop(visit, None)
        if scheduler is not self._scheduler:
            self._end_late(visit)
        elif fault is not None:
            if scheduler.failed(visit, time.monotonic(), f"{visit.worker}: {fault}"):
                self._report_hop(visit, fault)
        elif scheduler.arrived(visit, time.monotonic()):
            self._take(visit, result)
        else:
            self._end_late(visit)
        if fault is not None:
            self.watcher.faulted(visit, fault)
        self._wake.set()

    def _take(self, visit: Visit, result: Any) -> None:
        """A result that counts."""
        request = self._requests[visit.request]  # type: ignore[index]
        now = time.monotonic()
        request.hidden_states = result.hidden_states
        request.waits_since = now
        request.hops.append(Hop(visit.layer, visit.worker, now - visit.started))
        self._report_hop(visit, None, now - visit.started)
        self.watcher.succeeded(visit.worker, now - visit.started)

    def _end_late(self, visit: Visit) -> None:
        """A result that no longer counts. Its worker lives, so its request did it no harm."""
        request = self._requests.get(visit.request)  # type: ignore[call-overload]
        if request is not None:
            request.blamed.discard(visit)
        if not self._calls.get(visit.worker):
            self.resume(visit.worker, "an earlier call")

    def _report_hop(self, visit: Visit, fault: str | None, seconds: float | None = None) -> None:
        self.events.emit("hop_ended", **_named(visit), seconds=seconds, fault=fault)


def _named(visit: Visit) -> dict[str, Any]:
    return {
        "request": visit.request,
        "layer": visit.layer,
        "worker": visit.worker,
        "position": visit.position,
        "visit": visit.number,
    }


def _missing_layers(request: Request, decision: Failed, num_layers: int) -> MissingLayersError:
    missing = ", ".join(f"{layer} ({reason})" for layer, reason in sorted(decision.missing.items()))
    ran = f"{len(request.hops)} of {num_layers} layers ran, and it may skip {request.max_skips}"
    if decision.deadline:
        return DeadlineError(
            f"The request '{request.name}' came to its deadline of {request.deadline:g} s before it had run layers "
            f"{missing}: {ran}. Give it more time, more skips, or the layers more replicas.",
            sorted(decision.missing),
        )
    return MissingLayersError(
        f"The request '{request.name}' could not run layers {missing}: {ran}. Allow more skips, or give the layers "
        "more replicas.",
        sorted(decision.missing),
    )


def _nothing() -> None:
    pass
