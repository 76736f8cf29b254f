# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The rules by which requests wait for layers, and go without them."""

from dataclasses import dataclass

from ..common.checks import check_integers, check_seconds


POLICIES = ("free", "strict")


@dataclass(frozen=True)
class Policy:
    """Which layer a request may take next, and when it goes without one.

    Args:
        name: `"free"`: the next free worker among the layers still missing. `"strict"`: one layer after the other, as
            other systems do.
        max_skips: Most layers that may be missing in an answer, whatever the cause. A layer that no worker holds any
            more is skipped at once, when nothing else is left to run.
        skip_after: Seconds that a request waits for busy workers before it skips the layers it still lacks, if
            `max_skips` allows; None to wait as long as they are there.
        deadline: Seconds from acceptance to the answer, which is then given without the layers still missing. With
            more than `max_skips` of them, the request fails. None for no deadline.
        call_timeout: Seconds that a worker has for one layer, before it is suspected and the layer is asked elsewhere.
        hedge: Seconds after which a replica, if one is free, is asked for the same layer; the first result counts.
            None to ask no second worker.
        max_attempts: Times that a layer is tried for one request before it counts as one that no worker holds.
        max_wait: Seconds that a request waits while no worker holds a layer it may not skip, such as for a restart,
            before it fails.
    """

    name: str = "free"
    max_skips: int = 0
    skip_after: float | None = None
    deadline: float | None = None
    call_timeout: float = 30.0
    hedge: float | None = None
    max_attempts: int = 3
    max_wait: float = 30.0

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise ValueError(f"`policy` is {self.name!r}; it must be one of {', '.join(POLICIES)}.")
        check_integers(max_skips=(self.max_skips, 0), max_attempts=(self.max_attempts, 1))
        check_seconds(call_timeout=self.call_timeout, max_wait=self.max_wait)
        for name in ("skip_after", "deadline", "hedge"):
            if getattr(self, name) is not None:
                check_seconds(**{name: getattr(self, name)})
