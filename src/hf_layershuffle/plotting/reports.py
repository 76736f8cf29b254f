# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The pictures of any report."""

from functools import singledispatch
from typing import Any

from ..adaptive.budget_report import BudgetReport
from ..analysis.report import AnalysisReport
from ..common.reports import Report
from ..evaluation.report import RobustnessReport
from ..merging.random_merges import RandomMergeReport
from .analysis import analysis_pictures
from .budget import budget_pictures
from .merges import plot_random_merges
from .robustness import robustness_pictures
from .style import Pictures


@singledispatch
def pictures_of(report: Report, **kwargs: Any) -> Pictures:
    """The pictures of a report by name.

    Args:
        report: A report of robustness, of random merges, of budgets or of an analysis.
        kwargs: For an [`AnalysisReport`], `class_names` for its attention maps, which show numbers otherwise.

    Raises:
        `TypeError`: if no pictures are known of such a report.
    """
    raise TypeError(f"There are no pictures of a {type(report).__name__}.")


@pictures_of.register
def _(report: RobustnessReport) -> Pictures:
    return robustness_pictures({report.model: report})


@pictures_of.register
def _(report: RandomMergeReport) -> Pictures:
    return plot_random_merges([report])


pictures_of.register(AnalysisReport, analysis_pictures)
pictures_of.register(BudgetReport, budget_pictures)
