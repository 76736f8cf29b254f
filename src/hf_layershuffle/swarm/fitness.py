# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What free order and missing layers cost a model that was not trained for them."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..evaluation.report import REPORT_FILE, RobustnessReport
from .placement import Placement
from .policy import Policy


logger = logging.getLogger(__name__)


def warn_if_unfit(config: Any, folder: str | os.PathLike, policy: Policy) -> str | None:
    """Warns of a policy that a model was not trained for, and says what it will cost. Returns what it said.

    The costs are those of the report of `hf-layershuffle evaluate` in the model's folder, if there is one.
    """
    mode = getattr(config, "shuffle_mode", "none")
    freed = policy.name != "strict" and mode != "arbitrary"
    skips = policy.max_skips > 0 and mode != "arbitrary" and not getattr(config, "layerdrop", 0.0)
    if not freed and not skips:
        return None
    asked = ", ".join(
        ([f"`policy='{policy.name}'` runs its layers in any order"] if freed else [])
        + ([f"`max_skips={policy.max_skips}` leaves layers out"] if skips else [])
    )
    report = _report(folder)
    cost = (
        f"Its {REPORT_FILE} says what that costs: {_cost(report, policy, freed, skips)}."
        if report is not None
        else "Expect wrong answers, often by chance alone; `hf-layershuffle evaluate` measures how many."
    )
    text = (
        f"'{os.fspath(folder)}' was not trained for this (`shuffle_mode='{mode}'`): {asked}. {cost} Take "
        "`policy='strict'` with `max_skips=0`, or a model that was trained with `shuffle_mode='arbitrary'`."
    )
    logger.warning("%s", text)
    return text


def warn_if_skips_cover_no_worker(placement: Placement, policy: Policy) -> None:
    """Warns where skips are allowed, but too few for the layers that are gone with one worker."""
    holders = Counter(layer for layers in placement.values() for layer in layers)
    alone = {name: sum(holders[layer] == 1 for layer in layers) for name, layers in placement.items()}
    most = max(alone.values())
    if 0 < policy.max_skips < most:
        logger.warning(
            "A worker holds %d layers that no other has, and `max_skips` is %d: when it dies, requests wait for its "
            "restart. Take `max_skips=%d`, more workers, or `replicas=2`.",
            most, policy.max_skips, most,
        )  # fmt: skip


def _report(folder: str | os.PathLike) -> RobustnessReport | None:
    if not (Path(folder).expanduser() / REPORT_FILE).is_file():
        return None
    try:
        return RobustnessReport.load(Path(folder).expanduser())
    except (ValueError, OSError) as error:
        logger.warning("The model's report could not be read: %s", error)
        return None


def _cost(report: RobustnessReport, policy: Policy, freed: bool, skips: bool) -> str:
    said = [f"accuracy {report.sequential.accuracy:.4f} in sequential order"]
    if freed:
        said.append(f"{report.arbitrary.accuracy.mean:.4f} in arbitrary order")
    left = report.num_layers - policy.max_skips
    groups = report.pruning.get("arbitrary" if freed else "random", [])
    if skips and 1 <= left <= len(groups):
        said.append(f"{groups[left - 1].accuracy.mean:.4f} with {left} of {report.num_layers} layers")
    return f"{', '.join(said)} ({report.num_images:,} {report.noun} of {report.dataset})"
