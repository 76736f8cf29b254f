# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a card says of running fewer layers: the table of a budget, and the rule of the configuration."""

from dataclasses import replace
from types import SimpleNamespace

from ..adaptive.budget_report import OTHER_MODELS, BudgetReport
from ..common.markdown import escape
from ..common.tables import markdown_table


def budget_table(budget: BudgetReport) -> str:
    """The table of a budget, of what is on a front, and of other models; its names may be somebody else's."""
    shown = [point for point in budget.points if point.on_front or point.policy == OTHER_MODELS]
    whole, *points = (
        replace(point, policy=escape(point.policy), label=escape(point.label)) for point in (budget.whole, *shown)
    )
    return markdown_table(replace(budget, whole=whole, points=points).table())


def describe_skipped_mlps(config: SimpleNamespace) -> str | None:
    """Which MLPs the configuration leaves out. None if none."""
    positions = getattr(config, "skipped_mlps", None)
    return escape(", ".join(map(str, positions))) if isinstance(positions, list) and positions else None


_SURE = {
    "probability": "whose highest class probability is at least {}",
    "entropy": "at which 1 minus the entropy, as a fraction of its largest value, is at least {}",
    "margin": "at which the two highest class probabilities differ by at least {}",
    "halting": "at which the probability of having left, by the halting head, is above {}",
}


def describe_exits(config: SimpleNamespace) -> str | None:
    """How the configuration says that an example runs through fewer layers. None if it does not."""
    threshold, patience = (getattr(config, name, None) for name in ("exit_threshold", "exit_patience"))
    budget = getattr(config, "layer_budget", None)
    if patience is not None:
        return f"an example leaves after {patience} layer{'s' * (patience != 1)} in a row with the same answer"
    if threshold is not None:
        rule = _SURE.get(getattr(config, "exit_criterion", "probability"), "that is sure enough by {}")
        return f"an example leaves at the first layer {rule.format(threshold)}"
    return None if budget is None else f"an example runs through the {budget} layers that the layer controller chooses"
