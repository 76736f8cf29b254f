# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The picture of a simulation."""

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..plotting.style import PAGE_WIDTH, Pictures, legend_below, styled
from .simulation_report import SimulatedPoint, SimulationReport


# Okabe and Ito's colours, which are told apart with any kind of colour vision: warm for a plain model, cold for a free one
_WARM = ("#D55E00", "#E69F00", "#9C5A2B")
_COLD = ("#000000", "#56B4E9", "#0072B2", "#009E73", "#005F46")
_PATHS = "#CC79A7"
_MARKERS = "osD^vP"
_DASHED, _DOTTED = (0, (4, 1.5)), (0, (1, 1.2))


@styled
def plot_simulation(report: SimulationReport) -> Pictures:
    """One picture, `simulation`: throughput, latency, answers and accuracy against the time that nodes are away.

    Dashed lines in warm colours are for a plain model, full lines in cold ones for an order-free model.
    """
    figure = Figure(figsize=(PAGE_WIDTH, 5.4), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    styles = _styles(report)
    _draw(panels[0][0], report, styles, lambda point, _: point.throughput)
    panels[0][0].set_title("throughput (answers a second)")
    _draw(panels[0][1], report, styles, lambda point, _: point.fraction_answered)
    panels[0][1].set_title("answered (share of requests)")
    _draw_accuracy(panels[0][2], report, styles)
    for axes, percentile, title in zip(
        panels[1], ("50", "95", "99"), ("median", "95th percentile", "99th percentile")
    ):
        _draw(axes, report, styles, lambda point, _, of=percentile: point.latency[of])
        axes.set_title(f"latency, {title} (seconds)")
        axes.set_xlabel("time that a node is away")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    panels[0][0].set_ylim(bottom=0)
    panels[0][1].yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    figure.suptitle(f"Nodes that fail and come back: {report.title()}", x=0.01, horizontalalignment="left")
    legend_below(figure, panels[0][0], max_columns=3)
    return Pictures(simulation=figure)


def _draw(
    axes: Axes,
    report: SimulationReport,
    styles: dict[str, dict[str, Any]],
    value_of: Callable[[SimulatedPoint, str], float | None],
) -> None:
    for policy, label in report.labels.items():
        model = "order-free" if report.order_free[policy] else "plain"
        curve = [(point.failure_rate, value_of(point, policy)) for point in report.curve(policy)]
        shown = [(rate, value) for rate, value in curve if value is not None]
        if shown:
            axes.plot(*zip(*shown), label=f"{model}: {label}", **styles[policy])


def _draw_accuracy(axes: Axes, report: SimulationReport, styles: dict[str, dict[str, Any]]) -> None:
    if not report.models:
        _draw(axes, report, styles, lambda point, _: point.mean_layers)
        axes.set_title("layers that ran (mean of answers)")
        return

    def accuracy(point: SimulatedPoint, policy: str) -> float | None:
        kind = report.kind_of(policy)
        return None if kind is None else point.accuracy_of_requests(kind)

    _draw(axes, report, styles, accuracy)
    axes.set_title("right answers (share of requests)")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _styles(report: SimulationReport) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    for is_free, colors in ((False, _WARM), (True, _COLD)):
        policies = [policy for policy in report.labels if report.order_free[policy] is is_free]
        for number, policy in enumerate(policies):
            styles[policy] = {
                "color": _PATHS if policy == "skip_pipe" else colors[number % len(colors)],
                "linestyle": _DOTTED if policy == "skip_pipe" else "-" if is_free else _DASHED,
                "marker": "X" if policy == "skip_pipe" else _MARKERS[number % len(_MARKERS)],
                "markersize": 3.5,
            }
    return styles
