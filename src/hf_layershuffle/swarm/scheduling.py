# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Which layer a request takes next, on which worker: decisions only, no clock, no input or output.

The router drives a [`Scheduler`] with real workers, and the simulation with simulated ones.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from .policy import Policy


@dataclass(frozen=True)
class Visit:
    """One layer of one request on one worker.

    Args:
        number: Counts the visits of a scheduler, so each is named by it.
        position: The number of layers that ran for the request before.
        started: Time of the decision, in seconds.
    """

    number: int
    request: Hashable
    worker: str
    layer: int
    position: int
    started: float


@dataclass(frozen=True)
class Start:
    """The visit shall begin: send the request's hidden states to the worker."""

    visit: Visit


@dataclass(frozen=True)
class TimedOut:
    """A visit took longer than `call_timeout`. The request goes on elsewhere; the worker gets nothing until
    `freed`."""

    visit: Visit


@dataclass(frozen=True)
class Finished:
    """A request has run all layers that it can and must.

    Args:
        order: Layers as they ran.
        visits: Of these, with the seconds that each took.
        skipped: Layers that did not run, with the reason.
    """

    request: Hashable
    order: list[int]
    visits: list[tuple[Visit, float]]
    skipped: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A request lacks more layers than it may skip, and no longer waits for them.

    Args:
        missing: Layers that did not run, with the reason.
        deadline: Whether its deadline came, and not the end of its patience.
    """

    request: Hashable
    missing: dict[int, str]
    deadline: bool


Decision = Start | TimedOut | Finished | Failed


class Scheduler:
    """Matches requests that wait with workers that are free.

    Tell it what happens (`accept`, `arrived`, `failed`, `add_worker`, ...), then do what `decide` says; ask again at
    the time that `next_check` says at the latest. Times are seconds of any clock that does not go back.

    Args:
        layers: Those that a request must run, each once; with the strict policy in this order.
        policy: The rules. `deadline` and `max_skips` can be others for a request.
    """

    def __init__(self, layers: Sequence[int], policy: Policy | None = None): ...

    def add_worker(self, worker: str, layers: Collection[int]) -> None:
        """A worker that is free and holds these layers. One that is known gets these layers, and keeps its visit."""

    def remove_worker(self, worker: str, reason: str) -> list[Visit]:
        """A worker that is gone: its visits come back to their requests. Returns these visits."""

    def pause_worker(self, worker: str) -> None:
        """Gives a worker no further visit, as while it is suspected or drains. Its layers still count as there."""

    def resume_worker(self, worker: str) -> None: ...

    def freed(self, worker: str) -> None:
        """A worker ended a call that no longer counts, as after `TimedOut`, and can take another."""

    def accept(
        self, request: Hashable, now: float, deadline: float | None = None, max_skips: int | None = None
    ) -> None: ...

    def cancel(self, request: Hashable) -> None:
        """The request is no longer wanted. Its running visit ends as a late one."""

    def arrived(self, visit: Visit, now: float) -> bool:
        """A visit's result is there, and its worker is free. Returns whether it counts: a late one is to be dropped."""

    def failed(self, visit: Visit, now: float, reason: str) -> bool:
        """A visit gave no usable result, and its worker is free. Returns whether the visit still counted."""

    def decide(self, now: float) -> list[Decision]:
        """What is to be done now, in this order."""

    def next_check(self) -> float | None:
        """When `decide` has to be asked again at the latest, if nothing happens before; None for never."""
