# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What an evaluation of budgets found: accuracy against cost, for every policy and setting."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..checkpoints.record_checks import BudgetRecord, check_record
from ..common.reports import Report
from ..evaluation.statistics import json_values


if TYPE_CHECKING:
    from rich.table import Table


REPORT_FILE = "budget.json"
FORMAT = 1
MULTIPLY_ADDS = "multiply_adds"


def time_cost(batch_size: int | str) -> str:
    """The name of a cost: the time at a batch size."""
    return f"time_at_batch_{batch_size}"


@dataclass(frozen=True)
class BudgetPoint:
    """Accuracy and cost of one setting of a policy.

    Args:
        policy, label: Names of the policy and of its setting.
        accuracy: Fraction in [0, 1] of right answers. Of a random setting, the mean over several passes.
        accuracy_interval: Its 95 % interval over examples (Wilson, 1927).
        accuracy_loss: The accuracy of the whole model on the same examples, minus this one.
        accuracy_loss_interval: Its 95 % interval for paired answers (Agresti and Min, 2005).
        mean_num_layers: Layers that an example runs through, on average. None where the outputs do not say.
        multiply_adds: Multiply-adds an example, on average, counted as they ran.
        seconds: Seconds an example, by batch size. Empty where time was not measured.
        time_ratio: The same as a fraction of the whole model's time, which ran in turns with it.
        chosen: What was chosen on the calibration data, such as a threshold.
        on_front: The costs at which the point is on the Pareto front: nothing else that was measured is cheaper and
            as accurate, or as cheap and more accurate.
    """

    policy: str
    label: str
    accuracy: float
    accuracy_interval: tuple[float, float]
    accuracy_loss: float
    accuracy_loss_interval: tuple[float, float]
    mean_num_layers: float | None
    multiply_adds: float
    seconds: dict[str, float] = field(default_factory=dict)
    time_ratio: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    on_front: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: dict) -> "BudgetPoint":
        """The inverse of `dataclasses.asdict`, of JSON."""
        pairs = {name: tuple(values[name]) for name in ("accuracy_interval", "accuracy_loss_interval")}
        return cls(**{**values, **pairs, "on_front": tuple(values.get("on_front", ()))})

    def cost(self, name: str) -> float | None:
        """Multiply-adds an example, or the time as a fraction of the whole model's; None if it was not measured."""
        if name == MULTIPLY_ADDS:
            return self.multiply_adds
        return self.time_ratio.get(name.removeprefix(time_cost("")))


@dataclass(frozen=True, repr=False)
class BudgetReport(Report):
    """Accuracy against cost for every policy of a model, from [`evaluate_budget`].

    Args:
        model, dataset: Names, for people.
        num_images: Number of images, or texts, that the numbers are of.
        num_chosen_on: Number of the others, which settings were chosen on. 0 if nothing was chosen.
        num_classes, num_layers: Numbers of classes and layers of the model.
        seed: Seed of everything random.
        whole: The model with all its layers, in the order of its configuration.
        points: All settings, by policy in the sequence of the evaluation.
        config: As of [`RobustnessReport`]; also `calibration`, a digest of the data that settings were chosen on.
        environment: As of [`RobustnessReport`], and the number of threads.
        format: Number of the file's format.
    """

    file_name: ClassVar[str] = REPORT_FILE
    kind: ClassVar[str] = "a budget report"

    model: str
    dataset: str
    num_images: int
    num_chosen_on: int
    num_classes: int
    num_layers: int
    seed: int
    whole: BudgetPoint
    points: list[BudgetPoint]
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    format: int = FORMAT

    @property
    def costs(self) -> list[str]:
        """The names of the costs that were measured: "multiply_adds", "time_at_batch_1" and the like."""
        return [MULTIPLY_ADDS, *map(time_cost, self.whole.time_ratio)]

    def by_policy(self) -> dict[str, list[BudgetPoint]]:
        """The points of each policy."""
        found: dict[str, list[BudgetPoint]] = {}
        for point in self.points:
            found.setdefault(point.policy, []).append(point)
        return found

    def front(self, cost: str = MULTIPLY_ADDS) -> list[BudgetPoint]:
        """The Pareto front at a cost, cheapest first.

        Raises:
            `ValueError`: if the cost is none of `costs`.
        """
        if cost not in self.costs:
            raise ValueError(f"`cost` is {cost!r}; this report has {', '.join(self.costs)}.")
        found = [point for point in (self.whole, *self.points) if cost in point.on_front]
        return sorted(found, key=lambda point: point.cost(cost) or 0.0)

    def to_dict(self) -> dict:
        """The report in types of JSON."""
        return json_values(asdict(self))

    @classmethod
    def from_dict(cls, values: dict) -> "BudgetReport":
        """The inverse of `to_dict`.

        Raises:
            `ValueError`: if fields are missing, unknown or of another type, or the format is another.
        """
        found = values.get("format")
        if found != FORMAT or isinstance(found, bool):
            raise ValueError(f"Its format is {found!r}, and this version reads {FORMAT}; evaluate again.")
        values = check_record(values, BudgetRecord, "The file")
        names = {each.name for each in fields(cls)}
        if set(values) != names:
            raise ValueError(f"The fields {sorted(set(values) ^ names)} are missing or unknown.")
        points = [BudgetPoint.from_dict(point) for point in values["points"]]
        return cls(**{**values, "whole": BudgetPoint.from_dict(values["whole"]), "points": points})

    def table(self) -> "Table":
        """The report as a table. `print(report)` shows it too."""
        from rich.table import Table
        from rich.text import Text

        title = f"{self.model} on {self.dataset} ({self.num_images:,} {self.noun}, {self.num_layers} layers)"
        table = Table(title=Text(title, style="table.title"), caption=Text(self._caption, style="table.caption"))
        for name in ("policy", "setting"):
            table.add_column(name, overflow="fold")
        numbers = ["accuracy", "95 % interval", "lost", "layers", f"{_UNIT} multiply-adds"]
        for name in [*numbers, *(f"time at batch {size}" for size in self.whole.time_ratio)]:
            table.add_column(name, justify="right")
        last = None
        for point in (self.whole, *self.points):
            if last not in (None, point.policy):
                table.add_section()
            last = point.policy
            table.add_row(Text(point.policy), Text(point.label), *self._cells(point))
        return table

    @property
    def _caption(self) -> str:
        time = "Time: a fraction of the whole model's. " if self.whole.time_ratio else ""
        star = "*: on the Pareto front of this cost, controls apart"
        return f"lost: accuracy of the whole model minus this one. {time}{star}"

    def _cells(self, point: BudgetPoint) -> list[str]:
        low, high = point.accuracy_interval
        layers = "" if point.mean_num_layers is None else f"{point.mean_num_layers:.2f}"
        shown = {cost: point.cost(cost) for cost in self.costs}
        costs = [
            ("" if value is None else f"{value / 1e6:,.1f}" if cost == MULTIPLY_ADDS else f"{value:.2f}")
            + (" *" if cost in point.on_front else "  ")
            for cost, value in shown.items()
        ]
        lost = "" if point is self.whole else f"{point.accuracy_loss:+.4f}"
        return [f"{point.accuracy:.4f}", f"{low:.4f} – {high:.4f}", lost, layers, *costs]

    def _summary(self) -> str:
        front = ", ".join(f"{point.policy} ({point.label}) {point.accuracy:.4f}" for point in self.front())
        return f"accuracy {self.whole.accuracy:.4f} with all layers; Pareto front of multiply-adds: {front}"


_UNIT = "million"


OTHER_MODELS = "other models"  # the policy that models of other weights are the settings of
# Policies that draw what others choose. They are shown beside these, and stand on no front
CONTROLS = ("exit-halting-drawn", "random-layers", "random-programs", "shuffled-programs", "random-mlps")


def with_fronts(points: Sequence[BudgetPoint], costs: Sequence[str]) -> list[BudgetPoint]:
    """The points, with their `on_front`. Those of controls are on none."""
    able = [index for index, point in enumerate(points) if point.policy not in CONTROLS]
    fronts = {
        cost: {able[index] for index in pareto_front([points[index] for index in able], _cost_of(cost))}
        for cost in costs
    }
    return [
        BudgetPoint(**{**vars(point), "on_front": tuple(cost for cost in costs if index in fronts[cost])})
        for index, point in enumerate(points)
    ]


def _cost_of(name: str) -> Callable[[BudgetPoint], float]:
    def cost(point: BudgetPoint) -> float:
        value = point.cost(name)
        return float("inf") if value is None else value

    return cost


def pareto_front(points: Sequence[BudgetPoint], cost: Callable[[BudgetPoint], float]) -> set[int]:
    """Indices of the points that no other is better than: cheaper and as accurate, or as cheap and more accurate."""
    best = float("-inf")
    front: set[int] = set()
    cheapest: float | None = None
    for index in sorted(range(len(points)), key=lambda each: (cost(points[each]), -points[each].accuracy)):
        point = points[index]
        is_as_good = point.accuracy == best and cost(point) == cheapest
        if point.accuracy > best or is_as_good:
            front.add(index)
            best, cheapest = point.accuracy, cost(point)
    return front
