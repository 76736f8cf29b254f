# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""One style for all pictures: sized for a page (3.3 or 6.8 inches wide), readable in grey."""

import base64
import functools
import io
import os
import textwrap
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..common.files import replaced_file
from ..common.reports import Report


_P = ParamSpec("_P")
_T = TypeVar("_T")

COLUMN_WIDTH = 3.3  # inches
PAGE_WIDTH = 6.8  # inches
STYLE: dict[str, Any] = {
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
    "text.parse_math": False,  # a model's name may hold a dollar sign
    "xtick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 7,
    "ytick.major.width": 0.6,
}
CHANCE: dict[str, Any] = dict(color="0.35", linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
_MARKERS = "osD^vPX*<>"
_LINE_STYLES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
# matplotlib's settings are the process's, so two threads may not draw at once
_STYLE_LOCK = threading.RLock()


def styled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Runs `function` with `STYLE` in force and leaves matplotlib's settings as they were."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _STYLE_LOCK, mpl.rc_context():
            mpl.rcdefaults()
            # The annotation allows the names of settings only
            mpl.rcParams.update(STYLE)  # type: ignore[arg-type]
            result = function(*args, **kwargs)
            if isinstance(result, Figure):
                result.draw_without_rendering()  # ticks are made when first drawn, and must be made in this style
            return result

    return wrapper


@styled
def save_figure(figure: Figure, path_without_suffix: str | os.PathLike) -> list[Path]:
    """Writes the figure as PNG (200 dots an inch) and as SVG, each complete or not at all.

    The same figure gives the same bytes.

    Args:
        figure: The figure to write.
        path_without_suffix: Path to which `.png` and `.svg` are added. Its folder is made if missing.

    Returns:
        The two paths.
    """
    target = Path(path_without_suffix)
    paths = [target.with_name(f"{target.name}.{suffix}") for suffix in ("png", "svg")]
    with replaced_file(paths[0]) as png, replaced_file(paths[1]) as svg:
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return paths


class Pictures(dict[str, Figure]):
    """Figures by name, which a notebook shows one below the other."""

    def save(self, folder: str | os.PathLike) -> None:
        """Writes each figure as `<name>.png` and `<name>.svg` into a folder, which is made if missing."""
        for name, figure in self.items():
            save_figure(figure, Path(folder) / name)

    @styled
    def _repr_html_(self) -> str:
        return "\n".join(
            f'<p><img alt="{name}" width="{figure.bbox.width:.0f}" src="data:image/png;base64,{_png(figure)}"/></p>'
            for name, figure in self.items()
        )

    def __repr__(self) -> str:
        return f"Pictures: {', '.join(self)}"


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def set_title(figure: Figure, what: str, reports: Mapping[str, Report]) -> None:
    """Says above all panels what is shown, of which model and on which dataset.

    Several models are named elsewhere.
    """
    datasets = {f"{report.dataset} ({report.num_images:,} {report.noun})": None for report in reports.values()}
    models = next(iter(reports)) if len(reports) == 1 else f"{len(reports)} models"
    put_title(figure, f"{what}: {models} on {' and '.join(datasets)}")


def put_title(figure: Figure, title: str) -> None:
    """A title above all panels, on as many lines as it takes."""
    letters = round(15 * figure.get_figwidth())
    figure.suptitle(textwrap.fill(title, letters), x=0.01, horizontalalignment="left")


def accuracy_label(reports: Iterable[Report]) -> str:
    """What an axis of accuracies says: of what they are fractions."""
    return f"accuracy (fraction of {' and '.join(dict.fromkeys(report.noun for report in reports))})"


def wrap_name(name: str, width: int = 26) -> str:
    """A long model name on several lines."""
    return textwrap.fill(name.replace("/", "/ "), width).replace("/ ", "/")


def check_not_empty(values: Collection, name: str) -> None:
    """Raises `ValueError` if there is no model to show."""
    if not values:
        raise ValueError(f"`{name}` is empty; pass at least one model.")


def colors_of(number: int, lightest: float = 0.8) -> list:
    """Colours from dark to light.

    They stop before the palest, so that the order is seen in grey and each stands out from white.
    """
    return [mpl.colormaps["viridis"](value) for value in np.linspace(0.05, lightest, number)]


def series_style(number: int, total: int) -> dict[str, Any]:
    """How line `number` of `total` lines is drawn."""
    return dict(
        color=colors_of(total)[number],
        marker=_MARKERS[number % len(_MARKERS)],
        linestyle=_LINE_STYLES[number % len(_LINE_STYLES)],
    )


def legend_below(figure: Figure, axes: Axes, max_columns: int = 5) -> None:
    """Draws the legend of a panel below all panels, in as many columns as the figure is wide enough for."""
    handles, labels = axes.get_legend_handles_labels()
    # Where lines are told apart by their style, the legend must show enough of it
    has_lines = any(isinstance(handle, Line2D) and handle.get_linestyle() != "None" for handle in handles)
    for num_columns in range(min(len(handles), max_columns), 0, -1):  # as many as the figure is wide enough for
        legend = figure.legend(
            handles,
            [wrap_name(label, 46) for label in labels],
            loc="outside lower center",
            ncols=num_columns,
            handlelength=2.6 if has_lines else 1.2,
        )
        if num_columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()
