# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The curve of a layer controller (ADMN, NeurIPS 2025), and its controls: what it is worth which layers run at all,
and what that each example chooses its own."""

from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..models.layer_controller import choose_layers
from .exit_calibration import orders_of
from .policies import CalibratedPolicy, Calibration, Run, Setting, layers_label, run_with


class ControlledLayers(CalibratedPolicy):
    """Each example runs the layers that the controller finds best for it."""

    name = "layer-controller"

    @classmethod
    def applies_to(cls, model: PreTrainedModel) -> bool:
        return getattr(model, "layer_controller", None) is not None

    def settings(self) -> list[Setting]:
        model = self.calibration.model
        chosen = [{"layer_budget": count} for count in counts_within_order(self.calibration)]
        return [Setting(layers_label(each["layer_budget"]), partial(run_with, model, each), each) for each in chosen]


class ControlledForAll(ControlledLayers):
    """A control of [`ControlledLayers`]: all examples run the layers with the best mean score on the calibration
    data."""

    name = "layer-controller-for-all"

    def settings(self) -> list[Setting]:
        calibration, model = self.calibration, self.calibration.model
        order = orders_of(calibration.parts, calibration.seed)[0]
        scores = mean_scores(model, calibration)[order]
        settings = []
        for count in counts_within_order(calibration):
            is_chosen = choose_layers(scores[None], count)[0].tolist()
            chosen = {"execution_order": [layer for layer, runs in zip(order, is_chosen) if runs]}
            settings.append(Setting(layers_label(count), partial(run_with, model, chosen), chosen))
        return settings


def counts_within_order(calibration: Calibration) -> list[int]:
    """The numbers of layers, of which none is above that of the model's order: its layers are chosen from."""
    most = len(orders_of(calibration.parts, calibration.seed)[0])
    return sorted({min(count, most) for count in calibration.num_layers_run})


def mean_scores(model: Any, calibration: Any) -> torch.Tensor:
    """The controller's score of each layer, mean over the calibration data: float32 of shape `(num_layers,)`."""
    parts = calibration.parts
    total, count = torch.zeros(parts.num_layers, device=parts.device), 0
    with torch.no_grad(), parts.evaluation_mode():
        for batch in calibration.loader:
            inputs = {name: value.to(parts.device) for name, value in batch.items() if name != "labels"}
            scores = model.layer_controller(parts.embed(inputs), inputs.get("attention_mask"))
            total, count = total + scores.sum(dim=0), count + len(scores)
    return (total / max(count, 1)).cpu()


class RandomLayers(CalibratedPolicy):
    """A control of all that chooses layers: different layers in the model's sequence, drawn anew for each batch."""

    name = "random-layers"

    def settings(self) -> list[Setting]:
        counts = counts_within_order(self.calibration)
        return [Setting(layers_label(count), self._drawing(count), is_random=True) for count in counts]

    def _drawing(self, count: int) -> Run:
        rng = np.random.default_rng((self.calibration.seed, count))
        order = orders_of(self.calibration.parts, self.calibration.seed)[0]

        def run(inputs: dict[str, torch.Tensor]) -> Any:
            positions = sorted(rng.permutation(len(order))[:count].tolist())
            drawn = [order[position] for position in positions]
            return run_with(self.calibration.model, {"execution_order": drawn}, inputs)

        return run
