# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Counts and latencies of a swarm, as a dict and in the text form of Prometheus."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from .answers import SwarmError
from .events import ROUTER_RESTARTED, TOO_LATE


BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
PREFIX = "layershuffle_swarm"


class Latencies:
    """Seconds, counted in `BUCKETS`."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)  # the last of those that are longer
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, int]]:
        """Number of those that took at most as long, as Prometheus has it."""
        bounds = [*(f"{bound:g}" for bound in BUCKETS), "+Inf"]
        return [(bound, sum(self.counts[: index + 1])) for index, bound in enumerate(bounds)]

    def to_dict(self) -> dict[str, Any]:
        mean = self.sum / self.count if self.count else None
        return {"count": self.count, "sum": self.sum, "mean": mean, "buckets": dict(self.cumulative())}


class Metrics:
    """Keeps count of events.

    Args:
        gauges: Says what is so now, by name: numbers, or numbers by a label's value.
    """

    def __init__(self, gauges: Callable[[], dict[str, Any]] = dict):
        self.gauges = gauges
        self.requests: Counter[str] = Counter({"accepted": 0, "answered": 0})
        self.failed: Counter[str] = Counter()  # by kind
        self.refused: Counter[str] = Counter()  # by kind
        self.skips: Counter[tuple[int, str]] = Counter()  # by layer and cause
        self.faults: Counter[tuple[int, str]] = Counter()  # of workers, by layer and worker
        self.workers: Counter[tuple[str, str]] = Counter()  # changes of state, by worker and state
        self.request_seconds, self.queue_seconds = Latencies(), Latencies()
        self.hop_seconds: dict[int, Latencies] = {}

    def record(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "accepted":
            self.requests["accepted"] += 1
        elif kind == "answered":
            self.requests["answered"] += 1
            self.request_seconds.add(event["seconds"])
        elif kind == "failed":
            self.failed[event["kind"]] += 1
        elif kind == "refused":
            self.refused[event["kind"]] += 1
        elif kind == "hop_started":
            self.queue_seconds.add(event["waited"])
        elif kind == "hop_ended" and event["reason"] is None:
            self.hop_seconds.setdefault(event["layer"], Latencies()).add(event["seconds"])
        elif kind == "hop_ended" and event["reason"] not in (TOO_LATE, ROUTER_RESTARTED):
            self.faults[event["layer"], event["worker"]] += 1
        elif kind == "skipped":
            self.skips[event["layer"], _cause(event["reason"])] += 1
        elif kind == "worker":
            self.workers[event["worker"], event["state"]] += 1

    def to_dict(self) -> dict[str, Any]:
        """All of it in types of JSON. Latencies are in seconds."""
        return {
            **self.requests,
            "failed": dict(self.failed),
            "refused": dict(self.refused),
            "skips": _nested(self.skips),
            "faults": _nested(self.faults),
            "worker_changes": _nested(self.workers),
            "request_seconds": self.request_seconds.to_dict(),
            "queue_seconds": self.queue_seconds.to_dict(),
            "hop_seconds": {str(layer): self.hop_seconds[layer].to_dict() for layer in sorted(self.hop_seconds)},
            **self.gauges(),
        }

    def prometheus(self) -> str:
        """The text that Prometheus reads.

        Raises:
            `SwarmError`: if prometheus-client is not installed.
        """
        try:
            from prometheus_client import CollectorRegistry, generate_latest
        except ImportError:
            raise SwarmError(
                'Metrics in the form of Prometheus need prometheus-client: pip install "hf-layershuffle[swarm]".'
            ) from None
        registry = CollectorRegistry()  # of this swarm alone
        registry.register(_Collector(self))
        return generate_latest(registry).decode()


class _Collector:
    def __init__(self, metrics: Metrics):
        self.metrics = metrics

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        ours = self.metrics
        for name, number in ours.requests.items():
            yield CounterMetricFamily(f"{PREFIX}_requests_{name}", f"Requests {name}", value=number)
        counters: tuple[tuple[str, str, list[str], Counter], ...] = (
            ("requests_failed", "Requests that ended without an answer", ["kind"], ours.failed),
            ("requests_refused", "Requests that were not accepted", ["kind"], ours.refused),
            ("skips", "Layers that did not run for a request", ["layer", "cause"], ours.skips),
            ("faults", "Calls that failed or took longer than call_timeout", ["layer", "worker"], ours.faults),
            ("worker_changes", "Changes of the state of workers", ["worker", "state"], ours.workers),
        )
        for name, help_text, labels, counter in counters:
            family = CounterMetricFamily(f"{PREFIX}_{name}", help_text, labels=labels)
            for key, number in counter.items():
                family.add_metric([str(part) for part in (key if isinstance(key, tuple) else (key,))], number)
            yield family
        latencies: tuple[tuple[str, str, Latencies], ...] = (
            ("request_seconds", "From acceptance to the answer", ours.request_seconds),
            ("queue_seconds", "Waiting for a free worker, for each layer", ours.queue_seconds),
        )
        for name, help_text, each in latencies:
            yield HistogramMetricFamily(f"{PREFIX}_{name}", help_text, each.cumulative(), each.sum)
        what = "From sending hidden states to their return"
        hops = HistogramMetricFamily(f"{PREFIX}_hop_seconds", what, labels=["layer"])
        for layer, each in ours.hop_seconds.items():
            hops.add_metric([str(layer)], each.cumulative(), each.sum)
        yield hops
        for name, value in ours.gauges().items():
            labels = ["state"] * isinstance(value, dict)
            gauge = GaugeMetricFamily(f"{PREFIX}_{name}", name.replace("_", " "), labels=labels)
            for label, number in value.items() if isinstance(value, dict) else [(None, value)]:
                gauge.add_metric([] if label is None else [label], number)
            yield gauge


def _cause(reason: str) -> str:
    """The kind of a skip's reason: reasons name workers, and a label of Prometheus should take few values."""
    kinds = {"the deadline": "deadline", "no worker was free": "busy", "tried": "failed"}
    return next((kind for start, kind in kinds.items() if reason.startswith(start)), "lost")


def _nested(counter: Counter) -> dict[str, dict[str, int]]:
    """Counts by two keys as a dict of dicts."""
    nested: dict[str, dict[str, int]] = {}
    for (first, second), number in counter.items():
        nested.setdefault(str(first), {})[second] = number
    return nested
