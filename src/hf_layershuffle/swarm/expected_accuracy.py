# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""How accurate a model is in an execution order that a swarm gave it, by the model's robustness report."""

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..evaluation.report import RobustnessReport
from ..evaluation.statistics import OrderScore


# Copied from the model cards by experiments/build_model_cards.py; the package does not hold these
DIGITS_REPORTS = Path(__file__).with_name("digits_reports")


class ExpectedAccuracy:
    """The accuracy that a report lets expect of an execution order.

    An order that the report holds has its own number there: the sequential one, those with one layer left out, with
    two neighbours swapped, and those that were drawn. Any other has the mean of the orders of its kind with as many
    layers: "random" layers in sequential order, or layers in "arbitrary" order. A report knows nothing between these
    two. Where no layer stands more than one place from its own (neighbours were swapped), the number is interpolated
    between them, by the pairs of layers that are out of order against those of an arbitrary order;
    `share_interpolated` says how often.

    Args:
        report: Of the model.

    Raises:
        `ValueError`: if the report lacks the accuracy with some number of layers.
    """

    def __init__(self, report: RobustnessReport):
        self.model, self.dataset = report.model, report.dataset
        self.num_layers, self.num_images, self.noun = report.num_layers, report.num_images, report.noun
        self.digest = hashlib.sha256(json.dumps(report.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
        self._mean = {method: _means(report, method) for method in ("random", "arbitrary")}
        self._known = {tuple(score.execution_order): score.accuracy for score in _scores(report)}
        self._of = functools.lru_cache(maxsize=None)(self._look_up)

    def of(self, order: Sequence[int]) -> float:
        """Accuracy, a fraction in [0, 1], with these layers in this order.

        Raises:
            `ValueError`: if it is no order of the model's layers, each at most once, or empty.
        """
        return self._of(tuple(order))[0]

    def mean(self, orders: Mapping[tuple[int, ...], int]) -> float:
        """The mean over orders by how often each ran, at least one."""
        return sum(self.of(order) * number for order, number in orders.items()) / sum(orders.values())

    def share_interpolated(self, orders: Mapping[tuple[int, ...], int]) -> float:
        """The fraction in [0, 1] of orders, by how often each ran, of which the report knows only the bounds."""
        return sum(self._of(order)[1] * number for order, number in orders.items()) / sum(orders.values())

    def _look_up(self, order: tuple[int, ...]) -> tuple[float, bool]:
        """The accuracy, and whether it is interpolated."""
        if not order or len(set(order)) < len(order) or not set(order) <= set(range(self.num_layers)):
            raise ValueError(
                f"The execution order is {list(order)}; it must name layers from 0 to {self.num_layers - 1}, at least "
                "one, each at most once."
            )
        if order in self._known:
            return self._known[order], False
        in_sequence = sorted(order)
        random, arbitrary = (self._mean[method][len(order) - 1] for method in ("random", "arbitrary"))
        if list(order) == in_sequence:
            return random, False
        if any(abs(place - in_sequence.index(layer)) > 1 for place, layer in enumerate(order)):
            return arbitrary, False
        swaps = sum(first > second for first, second in itertools.pairwise(order))
        share = min(1.0, swaps / (len(order) * (len(order) - 1) / 4))  # half of all pairs are out of order at random
        return random + share * (arbitrary - random), True


def digits_reports() -> list[RobustnessReport]:
    """The reports that come with the package: of an order-free and of a plain ViT of six layers on digits."""
    return [RobustnessReport.load(DIGITS_REPORTS / f"{kind}.json") for kind in ("free", "plain")]


def _means(report: RobustnessReport, method: str) -> list[float]:
    groups = report.pruning.get(method, [])
    if len(groups) != report.num_layers:
        raise ValueError(
            f"The report of '{report.model}' has the accuracy with {len(groups)} numbers of layers "
            f"({method!r}), not with all {report.num_layers}; evaluate the model again."
        )
    return [group.accuracy.mean for group in groups]


def _scores(report: RobustnessReport) -> list[OrderScore]:
    groups = [report.arbitrary, *(group for groups in report.pruning.values() for group in groups)]
    drawn = [score for group in groups for score in group.scores]
    return [*drawn, report.reversed, *report.neighbour_swaps, *report.leave_one_out, report.sequential]
