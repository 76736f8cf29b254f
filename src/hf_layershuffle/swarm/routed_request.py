# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A request on its way from worker to worker."""

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from .answers import DeadlineError, Hop, MissingLayersError, SwarmError
from .decisions import Failed, Finished, Visit


@dataclass(eq=False)
class RoutedRequest:
    """A request on its way. Its hidden states stay with the router, so the death of a worker loses nothing of it.

    Args:
        split: Its part of the model: embedded inputs, calls of layers, classification.
        accepted: Time of the router's clock, in seconds.
        deadline: Seconds from acceptance.
        end: What the scheduler says of its end.
        waits_since: When it began to wait for a worker; infinite while one has it.
        blamed: Visits that may have ended their workers.
    """

    name: str
    split: Any
    hidden_states: torch.Tensor
    accepted: float
    deadline: float | None
    max_skips: int
    end: "asyncio.Future[Finished]"
    hops: list[Hop] = field(default_factory=list)
    blamed: set[Visit] = field(default_factory=set)
    waits_since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.end.add_done_callback(_look_at_error)

    def wait(self) -> None:
        """It waits from now on, if it did not before."""
        self.waits_since = min(self.waits_since, time.monotonic())

    def stop_waiting(self, now: float) -> float:
        """Seconds that it waited for a worker; 0 if one has it already, as when a replica is asked too."""
        waited = max(0.0, now - self.waits_since)
        self.waits_since = math.inf
        return waited

    def release(self) -> None:
        """Gives its tensors back. Visits of it may be known for long after its end."""
        del self.split, self.hidden_states

    def fail(self, error: Exception) -> None:
        if not self.end.done():
            self.end.set_exception(error)

    def give_up(self, reason: str) -> None:
        """Fails, since workers failed in it too often."""
        at = ", ".join(sorted({f"layer {visit.layer} on {visit.worker}" for visit in self.blamed}))
        self.fail(
            SwarmError(
                f"The request '{self.name}' was given up, since workers failed in it {len(self.blamed)} times ({at}), "
                f"at last for this reason: {reason}. Its inputs may be the cause."
            )
        )

    @property
    def order(self) -> list[int]:
        return [hop.layer for hop in self.hops]

    def error_of(self, decision: Failed, num_layers: int) -> MissingLayersError:
        """Why it has no answer."""
        missing = ", ".join(f"{layer} ({reason})" for layer, reason in sorted(decision.missing.items()))
        ran = f"{len(self.hops)} of {num_layers} layers ran, and it may skip {self.max_skips}"
        if decision.deadline:
            return DeadlineError(
                f"The request '{self.name}' came to its deadline of {self.deadline:g} s before it had run layers "
                f"{missing}: {ran}. Give it more time, more skips, or the layers more replicas.",
                sorted(decision.missing),
            )
        return MissingLayersError(
            f"The request '{self.name}' could not run layers {missing}: {ran}. Allow more skips, or give the layers "
            "more replicas.",
            sorted(decision.missing),
        )


def request_of(visit: Visit | Finished | Failed) -> RoutedRequest:
    """The request of a visit or decision: schedulers take anything that has a hash for one."""
    return cast(RoutedRequest, visit.request)


def named(visit: Visit) -> dict[str, Any]:
    """A visit as events tell it."""
    return {
        "request": request_of(visit).name,
        "layer": visit.layer,
        "worker": visit.worker,
        "position": visit.position,
    }


def _look_at_error(end: asyncio.Future) -> None:
    """So that asyncio does not log the error of a request that was cancelled at the same time."""
    if not end.cancelled():
        end.exception()
