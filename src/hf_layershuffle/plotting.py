# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what an evaluation found, in one style: sized for a page (3.3 or 6.8 inches wide), readable in grey.

Each function returns a [`matplotlib.figure.Figure`] that pyplot does not know of: it needs no display, and goes when
nothing refers to it any more.
"""

import functools
import os
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .report import PRUNING_METHODS, RobustnessReport


COLUMN_WIDTH, PAGE_WIDTH = 3.3, 6.8  # inches
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8,
    "figure.dpi": 100,
    "figure.titlesize": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 8,
    "grid.alpha": 0.4,
    "grid.linewidth": 0.4,
    "image.cmap": "cividis",
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "hf-layershuffle",
    "xtick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 7,
    "ytick.major.width": 0.6,
}
ACCURACY_LABEL = "accuracy (fraction of images)"
_MARKERS = "osD^vPX*<>"
_LINE_STYLES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_CHANCE = dict(color="0.35", linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
# matplotlib's settings are the process's, so two threads may not draw at once
_STYLE_LOCK = threading.RLock()


def styled(function):
    """Runs `function` with `STYLE` in force and leaves matplotlib's settings as they were."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with _STYLE_LOCK, mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(STYLE)
            result = function(*args, **kwargs)
            if isinstance(result, Figure):
                result.draw_without_rendering()  # ticks are made when first drawn, and must be made in this style
            return result

    return wrapper


@styled
def save_figure(figure: Figure, path_without_suffix) -> list[Path]:
    """Writes the figure as PNG (200 dots an inch) and as SVG, each complete or not at all; the same figure gives the
    same bytes.

    Args:
        path_without_suffix: Path to which `.png` and `.svg` are added; its folder is made if missing.

    Returns:
        The two paths.
    """
    target = Path(path_without_suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    paths = [target.with_name(f"{target.name}.{suffix}") for suffix in ("png", "svg")]
    partials = [path.with_name(f".{path.name}.partial") for path in paths]
    try:
        figure.savefig(partials[0], format="png", metadata={"Software": None})
        figure.savefig(partials[1], format="svg", metadata={"Date": None})
        for partial, path in zip(partials, paths):
            os.replace(partial, path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    return paths


@styled
def plot_accuracy_distribution(
    accuracies: dict[str, Sequence[float]],
    *,
    title: str | None = None,
    xlabel: str = "accuracy",
    point_label: str = "one order",
) -> Figure:
    """Distribution of accuracies, one row a model: every value, a box of median and quartiles, and the mean.

    Args:
        accuracies: By model name; at least one fraction in [0, 1] each.
        point_label: What one value is, for the legend.
    """
    figure, axes = _distribution_figure(accuracies, title, xlabel, point_label)
    _legend_below(figure, axes)
    return figure


@styled
def plot_order_distribution(reports: dict[str, RobustnessReport]) -> Figure:
    """Accuracy over arbitrary execution orders, one row a model, with the sequential order's and chance level."""
    _check_not_empty(reports, "reports")
    accuracies = {name: [score.accuracy for score in each.arbitrary.scores] for name, each in reports.items()}
    figure, axes = _distribution_figure(accuracies, None, ACCURACY_LABEL, "one arbitrary order")
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
    _draw_chance(axes.axvline, reports)
    _legend_below(figure, axes)
    return figure


@styled
def plot_pruning_curves(reports: dict[str, RobustnessReport]) -> Figure:
    """Accuracy against the number of layers that run, one panel a method of choosing them, one line a model.

    Lines are means, bands one standard deviation over orders; evenly spaced layers are one order each, so have no band.
    """
    _check_not_empty(reports, "reports")
    figure = Figure(figsize=(PAGE_WIDTH, 2.5), layout="constrained")
    panels = figure.subplots(1, len(PRUNING_METHODS), sharey=True)
    for axes, (method, description) in zip(panels, PRUNING_METHODS.items()):
        for number, (name, report) in enumerate(reports.items()):
            summaries = [group.accuracy for group in report.pruning[method]]
            kept = np.arange(1, len(summaries) + 1)
            mean = np.array([summary.mean for summary in summaries])
            std = np.array([summary.std for summary in summaries])
            style = _series_style(number, len(reports))
            axes.fill_between(kept, mean - std, mean + std, color=style["color"], alpha=0.18, linewidth=0)
            axes.plot(kept, mean, label=name, **style)
        _draw_chance(axes.axhline, reports)
        axes.set_title(description.replace(", ", ",\n"))
        axes.set_xlabel("layers kept (number)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel(ACCURACY_LABEL)
    panels[0].set_ylim(0, 1.02)
    _legend_below(figure, panels[0])
    return figure


@styled
def plot_layer_ablation(reports: dict[str, RobustnessReport]) -> Figure:
    """Accuracy in sequential order without one layer, and with two neighbouring layers swapped; one line a model.

    The thin line in a model's colour is its accuracy in sequential order with all layers; a model of one layer has only
    that. The scale does not start at 0.
    """
    _check_not_empty(reports, "reports")
    figure = Figure(figsize=(PAGE_WIDTH, 2.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    for number, (name, report) in enumerate(reports.items()):
        style = _series_style(number, len(reports))
        for axes, scores, offset in ((panels[0], report.leave_one_out, 0), (panels[1], report.neighbour_swaps, 0.5)):
            axes.axhline(report.sequential.accuracy, color=style["color"], linewidth=0.6, linestyle=style["linestyle"])
            axes.plot(np.arange(len(scores)) + offset, [score.accuracy for score in scores], label=name, **style)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_title("one layer left out")
    panels[0].set_xlabel("layer left out (index)")
    panels[1].set_title("two neighbours swapped")
    panels[1].set_xlabel("swapped layers (between their indices)")
    panels[0].set_ylabel(ACCURACY_LABEL)
    _legend_below(figure, panels[0])
    return figure


def _distribution_figure(accuracies: dict[str, Sequence[float]], title, xlabel, point_label):
    _check_not_empty(accuracies, "accuracies")
    rows = [np.asarray(values, dtype=float) for values in accuracies.values()]
    for name, values in zip(accuracies, rows):
        if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
            raise ValueError(
                f"The accuracies of '{name}' are {values.tolist()}; pass a non-empty list of finite numbers."
            )
    figure = Figure(figsize=(PAGE_WIDTH, 1.1 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    box = dict(facecolor="0.92", edgecolor="0.45", linewidth=0.7)
    lines = {name: dict(color="0.45", linewidth=0.7) for name in ("whiskerprops", "capprops")}
    axes.boxplot(
        rows,
        positions=np.arange(len(rows)) - 0.12,
        orientation="horizontal",
        widths=0.3,
        showfliers=False,
        patch_artist=True,
        boxprops=box,
        medianprops=dict(color="0.25", linewidth=1.2),
        manage_ticks=False,
        **lines,
    )
    rng = np.random.default_rng(0)  # of the jitter alone, which only keeps the points apart
    colors = _colors(len(rows))
    for row, (values, color) in enumerate(zip(rows, colors)):
        below_box = row + rng.uniform(0.12, 0.36, len(values))
        axes.plot(values, below_box, "o", color=color, alpha=0.7, markersize=3, markeredgewidth=0, zorder=4)
    means = [values.mean() for values in rows]
    axes.plot([], [], "o", color=colors[0], alpha=0.7, markersize=3, markeredgewidth=0, label=point_label)
    mean_style = dict(color="white", markeredgecolor="black", markeredgewidth=0.8, markersize=5)
    axes.plot(means, np.arange(len(rows)) - 0.12, "D", label="mean", zorder=5, **mean_style)
    axes.set_yticks(range(len(rows)), [wrap_name(name) for name in accuracies])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first model on top
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(xlabel)
    if title:
        axes.set_title(title)
    return figure, axes


def wrap_name(name: str, width: int = 26) -> str:
    """A long model name on several lines."""
    return textwrap.fill(name.replace("/", "/ "), width).replace("/ ", "/")


def _check_not_empty(values, name: str) -> None:
    if not values:
        raise ValueError(f"`{name}` is empty; pass at least one model.")


def _colors(number: int) -> list:
    """From dark to light, not to the palest, so that the order is seen in grey and each stands out from white."""
    return [mpl.colormaps["viridis"](value) for value in np.linspace(0.05, 0.8, number)]


def _series_style(number: int, total: int) -> dict:
    return dict(
        color=_colors(total)[number],
        marker=_MARKERS[number % len(_MARKERS)],
        linestyle=_LINE_STYLES[number % len(_LINE_STYLES)],
    )


def _draw_chance(draw_line, reports: dict[str, RobustnessReport]) -> None:
    """One line for each number of classes; the first carries the legend's label."""
    label = "chance"
    for num_classes in sorted({report.num_classes for report in reports.values()}):
        draw_line(1 / num_classes, label=label, **_CHANCE)
        label = None


def _legend_below(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # Where lines are told apart by their style, the legend must show enough of it
    has_lines = any(isinstance(handle, Line2D) and handle.get_linestyle() != "None" for handle in handles)
    figure.legend(
        handles,
        [wrap_name(label, 40) for label in labels],
        loc="outside lower center",
        ncols=min(len(handles), 5),
        handlelength=2.6 if has_lines else 1.2,
    )
