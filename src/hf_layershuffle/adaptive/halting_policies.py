# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Policies of models with a halting head: Q-exit, and as a control PonderNet's way of leaving by a coin."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.exit_rule import HALTING
from ..models.halting_head import HaltingHead
from .exit_calibration import best_rule
from .policies import CalibratedPolicy, Setting, run_with


class _OfHaltingHead(CalibratedPolicy):
    @classmethod
    def applies_to(cls, model: PreTrainedModel) -> bool:
        return getattr(model, "halting_head", None) is not None


class HaltingExit(_OfHaltingHead):
    """Examples leave where the halting head says so (Q-exit, arXiv 2204.03276): with a threshold of 0.5, and with
    those of the numbers of layers."""

    name = "exit-halting"

    def settings(self) -> list[Setting]:
        counts: dict[float, int | None] = {}  # different numbers of layers may give the same threshold
        for count in self.calibration.num_layers_run:
            rule, _ = best_rule(self.calibration.answers, HALTING, max_mean_layers=count)
            if rule.threshold is not None:
                counts.setdefault(rule.threshold, count)
        counts.setdefault(0.5, None)
        # A higher threshold lets examples leave later
        return [self._setting(threshold, counts[threshold]) for threshold in sorted(counts)]

    def _setting(self, threshold: float, count: int | None) -> Setting:
        fields = {"exit_threshold": threshold, "exit_criterion": HALTING}
        label = f"threshold {threshold:g}" + (" (Q-exit)" if threshold == 0.5 else "")
        chosen = fields if count is None else fields | {"max_mean_layers": count}
        return Setting(label, partial(run_with, self.calibration.model, fields), chosen)


class HaltingDraws(_OfHaltingHead):
    """The control: each example leaves by a coin of the halting head's λ after each layer (arXiv 2107.05407)."""

    name = "exit-halting-drawn"

    def settings(self) -> list[Setting]:
        generator = torch.Generator().manual_seed(self.calibration.seed)
        return [Setting("drawn", partial(_run_drawn, self.calibration.model, generator), is_random=True)]


class _Coins(nn.Module):
    """In the place of a halting head: throws its coins, and then is sure."""

    def __init__(self, head: HaltingHead, generator: torch.Generator):
        super().__init__()
        self.head = head
        self.generator = generator

    def log_stays(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        stays = self.head.log_stays(before, after).exp()
        drawn = torch.rand(stays.shape, generator=self.generator).to(stays.device)
        return torch.where(drawn < stays, 0.0, -torch.inf)


def _run_drawn(model: Any, generator: torch.Generator, inputs: dict[str, torch.Tensor]) -> Any:
    head = model.halting_head
    model.halting_head = _Coins(head, generator)
    try:
        return model(**inputs, exit_threshold=0.5, exit_criterion=HALTING)
    finally:
        model.halting_head = head
