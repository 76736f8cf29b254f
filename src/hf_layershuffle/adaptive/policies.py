# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Policies: ways to run a model with fewer layers, each with settings that give a curve of accuracy against cost.

A policy has a `name` and `settings()`. A [`Setting`] says how to run a batch. What a setting must choose, such as a
threshold or a program, is chosen on the batches of a [`Calibration`], which are others than those reported on.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..compression.pruning import search_layers
from ..evaluation.order_plans import evenly_spaced_layers
from ..layerwise import LayerwiseClassifier
from ..models.configuration_layershuffle import num_layers_of
from ..models.early_exit import FEWER_FIELDS, all_layers
from ..models.exit_rule import CRITERIA, ExitRule
from .budget_report import OTHER_MODELS
from .exit_calibration import PATIENCE, best_rule, orders_of
from .layer_answers import LayerAnswers, answers_after_layers
from .program_search import search_program


Run = Callable[[dict[str, torch.Tensor]], Any]


@dataclass(frozen=True)
class Setting:
    """One way to run a batch.

    Args:
        label: What tells it from the policy's others, such as "6 layers".
        run: Takes the inputs of a model by name, without labels, and gives outputs with `logits`. Where layers are
            chosen by example, they have `num_layers_run` of shape `(batch_size,)`. It is called in inference mode,
            with the model in evaluation mode.
        chosen: What was chosen on the calibration data, in types of JSON.
        is_random: Whether each call draws anew, as of a control; many batches are then run, also of little data.
        num_layers: Layers that run, for outputs that have neither `num_layers_run` nor `execution_order`.
    """

    label: str
    run: Run
    chosen: Mapping[str, Any] = field(default_factory=dict)
    is_random: bool = False
    num_layers: int | None = None


class Policy(Protocol):
    """What gives a curve of accuracy against cost."""

    @property
    def name(self) -> str: ...

    def settings(self) -> list[Setting]:
        """Its settings, cheapest first. What they need is chosen in this call, which may take long."""
        ...


@dataclass
class Calibration:
    """What policies choose their settings by.

    Args:
        model: The LayerShuffle model, a classifier, in evaluation mode.
        loader: Batches to choose on, `{"pixel_values", "labels"}` or those of texts.
        search_loader: Batches of fewer of these examples, for searches that run hundreds of programs.
        num_layers_run: Numbers of layers, ascending, at which a policy has a setting: that many layers, or that many
            on average.
        seed: Seed of everything random.
    """

    model: PreTrainedModel
    loader: DataLoader
    search_loader: DataLoader
    num_layers_run: list[int]
    seed: int = 0

    @cached_property
    def parts(self) -> LayerwiseClassifier:
        """The model, taken apart."""
        return LayerwiseClassifier(self.model)

    @cached_property
    def answers(self) -> list[LayerAnswers]:
        """Answers after each layer of the orders in which the model runs."""
        return answers_after_layers(self.parts, self.loader, orders_of(self.parts, self.seed), progress=False)


class CalibratedPolicy:
    """Base of policies of a free model. It is made of a [`Calibration`] alone."""

    name: ClassVar[str]

    def __init__(self, calibration: Calibration):
        self.calibration = calibration

    @classmethod
    def applies_to(cls, model: PreTrainedModel) -> bool:
        """Whether the model has what the policy needs, such as a trained head."""
        return True

    def settings(self) -> list[Setting]:
        raise NotImplementedError


def layers_label(num_layers: int) -> str:
    """ "1 layer" or "6 layers"."""
    return f"{num_layers} layer{'s' * (num_layers != 1)}"


def run_with(model: PreTrainedModel, arguments: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Any:
    """Outputs of a batch, with further arguments of the call."""
    return model(**inputs, **arguments)


class _FixedPrograms(CalibratedPolicy):
    """A policy with one execution order for each number of layers."""

    def order_of(self, num_layers_run: int) -> list[int]:
        raise NotImplementedError

    def settings(self) -> list[Setting]:
        model, counts = self.calibration.model, self.calibration.num_layers_run
        chosen = {count: {"execution_order": self.order_of(count)} for count in counts}
        return [
            Setting(layers_label(count), partial(run_with, model, arguments), arguments)
            for count, arguments in chosen.items()
        ]


class EvenlySpaced(_FixedPrograms):
    """Evenly spaced layers in sequential order (see [`layers_for_speedup`])."""

    name = "evenly-spaced"

    def order_of(self, num_layers_run: int) -> list[int]:
        return evenly_spaced_layers(self.calibration.parts.num_layers, num_layers_run)


class SearchedLayers(_FixedPrograms):
    """The layers that [`search_layers`] keeps (`prune --search`), in sequential order."""

    name = "searched-layers"

    def order_of(self, num_layers_run: int) -> list[int]:
        return search_layers(self.calibration.model, self.calibration.search_loader, num_layers_run, progress=False)


class SearchedProgram(_FixedPrograms):
    """The program that [`search_program`] finds, with a narrower beam and less refinement than its defaults."""

    name = "searched-program"
    beam_width = 4
    num_refinements = 1

    def order_of(self, num_layers_run: int) -> list[int]:
        return search_program(
            self.calibration.parts,
            self.calibration.search_loader,
            num_layers_run,
            beam_width=self.beam_width,
            num_refinements=self.num_refinements,
            progress=False,
        )


class RandomPrograms(CalibratedPolicy):
    """The control of all programs: different layers in random order, drawn anew for each batch."""

    name = "random-programs"

    def settings(self) -> list[Setting]:
        counts = self.calibration.num_layers_run
        return [Setting(layers_label(count), self._drawing(count), is_random=True) for count in counts]

    def _drawing(self, num_layers_run: int) -> Run:
        rng = np.random.default_rng((self.calibration.seed, num_layers_run))
        num_layers = self.calibration.parts.num_layers

        def run(inputs: dict[str, torch.Tensor]) -> Any:
            order = rng.permutation(num_layers)[:num_layers_run].tolist()
            return run_with(self.calibration.model, {"execution_order": order}, inputs)

        return run


class _EarlyExit(CalibratedPolicy):
    """Examples leave when the answer is sure enough, in the order of the configuration."""

    criterion: ClassVar[str]

    def settings(self) -> list[Setting]:
        rules: dict[ExitRule, Setting] = {}  # different numbers of layers may give the same rule
        for count in self.calibration.num_layers_run:
            rule, _ = best_rule(self.calibration.answers, self.criterion, max_mean_layers=count)
            fields: dict[str, Any] = {"exit_patience": rule.patience}
            if rule.patience is None:
                fields = {"exit_threshold": rule.threshold, "exit_criterion": rule.criterion}
            label = f"patience {rule.patience}" if rule.threshold is None else f"threshold {rule.threshold:g}"
            run = partial(run_with, self.calibration.model, fields)
            rules.setdefault(rule, Setting(label, run, fields | {"max_mean_layers": count}))
        return list(rules.values())


def _exit_policy(criterion: str) -> type[CalibratedPolicy]:
    body = {"name": f"exit-{criterion}", "criterion": criterion, "__doc__": _EarlyExit.__doc__}
    return type(f"{criterion.capitalize()}Exit", (_EarlyExit,), body)


EXIT_POLICIES = tuple(_exit_policy(criterion) for criterion in (*CRITERIA, PATIENCE))


class AsConfigured(CalibratedPolicy):
    """What the model does by itself, where its configuration says that fewer layers or MLPs run."""

    name = "as-configured"

    @classmethod
    def applies_to(cls, model: PreTrainedModel) -> bool:
        return bool(_configured_fields(model))

    def __init__(self, calibration: Calibration):
        super().__init__(calibration)
        self.fields = _configured_fields(calibration.model)
        config: Any = calibration.model.config
        if "exit_threshold" in self.fields:
            self.fields["exit_criterion"] = config.exit_criterion

    def settings(self) -> list[Setting]:
        label = ", ".join(f"{name.removeprefix('exit_')} {value}" for name, value in self.fields.items())
        return [Setting(label, partial(_run_configured, self.calibration.model, self.fields), self.fields)]


def _configured_fields(model: PreTrainedModel) -> dict[str, Any]:
    values = {name: getattr(model.config, name, None) for name in FEWER_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def how_it_runs(model: PreTrainedModel) -> dict[str, Any]:
    """What a configuration says of the layers that run in evaluation, in types of JSON."""
    return {name: getattr(model.config, name, None) for name in ("execution_order", "exit_criterion", *FEWER_FIELDS)}


@contextmanager
def configured(model: PreTrainedModel, fields: Mapping[str, Any]) -> Iterator[None]:
    """Context in which a model's configuration says these fields, and no other way to run fewer layers or MLPs."""
    config: Any = model.config
    with all_layers(model, with_mlps=True):
        kept = {name: getattr(config, name) for name in fields}
        try:
            for name, value in fields.items():
                setattr(config, name, value)
            yield
        finally:
            for name, value in kept.items():
                setattr(config, name, value)


def _run_configured(model: PreTrainedModel, fields: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Any:
    with configured(model, fields):
        return model(**inputs)


class OtherModels:
    """Rivals: other models, each with all its layers, such as plain ones trained with fewer.

    Args:
        models: Classifiers of the same inputs and classes by name, in evaluation mode.
        name: The policy's name.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel], name: str = OTHER_MODELS):
        self.models = dict(models)
        self.name = name

    def settings(self) -> list[Setting]:
        return [
            Setting(label, partial(run_with, model, {}), num_layers=num_layers_of(model.config))
            for label, model in self.models.items()
        ]
