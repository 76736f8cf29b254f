# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a swarm shows of itself: its state, its metrics, and what happens in it."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from .events import Events, Listener
from .intake import Intake
from .life import Life
from .membership import Membership
from .metrics import Metrics
from .policy import Policy
from .router import Router


class Observable:
    """Base of a [`Swarm`]."""

    model: Any
    policy: Policy
    name: str
    events: Events
    _router: Router
    _life: Life
    _members: Membership
    _intake: Intake
    _metrics: Metrics

    def status(self) -> dict[str, Any]:
        """The swarm as it is now, in types of JSON.

        `model`, `layers`, `policy`, `closed`, the number of requests `in_flight` and of those of them that are
        `waiting` for a worker, and `workers`: of each `name`, `layers`, `state` ("healthy", "suspect", "starting",
        "dead" or "draining"), `device`, `process_id`, `node`, `busy_with` (`request` and `layer`, or None),
        `num_calls` and `mean_seconds`.
        """
        return {
            "model": self.name,
            "layers": list(self.model.layers),
            "policy": asdict(self.policy),
            "workers": self._members.status(),
            "waiting": self._router.num_waiting,
            "in_flight": self._intake.num_unanswered,
            "closed": self._intake.is_closed,
        }

    def metrics(self) -> dict[str, Any]:
        """Counts of requests, skips, faults and changes of workers, and latencies in seconds, in types of JSON."""
        return self._metrics.to_dict()

    def prometheus(self) -> str:
        """The metrics in the text form of Prometheus.

        Raises:
            `SwarmError`: if prometheus-client is not installed.
        """
        return self._metrics.prometheus()

    def subscribe(self) -> Listener:
        """What happens from now on, as an async iterator of dicts that ends with the swarm.

        Each has a `type`: "accepted", "hop_started", "hop_ended", "skipped", "answered", "failed", "refused" or
        "worker". Who is slow loses the oldest events.
        """
        return self.events.subscribe()

    def _gauges(self) -> dict[str, Any]:
        return {
            "in_flight": self._intake.num_unanswered,
            "waiting": self._router.num_waiting,
            "restarts": self._life.num_restarts,
            "workers": dict(Counter(worker.state for worker in self._life.workers.values())),
        }
