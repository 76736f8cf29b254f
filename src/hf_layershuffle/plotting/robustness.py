# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Pictures of robustness reports."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..evaluation.report import RobustnessReport
from .style import (
    CHANCE,
    PAGE_WIDTH,
    Pictures,
    accuracy_label,
    check_not_empty,
    colors_of,
    legend_below,
    put_title,
    series_style,
    set_title,
    styled,
    wrap_name,
)


_PRUNING_TITLES = {
    "arbitrary": "first layers\nof a random order",
    "random": "random layers\nin sequential order",
    "evenly_spaced": "evenly spaced layers\nin sequential order",
}


@styled
def plot_accuracy_distribution(
    accuracies: Mapping[str, Sequence[float]],
    *,
    title: str | None = None,
    xlabel: str = "accuracy",
    point_label: str = "one order",
) -> Figure:
    """Distribution of accuracies, one row a model.

    A row shows every value, a box of median and quartiles with whiskers to the extremes, and the mean.

    Args:
        accuracies: Accuracies by model name. Each model has at least one fraction in [0, 1].
        title, xlabel: Title of the picture and label of its axis.
        point_label: What one value is, for the legend.
    """
    figure, axes = _distribution_figure(accuracies, title, xlabel, point_label)
    legend_below(figure, axes)
    return figure


@styled
def plot_order_distribution(reports: dict[str, RobustnessReport]) -> Figure:
    """Accuracy over arbitrary execution orders, one row a model, with the sequential order's and chance level.

    The scale holds the accuracies; where chance lies outside of it, the legend says its value.
    """
    check_not_empty(reports, "reports")
    accuracies = {name: [score.accuracy for score in each.arbitrary.scores] for name, each in reports.items()}
    figure, axes = _distribution_figure(accuracies, None, accuracy_label(reports.values()), "one arbitrary order")
    axes.plot(
        [report.sequential.accuracy for report in reports.values()],
        np.arange(len(reports)) - 0.12,
        "*",
        color="white",
        markeredgecolor="black",
        markeredgewidth=0.8,
        markersize=8,
        label="sequential order",
        zorder=6,
    )
    low, high = axes.get_xlim()
    _draw_chance(axes, axes.axvline, reports, lowest=low)
    axes.set_xlim(low, high)
    set_title(figure, "Accuracy in arbitrary orders of the layers", reports)
    legend_below(figure, axes)
    return figure


@styled
def plot_pruning_curves(reports: dict[str, RobustnessReport]) -> Figure:
    """Accuracy against the number of layers that run, one panel a method of choosing them, one line a model.

    Lines are means. Bands are one population standard deviation over orders, within [0, 1]. Evenly spaced layers are
    one order each, so they have no band.
    """
    check_not_empty(reports, "reports")
    figure = Figure(figsize=(PAGE_WIDTH, 2.7), layout="constrained")
    panels = figure.subplots(1, len(_PRUNING_TITLES), sharey=True)
    for axes, (method, title) in zip(panels, _PRUNING_TITLES.items()):
        for number, (name, report) in enumerate(reports.items()):
            summaries = [group.accuracy for group in report.pruning[method]]
            kept = np.arange(1, len(summaries) + 1)
            mean = np.array([summary.mean for summary in summaries])
            std = np.array([summary.std for summary in summaries])
            style = series_style(number, len(reports))
            low, high = np.clip(mean - std, 0, 1), np.clip(mean + std, 0, 1)
            axes.fill_between(kept, low, high, color=style["color"], alpha=0.18, linewidth=0)
            axes.plot(kept, mean, label=name, **style)
        axes.fill_between(
            [], [], [], color="0.5", alpha=0.18, linewidth=0, label="band: ± one standard deviation over orders"
        )
        _draw_chance(axes, axes.axhline, reports)
        axes.set_title(title)
        axes.set_xlabel("layers kept (number)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel(accuracy_label(reports.values()))
    panels[0].set_ylim(0, 1.02)
    set_title(figure, "Accuracy with fewer layers", reports)
    legend_below(figure, panels[0])
    return figure


@styled
def plot_layer_ablation(reports: dict[str, RobustnessReport]) -> Figure:
    """Accuracy in sequential order without one layer, and with two neighbouring layers swapped; one line a model.

    The thin line in a model's colour is its accuracy in sequential order with all layers. A model of one layer has
    only that line. The scale does not start at 0.
    """
    check_not_empty(reports, "reports")
    figure = Figure(figsize=(PAGE_WIDTH, 2.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    for number, (name, report) in enumerate(reports.items()):
        style = series_style(number, len(reports))
        for axes, scores, offset in ((panels[0], report.leave_one_out, 0), (panels[1], report.neighbour_swaps, 0.5)):
            axes.axhline(report.sequential.accuracy, color=style["color"], linewidth=0.6, linestyle=style["linestyle"])
            axes.plot(np.arange(len(scores)) + offset, [score.accuracy for score in scores], label=name, **style)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_title("one layer left out")
    panels[0].set_xlabel("layer left out (index)")
    panels[1].set_title("two neighbours swapped")
    panels[1].set_xlabel("swapped layers (between their indices)")
    panels[0].set_ylabel(accuracy_label(reports.values()))
    label = "thin line: all layers, in sequential order"
    panels[0].plot([], [], color="0.3", linewidth=0.6, label=label)
    set_title(figure, "Accuracy with a layer left out, or two swapped", reports)
    legend_below(figure, panels[0])
    return figure


def _distribution_figure(
    accuracies: Mapping[str, Sequence[float]], title: str | None, xlabel: str, point_label: str
) -> tuple[Figure, Axes]:
    check_not_empty(accuracies, "accuracies")
    rows = [np.asarray(values, dtype=float) for values in accuracies.values()]
    for name, values in zip(accuracies, rows):
        if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
            raise ValueError(
                f"The accuracies of '{name}' are {values.tolist()}; pass a non-empty list of finite numbers."
            )
    figure = Figure(figsize=(PAGE_WIDTH, 1.35 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    box = dict(facecolor="0.92", edgecolor="0.45", linewidth=0.7)
    line = dict(color="0.45", linewidth=0.7)
    drawn = axes.boxplot(
        rows,
        positions=np.arange(len(rows)) - 0.12,
        orientation="horizontal",
        widths=0.3,
        whis=(0, 100),
        showfliers=False,
        patch_artist=True,
        boxprops=box,
        medianprops=dict(color="0.25", linewidth=1.2),
        whiskerprops=line,
        capprops=line,
        manage_ticks=False,
    )
    drawn["boxes"][0].set_label("median, quartiles, extremes")
    rng = np.random.default_rng(0)  # of the jitter alone, which only keeps the points apart
    colors = colors_of(len(rows))
    for row, (values, color) in enumerate(zip(rows, colors)):
        below_box = row + rng.uniform(0.12, 0.36, len(values))
        axes.plot(values, below_box, "o", color=color, alpha=0.7, markersize=3, markeredgewidth=0, zorder=4)
    means = [values.mean() for values in rows]
    axes.plot([], [], "o", color=colors[0], alpha=0.7, markersize=3, markeredgewidth=0, label=point_label)
    mean_style: dict[str, Any] = dict(color="white", markeredgecolor="black", markeredgewidth=0.8, markersize=5)
    axes.plot(means, np.arange(len(rows)) - 0.12, "D", label="mean", zorder=5, **mean_style)
    axes.set_yticks(range(len(rows)), [wrap_name(name) for name in accuracies])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first model on top
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(xlabel)
    if title:
        put_title(figure, title)
    return figure, axes


def robustness_pictures(reports: dict[str, RobustnessReport]) -> Pictures:
    """`order_distribution`, `pruning_curves` and `layer_ablation` of models by name."""
    functions = (plot_order_distribution, plot_pruning_curves, plot_layer_ablation)
    return Pictures({draw.__name__.removeprefix("plot_"): draw(reports) for draw in functions})


def save_report_pictures(reports: dict[str, RobustnessReport], folder: str | os.PathLike) -> None:
    """Writes the [`robustness_pictures`] (PNG and SVG) of models by name into a folder."""
    robustness_pictures(reports).save(folder)


def _draw_chance(
    axes: Axes, draw_line: Callable[..., Line2D], reports: dict[str, RobustnessReport], lowest: float = 0.0
) -> None:
    """Draws one line for each number of classes. One that lies below the scale is only named in the legend."""
    for num_classes in sorted({report.num_classes for report in reports.values()}, reverse=True):
        label = f"chance (1/{num_classes})"
        if 1 / num_classes >= lowest:
            draw_line(1 / num_classes, label=label, **CHANCE)
        else:
            axes.plot([], [], label=f"{label}: left of the scale", **CHANCE)
