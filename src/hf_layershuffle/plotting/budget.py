# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The picture of a budget report: accuracy against multiply-adds and against time."""

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..adaptive.budget_report import CONTROLS, MULTIPLY_ADDS, OTHER_MODELS, BudgetPoint, BudgetReport
from .style import PAGE_WIDTH, Pictures, accuracy_label, legend_below, set_title, styled


SHOWN_BELOW_BEST = 0.25  # of accuracy; what is lower is not drawn, so that the others can be told apart
_FRONT: dict[str, Any] = dict(color="0.85", linewidth=3.5, solid_capstyle="round", zorder=1)
_WHOLE: dict[str, Any] = dict(
    color="white", marker="*", markeredgecolor="black", markeredgewidth=0.8, markersize=10, linestyle="None", zorder=6,
    clip_on=False,
)  # fmt: skip
_CONTROL, _OTHER = "0.55", "#E69F00"
# By what is chosen, as the names of policies begin: colours that the colour-blind tell apart (Okabe and Ito, 2008)
_COLORS = {
    "exit-halting": "#56B4E9",
    "exit-": "#0072B2",
    "layer-controller": "#009E73",
    "predicted-programs": "#CC79A7",
    "skipped-mlps": "#D55E00",
    OTHER_MODELS: "black",
}
_MARKERS = "osD^vPX<>*ph"
_LINE_STYLES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))


@styled
def plot_budget(report: BudgetReport) -> Figure:
    """Accuracy against multiply-adds and, where it was measured, against time; one line a policy.

    The broad grey line is the Pareto front, thin grey lines are controls. Points whose accuracy is more than 0.25
    below the best one are left out.
    """
    panels = report.costs
    figure = Figure(figsize=(PAGE_WIDTH, 3.1 if len(panels) > 1 else 3.6), layout="constrained")
    all_axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, cost in zip(all_axes, panels):
        draw_budget_panel(axes, report, cost, list(report.by_policy()))
    all_axes[0].set_ylim(*accuracy_limits(report))
    all_axes[0].set_ylabel(accuracy_label([report]))
    set_title(figure, "Accuracy against cost", {report.model: report})
    legend_below(figure, all_axes[0])
    return figure


def draw_budget_panel(axes: Axes, report: BudgetReport, cost: str, policies: list[str]) -> None:
    """Draws accuracy against one cost.

    Args:
        cost: One of the report's `costs`.
        policies: Names of all policies of the figure, which decide how each is drawn.
    """
    styles = _styles(policies)
    front = report.front(cost)
    axes.plot(
        [_x(point, cost) for point in front], [point.accuracy for point in front], label="Pareto front", **_FRONT
    )
    for name, points in report.by_policy().items():
        shown = sorted(points, key=lambda point: _x(point, cost))
        axes.plot(
            [_x(each, cost) for each in shown], [each.accuracy for each in shown], label=name, zorder=3, **styles[name]
        )
    axes.plot([_x(report.whole, cost)], [report.whole.accuracy], label=report.whole.policy, **_WHOLE)
    axes.set_xlim(left=0)
    axes.set_title("multiply-adds" if cost == MULTIPLY_ADDS else f"time, batch of {cost.rpartition('_')[2]}")
    axes.set_xlabel("multiply-adds an example (million)" if cost == MULTIPLY_ADDS else "fraction of all layers' time")


def accuracy_limits(report: BudgetReport) -> tuple[float, float]:
    """The lowest and the highest accuracy that a picture shows."""
    found = [point.accuracy for point in (report.whole, *report.points)]
    best = max(found)
    bottom = max(min(found), best - SHOWN_BELOW_BEST)
    margin = 0.06 * (best - bottom) or 0.01
    return bottom - margin, best + margin


def _styles(policies: list[str]) -> dict[str, dict[str, Any]]:
    """How each policy is drawn: a colour for what is chosen, in it a marker for each way; controls thin and grey."""
    found: dict[str, dict[str, Any]] = {}
    used: Counter[str] = Counter()
    for name in policies:
        kind = next((kind for kind in _COLORS if name.startswith(kind)), "")
        color = _CONTROL if name in CONTROLS else _COLORS.get(kind, _OTHER)
        found[name] = dict(
            color=color,
            marker=_MARKERS[used[color] % len(_MARKERS)],
            linewidth=0.7 if color == _CONTROL else 1.0,
            linestyle=(0, (1, 1.5)) if color == _CONTROL else _LINE_STYLES[used[color] % len(_LINE_STYLES)],
            markersize=3 if color == _CONTROL else 4,
        )
        used[color] += 1
    if OTHER_MODELS in found:  # points that no setting leads through
        found[OTHER_MODELS]["linestyle"] = "None"
    return found


def _x(point: BudgetPoint, cost: str) -> float:
    value = point.cost(cost)
    value = float("nan") if value is None else value
    return value / 1e6 if cost == MULTIPLY_ADDS else value


def budget_pictures(report: BudgetReport) -> Pictures:
    """One picture, `budget`."""
    return Pictures(budget=plot_budget(report))
