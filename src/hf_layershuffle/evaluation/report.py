# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a robustness evaluation found: numbers that can be saved, loaded, read on a terminal and compared."""

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

from ..checkpoints.record_checks import ReportRecord, check_record
from ..common.reports import Report
from .statistics import OrderGroup, OrderScore, PositionPrediction, group_of, json_values, score_of


if TYPE_CHECKING:
    from rich.table import Table


REPORT_FILE = "robustness.json"
# How k layers are chosen: the first k of a random order; or, in sequential order, k random or k evenly spaced ones
PRUNING_METHODS = {"arbitrary": "in arbitrary order", "random": "at random", "evenly_spaced": "evenly spaced"}


@dataclass(frozen=True, repr=False)
class RobustnessReport(Report):
    """What order and missing layers cost a model, from [`evaluate_robustness`].

    Args:
        model, dataset: Names, for people.
        num_images: Number of images, or texts, of the evaluation set.
        num_classes, num_layers: Numbers of classes and layers of the model.
        num_orders: Number of arbitrary orders.
        num_subsets: Number of random subsets for each number of layers.
        seed: Seed that drew the orders and subsets.
        sequential, reversed: Scores in the checkpoint's order and in its reverse.
        arbitrary: Scores in `num_orders` random permutations of all layers.
        pruning: For each of "arbitrary", "random" and "evenly_spaced" (see `PRUNING_METHODS`) a list of groups. Item k
            - 1 is with k layers.
        leave_one_out: Item i is the score in sequential order without layer i. Empty for a model of one layer.
        neighbour_swaps: Item i is the score in sequential order with layers i and i + 1 swapped.
        position_prediction: How well the layers know their position. None without position predictor.
        config: The model's type and its LayerShuffle flags, the positions at which it ran without an MLP
            (`skipped_mlps`), and what else changes its outputs. It also says what the numbers belong to, by digests of
            the weights (`weights`), of the settings of the image processor (`image_processor`) or of the tokenizer
            (`tokenizer`), and of the images or texts and labels (`data`).
        environment: Versions, device, dtype, machine and date (ISO 8601, UTC).
    """

    file_name: ClassVar[str] = REPORT_FILE
    kind: ClassVar[str] = "a robustness report"

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
        """The report in types of JSON, with None for NaN and infinity."""
        return json_values(asdict(self))

    @classmethod
    def from_dict(cls, values: dict) -> "RobustnessReport":
        """The inverse of `to_dict`.

        Raises:
            `ValueError`: if fields are missing, unknown or of another type.
        """
        values = check_record(values, ReportRecord, "The file")
        names = {each.name for each in fields(cls)}
        required = names - {"position_prediction", "config", "environment"}
        if not required <= set(values) <= names:
            wrong = sorted(required - set(values)) or sorted(set(values) - names)
            raise ValueError(f"This is no robustness report: the fields {wrong} are missing or unknown.")
        position = values.get("position_prediction")
        return cls(
            **{
                **values,
                "sequential": score_of(values["sequential"]),
                "reversed": score_of(values["reversed"]),
                "arbitrary": group_of(values["arbitrary"]),
                "pruning": {name: [group_of(item) for item in items] for name, items in values["pruning"].items()},
                "leave_one_out": [score_of(item) for item in values["leave_one_out"]],
                "neighbour_swaps": [score_of(item) for item in values["neighbour_swaps"]],
                "position_prediction": position and PositionPrediction.of(position["correct"], position["total"]),
            }
        )

    def table(self) -> "Table":
        """The report as a table. `print(report)` shows it too."""
        from rich.table import Table
        from rich.text import Text

        # `Text`: brackets in a name are not markup
        title = f"{self.model} on {self.dataset} ({self.num_images:,} {self.noun}, {self.num_layers} layers)"
        skipped = self.config.get("skipped_mlps")
        caption = f"Without the MLPs at the positions {', '.join(map(str, skipped))}" if skipped else None
        table = Table(title=Text(title, style="table.title"), caption=caption)
        table.add_column("execution order")
        for name in ("accuracy", "std", "min", "max", "95 % over orders", "loss"):
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
        rows: dict[str, OrderScore | OrderGroup] = {
            "sequential": self.sequential,
            "reversed": self.reversed,
            "arbitrary": self.arbitrary,
        }
        if self.leave_one_out:
            rows["neighbours swapped"] = OrderGroup.of(self.neighbour_swaps)
            rows["one layer left out"] = OrderGroup.of(self.leave_one_out)
        for k in reversed(pruning_points(self.num_layers)):
            for method, text in PRUNING_METHODS.items():
                rows[f"{k} of {self.num_layers} layers, {text}"] = self.pruning[method][k - 1]
        return rows

    def _summary(self) -> str:
        spread = self.arbitrary.accuracy
        return (
            f"accuracy {self.sequential.accuracy:.4f} in sequential order, {spread.mean:.4f} ± {spread.std:.4f} in "
            f"{self.num_orders} arbitrary orders"
        )


def compare_reports(reports: dict[str, RobustnessReport]) -> "Table":
    """Several models, by name, in one table: accuracies as fractions in [0, 1].

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
    datasets = {(report.dataset, report.num_images, report.noun) for report in reports.values()}
    if len(datasets) != 1:
        found = ", ".join(f"{name} ({count} {noun})" for name, count, noun in sorted(datasets)) or "none"
        raise ValueError(f"The reports to compare must be of one and the same dataset; they are of: {found}.")
    dataset, num_images, noun = datasets.pop()
    table = Table(title=Text(f"Accuracy on {dataset} ({num_images:,} {noun})", style="table.title"))
    table.add_column("execution order")
    for name in reports:
        table.add_column(Text(name), justify="right", overflow="fold")
    rows = [report.rows() for report in reports.values()]
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        table.add_row(name, *("" if value is None else f"{_mean(value):.4f}" for value in values))
        if name == "arbitrary":
            spreads = [report.arbitrary.accuracy for report in reports.values()]
            table.add_row("arbitrary: std", *(f"{spread.std:.4f}" for spread in spreads))
            table.add_row("arbitrary: worst", *(f"{spread.min:.4f}" for spread in spreads))
    return table


def pruning_points(num_layers: int) -> list[int]:
    """The numbers of layers shown in tables: a quarter, a half and three quarters (the paper's 3, 6 and 9 of 12)."""
    return sorted({max(1, round(num_layers * quarter / 4)) for quarter in (1, 2, 3)})


def _mean(row: OrderScore | OrderGroup) -> float:
    return row.accuracy if isinstance(row, OrderScore) else row.accuracy.mean


def _cells(row: OrderScore | OrderGroup) -> list[str]:
    if isinstance(row, OrderScore):
        return [f"{row.accuracy:.4f}", "", "", "", "", f"{row.loss:.4f}"]
    numbers = row.accuracy
    interval = f"{numbers.ci_low:.4f} – {numbers.ci_high:.4f}" if len(row.scores) > 1 else ""
    spread = [f"{value:.4f}" for value in (numbers.std, numbers.min, numbers.max)] if interval else [""] * 3
    return [f"{numbers.mean:.4f}", *spread, interval, f"{row.loss.mean:.4f}"]
