# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Which layer a request takes next, on which worker: decisions only, no clock, no input or output.

The router drives a [`Scheduler`] with real workers, and the simulation with simulated ones.
"""

from collections.abc import Collection, Hashable, Sequence
from itertools import count
from typing import Any

from .decisions import Decision, Failed, Finished, Start, TimedOut, Visit
from .heap import Heap
from .policy import Policy
from .request import Entry, Request, still_waits
from .worker_pool import WorkerPool


class Scheduler:
    """Matches requests that wait with workers that are free.

    Tell it what happens (`accept`, `arrived`, `failed`, `add_worker`, ...), then do what `decide` says; ask again at
    the time that `next_check` says at the latest. Times are seconds of any clock that does not go back.

    A worker that becomes free takes the oldest request that lacks one of its layers, and of these the first layer. A
    request that finds several workers free takes the first layer that it lacks and one of them holds. To prefer the
    layer that most waiting requests lack was tried: the throughput was the same within one percent. A layer of which
    a worker is free is lacked by no waiting request, but where a worker holds several.

    Args:
        layers: Those that a request must run, each once; with the strict policy in this order.
        policy: The rules. `deadline` and `max_skips` can be others for a request.
    """

    def __init__(self, layers: Sequence[int], policy: Policy | None = None):
        self.layers = list(layers)
        self.policy = policy or Policy()
        self._is_strict = self.policy.name == "strict"
        self._workers = WorkerPool(layers)
        self._requests: dict[Hashable, Request] = {}
        # Requests that could take this layer next
        self._queues: dict[int, Heap[Entry]] = {layer: Heap(still_waits) for layer in layers}
        self._to_match: Heap[Entry] = Heap(still_waits)  # requests that began to wait since the last decision
        # When, a number, what for, the request, and what of it
        self._timers: Heap[tuple[float, int, str, Request, Any]] = Heap(lambda timer: self._is_due(*timer[2:]))
        self._now = 0.0
        self._decisions: list[Decision] = []
        self._visit_numbers, self._request_numbers, self._timer_numbers = count(), count(), count()

    @property
    def num_waiting(self) -> int:
        return sum(request.waits for request in self._requests.values())

    @property
    def num_in_flight(self) -> int:
        """Requests that have no answer yet, waiting or running."""
        return len(self._requests)

    def visit_of(self, worker: str) -> Visit | None:
        """What a worker is busy with, a late visit too."""
        return self._workers.visit_of(worker)

    # Workers

    def add_worker(self, worker: str, layers: Collection[int]) -> None:
        """A worker that is free and holds these layers. One that is known gets these layers, and keeps its visit."""
        if self._workers.put(worker, layers):
            self._look_again()

    def remove_worker(self, worker: str, reason: str) -> list[Visit]:
        """A worker that is gone: its visits come back to their requests. Returns these visits."""
        visit, is_layer_lost = self._workers.remove(worker, reason)
        lost = [visit] if visit is not None and self._came_to_nothing(visit, reason) else []
        if is_layer_lost:
            self._look_again()
        return lost

    def pause_worker(self, worker: str) -> None:
        """Gives a worker no further visit, as while it is suspected or drains. Its layers still count as there."""
        self._workers.set_paused(worker, True)

    def resume_worker(self, worker: str) -> None:
        self._workers.set_paused(worker, False)

    def freed(self, worker: str) -> None:
        """A worker ended a call that no longer counts, as after `TimedOut`, and can take another."""
        self._workers.set_visit(worker, None)

    def _look_again(self) -> None:
        """Requests that wait may be stuck now, or no longer."""
        for request in self._requests.values():
            if request.waits:
                self._to_match.push((request.number, request.num_waits, request))

    # Requests

    def accept(
        self,
        request: Hashable,
        now: float,
        deadline: float | None = None,
        max_skips: int | None = None,
        ran: Sequence[int] = (),
    ) -> None:
        """A new request. `deadline` (seconds from now) and `max_skips` are those of the policy unless given. `ran` are
        layers that ran already, in their order, as before a restart of the router.

        Raises:
            `ValueError`: if a request of this name is in flight.
        """
        if request in self._requests:
            raise ValueError(f"The request {request!r} is in flight already; give each a name of its own.")
        deadline = self.policy.deadline if deadline is None else deadline
        skips = self.policy.max_skips if max_skips is None else max_skips
        self._now = now
        new = self._requests[request] = Request(request, next(self._request_numbers), self.layers, skips, ran)
        if self._is_strict and ran:  # what stands before them in the order was skipped
            before = self.layers[: self.layers.index(ran[-1])]
            self._leave_out(new, [layer for layer in before if layer not in ran], "it was skipped before")
        if deadline is not None:
            self._set_timer(deadline, "deadline", new)
        self._wait(new)

    def cancel(self, request: Hashable) -> None:
        """The request is no longer wanted. Its running visit ends as a late one."""
        if request in self._requests:
            self._end(self._requests[request])

    def arrived(self, visit: Visit, now: float) -> bool:
        """A visit's result is there, and its worker is free. Returns whether it counts: a late one does not."""
        self._now = now
        self._release(visit)
        request = self._request_of(visit)
        if request is None:
            return False
        request.running = []
        request.missing.remove(visit.layer)
        request.visits.append((visit, now - visit.started))
        self._wait(request)
        return True

    def failed(self, visit: Visit, now: float, reason: str) -> bool:
        """A visit gave no usable result, and its worker is free. Returns whether the visit still counted."""
        self._now = now
        self._release(visit)
        return self._came_to_nothing(visit, reason)

    def _release(self, visit: Visit) -> None:
        if self._workers.visit_of(visit.worker) is visit:
            self.freed(visit.worker)

    def _request_of(self, visit: Visit) -> Request | None:
        """The request that waits for a visit's result; None for a late one."""
        request = self._requests.get(visit.request)
        return request if request is not None and visit in request.running else None

    def _came_to_nothing(self, visit: Visit, reason: str) -> bool:
        request = self._request_of(visit)
        if request is None:
            return False
        request.running.remove(visit)
        attempts = request.attempts[visit.layer] = request.attempts.get(visit.layer, 0) + 1
        if request.running:  # a replica was asked too
            return True
        if attempts >= self.policy.max_attempts:
            request.unreachable[visit.layer] = f"tried {attempts} times, at last {reason}"
        if sum(layer in request.unreachable for layer in request.missing) > request.budget:
            self._fail(request)
        else:
            self._wait(request)
        return True

    def _next_layers(self, request: Request) -> list[int]:
        """Layers that a request could take next."""
        return [layer for layer in self._needed(request) if layer not in request.unreachable]

    def _wait(self, request: Request) -> None:
        """Lets a request wait for its next layer. With none missing, it is finished."""
        if not request.missing:
            self._finish(request)
            return
        request.waits = True
        request.num_waits += 1
        entry = (request.number, request.num_waits, request)
        for layer in self._next_layers(request):
            self._queues[layer].push(entry)
        self._to_match.push(entry)
        if self.policy.skip_after is not None:
            self._set_timer(self.policy.skip_after, "skip_after", request, request.num_waits)

    def _stop_waiting(self, request: Request) -> None:
        request.waits = False
        request.stuck_since = None

    def _end(self, request: Request) -> None:
        self._stop_waiting(request)
        request.running = []
        del self._requests[request.name]

    def _finish(self, request: Request) -> None:
        self._end(request)
        self._decisions.append(Finished(request.name, request.order, request.visits, request.skipped))

    def _fail(self, request: Request, is_deadline: bool = False) -> None:
        self._end(request)
        missing = {layer: self._why(request, layer) for layer in request.missing}
        self._decisions.append(Failed(request.name, missing | request.skipped, is_deadline))

    def _why(self, request: Request, layer: int, otherwise: str = "it had not run yet") -> str:
        """Why a layer does not run."""
        if layer in request.unreachable:
            return request.unreachable[layer]
        return otherwise if self._workers.is_held(layer) else self._workers.why_gone[layer]

    def _needed(self, request: Request) -> list[int]:
        """Layers without which a request that finds no worker cannot go on."""
        return request.missing[:1] if self._is_strict else request.missing

    def _skip(self, request: Request, layers: Sequence[int], otherwise: str = "") -> None:
        self._stop_waiting(request)
        self._leave_out(request, layers, otherwise)
        self._wait(request)

    def _leave_out(self, request: Request, layers: Sequence[int], otherwise: str) -> None:
        request.skipped |= {layer: self._why(request, layer, otherwise) for layer in layers}
        request.missing = [layer for layer in request.missing if layer not in request.skipped]

    # Decisions

    def decide(self, now: float) -> list[Decision]:
        """What is to be done now, in this order."""
        self._now = now
        while (timer := self._timers.first()) is not None and timer[0] <= now:
            self._timers.pop()
            _, _, kind, request, what = timer
            getattr(self, f"_on_{kind}")(request, what)
        self._match()
        decisions, self._decisions = self._decisions, []
        return decisions

    def next_check(self) -> float | None:
        """When `decide` has to be asked again at the latest, if nothing happens before; None for never."""
        timer = self._timers.first()
        return None if timer is None else timer[0]

    def _match(self) -> None:
        """Lets visits begin until no free worker holds what a waiting request lacks."""
        workers = self._workers
        while True:
            while workers.newly_idle:
                worker = next(iter(workers.newly_idle))
                self._serve(worker)
                workers.newly_idle.pop(worker, None)
            entry = self._to_match.first()
            if entry is None:
                break
            self._to_match.pop()
            request = entry[-1]
            for layer in self._next_layers(request):
                holder = workers.idle_holder(layer)
                if holder is not None:
                    self._start(request, layer, holder)
                    break
            else:
                self._go_without(request)

    def _serve(self, worker: str) -> None:
        """Gives a free worker the oldest request that lacks one of its layers, if there is one."""
        found: tuple[Request, int] | None = None
        for layer in self._workers.layers_of(worker):
            entry = self._queues[layer].first()
            if entry is not None and (found is None or entry[0] < found[0].number):
                found = entry[-1], layer
        if found is not None:
            self._start(*found, worker)

    def _start(self, request: Request, layer: int, worker: str) -> None:
        self._stop_waiting(request)
        visit = Visit(next(self._visit_numbers), request.name, worker, layer, len(request.order), self._now)
        request.running.append(visit)
        self._workers.set_visit(worker, visit)
        self._set_timer(self.policy.call_timeout, "call_timeout", request, visit)
        if self.policy.hedge is not None and len(request.running) == 1:
            self._set_timer(self.policy.hedge, "hedge", request, visit)
        self._decisions.append(Start(visit))

    def _go_without(self, request: Request) -> None:
        """A request for which no worker is free waits, unless no worker holds what it lacks, and it may skip that."""
        if any(self._workers.is_held(layer) for layer in self._next_layers(request)):
            request.stuck_since = None
        elif len(self._needed(request)) <= request.budget:
            self._skip(request, self._needed(request))
        elif request.stuck_since is None:
            request.stuck_since = self._now
            self._set_timer(self.policy.max_wait, "max_wait", request, self._now)

    # Timers

    def _set_timer(self, seconds: float, kind: str, request: Request, what: Visit | float | None = None) -> None:
        self._timers.push((self._now + seconds, next(self._timer_numbers), kind, request, what))

    def _is_due(self, kind: str, request: Request, what: Visit | float | None) -> bool:
        """Whether what a timer was set for still holds."""
        if kind == "call_timeout":
            assert isinstance(what, Visit)
            return self._workers.visit_of(what.worker) is what
        if self._requests.get(request.name) is not request:
            return False
        if kind == "skip_after":
            return request.waits and request.num_waits == what
        if kind == "max_wait":
            return request.stuck_since == what
        return kind == "deadline" or what in request.running

    def _on_deadline(self, request: Request, _: object) -> None:
        if len(request.missing) <= request.budget:
            self._skip(request, request.missing, "the deadline came")
        else:
            self._fail(request, is_deadline=True)

    def _on_skip_after(self, request: Request, _: object) -> None:
        if len(self._needed(request)) <= request.budget:
            self._skip(request, self._needed(request), f"no worker was free for {self.policy.skip_after:g} s")

    def _on_max_wait(self, request: Request, _: object) -> None:
        self._fail(request)

    def _on_call_timeout(self, request: Request, visit: Visit) -> None:
        self._decisions.append(TimedOut(visit))
        self._came_to_nothing(visit, f"{visit.worker} took more than {self.policy.call_timeout:g} s")

    def _on_hedge(self, request: Request, visit: Visit) -> None:
        replica = self._workers.idle_holder(visit.layer)
        if replica is not None:
            self._start(request, visit.layer, replica)
        else:  # no replica is free yet
            self._set_timer(self.policy.hedge or 0.0, "hedge", request, visit)


__all__ = ["Decision", "Failed", "Finished", "Scheduler", "Start", "TimedOut", "Visit"]
