# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The curve of a program chosen for each example, and its control."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .policies import CalibratedPolicy, Calibration, Setting
from .predictor_training import cost_weight_for, fit, num_shared_of, settings_of
from .program_answers import ProgramAnswers, answers_of_programs, programs_by_length
from .program_predictor import PredictedAnswers, ProgramPredictor


NUM_PROGRAMS = 6


class PredictedPrograms(CalibratedPolicy):
    """A predictor chooses one of six programs for each example (see [`ProgramPredictor`])."""

    name = "predicted-programs"

    @classmethod
    def applies_to(cls, model: PreTrainedModel) -> bool:
        free: Any = model
        return len(free.free_layers) > 1

    def settings(self) -> list[Setting]:
        predictor, answers = _trained(self.calibration)
        weights: dict[float, Setting] = {}  # different numbers of layers may give the same weight
        for count in self.calibration.num_layers_run:
            if count >= answers.num_layers_run.min():
                weight = cost_weight_for(predictor, answers.features, count)
                chosen = {"cost_weight": weight, "max_mean_layers": count}
                weights.setdefault(weight, Setting(f"cost weight {weight:.2g}", self._running(weight), chosen))
        return list(weights.values())

    def _running(self, cost_weight: float) -> Any:
        predictor, _ = _trained(self.calibration)
        return partial(self._run, predictor, cost_weight)

    def _run(
        self, predictor: ProgramPredictor, cost_weight: float, inputs: Mapping[str, torch.Tensor]
    ) -> PredictedAnswers:
        return predictor.run(self.calibration.parts, inputs, cost_weight)


class ShuffledPrograms(PredictedPrograms):
    """The control of [`PredictedPrograms`]: the same programs, given to other examples of the batch at random."""

    name = "shuffled-programs"

    def settings(self) -> list[Setting]:
        return [Setting(each.label, each.run, each.chosen, is_random=True) for each in super().settings()]

    def _running(self, cost_weight: float) -> Any:
        predictor, _ = _trained(self.calibration)
        shuffled = _Shuffled(predictor, torch.Generator().manual_seed(self.calibration.seed))
        return partial(self._run, shuffled, cost_weight)


class _Shuffled(ProgramPredictor):
    """A predictor whose choices are handed out at random."""

    def __init__(self, predictor: ProgramPredictor, generator: torch.Generator):
        nn.Module.__init__(self)
        self.__dict__.update(predictor.__dict__)
        self._generator = generator

    def choose(self, features: torch.Tensor, cost_weight: float) -> torch.Tensor:
        chosen = super().choose(features, cost_weight)
        return chosen[torch.randperm(len(chosen), generator=self._generator).to(chosen.device)]


def _trained(calibration: Calibration) -> tuple[ProgramPredictor, ProgramAnswers]:
    """The predictor of a calibration, trained once for the policy and its control."""
    kept = vars(calibration)
    if "_program_predictor" not in kept:
        parts = calibration.parts
        programs = programs_by_length(parts.num_layers, num_shared_of(parts.num_layers), NUM_PROGRAMS)
        answers = answers_of_programs(parts, calibration.loader, programs, progress=False)
        kept["_program_predictor"] = fit(answers, settings_of(parts), seed=calibration.seed).to(parts.device), answers
    return kept["_program_predictor"]
