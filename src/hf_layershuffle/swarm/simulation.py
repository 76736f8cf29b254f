# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A swarm in simulated time: the router's own [`Scheduler`], with nodes that exist in a simulation only.

Thousands of nodes that fail and come back take seconds. Nothing is computed but times and decisions.
"""

import functools
import math
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .placement import place_evenly
from .policy import Policy
from .scheduling import Decision, Failed, Finished, Scheduler, Start, TimedOut, Visit
from .simulated_nodes import Outage, SimulatedNodes, SimulationSettings


WARM_UP = 0.1  # of the requests are sent before anything is counted, so that an empty swarm's start does not count


class Decides(Protocol):
    """What a simulation asks for decisions: a [`Scheduler`], or another with its methods."""

    def add_worker(self, worker: str, layers: Collection[int]) -> None: ...
    def remove_worker(self, worker: str, reason: str) -> list[Visit]: ...
    def accept(self, request: Hashable, now: float) -> None: ...
    def arrived(self, visit: Visit, now: float) -> bool: ...
    def decide(self, now: float) -> list[Decision]: ...
    def next_check(self) -> float | None: ...


@dataclass
class SimulationResult:
    """What came of a simulation. All but the first three are counted after the warm-up.

    Args:
        accepted, refused: Requests that were sent, and of these, those that met a full queue and were not accepted.
        seconds: Simulated time from the end of the warm-up until the last request was sent.
        counted: Requests sent after the warm-up, refused ones included.
        answered: Of these, those that got an answer.
        throughput: Answers a second.
        latencies: Seconds from acceptance to the answer, of the answered.
        orders: How often each execution order ran.
        hops: Layers that ran and counted, of the requests sent after the warm-up.
        lost_hops: Layers of these that a node was asked for in vain: it failed, took too long, or another was faster.
        busy: Fraction in [0, 1] of the nodes' time in which they were asked for something.
    """

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    counted: int = 0
    answered: int = 0
    throughput: float = 0.0
    latencies: list[float] = field(default_factory=list)
    orders: Counter = field(default_factory=Counter)
    hops: int = 0
    lost_hops: int = 0
    busy: float = 0.0

    def latency(self, percentile: float) -> float | None:
        """Seconds within which this share (0 to 100) of the answers came; None if there is none."""
        return float(np.percentile(self.latencies, percentile)) if self.latencies else None

    @property
    def fraction_answered(self) -> float:
        return self.answered / self.counted if self.counted else 0.0

    @property
    def mean_layers(self) -> float:
        """Mean number of layers that ran for an answer."""
        return sum(len(order) * number for order, number in self.orders.items()) / max(1, self.answered)


def place_on_nodes(num_layers: int, nodes: Sequence[str], replicas: int = 1) -> dict[str, tuple[int, ...]]:
    """Which layers each node holds, as in a real swarm; with more nodes than needed, each layer is on more of them.

    Raises:
        `ValueError`: if there are fewer nodes than replicas.
    """
    return dict(zip(nodes, _dealt(num_layers, len(nodes), max(replicas, math.ceil(len(nodes) / num_layers)))))


@functools.lru_cache(maxsize=16)
def _dealt(num_layers: int, num_nodes: int, replicas: int) -> tuple[tuple[int, ...], ...]:
    return tuple(place_evenly(range(num_layers), num_nodes, replicas).values())


def simulate(settings: SimulationSettings, policy: Policy | None = None, replicas: int = 1) -> SimulationResult:
    """Runs requests through a simulated swarm.

    Args:
        settings: Nodes and load.
        policy: As of a real swarm. Defaults to `Policy()`: any order, no skips.
        replicas: Nodes that hold each layer, at least.

    Raises:
        `ValueError`: if there are fewer nodes than replicas.
    """
    nodes = SimulatedNodes(settings)
    placement = place_on_nodes(settings.num_layers, nodes.names, replicas)
    return SimulatedSwarm(Scheduler(range(settings.num_layers), policy or Policy()), nodes, placement).run()


@dataclass
class _Call:
    """What a node is at. `number` tells a planned end that counts from one that an outage has put off."""

    visit: Visit
    ends: float
    number: int = 0


class _Node:
    """A node as it is now."""

    def __init__(self, name: str, layers: Sequence[int]):
        self.name = name
        self.layers = layers
        self.outage: Outage | None = None
        self.is_known = True  # to the router
        self.call: _Call | None = None


class SimulatedSwarm:
    """Nodes, requests and a router in simulated time.

    Args:
        scheduler: Decides. It is new and empty.
        nodes: What the nodes draw.
        placement: Layers by node.
    """

    def __init__(self, scheduler: Decides, nodes: SimulatedNodes, placement: Mapping[str, Sequence[int]]):
        self.scheduler = scheduler
        self.settings = nodes.settings
        self.env: Any = _simpy().Environment()
        self.result = SimulationResult()
        self._draws = nodes
        self._nodes = {name: _Node(name, layers) for name, layers in placement.items()}
        self._attempts: Counter[tuple[Hashable, int]] = Counter()
        self._accepted_at: dict[Hashable, float] = {}
        self._sent = self._ended = 0
        self._first_counted = int(WARM_UP * self.settings.num_requests)
        self._counting_from: float | None = None
        self._counting_until: float | None = None
        self._answers_in_time = 0
        self._next_timer: float | None = None
        self._busy_seconds = self._router_is_free_at = 0.0
        self._num_visits = 0  # of requests that count

    def run(self) -> SimulationResult:
        """Sends all requests, and waits until each has ended."""
        settings = self.settings
        for number, node in enumerate(self._nodes.values()):
            self.scheduler.add_worker(node.name, node.layers)
            if settings.failure_rate > 0:
                self.env.process(self._fail_and_return(node, number))
        self._all_ended = self.env.event()
        if settings.arrival_rate is None:
            self._send(min(settings.in_flight or settings.nodes, settings.num_requests))
            self._decide()
        else:
            self.env.process(self._arrive())
        self.env.run(until=self._all_ended)
        return self._finish()

    def _finish(self) -> SimulationResult:
        result = self.result
        start, end = self._counting_from or 0.0, self._counting_until
        result.seconds = (self.env.now if end is None or end <= start else end) - start
        for node in self._nodes.values():
            self._count_busy(node)
        if result.seconds > 0:
            result.throughput = self._answers_in_time / result.seconds
            result.busy = self._busy_seconds / ((self.env.now - start) * len(self._nodes))
        result.lost_hops = self._num_visits - result.hops  # all requests have ended, and so nobody waits for a visit
        return result

    # Requests

    def _arrive(self):
        for moment in self._draws.arrivals():
            yield self.env.timeout(moment - self.env.now)
            self._send(1)
            self._decide()

    def _send(self, number: int) -> None:
        for _ in range(number):
            request = self._sent
            self._sent += 1
            counts = self._counts(request)
            if counts and self._counting_from is None:
                self._counting_from = self.env.now
            if self._sent == self.settings.num_requests:
                self._counting_until = self.env.now
            self.result.counted += counts
            is_open = self.settings.arrival_rate is not None
            if is_open and len(self._accepted_at) >= self.settings.max_queue:
                self.result.refused += 1
                self._end_one()
                continue
            self.result.accepted += 1
            self._accepted_at[request] = self.env.now
            self.scheduler.accept(request, self.env.now)

    def _counts(self, request: Any) -> bool:
        """Whether a request is sent after the warm-up. They are numbered from 0."""
        return request >= self._first_counted

    def _end(self, decision: Finished | Failed) -> None:
        request = decision.request
        accepted_at = self._accepted_at.pop(request)
        is_answer = isinstance(decision, Finished)
        # Throughput counts what is answered while requests still come; so the last ones, which nothing follows, do
        # not lower it
        if is_answer and self._counting_from is not None and self._counting_until is None:
            self._answers_in_time += 1
        if is_answer and self._counts(request):
            self.result.answered += 1
            self.result.latencies.append(self.env.now - accepted_at)
            self.result.orders[tuple(decision.order)] += 1  # type: ignore[union-attr]
        self._end_one()

    def _end_one(self) -> None:
        self._ended += 1
        if self._ended == self.settings.num_requests:
            self._all_ended.succeed()

    # Decisions

    def _decide(self) -> None:
        """Does what the scheduler decides, until it decides nothing more."""
        is_closed = self.settings.arrival_rate is None
        sends_more = True
        while sends_more:
            sends_more = False
            for decision in self.scheduler.decide(self.env.now):
                if isinstance(decision, Start):
                    self._start(decision.visit)
                elif not isinstance(decision, TimedOut):
                    self._end(decision)
                    if is_closed and self._sent < self.settings.num_requests:
                        self._send(1)
                        sends_more = True
        self._set_timer()

    def _set_timer(self) -> None:
        check = self.scheduler.next_check()
        if check is None or (self._next_timer is not None and self._next_timer <= check):
            return
        self._next_timer = check
        # Rounding may let a timer ring before its time; then it is set once more
        self._after(max(check - self.env.now, 0.0), lambda: self._check(check))

    def _check(self, moment: float) -> None:
        if moment == self._next_timer:
            self._next_timer = None
            self._decide()

    def _after(self, seconds: float, function) -> None:
        self.env.timeout(seconds).callbacks.append(lambda _: function())

    # Nodes

    def _start(self, visit: Visit) -> None:
        self._num_visits += self._counts(visit.request)
        node = self._nodes[visit.worker]
        attempt = self._attempts[visit.request, visit.layer]
        self._attempts[visit.request, visit.layer] += 1
        seconds = self._draws.seconds(visit.request, visit.layer, attempt, node.name)  # type: ignore[arg-type]
        if node.outage is not None and not node.outage.hangs:
            return  # the router does not know yet that the node is gone
        start = self.env.now if node.outage is None else node.outage.end
        node.call = _Call(visit, start + seconds)
        self._plan_end(node, node.call)

    def _plan_end(self, node: _Node, call: _Call) -> None:
        number = call.number
        self._after(call.ends - self.env.now, lambda: self._end_call(node, call, number))

    def _end_call(self, node: _Node, call: _Call, number: int) -> None:
        if node.call is not call or call.number != number:
            return
        self._count_busy(node)
        node.call = None
        self._router_is_free_at = max(self.env.now, self._router_is_free_at) + self.settings.router_seconds
        if self._router_is_free_at > self.env.now:
            self._after(self._router_is_free_at - self.env.now, lambda: self._arrived(call.visit))
        else:
            self._arrived(call.visit)

    def _count_busy(self, node: _Node) -> None:
        """Counts the time of what a node is at until now, without the warm-up."""
        if node.call is not None and self._counting_from is not None:
            self._busy_seconds += self.env.now - max(node.call.visit.started, self._counting_from)

    def _arrived(self, visit: Visit) -> None:
        if self.scheduler.arrived(visit, self.env.now):
            self.result.hops += self._counts(visit.request)
        self._decide()

    def _fail_and_return(self, node: _Node, number: int):
        for outage in self._draws.outages(number):
            yield self.env.timeout(outage.start - self.env.now)
            node.outage = outage
            if outage.hangs:
                self._put_off(node, outage)
                yield self.env.timeout(outage.end - self.env.now)
                node.outage = None
                continue
            self._count_busy(node)
            node.call = None
            yield self.env.timeout(min(self.settings.detection_seconds, outage.end - outage.start))
            self.scheduler.remove_worker(node.name, f"{node.name} died")
            self._decide()
            yield self.env.timeout(max(outage.end - self.env.now, 0.0))
            node.outage = None
            self.scheduler.add_worker(node.name, node.layers)
            self._decide()

    def _put_off(self, node: _Node, outage: Outage) -> None:
        """What a node is at goes on when it no longer hangs."""
        if node.call is not None:
            node.call.ends += outage.end - outage.start
            node.call.number += 1
            self._plan_end(node, node.call)


def _simpy() -> Any:
    try:
        import simpy
    except ImportError as error:
        raise ImportError(
            'a simulation needs the package simpy; install it with `pip install "hf-layershuffle[swarm]"`',
            name="simpy",
        ) from error
    return simpy
