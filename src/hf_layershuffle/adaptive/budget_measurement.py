# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Measures settings: accuracy, layers run, multiply-adds and time. Keeps what is done for a call that goes on."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..common.files import write_text
from ..common.yaml_files import read_json
from ..layerwise import LayerwiseClassifier, labels_on_device
from ..models.execution_order import ExecutionOrderStream
from .budget_report import BudgetPoint
from .exit_calibration import interval_of_mean
from .measured_cost import counted_multiply_adds, seconds_of_all, spread_batches
from .policies import Policy, Setting


logger = logging.getLogger(__name__)
WHOLE = "all layers"
# Batch sizes at which time is measured: of how many batches, and how often each
TIMED_BATCHES = {1: (16, 9), 64: (2, 7)}
MIN_RANDOM_BATCHES = 32  # draws of a random setting, at least


class FinishedPolicies:
    """The points of the policies that are done, in a file for a call that goes on."""

    def __init__(self, path: str | os.PathLike | None, key: str):
        self.path = None if path is None else Path(path)
        self.key = key
        self.points: dict[str, list[BudgetPoint]] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            saved = read_json(self.path, dict)
            if saved.get("key") == key:
                self.points = {name: list(map(BudgetPoint.from_dict, of)) for name, of in saved["points"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("The evaluation begins anew: '%s' cannot be read (%r).", self.path, error)

    def add(self, name: str, points: list[BudgetPoint]) -> None:
        self.points[name] = points
        if self.path is None:
            return
        content = {"key": self.key, "points": {name: list(map(asdict, each)) for name, each in self.points.items()}}
        try:
            write_text(self.path, json.dumps(content))
        except OSError as error:
            logger.warning("'%s' cannot be written, so a stopped evaluation begins anew: %s", self.path, error)

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass
class BudgetMeasurement:
    """Measures settings on the data to report on."""

    parts: LayerwiseClassifier
    loader: DataLoader
    measures_time: bool
    progress: bool
    seed: int = 0

    def all_points(self, policies: Sequence[Policy], done: FinishedPolicies) -> tuple[BudgetPoint, list[BudgetPoint]]:
        """The whole model's point, and those of all policies."""
        self.whole = Setting("in its own order", self._run_whole)
        measured = self._measured(self.whole, WHOLE)
        self.whole_right = measured[0]
        if WHOLE not in done.points:
            done.add(WHOLE, self._with_time([self.whole], [self._point(WHOLE, self.whole, *measured)]))
        for policy in policies:
            if policy.name not in done.points:
                done.add(policy.name, self._points(policy))
        return done.points[WHOLE][0], [point for policy in policies for point in done.points[policy.name]]

    def _run_whole(self, inputs: dict[str, torch.Tensor]) -> Any:
        return self.parts.model(**inputs)

    def _points(self, policy: Policy) -> list[BudgetPoint]:
        settings = policy.settings()
        names = [f"{policy.name}, {setting.label}" for setting in settings]
        found = [self._measured(setting, name) for setting, name in zip(settings, names)]
        points = [self._point(policy.name, setting, *each) for setting, each in zip(settings, found)]
        return self._with_time(settings, points)

    def _with_time(self, settings: list[Setting], points: list[BudgetPoint]) -> list[BudgetPoint]:
        for size, (num_batches, num_rounds) in TIMED_BATCHES.items() if self.measures_time else ():
            batches = [self._inputs(batch) for batch in spread_batches(self.loader, size, num_batches)]
            runs = [self.whole.run, *(setting.run for setting in settings if setting is not self.whole)]
            whole, *taken = [each / (size * num_batches) for each in seconds_of_all(runs, batches, num_rounds)]
            taken = taken or [whole]
            points = [
                replace(
                    point,
                    seconds=point.seconds | {str(size): seconds},
                    time_ratio=point.time_ratio | {str(size): seconds / whole},
                )
                for point, seconds in zip(points, taken)
            ]
        return points

    def _point(
        self, policy: str, setting: Setting, is_right: np.ndarray, layers: float | None, multiply_adds: float
    ) -> BudgetPoint:
        lost = self.whole_right - is_right
        return BudgetPoint(
            policy=policy,
            label=setting.label,
            accuracy=float(is_right.mean()),
            accuracy_interval=wilson_interval(float(is_right.mean()), len(is_right)),
            accuracy_loss=float(lost.mean()),
            accuracy_loss_interval=interval_of_mean(lost, is_difference=True),
            mean_num_layers=layers,
            multiply_adds=multiply_adds,
            chosen=dict(setting.chosen),
        )

    def _measured(self, setting: Setting, description: str) -> tuple[np.ndarray, float | None, float]:
        """Whether each answer is right, as a fraction of the passes, and the layers and multiply-adds an example."""
        num_passes = -(-MIN_RANDOM_BATCHES // len(self.loader)) if setting.is_random else 1
        if not setting.is_random:  # the first call of a model may do more than later ones, to learn its layers' form
            with self._seeded():
                setting.run(self._inputs(spread_batches(self.loader, 1, 1)[0]))
        with self._seeded():
            return self._measured_in_passes(setting, description, num_passes)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Context in which random orders of models ("arbitrary") are those of the seed, for every setting alike."""
        model: Any = self.parts.model
        kept = model.execution_order_stream
        model.execution_order_stream = ExecutionOrderStream()
        model.execution_order_stream.seek(self.seed)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed)  # of the CPU alone: another's would not come back
                yield
        finally:
            model.execution_order_stream = kept

    def _measured_in_passes(
        self, setting: Setting, description: str, num_passes: int
    ) -> tuple[np.ndarray, float | None, float]:
        right: list[list[torch.Tensor]] = [[] for _ in range(num_passes)]
        layers, multiply_adds, known = 0.0, 0, _KnownCosts(setting)
        with tqdm(
            total=num_passes * len(self.loader), desc=description, unit="batch", disable=not self.progress
        ) as bar:
            for one_pass in right:
                for batch in self.loader:
                    labels = labels_on_device(self.parts, batch["labels"])
                    outputs, cost = known.run(self._inputs(batch))
                    one_pass.append((outputs.logits.argmax(-1) == labels) & ~outputs.logits.isnan().any(-1))
                    layers += _layers_run(outputs, setting, len(labels))
                    multiply_adds += cost
                    bar.update()
        is_right = torch.stack([torch.cat(each) for each in right]).double().mean(0).cpu().numpy()
        count = len(is_right) * num_passes
        return is_right, layers / count if np.isfinite(layers) else None, multiply_adds / count

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.parts.device) for name, value in batch.items() if name != "labels"}


class _KnownCosts:
    """Counts the multiply-adds of a setting's batches: of each where layers are chosen by example, else of one of
    each shape."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.by_shape: dict[tuple, int] = {}

    def run(self, inputs: dict[str, torch.Tensor]) -> tuple[Any, int]:
        shape = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        if shape in self.by_shape:
            return self.setting.run(inputs), self.by_shape[shape]
        outputs, cost = counted_multiply_adds(self.setting.run, inputs)
        if getattr(outputs, "num_layers_run", None) is None:
            self.by_shape[shape] = cost
        return outputs, cost


def _layers_run(outputs: Any, setting: Setting, batch_size: int) -> float:
    """Layers that all examples together ran through; NaN where nothing says it."""
    by_example = getattr(outputs, "num_layers_run", None)
    if by_example is not None:
        return float(by_example.sum())
    order = getattr(outputs, "execution_order", None)
    count = setting.num_layers if order is None else len(order)
    return float("nan") if count is None else float(count * batch_size)


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """95 % interval of a fraction of `count` examples (Wilson, 1927)."""
    z = 1.96
    centre = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (mean * (1 - mean) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
