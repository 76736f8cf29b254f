# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a robustness evaluation found: numbers that can be saved, loaded, read on a terminal and compared."""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import numpy as np

from .common.files import write_text
from .common.yaml_files import read_json
from .record_checks import ReportRecord, check_record
from .report_display import ReportDisplay


REPORT_FILE = "robustness.json"
# How k layers are chosen: the first k of a random order; k random ones, or k evenly spaced ones, in sequential order
PRUNING_METHODS = {"arbitrary": "in arbitrary order", "random": "at random", "evenly_spaced": "evenly spaced"}
_VERSIONS_OF = ("hf-layershuffle", "torch", "transformers", "datasets", "numpy")


@dataclass(frozen=True)
class OrderScore:
    """How well a model does in one execution order.

    Args:
        execution_order: Layer index at each position.
        accuracy: Fraction in [0, 1] of images classified correctly.
        loss: Mean cross-entropy, in nats an image.
        top5_accuracy: Fraction in [0, 1] of images whose class is among the five likeliest; None for up to five classes.
    """

    execution_order: list[int]
    accuracy: float
    loss: float
    top5_accuracy: float | None = None


@dataclass(frozen=True)
class Summary:
    """Of a quantity over execution orders: population standard deviation, and a 95 % bootstrap confidence interval
    (BCa, [`scipy.stats.bootstrap`]) of the mean over orders. Of one order, the interval is that order's value."""

    mean: float
    std: float
    min: float
    max: float
    ci_low: float
    ci_high: float


def summarize(values, seed: int = 0) -> Summary:
    """Summary of at least one value; `seed` draws the bootstrap's 9,999 resamples."""
    values = np.asarray(values, dtype=np.float64)
    low = high = float(values.mean())
    if np.ptp(values) > 0:
        from scipy.stats import bootstrap

        interval = bootstrap((values,), np.mean, rng=np.random.default_rng(seed)).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Summary(
        float(values.mean()), float(values.std()), float(values.min()), float(values.max()), float(low), float(high)
    )


@dataclass(frozen=True)
class OrderGroup:
    """Scores in several execution orders of the same kind, and their summaries."""

    scores: list[OrderScore]
    accuracy: Summary
    loss: Summary
    top5_accuracy: Summary | None = None

    @classmethod
    def of(cls, scores: list[OrderScore], seed: int = 0) -> "OrderGroup":
        """Summarizes at least one score."""
        accuracy, loss = (summarize([getattr(score, name) for score in scores], seed) for name in ("accuracy", "loss"))
        top5 = [score.top5_accuracy for score in scores]
        return cls(list(scores), accuracy, loss, None if None in top5 else summarize(top5, seed))


@dataclass(frozen=True)
class PositionPrediction:
    """How often a layer's head knows the position at which the layer ran, over the report's arbitrary orders; where
    several of them begin alike, their common beginning counts once.

    Args:
        accuracy: Fraction in [0, 1], over all images, orders and positions.
        by_layer, by_position: The same of each layer and of each position; NaN where there was nothing to predict.
        correct, total: Counts, layers × positions.
    """

    accuracy: float
    by_layer: list[float]
    by_position: list[float]
    correct: list[list[int]]
    total: list[list[int]]

    @classmethod
    def of(cls, correct, total) -> "PositionPrediction":
        """From counts of shape `(num_layers, num_layers)`: layers × positions."""
        correct, total = np.asarray(correct), np.asarray(total)
        with np.errstate(invalid="ignore"):
            by_layer, by_position = correct.sum(1) / total.sum(1), correct.sum(0) / total.sum(0)
        return cls(
            float(correct.sum() / total.sum()),
            by_layer.tolist(),
            by_position.tolist(),
            correct.tolist(),
            total.tolist(),
        )


@dataclass(frozen=True, repr=False)
class RobustnessReport(ReportDisplay):
    """What order and missing layers cost a model, from [`evaluate_robustness`].

    Args:
        model, dataset: Names, for people.
        num_images, num_classes, num_layers: Of the evaluation set and the model.
        num_orders, num_subsets, seed: Settings: arbitrary orders; random subsets a size; the seed of both.
        sequential, reversed: Scores in the checkpoint's order and in its reverse.
        arbitrary: Over `num_orders` random permutations of all layers.
        pruning: For each of "arbitrary", "random" and "evenly_spaced" (see `PRUNING_METHODS`) a list of groups; item
            k - 1 is with k layers.
        leave_one_out: Item i is the sequential order without layer i. Empty for a model of one layer.
        neighbour_swaps: Item i is the sequential order with layers i and i + 1 swapped.
        position_prediction: None without position predictor.
        config: The model's type and its LayerShuffle flags, and what the numbers belong to: digests of the weights
            (`weights`), of the settings of the image processor (`image_processor`) and of the images and labels (`data`).
        environment: Versions, device, dtype, machine, date (ISO 8601, UTC).
    """

    model: str
    dataset: str
    num_images: int
    num_classes: int
    num_layers: int
    num_orders: int
    num_subsets: int
    seed: int
    sequential: OrderScore
    reversed: OrderScore
    arbitrary: OrderGroup
    pruning: dict[str, list[OrderGroup]]
    leave_one_out: list[OrderScore]
    neighbour_swaps: list[OrderScore]
    position_prediction: PositionPrediction | None = None
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """JSON types only; NaN and infinity as None."""
        return json_values(asdict(self))

    @classmethod
    def from_dict(cls, values: dict) -> "RobustnessReport":
        """The inverse of `to_dict`.

        Raises:
            `ValueError`: if fields are missing or unknown.
        """
        names = {each.name for each in fields(cls)}
        required = names - {"position_prediction", "config", "environment"}
        if not required <= set(values) <= names:
            wrong = sorted(required - set(values)) or sorted(set(values) - names)
            raise ValueError(f"This is no robustness report: the fields {wrong} are missing or unknown.")
        position = values.get("position_prediction")
        return cls(
            **{
                **values,
                "sequential": _score(values["sequential"]),
                "reversed": _score(values["reversed"]),
                "arbitrary": _group(values["arbitrary"]),
                "pruning": {name: [_group(item) for item in items] for name, items in values["pruning"].items()},
                "leave_one_out": [_score(item) for item in values["leave_one_out"]],
                "neighbour_swaps": [_score(item) for item in values["neighbour_swaps"]],
                "position_prediction": position and PositionPrediction.of(position["correct"], position["total"]),
            }
        )

    def save(self, folder) -> Path:
        """Writes `robustness.json` into `folder`, which is made if missing; returns the file's path."""
        return write_text(Path(folder) / REPORT_FILE, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path) -> "RobustnessReport":
        """Reads a report from its file or from the folder that holds it.

        Raises:
            `OSError`: if there is none.
            `ValueError`: if the file is not a report.
        """
        path = Path(path)
        path = path / REPORT_FILE if path.is_dir() else path
        try:
            return cls.from_dict(check_record(read_json(path, dict), ReportRecord, "The file"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"'{path}' is not a robustness report: {error}") from error

    def push_to_hub(self, repo_id: str, **kwargs):
        """Pushes the report, its pictures and the card that shows them to a model's repository, in one commit.

        Args:
            kwargs: `private`, `revision`, `token` and `commit_message`, as in [`publish`].
        """
        from .publishing import push_report

        return push_report(self, repo_id, **kwargs)

    def table(self):
        """The report as a [`rich.table.Table`]; `print(report)` shows it too."""
        from rich.table import Table
        from rich.text import Text

        # `Text`: brackets in a name are not markup
        title = f"{self.model} on {self.dataset} ({self.num_images:,} images, {self.num_layers} layers)"
        table = Table(title=Text(title, style="table.title"))
        table.add_column("execution order")
        for name in ("accuracy", "std", "min", "max", "95 % interval", "loss"):
            table.add_column(name, justify="right")
        for name, row in self.rows().items():
            table.add_row(name, *_cells(row))
        if self.position_prediction is not None:
            table.add_section()
            chance = f"layers know their position (chance {1 / self.num_layers:.4f})"
            table.add_row(chance, f"{self.position_prediction.accuracy:.4f}", *[""] * 5)
        return table

    def rows(self) -> dict[str, OrderScore | OrderGroup]:
        """What tables and cards show, by what it is: whole models first, then ones with layers missing."""
        rows = {"sequential": self.sequential, "reversed": self.reversed, "arbitrary": self.arbitrary}
        if self.leave_one_out:
            rows["neighbours swapped"] = OrderGroup.of(self.neighbour_swaps)
            rows["one layer left out"] = OrderGroup.of(self.leave_one_out)
        for k in reversed(pruning_points(self.num_layers)):
            for method, text in PRUNING_METHODS.items():
                rows[f"{k} of {self.num_layers} layers, {text}"] = self.pruning[method][k - 1]
        return rows

    def plot(self):
        """Its pictures by name, which a notebook shows: accuracy in arbitrary orders, with fewer layers, and with a layer
        left out. `report.plot().save(folder)` writes them."""
        from .plotting import robustness_pictures

        return robustness_pictures({self.model: self})

    def _summary(self) -> str:
        spread = self.arbitrary.accuracy
        return (
            f"accuracy {self.sequential.accuracy:.4f} in sequential order, {spread.mean:.4f} ± {spread.std:.4f} in "
            f"{self.num_orders} arbitrary orders"
        )


def compare_reports(reports: dict[str, RobustnessReport]):
    """Several models, by name, in one [`rich.table.Table`]: accuracies as fractions in [0, 1].

    Raises:
        `ValueError`: if there is no report, they are of different datasets, or it is no dictionary.
    """
    from rich.table import Table
    from rich.text import Text

    if not isinstance(reports, dict):
        raise ValueError(
            f"`reports` is a {type(reports).__name__}; pass a dictionary of reports by the names to show, such as "
            "{report.model: report}."
        )
    datasets = {(report.dataset, report.num_images) for report in reports.values()}
    if len(datasets) != 1:
        found = ", ".join(f"{name} ({images} images)" for name, images in sorted(datasets)) or "none"
        raise ValueError(f"The reports to compare must be of one and the same dataset; they are of: {found}.")
    dataset, num_images = datasets.pop()
    table = Table(title=Text(f"Accuracy on {dataset} ({num_images:,} images)", style="table.title"))
    table.add_column("execution order")
    for name in reports:
        table.add_column(Text(name), justify="right", overflow="fold")
    rows = [report.rows() for report in reports.values()]
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        table.add_row(name, *("" if value is None else f"{_mean(value):.4f}" for value in values))
        if name == "arbitrary":
            table.add_row("arbitrary: std", *(f"{value.accuracy.std:.4f}" for value in values))
            table.add_row("arbitrary: worst", *(f"{value.accuracy.min:.4f}" for value in values))
    return table


def pruning_points(num_layers: int) -> list[int]:
    """The numbers of layers shown in tables: a quarter, a half and three quarters (the paper's 3, 6 and 9 of 12)."""
    return sorted({max(1, round(num_layers * quarter / 4)) for quarter in (1, 2, 3)})


def describe_environment(model=None) -> dict:
    """Versions of what the numbers depend on, the machine, the date (ISO 8601, UTC), and the model's device and dtype."""
    placement = (
        {} if model is None else {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    )
    return {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _VERSIONS_OF},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **placement,
    }


def _mean(row: OrderScore | OrderGroup) -> float:
    return row.accuracy if isinstance(row, OrderScore) else row.accuracy.mean


def _cells(row: OrderScore | OrderGroup) -> list[str]:
    if isinstance(row, OrderScore):
        return [f"{row.accuracy:.4f}", "", "", "", "", f"{row.loss:.4f}"]
    numbers = row.accuracy
    interval = f"{numbers.ci_low:.4f} – {numbers.ci_high:.4f}" if len(row.scores) > 1 else ""
    spread = [f"{value:.4f}" for value in (numbers.std, numbers.min, numbers.max)] if interval else [""] * 3
    return [f"{numbers.mean:.4f}", *spread, interval, f"{row.loss.mean:.4f}"]


def _group(values: dict) -> OrderGroup:
    top5 = values.get("top5_accuracy")
    return OrderGroup(
        [_score(item) for item in values["scores"]],
        Summary(**values["accuracy"]),
        Summary(**with_nan(values["loss"])),
        top5 and Summary(**top5),
    )


def _score(values: dict) -> OrderScore:
    return OrderScore(**with_nan(values))


def with_nan(values: dict) -> dict:
    """Undoes what [`json_values`] did to a score: JSON has no NaN. None of the top-5 accuracy is None."""
    return {
        name: float("nan") if value is None and name != "top5_accuracy" else value for name, value in values.items()
    }


def json_values(value):
    """JSON types only, with None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: json_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
