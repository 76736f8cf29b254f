# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The picture of a simulation."""

import textwrap
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..plotting.style import PAGE_WIDTH, Pictures, legend_below, styled
from .simulation_report import SimulatedPoint, SimulationReport


# Okabe and Ito's colours, told apart with any kind of colour vision: warm for a plain model, cold for a free one
_WARM = ("#D55E00", "#E69F00", "#9C5A2B")
_COLD = ("#000000", "#56B4E9", "#0072B2", "#009E73", "#005F46")
_MARKERS = "osD^vP"
_OF_PATHS: dict[str, Any] = {"color": "#CC79A7", "linestyle": (0, (1, 1.2)), "marker": "X"}
_DASHED = (0, (4, 1.5))
_PERCENTILES = {"50": "half of the answers come within", "95": "95% of the answers come within"}


@styled
def plot_simulation(report: SimulationReport) -> Pictures:
    """One picture, `simulation`: throughput, accuracy and latency against the time that nodes are away.

    Dashed lines in warm colours are for a plain model, full lines in cold ones for an order-free model. A request
    without an answer counts as a wrong one. Without a report of a model, the number of layers that ran stands where
    the accuracy would.
    """
    figure = Figure(figsize=(PAGE_WIDTH, 6.0), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    _draw(panels[0][0], report, lambda point: point.throughput)
    panels[0][0].set_title("answers a second")
    _draw_accuracy(panels[0][1], report)
    for axes, (percentile, name) in zip(panels[1], _PERCENTILES.items()):
        _draw(axes, report, lambda point, of=percentile: point.latency[of])  # type: ignore[misc]
        axes.set_title(f"{name} (seconds)")
        axes.set_xlabel("time that each node is away")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    panels[0][0].set_ylim(bottom=0)
    figure.suptitle(_title(report), x=0.01, horizontalalignment="left")
    legend_below(figure, panels[0][0], max_columns=3)
    return Pictures(simulation=figure)


def _draw(axes: Axes, report: SimulationReport, value_of: Callable[[SimulatedPoint], float | None]) -> None:
    styles = _styles(report)
    for policy, label in report.labels.items():
        curve = [(point.failure_rate, value_of(point)) for point in report.curve(policy)]
        shown = [(rate, value) for rate, value in curve if value is not None]
        rates, values = [rate for rate, _ in shown], [value for _, value in shown]
        kind = "order-free" if report.order_free[policy] else "plain"
        axes.plot(rates, values, label=f"{kind}: {label}", markersize=3.5, **styles[policy])


def _draw_accuracy(axes: Axes, report: SimulationReport) -> None:
    if not report.models:
        _draw(axes, report, lambda point: point.mean_layers)
        axes.set_title("layers that ran, of answers")
        return

    def accuracy(point: SimulatedPoint) -> float | None:
        kind = report.kind_of(point.policy)
        return None if kind is None else point.accuracy_of_requests(kind)

    _draw(axes, report, accuracy)
    axes.set_title("requests answered correctly")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _title(report: SimulationReport) -> str:
    rules = report.settings["comparison"]["rules"]
    nodes = report.settings["nodes"]
    deadline = "" if rules["deadline"] is None else f"; deadline {rules['deadline']:g} s"
    away = f"; a node comes back after {nodes['repair_seconds']:g} s on average"
    models = " and ".join(each["model"] for each in report.models.values())
    dataset = next((f" on {each['dataset']}" for each in report.models.values()), "")
    accuracy = f"; accuracy by the report of {models}{dataset}" if models else ""
    details = f"Simulated: {report.title()}{away}{deadline}{accuracy}"
    return "\n".join(textwrap.fill(text, 98) for text in (_finding(report), details))


def _finding(report: SimulationReport) -> str:
    """What the picture says, in its own numbers: strict order against the most skips in free order."""
    rate = max(report.settings["failure_rates"])
    most_skips = max(report.settings["comparison"]["skips"], default=None)
    found = []
    for policy in ("strict", "free" if most_skips is None else f"free_{most_skips}_skips"):
        point, kind = report.curve(policy)[-1], report.kind_of(policy)
        if kind is None:
            return "Layers on nodes that fail and come back"
        found.append(f"{report.labels[policy]} {point.accuracy_of_requests(kind):.0%}")
    return f"Nodes away {rate:.0%} of the time, answered correctly: {found[0]}; {found[1]}"


def _styles(report: SimulationReport) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    for is_free, colors in ((False, _WARM), (True, _COLD)):
        policies = [name for name in report.labels if report.order_free[name] is is_free and name != "skip_pipe"]
        for number, policy in enumerate(policies):
            styles[policy] = {
                "color": colors[number % len(colors)],
                "linestyle": "-" if is_free else _DASHED,
                "marker": _MARKERS[number % len(_MARKERS)],
            }
    return styles | {"skip_pipe": _OF_PATHS}
