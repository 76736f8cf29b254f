# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what the layers of a model do at each position."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from ..analysis.attention import AttentionMaps
from ..analysis.contributions import PARTS
from ..analysis.embedding import Embedding
from ..analysis.report import AnalysisReport
from .style import (
    CHANCE,
    COLUMN_WIDTH,
    PAGE_WIDTH,
    Pictures,
    check_not_empty,
    colors_of,
    legend_below,
    series_style,
    set_title,
    styled,
)


POSITION_LABEL = "position (layers run before)"
_MAP_TITLES = {
    "update_norm": "update relative to the stream, ‖f(x) − x‖ / ‖x‖",
    "update_size": "size of the update, ‖f(x) − x‖",
    "cosine": "cosine of the update and the stream",
    "logit_change": "change of the true-class logit",
}
_PART_LABELS = {"update": "whole layer", "attention": "attention", "mlp": "MLP", "depth": "depth projection"}
_SEQUENTIAL: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 0.9, "markerfacecolor": "white"}
_MAX_TICKS = 12
# Share of the map that is laid over an image. The image is faded to greys about the middle, so that it hardly changes
# the shade
_MAP_SHARE = 0.75


@styled
def plot_layer_position_maps(report: AnalysisReport, quantities: Sequence[str] = tuple(_MAP_TITLES)) -> Figure:
    """Mean of some of the `QUANTITIES` by layer and position over random orders.

    Negative values are marked by a dash.
    """
    rows = -(-len(quantities) // 2)
    figure = Figure(figsize=(PAGE_WIDTH, 2.75 * rows + 0.2), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    for axes, quantity in zip(panels.flat, quantities):
        values = report.contributions.mean[quantity]
        image = _draw_matrix(axes, values, figure)
        _mark_negative(axes, image, values)
        axes.set_title(_MAP_TITLES.get(quantity, quantity.replace("_", " ")))
        axes.set_xlabel(POSITION_LABEL)
        axes.set_ylabel("layer (index)")
    for axes in panels.flat[len(quantities) :]:
        axes.set_axis_off()
    set_title(figure, "Layers by position, over random orders (a dash: below 0)", _named(report))
    return figure


@styled
def plot_updates_by_position(report: AnalysisReport) -> Figure:
    """Updates by position, of whole layers and of their parts.

    Lines are means over random orders, with a band of one population standard deviation over layers (not below 0).
    Dashed lines are the sequential order.
    """
    found = report.contributions
    figure = Figure(figsize=(PAGE_WIDTH, 2.8), layout="constrained")
    panels = figure.subplots(1, 2)
    names = [name for name in PARTS if f"{name}_norm" in found.mean]
    positions = np.arange(report.num_layers)
    for axes, kind in zip(panels, ("norm", "size")):
        for number, name in enumerate(names):
            style = series_style(number, len(names)) | {"linestyle": "-"}
            mean, std = found.by_position(f"{name}_{kind}"), found.mean[f"{name}_{kind}"].std(axis=0)
            low = np.clip(mean - std, 0, None)
            axes.fill_between(positions, low, mean + std, color=style["color"], alpha=0.15, linewidth=0)
            axes.plot(positions, mean, label=_PART_LABELS[name], **style)
            axes.plot(positions, found.sequential_mean[f"{name}_{kind}"], **style | _SEQUENTIAL)
        axes.plot([], [], color="0.3", marker="o", **_SEQUENTIAL, label="in sequential order")
        band = "band: ± one standard deviation over layers"
        axes.fill_between([], [], [], color="0.5", alpha=0.15, linewidth=0, label=band)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(POSITION_LABEL)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("‖part‖ / ‖x‖ (no unit)")
    panels[0].set_title("relative to the residual stream")
    panels[1].set_ylabel("‖part‖ (units of the stream)")
    panels[1].set_title("size")
    set_title(figure, "What layers add, by position, over random orders", _named(report))
    legend_below(figure, panels[0])
    return figure


@styled
def plot_position_probe(reports: dict[str, AnalysisReport]) -> Figure:
    """Accuracy with which a linear probe reads the position from each layer's output, one line a model.

    The bars are the standard deviation over folds.
    """
    check_not_empty(reports, "reports")
    figure = Figure(figsize=(COLUMN_WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    for chance in sorted({report.probe.chance for report in reports.values()}):
        axes.axhline(chance, label=f"chance ({chance:.3g})", **CHANCE)
    for number, (name, report) in enumerate(reports.items()):
        probe = report.probe
        style = series_style(number, len(reports))
        accuracy, std = np.asarray(probe.accuracy), np.asarray(probe.std)
        bars = [np.minimum(std, accuracy), np.minimum(std, 1 - accuracy)]  # within [0, 1]
        axes.errorbar(np.arange(len(accuracy)), accuracy, bars, label=name, capsize=2, elinewidth=0.7, **style)
    axes.plot([], [], "|", color="0.3", label="bars: ± one standard deviation over folds")
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("layer (index)")
    axes.set_ylabel("position read (fraction)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    set_title(figure, "Position read from outputs", reports)
    legend_below(figure, axes, max_columns=2)
    return figure


@styled
def plot_output_similarity(report: AnalysisReport) -> Figure:
    """CKA between the outputs of all (layer, position) pairs in different orders, sorted by layer and by position."""
    num_layers = report.num_layers
    by_position = np.arange(num_layers**2).reshape(num_layers, num_layers).T.ravel()
    figure = Figure(figsize=(PAGE_WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    matrix = report.similarity.matrix
    for axes, order, outer, inner in (
        (panels[0], slice(None), "layer (index)", "position"),
        (panels[1], by_position, "position (layers run before)", "layer"),
    ):
        image = axes.imshow(matrix[order][:, order], vmin=min(0, matrix.min()), vmax=1, interpolation="nearest")
        for edge in np.arange(1, num_layers) * num_layers - 0.5:
            axes.axhline(edge, color="white", linewidth=0.4)
            axes.axvline(edge, color="white", linewidth=0.4)
        shown = _shown_ticks(num_layers)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(shown * num_layers + (num_layers - 1) / 2, shown)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(f"by {outer.split()[0]}, within it by {inner}")
        axes.set_xlabel(outer)
        axes.set_ylabel(outer)
    figure.colorbar(image, ax=panels, label="linear CKA (no unit)", shrink=0.8, pad=0.01)
    set_title(figure, "How alike outputs are in different orders", _named(report))
    return figure


@styled
def plot_embedding(report: AnalysisReport) -> Figure:
    """CLS tokens after all layers in two dimensions, in shades of the layer and in shades of the position."""
    embedding = report.embedding
    figure = Figure(figsize=(PAGE_WIDTH, 3.1), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    # Points drawn later hide earlier ones: a fixed random order favours no layer
    order = np.random.default_rng(0).permutation(len(embedding.points))
    points = embedding.points[order]
    boundaries = np.arange(report.num_layers + 1) - 0.5
    palette = mpl.colors.ListedColormap(colors_of(report.num_layers, lightest=0.93))
    norm = mpl.colors.BoundaryNorm(boundaries, report.num_layers)
    for axes, values, name in zip(panels, (embedding.layer, embedding.position), ("layer (index)", POSITION_LABEL)):
        drawn = axes.scatter(
            *points.T, c=values[order], cmap=palette, norm=norm, s=5, linewidths=0, rasterized=True, zorder=2
        )
        shown = _shown_ticks(report.num_layers)
        figure.colorbar(drawn, ax=axes, label=name, ticks=shown, pad=0.02).minorticks_off()
        axes.set_xlabel(_axis_name(embedding, 0))
        axes.set_title(f"by {name.split()[0]}")
    panels[0].set_ylabel(_axis_name(embedding, 1))
    set_title(figure, "CLS tokens after each layer", _named(report))
    return figure


@styled
def plot_attention_maps(report: AnalysisReport | AttentionMaps, class_names: Sequence[str] | None = None) -> Figure:
    """Attention rollout over each image, one row an image, one column an execution order, with the predicted class.

    Images are those of a fresh analysis; one that was loaded from a file has none, and the maps are shown alone. Only
    a whole report says of which model and on which dataset.
    """
    attention = report.attention if isinstance(report, AnalysisReport) else report
    if attention is None:
        raise ValueError("The analysis is of texts, and attention maps are of images.")
    num_images, num_orders = attention.maps.shape[:2]
    num_columns = num_orders + (attention.images is not None)
    figure = Figure(
        figsize=(PAGE_WIDTH, 0.75 + num_images * (PAGE_WIDTH - 0.8) / num_columns * 1.12), layout="constrained"
    )
    panels = figure.subplots(num_images, num_columns, squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    norm = mpl.colors.Normalize(0, attention.maps.max())
    for row in range(num_images):
        cells = iter(panels[row])
        picture = None
        if attention.images is not None:
            axes = next(cells)
            picture = attention.images[row]
            axes.imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
            axes.set_title("image" if row == 0 else "")
            if attention.labels is not None:
                axes.set_xlabel(f"class {_class_name(attention.labels[row], class_names)}")
        for column, axes in enumerate(cells):
            axes.imshow(_overlay(norm(attention.maps[row, column]), picture), interpolation="nearest")
            predicted = attention.predicted[row, column]
            is_wrong = attention.labels is not None and predicted != attention.labels[row]
            axes.set_xlabel(f"predicted {_class_name(predicted, class_names)}{' (wrong)' if is_wrong else ''}")
            if row == 0:
                axes.set_title(_order_name(attention.execution_orders[column]))
    shades = mpl.colors.ListedColormap(_overlay(np.linspace(0, 1, 256)[None])[0])
    figure.colorbar(
        mpl.cm.ScalarMappable(norm, shades), ax=panels, label="reaches CLS (fraction)", shrink=0.7, pad=0.01
    )
    if isinstance(report, AnalysisReport):
        set_title(figure, "Attention (rollout)", _named(report))
    return figure


def analysis_pictures(report: AnalysisReport, class_names: Sequence[str] | None = None) -> Pictures:
    """All pictures of an analysis, by name."""
    attention = {} if report.attention is None else {"attention_maps": plot_attention_maps(report, class_names)}
    return Pictures(
        layer_position_maps=plot_layer_position_maps(report),
        updates_by_position=plot_updates_by_position(report),
        position_probe=plot_position_probe(_named(report)),
        output_similarity=plot_output_similarity(report),
        embedding=plot_embedding(report),
        **attention,
    )


def _overlay(shares: np.ndarray, picture: np.ndarray | None = None) -> np.ndarray:
    """Colours of a map of values in [0, 1], of shape `(height, width, 3)`.

    The map lies over a picture in [0, 1], or over a middle grey.
    """
    if picture is None:
        greys = np.full((*shares.shape, 1), 0.5)
    else:
        height, width = picture.shape[:2]
        rows, columns = (np.arange(size) * cells // size for size, cells in zip((height, width), shares.shape))
        shares = shares[rows[:, None], columns]
        greys = 0.2 + 0.6 * picture.mean(-1, keepdims=True)
    return _MAP_SHARE * mpl.colormaps["cividis"](shares)[..., :3] + (1 - _MAP_SHARE) * greys


def _draw_matrix(axes: Axes, values: np.ndarray, figure: Figure) -> AxesImage:
    """Draws layers × positions, each cell a square, with a colour bar."""
    image = axes.imshow(values, interpolation="nearest")
    shown = _shown_ticks(len(values))
    axes.set_xticks(shown)
    axes.set_yticks(shown)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, pad=0.02)
    return image


def _named(report: AnalysisReport) -> dict[str, AnalysisReport]:
    return {report.model: report}


def _mark_negative(axes: Axes, image: AxesImage, values: np.ndarray) -> None:
    for layer, position in np.argwhere(values < 0):
        lightness = float(np.asarray(image.norm(values[layer, position])))
        axes.plot(
            position, layer, "_", color="white" if lightness < 0.5 else "black", markersize=5, markeredgewidth=0.9
        )


def _shown_ticks(number: int) -> np.ndarray:
    """Indices to be labelled: all, or every second, third, ... of many."""
    return np.arange(0, number, -(-number // _MAX_TICKS))


def _axis_name(embedding: Embedding, axis: int) -> str:
    if embedding.explained_variance is None:
        return f"{embedding.method.upper()} dimension {axis + 1} (no unit)"
    return f"principal component {axis + 1} ({embedding.explained_variance[axis]:.0%} of variance)"


def _order_name(order: list[int]) -> str:
    sequential = list(range(len(order)))
    if order in (sequential, sequential[::-1]):
        return "sequential order" if order == sequential else "reversed order"
    return textwrap.fill(" ".join(map(str, order)), 22)


def _class_name(label: int, class_names: Sequence[str] | None) -> str:
    return textwrap.shorten(str(class_names[label] if class_names else label), 18, placeholder="…")
