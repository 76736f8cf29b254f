# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The picture of random merges."""

from collections.abc import Sequence

from ..merging.random_merges import RandomMergeReport
from .robustness import plot_accuracy_distribution
from .style import Pictures


def plot_random_merges(reports: Sequence[RandomMergeReport]) -> Pictures:
    """One picture, `random_merges`, of reports on the same dataset.

    Each report has a row for its sources and one for its merges.
    """
    rows = {label: values for report in reports for label, values in report.accuracies().items()}
    title = f"Random merges on {reports[0].dataset} ({reports[0].num_images:,} images)"
    return Pictures(random_merges=plot_accuracy_distribution(rows, title=title, point_label="one model"))
