# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Nodes that exist in a simulation only: how long a layer takes on them, when they fail, and when they come back.

Everything random is drawn from the seed and from what it is of (the request and its layer, the node), not from the
sequence of what happens. So all policies meet the same requests, the same slow nodes and the same failures.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..common.checks import check_integers


SERVICE_TIMES = ("constant", "exponential", "lognormal")


@dataclass(frozen=True)
class SimulationSettings:
    """The nodes of a simulation, and its load.

    Args:
        num_layers: Layers of the model.
        nodes: Number of nodes, each of which runs one layer at a time.
        num_requests: Requests that are sent.
        in_flight: Requests that are under way at any time (a closed load). Defaults to `nodes`.
        arrival_rate: Requests a second, which come at random (a Poisson process) instead of a closed load.
        max_queue: With `arrival_rate`: a request is refused while so many are under way.
        service: How the time that a layer takes is distributed: `"constant"`, `"exponential"` or `"lognormal"`.
        service_seconds: Its mean, on a node that is no straggler.
        service_spread: For `"lognormal"`: standard deviation of its logarithm.
        stragglers: Fraction in [0, 1) of nodes that are slow. They are drawn.
        straggler_factor: Times as slow as others, at least 1.
        latency_seconds: Mean time for a hop's way to the node and back, lognormal. 0 for none.
        latency_spread: Standard deviation of its logarithm.
        failure_rate: Fraction in [0, 1) of the time for which a node is away, on average. The times between failures
            and the times away are exponential.
        repair_seconds: Mean time for which a node is away.
        hangs: Fraction in [0, 1] of failures in which the node stands still and says nothing. A node that fails
            otherwise loses what it was at, which its router learns after `detection_seconds`.
        detection_seconds: See `hangs`.
        router_seconds: Time that the router, which does one thing at a time, is busy with each hop. 0 for none.
        seed: Seed of everything random.

    Raises:
        `ValueError`: if a value is not in its range.
    """

    num_layers: int = 12
    nodes: int = 12
    num_requests: int = 2000
    in_flight: int | None = None
    arrival_rate: float | None = None
    max_queue: int = 256
    service: str = "exponential"
    service_seconds: float = 0.02
    service_spread: float = 1.0
    stragglers: float = 0.0
    straggler_factor: float = 5.0
    latency_seconds: float = 0.002
    latency_spread: float = 0.5
    failure_rate: float = 0.0
    repair_seconds: float = 1.0
    hangs: float = 0.0
    detection_seconds: float = 0.03
    router_seconds: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(
            num_layers=(self.num_layers, 1),
            nodes=(self.nodes, 1),
            num_requests=(self.num_requests, 1),
            max_queue=(self.max_queue, 1),
            seed=(self.seed, 0),
        )
        if self.in_flight is not None:
            check_integers(in_flight=(self.in_flight, 1))
            if self.arrival_rate is not None:
                raise ValueError(
                    f"`in_flight` is {self.in_flight} and `arrival_rate` is {self.arrival_rate}; give one of them: so "
                    "many requests at any time, or so many a second."
                )
        if self.service not in SERVICE_TIMES:
            raise ValueError(f"`service` is {self.service!r}; it must be one of {', '.join(SERVICE_TIMES)}.")
        above_zero = ["service_seconds", "repair_seconds"] + ["arrival_rate"] * (self.arrival_rate is not None)
        for name in above_zero:
            self._check(name, lambda value: value > 0, "a number above 0")
        for name in ("service_spread", "latency_seconds", "latency_spread", "detection_seconds", "router_seconds"):
            self._check(name, lambda value: value >= 0, "a number of at least 0")
        for name in ("failure_rate", "stragglers"):
            self._check(name, lambda value: 0 <= value < 1, "a fraction from 0 to below 1")
        self._check("hangs", lambda value: 0 <= value <= 1, "a fraction from 0 to 1")
        self._check("straggler_factor", lambda value: value >= 1, "a number of at least 1")

    def _check(self, name: str, is_allowed, allowed: str) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not is_allowed(value):
            raise ValueError(f"`{name}` is {value!r}; it must be {allowed}.")


@dataclass(frozen=True)
class Outage:
    """A time in which a node is away.

    Args:
        start, end: Seconds of simulated time.
        hangs: Whether the node stands still and goes on afterwards, instead of losing what it was at.
    """

    start: float
    end: float
    hangs: bool


class SimulatedNodes:
    """What the nodes of a simulation draw.

    Args:
        settings: What to draw from.
    """

    def __init__(self, settings: SimulationSettings):
        self.settings = settings
        self.names = [f"node-{number}" for number in range(settings.nodes)]
        shape = (settings.num_requests, settings.num_layers)
        work = _draw_work(settings, self._generator(0), shape)
        spread = settings.latency_spread
        ways = settings.latency_seconds * np.exp(self._generator(1).normal(-(spread**2) / 2, spread, shape))
        self._work: list[float] = work.ravel().tolist()
        self._ways: list[float] = ways.ravel().tolist()
        num_slow = round(settings.stragglers * settings.nodes)
        slow = set(self._generator(2).permutation(settings.nodes)[:num_slow].tolist())
        self.slowness = {
            name: settings.straggler_factor if number in slow else 1.0 for number, name in enumerate(self.names)
        }

    def _generator(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, *what])

    def seconds(self, request: int, layer_number: int, attempt: int, node: str) -> float:
        """From sending hidden states to a node to their return.

        Args:
            request: Number of the request, from 0.
            layer_number: Which of the layers, from 0.
            attempt: How often the layer was begun for the request before. A second try draws another time.
        """
        # A step that no number of requests and layers divides, so that a further try meets an independent draw
        place = (request * self.settings.num_layers + layer_number + attempt * 1_000_003) % len(self._work)
        return self._work[place] * self.slowness[node] + self._ways[place]

    def expected_seconds(self, node: str) -> float:
        """The mean of `seconds` on a node."""
        return self.settings.service_seconds * self.slowness[node] + self.settings.latency_seconds

    def outages(self, number: int) -> Iterator[Outage]:
        """The times in which a node is away, one after the other, without end. At the start it may be away already."""
        settings = self.settings
        if settings.failure_rate == 0:
            return
        generator = self._generator(3, number)
        lifetime = settings.repair_seconds * (1 - settings.failure_rate) / settings.failure_rate
        now = 0.0
        # In the long run a node is away for this fraction of the time; so is it at the start
        is_away = generator.random() < settings.failure_rate
        while True:
            if not is_away:
                now += generator.exponential(lifetime)
            end = now + generator.exponential(settings.repair_seconds)
            yield Outage(now, end, bool(generator.random() < settings.hangs))
            now, is_away = end, False

    def arrivals(self) -> list[float]:
        """With an arrival rate: when each request comes, in seconds."""
        rate = self.settings.arrival_rate
        if rate is None:
            raise ValueError("`arrival_rate` is None; the load is closed, and no request comes by itself.")
        return np.cumsum(self._generator(4).exponential(1 / rate, self.settings.num_requests)).tolist()


def _draw_work(settings: SimulationSettings, generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Seconds that each layer of each request takes on a node that is no straggler."""
    if settings.service == "constant":
        return np.full(shape, float(settings.service_seconds))
    if settings.service == "exponential":
        return generator.exponential(settings.service_seconds, shape)
    spread = settings.service_spread
    return settings.service_seconds * np.exp(generator.normal(-(spread**2) / 2, spread, shape))
