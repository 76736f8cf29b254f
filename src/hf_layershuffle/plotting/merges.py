# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The picture of random merges."""

from collections.abc import Sequence
from itertools import count

from ..merging.random_merges import RandomMergeReport
from .robustness import plot_accuracy_distribution
from .style import Pictures


def plot_random_merges(reports: Sequence[RandomMergeReport]) -> Pictures:
    """One picture, `random_merges`, of reports on the same dataset.

    Each report has a row for its sources and one for its merges. Those of a further report of the same name are
    numbered.
    """
    rows: dict[str, list[float]] = {}
    for report in reports:
        for label, values in report.accuracies().items():
            labels = (label if number == 1 else f"{label} ({number})" for number in count(1))
            rows[next(each for each in labels if each not in rows)] = values
    title = f"Random merges on {reports[0].dataset} ({reports[0].num_images:,} {reports[0].noun})"
    return Pictures(random_merges=plot_accuracy_distribution(rows, title=title, point_label="one model"))
