# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The curve of a model without some of its MLPs, and its control.

Of `n` layers in [`Calibration.num_layers_run`], all layers run, and `n` of them with their MLP.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .mlp_skipping import mlp_similarities, random_skipped_mlps, skippable_positions, without_mlps
from .policies import CalibratedPolicy, Setting


def _run_without(policy: "SkippedMlps | RandomMlps", positions: list[int], inputs: dict[str, torch.Tensor]) -> Any:
    model = policy.calibration.model
    with without_mlps(model, positions):
        return model(**inputs)


def _numbers_skipped(policy: CalibratedPolicy, num_positions: int) -> list[int]:
    """How many MLPs are left out, most first."""
    most = len(skippable_positions(num_positions))
    numbers = {min(num_positions - count, most) for count in policy.calibration.num_layers_run}
    return sorted((number for number in numbers if number > 0), reverse=True)


def _label(number: int) -> str:
    return f"without {number} MLP{'s' * (number != 1)}"


class _OfMlps(CalibratedPolicy):
    @classmethod
    def applies_to(cls, model: PreTrainedModel) -> bool:
        try:
            with without_mlps(model, [0]):
                return True
        except ValueError:  # a family whose MLP is not known
            return False


class SkippedMlps(_OfMlps):
    """All layers run, and the MLPs that change the hidden states least are left out (FFN-SkipLLM)."""

    name = "skipped-mlps"

    def settings(self) -> list[Setting]:
        calibration = self.calibration
        found = mlp_similarities(calibration.parts, calibration.loader, seed=calibration.seed, progress=False)
        chosen = [found.most_similar(number) for number in _numbers_skipped(self, found.similarities.shape[1])]
        return [
            Setting(_label(len(each)), partial(_run_without, self, each), {"skipped_mlps": each}) for each in chosen
        ]


class RandomMlps(_OfMlps):
    """The control of [`SkippedMlps`]: as many MLPs are left out, drawn anew for each batch."""

    name = "random-mlps"

    def settings(self) -> list[Setting]:
        order = self.calibration.model.config.execution_order
        num_positions = self.calibration.parts.num_layers if isinstance(order, str) else len(order)
        return [
            Setting(_label(number), self._drawing(num_positions, number), is_random=True)
            for number in _numbers_skipped(self, num_positions)
        ]

    def _drawing(self, num_positions: int, number: int) -> Any:
        seeds = np.random.default_rng((self.calibration.seed, number))

        def run(inputs: dict[str, torch.Tensor]) -> Any:
            seed = int(seeds.integers(2**31))
            return _run_without(self, random_skipped_mlps(num_positions, number, 1, seed=seed)[0], inputs)

        return run
