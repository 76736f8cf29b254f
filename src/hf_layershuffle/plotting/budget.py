# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The picture of a budget report: accuracy against multiply-adds and against time."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..adaptive.budget_report import MULTIPLY_ADDS, BudgetPoint, BudgetReport
from .robustness import ACCURACY_LABEL
from .style import PAGE_WIDTH, Pictures, colors_of, legend_below, series_style, set_title, styled


SHOWN_BELOW_BEST = 0.25  # of accuracy; what is lower is not drawn, so that the others can be told apart
_FRONT: dict[str, Any] = dict(color="0.75", linewidth=3.5, solid_capstyle="round", zorder=1)
_WHOLE: dict[str, Any] = dict(
    color="white", marker="*", markeredgecolor="black", markeredgewidth=0.8, markersize=10, linestyle="None", zorder=6
)


@styled
def plot_budget(report: BudgetReport) -> Figure:
    """Accuracy against multiply-adds and, where it was measured, against time; one line a policy.

    The broad grey line is the Pareto front. Points whose accuracy is more than 0.25 below the best one are left out.
    """
    panels = report.costs
    figure = Figure(figsize=(PAGE_WIDTH, 3.1 if len(panels) > 1 else 3.6), layout="constrained")
    all_axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, cost in zip(all_axes, panels):
        draw_budget_panel(axes, report, cost, list(report.by_policy()))
    all_axes[0].set_ylim(*accuracy_limits(report))
    all_axes[0].set_ylabel(ACCURACY_LABEL)
    set_title(figure, "Accuracy against cost", {report.model: report})
    legend_below(figure, all_axes[0])
    return figure


def draw_budget_panel(axes: Axes, report: BudgetReport, cost: str, policies: list[str]) -> None:
    """Draws accuracy against one cost.

    Args:
        cost: One of the report's `costs`.
        policies: Names of policies, in the sequence that decides how each is drawn.
    """
    front = report.front(cost)
    axes.plot(
        [_x(point, cost) for point in front], [point.accuracy for point in front], label="Pareto front", **_FRONT
    )
    for name, points in report.by_policy().items():
        shown = sorted(points, key=lambda point: _x(point, cost))
        style = _style(policies.index(name), len(policies))
        axes.plot([_x(each, cost) for each in shown], [each.accuracy for each in shown], label=name, zorder=3, **style)
    axes.plot([_x(report.whole, cost)], [report.whole.accuracy], label=report.whole.policy, **_WHOLE)
    axes.set_xlim(left=0)
    axes.set_title("multiply-adds" if cost == MULTIPLY_ADDS else f"time, batch of {cost.rpartition('_')[2]}")
    axes.set_xlabel("multiply-adds an example (million)" if cost == MULTIPLY_ADDS else "fraction of all layers' time")


def accuracy_limits(report: BudgetReport) -> tuple[float, float]:
    """The lowest and the highest accuracy that a picture shows."""
    found = [point.accuracy for point in (report.whole, *report.points)]
    best = max(found)
    bottom = max(min(found), best - SHOWN_BELOW_BEST)
    margin = 0.04 * (best - bottom) or 0.01
    return bottom - margin, best + margin


def _style(number: int, total: int) -> dict[str, Any]:
    """Neighbours are dark and light by turns: the policies of one kind, whose points lie together, are neighbours."""
    shade = number // 2 + (number % 2) * -(-total // 2)
    return series_style(number, total) | dict(color=colors_of(total)[shade], linewidth=1.0)


def _x(point: BudgetPoint, cost: str) -> float:
    value = point.cost(cost)
    value = float("nan") if value is None else value
    return value / 1e6 if cost == MULTIPLY_ADDS else value


def budget_pictures(report: BudgetReport) -> Pictures:
    """One picture, `budget`."""
    return Pictures(budget=plot_budget(report))
