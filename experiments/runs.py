"""The recorded runs: one JSON line each, and those of one method together."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from methods import LABELS, METHODS

from hf_layershuffle import RobustnessReport


def read_records(path) -> list[dict]:
    """All records of the file, none if there is no file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def counted(records: list[dict], split: str = "test") -> list[dict]:
    """The records on a split that the tables are about. A record's `left_out` says why it is not."""
    return [record for record in records if record["split"] == split and "left_out" not in record]


@dataclass
class Group:
    """The runs of one method with the same further training arguments, one a seed."""

    method: str
    train_arguments: str
    runs: list[dict] = field(default_factory=list)
    merges: dict[str, list[float]] = field(default_factory=dict)
    reports: dict[int, RobustnessReport] = field(default_factory=dict)  # by seed

    @property
    def label(self) -> str:
        return LABELS[self.method] + (f" ({self.train_arguments})" if self.train_arguments else "")

    @property
    def images_seen(self) -> int:
        return self.runs[0]["images_seen"]

    @property
    def first_report(self) -> RobustnessReport:
        return next(iter(self.reports.values()))

    def add(self, record: dict) -> None:
        if "merges" in record:
            self.merges = record["merges"]
            return
        if record["seed"] in self.reports:
            raise ValueError(
                f"Two records of {self.label}, seed {record['seed']}, on {record['dataset']}: keep one, or give the "
                "other a field `left_out` that says why it does not count."
            )
        self.runs.append(record)
        self.reports[record["seed"]] = RobustnessReport.from_dict(record["report"])

    def sequential(self) -> dict[int, float]:
        """Accuracy by seed, as in all of the following."""
        return {seed: report.sequential.accuracy for seed, report in self.reports.items()}

    def arbitrary(self) -> dict[int, float]:
        """Mean over the orders of each seed."""
        return {seed: float(np.mean(accuracies)) for seed, accuracies in self.by_order().items()}

    def by_order(self) -> dict[int, list[float]]:
        """Accuracy in each arbitrary order, by seed."""
        return {seed: [score.accuracy for score in report.arbitrary.scores] for seed, report in self.reports.items()}

    def all_orders(self) -> list[float]:
        """Accuracies of all seeds and orders."""
        return [accuracy for accuracies in self.by_order().values() for accuracy in accuracies]

    def spread_over_orders(self) -> float:
        """Population standard deviation over the orders of a seed, mean over seeds."""
        return float(np.mean([np.std(accuracies) for accuracies in self.by_order().values()]))

    def gaps(self) -> list[float]:
        """The worst order below the mean of the same seed's orders, in points."""
        return [100 * (np.mean(accuracies) - min(accuracies)) for accuracies in self.by_order().values()]

    def gap_of_all(self) -> float:
        """The worst order of all seeds below the mean of all, in points."""
        return 100 * (float(np.mean(self.all_orders())) - min(self.all_orders()))

    def pruned(self, kind: str, num_kept: int) -> dict[int, float]:
        """Accuracy with `num_kept` layers, mean over the ways to choose them; nothing for models of no more layers."""
        return {
            seed: float(np.mean([score.accuracy for score in report.pruning[kind][num_kept - 1].scores]))
            for seed, report in self.reports.items()
            if num_kept < report.num_layers
        }

    def position_known(self) -> list[float]:
        return [report.position_prediction.accuracy for report in self.reports.values() if report.position_prediction]


def group_records(records: list[dict]) -> list[Group]:
    """The groups of records of one dataset and split, in the order of `METHODS`, each with at least one run.

    Raises:
        `ValueError`: if two records are of the same run.
    """
    groups = {}
    for method in METHODS:
        for record in records:
            if record["method"] == method:
                key = (method, record["train_arguments"])
                groups.setdefault(key, Group(*key)).add(record)
    return [group for group in groups.values() if group.runs]
