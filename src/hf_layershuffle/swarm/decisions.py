# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a scheduler decides: visits of requests at workers, and how requests end."""

from collections.abc import Hashable
from dataclasses import dataclass, field


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
        visits: Of these, without those that ran before the request came here, with the seconds that each took.
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
