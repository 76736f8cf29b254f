# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Policies against failure rates: runs that go on where they stopped, and what came out."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.environment import describe_environment
from ..common.files import write_text
from ..common.yaml_files import read_json
from ..evaluation.report import RobustnessReport
from .compared_policies import ComparedPolicy, Comparison
from .expected_accuracy import ExpectedAccuracy
from .simulated_nodes import SimulationSettings
from .simulation import SimulationResult


if TYPE_CHECKING:
    from rich.table import Table


REPORT_FILE = "simulation.json"
PROGRESS_FILE = ".simulation.progress.json"
PERCENTILES = (50, 95, 99)
KINDS = ("free", "plain")  # of models


@dataclass(frozen=True)
class SimulatedPoint:
    """A policy at a failure rate.

    Args:
        policy: Its name.
        failure_rate: Fraction in [0, 1) of the time for which a node is away.
        throughput: Answers a second.
        latency: Seconds by percentile, as text: "50", "95", "99". None of one where nothing was answered.
        fraction_answered: In [0, 1], of the requests that were sent.
        mean_layers: Layers that ran for an answer, on average.
        busy: Fraction in [0, 1] of the nodes' time in which they were asked for something.
        hops, lost_hops: Layers that ran, and those that were asked for in vain.
        accuracy: Of the answers, by kind of model ("free", "plain"), a fraction in [0, 1].
        interpolated: Fraction in [0, 1] of the answers, by kind of model, whose execution order lies between orders
            that the report has numbers of; see [`ExpectedAccuracy`].
    """

    policy: str
    failure_rate: float
    throughput: float
    latency: dict[str, float | None]
    fraction_answered: float
    mean_layers: float
    busy: float
    hops: int
    lost_hops: int
    accuracy: dict[str, float] = field(default_factory=dict)
    interpolated: dict[str, float] = field(default_factory=dict)

    def accuracy_of_requests(self, kind: str) -> float | None:
        """Accuracy over all requests, where one without an answer counts as wrong."""
        accuracy = self.accuracy.get(kind)
        return 0.0 if self.fraction_answered == 0 else accuracy and accuracy * self.fraction_answered


@dataclass(frozen=True)
class SimulationReport:
    """What a comparison of policies found, from [`compare_policies`].

    Args:
        settings: Of nodes, load and policies, as given.
        models: What the accuracies are of, by kind of model: its name, dataset, number of images, and a digest
            of its report.
        labels: What each policy is called for people, in the order in which they are shown.
        order_free: Which policies are for an order-free model.
        points: One for each policy and failure rate.
        environment: Versions and date.
    """

    settings: dict[str, Any]
    models: dict[str, dict[str, Any]]
    labels: dict[str, str]
    order_free: dict[str, bool]
    points: list[SimulatedPoint]
    environment: dict[str, Any] = field(default_factory=dict)

    def is_of(self, other: "SimulationReport") -> bool:
        """Whether both are of the same nodes, load, policies, models and versions, so that their points are equal."""
        return self._origin() == other._origin()

    def _origin(self) -> tuple:
        """All that the points depend on. Numpy draws what is random."""
        versions = self.environment.get("versions", {})
        return self.settings, self.models, self.labels, *(versions.get(name) for name in ("hf-layershuffle", "numpy"))

    def curve(self, policy: str) -> list[SimulatedPoint]:
        """A policy's points by failure rate."""
        return sorted((each for each in self.points if each.policy == policy), key=lambda each: each.failure_rate)

    def kind_of(self, policy: str) -> str | None:
        """Which model's accuracy counts for a policy: an order-free one where there is need of it. None without."""
        preferred = "free" if self.order_free[policy] else "plain"
        # An order-free model can do all that a plain one can
        return preferred if preferred in self.models else next(iter({"free"} & set(self.models)), None)

    def table(self) -> "Table":
        """A row for each policy and failure rate."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title(), style="table.title"))
        names = ("policy", "away", "answers/s", *(f"p{each} s" for each in PERCENTILES), "answered", "layers")
        for name in (*names, "accuracy of answers", "of all requests"):
            table.add_column(name, justify="left" if name == "policy" else "right")
        for policy, label in self.labels.items():
            for point in self.curve(policy):
                table.add_row(label, *self._cells(point))
            table.add_section()
        return table

    def title(self) -> str:
        settings = self.settings["nodes"]
        return (
            f"{settings['nodes']:,} nodes, {settings['num_layers']} layers, {settings['num_requests']:,} requests, "
            f"{settings['service']} service times of {1000 * settings['service_seconds']:g} ms"
        )

    def _cells(self, point: SimulatedPoint) -> list[str]:
        kind = self.kind_of(point.policy)
        latencies = [point.latency[str(each)] for each in PERCENTILES]
        accuracies = [point.accuracy.get(kind), point.accuracy_of_requests(kind)] if kind else [None, None]
        return [
            f"{point.failure_rate:.1%}",
            f"{point.throughput:.1f}",
            *("-" if value is None else f"{value:.3f}" for value in latencies),
            f"{point.fraction_answered:.1%}",
            f"{point.mean_layers:.2f}",
            *("-" if value is None else f"{value:.4f}" for value in accuracies),
        ]

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `simulation.json` into `folder`, which is made if missing; returns the file's path."""
        return write_text(Path(folder) / REPORT_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SimulationReport":
        """Reads a report from its file or from the folder that holds it.

        Raises:
            `OSError`: if there is none.
            `ValueError`: if the file is not such a report.
        """
        path = Path(path)
        path = path / REPORT_FILE if path.is_dir() else path
        values = read_json(path, dict)
        try:
            report = cls(**{**values, "points": [SimulatedPoint(**point) for point in values["points"]]})
            report._origin()  # which is compared with others
            return report
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{path}' is not a report of a simulation: {error!r}") from error


def models_of(reports: Sequence[RobustnessReport]) -> dict[str, ExpectedAccuracy]:
    """Reports by kind of model: "free" for one that was trained for any order, "plain" for one that was not.

    Raises:
        `ValueError`: if there are two of a kind, they are of different depths or datasets, or one lacks numbers.
    """
    models: dict[str, ExpectedAccuracy] = {}
    for report in reports:
        kind = "plain" if report.config.get("shuffle_mode", "none") == "none" else "free"
        if kind in models:
            raise ValueError(
                f"The reports of '{models[kind].model}' and '{report.model}' are both of {_NAMES[kind]}; give "
                "one of an order-free model and one of a plain model."
            )
        models[kind] = ExpectedAccuracy(report)
    if len({each.num_layers for each in models.values()}) > 1:
        found = ", ".join(f"'{each.model}' has {each.num_layers} layers" for each in models.values())
        raise ValueError(f"The reports must be of models with as many layers: {found}.")
    if len({(each.dataset, each.num_images, each.noun) for each in models.values()}) > 1:
        found = ", ".join(
            f"'{each.model}' on {each.dataset} ({each.num_images} {each.noun})" for each in models.values()
        )
        raise ValueError(f"The reports must be of one and the same dataset: {found}.")
    return models


_NAMES = {"free": "order-free models", "plain": "plain models"}


def check_comparison(
    settings: SimulationSettings,
    failure_rates: Sequence[float],
    comparison: Comparison,
    reports: Sequence[RobustnessReport],
) -> SimulationReport:
    """The report of a comparison before any point is there. Raises as [`compare_policies`]."""
    models = models_of(reports)
    for model in models.values():
        if model.num_layers != settings.num_layers:
            raise ValueError(
                f"The report of '{model.model}' is of {model.num_layers} layers, and `num_layers` is "
                f"{settings.num_layers}; they must be equal."
            )
    if not failure_rates or len(set(failure_rates)) < len(failure_rates):
        raise ValueError(f"`failure_rates` is {list(failure_rates)}; give at least one, each once.")
    for rate in failure_rates:
        replace(settings, failure_rate=rate)
    policies = comparison.policies(settings.num_layers, settings.nodes)
    about = {
        kind: {"model": model.model, "dataset": model.dataset, "num_images": model.num_images, "digest": model.digest}
        for kind, model in models.items()
    }
    return SimulationReport(
        settings=settings_of(settings, failure_rates, comparison),
        models=about,
        labels={policy.name: policy.label for policy in policies},
        order_free={policy.name: policy.order_free for policy in policies},
        points=[],
        environment=describe_environment(),
    )


def compare_policies(
    settings: SimulationSettings,
    failure_rates: Sequence[float],
    comparison: Comparison | None = None,
    reports: Sequence[RobustnessReport] = (),
    *,
    progress_file: str | os.PathLike | None = None,
    on_point: Callable[[int, int, ComparedPolicy, float], object] | None = None,
) -> SimulationReport:
    """Simulates each policy at each failure rate, on the same nodes with the same requests.

    Args:
        settings: Nodes and load. Its own failure rate does not count.
        failure_rates: Fractions in [0, 1) of the time for which a node is away, each once.
        comparison: The policies. Defaults to `Comparison()`.
        reports: Of an order-free model, of a plain one, or of both. Without one there are no accuracies of its kind.
        progress_file: Where finished points are kept, so that a run with the same arguments goes on after them.
        on_point: Called before each point with its number from 1, their number, the policy and the failure rate.

    Raises:
        `ValueError`: if a rate or a number of nodes, skips or copies is not in its range, or a report is of another
            depth.
    """
    comparison = comparison or Comparison()
    report = check_comparison(settings, failure_rates, comparison, reports)
    models = models_of(reports)
    done = _read_progress(progress_file, report)
    policies = comparison.policies(settings.num_layers, settings.nodes)
    grid = [(policy, rate) for rate in failure_rates for policy in policies]
    for number, (policy, rate) in enumerate(grid, 1):
        if (policy.name, rate) not in done:
            if on_point is not None:
                on_point(number, len(grid), policy, rate)
            result = policy.run(replace(settings, failure_rate=rate))
            done[policy.name, rate] = point_of(policy, rate, result, models)
            _write_progress(progress_file, report, done.values())
        report.points.append(done[policy.name, rate])
    return report


def settings_of(
    settings: SimulationSettings, failure_rates: Sequence[float], comparison: Comparison
) -> dict[str, Any]:
    """All that the points depend on, in types of JSON."""
    nodes = {name: value for name, value in asdict(settings).items() if name != "failure_rate"}
    values = {"nodes": nodes, "failure_rates": list(failure_rates), "comparison": asdict(comparison)}
    return json.loads(json.dumps(values))  # tuples are lists, as they will be when it is read


def point_of(
    policy: ComparedPolicy, failure_rate: float, result: SimulationResult, models: Mapping[str, ExpectedAccuracy]
) -> SimulatedPoint:
    """What a simulation found, with the accuracy that it lets expect of each model."""
    orders = result.orders
    return SimulatedPoint(
        policy=policy.name,
        failure_rate=failure_rate,
        throughput=result.throughput,
        latency={str(percentile): result.latency(percentile) for percentile in PERCENTILES},
        fraction_answered=result.fraction_answered,
        mean_layers=result.mean_layers,
        busy=result.busy,
        hops=result.hops,
        lost_hops=result.lost_hops,
        accuracy={kind: model.mean(orders) for kind, model in models.items() if orders},
        interpolated={kind: model.share_interpolated(orders) for kind, model in models.items() if orders},
    )


def _read_progress(
    path: str | os.PathLike | None, report: SimulationReport
) -> dict[tuple[str, float], SimulatedPoint]:
    """The points of an earlier run with the same arguments; none of a run with others."""
    if path is None or not Path(path).is_file():
        return {}
    try:
        earlier = SimulationReport.load(path)
    except ValueError:
        return {}
    if not earlier.is_of(report):
        return {}
    return {(point.policy, point.failure_rate): point for point in earlier.points}


def _write_progress(
    path: str | os.PathLike | None, report: SimulationReport, points: Iterable[SimulatedPoint]
) -> None:
    if path is not None:
        write_text(path, json.dumps(asdict(replace(report, points=list(points)))) + "\n")
