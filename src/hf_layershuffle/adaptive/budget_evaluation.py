# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Accuracy against cost for every way that a model has to run fewer layers, beside other models."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..checkpoints.checks import check_finite
from ..checkpoints.identity import describe_model, weights_digest
from ..checkpoints.processing_classes import ProcessingClass, check_evaluable, chosen_processing_class
from ..checkpoints.tokenizers import input_record
from ..common.checks import check_integers
from ..common.environment import describe_environment
from ..common.progress import silenceable
from ..data.dataloading import LabelledData
from ..evaluation.fingerprint import data_digest, example_digests, processing_record
from ..layerwise import LayerwiseClassifier, as_layerwise, batches_for, rows_of
from ..models.configuration_layershuffle import num_channels_of
from .budget_measurement import WHOLE, BudgetMeasurement, FinishedPolicies
from .budget_report import MULTIPLY_ADDS, OTHER_MODELS, BudgetReport, time_cost, with_fronts
from .controller_policies import ControlledForAll, ControlledLayers, RandomLayers
from .halting_policies import HaltingDraws, HaltingExit
from .measured_cost import some_of
from .mlp_policies import RandomMlps, SkippedMlps
from .policies import (
    EXIT_POLICIES,
    AsConfigured,
    CalibratedPolicy,
    Calibration,
    EvenlySpaced,
    OtherModels,
    Policy,
    RandomPrograms,
    SearchedLayers,
    SearchedProgram,
    configured,
    how_it_runs,
)
from .program_policies import PredictedPrograms, ShuffledPrograms


# All policies that are made of a calibration, in the sequence of tables
POLICIES: tuple[type[CalibratedPolicy], ...] = (
    AsConfigured,
    *EXIT_POLICIES,
    HaltingExit,
    HaltingDraws,
    ControlledLayers,
    ControlledForAll,
    SearchedProgram,
    SearchedLayers,
    EvenlySpaced,
    RandomLayers,
    RandomPrograms,
    PredictedPrograms,
    ShuffledPrograms,
    SkippedMlps,
    RandomMlps,
)
# The part of the calibration data that may be among the data to report on: the splits of many datasets share a few
MAX_SHARED = 0.1
logger = logging.getLogger(__name__)


@silenceable
def evaluate_budget(
    model: PreTrainedModel | LayerwiseClassifier,
    data: LabelledData,
    calibration_data: LabelledData | None = None,
    *,
    policies: Sequence[str | Policy] | None = None,
    rivals: Mapping[str, PreTrainedModel] | None = None,
    num_layers_run: Sequence[int] | None = None,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    batch_size: int = 64,
    max_samples: int | None = None,
    max_calibration_samples: int | None = None,
    num_search_samples: int = 256,
    measure_time: bool = True,
    seed: int = 0,
    model_name: str | None = None,
    dataset_name: str = "unnamed",
    progress: bool = True,
    progress_file: str | os.PathLike | None = None,
) -> BudgetReport:
    """Accuracy, multiply-adds and time of a model under every policy that it has for running fewer layers.

    What a setting needs, such as a threshold or a program, is chosen on `calibration_data`, and measured on `data`.
    Multiply-adds are counted as the batches run. Time is measured at batch 1 and 64, in turns with the whole model.

    Args:
        model: A classifier of images or texts (see [`score_execution_orders`]).
        data: What to report on, as for [`score_execution_orders`].
        calibration_data: Other labelled data of the same kind, best such as the model was not trained on.
        policies: Names (`POLICIES` of this module holds them), or objects with `name` and `settings()` (see
            [`Policy`]). Defaults to all that the model has.
        rivals: Other classifiers of the same inputs and classes, by name, on the same device.
        num_layers_run: Numbers of layers at which a policy has a setting. Defaults to a quarter, a third, a half and
            three quarters of the model's.
        processing_class, image_processor, batch_size, max_samples, progress: As for [`score_execution_orders`].
        max_calibration_samples: How many examples of `calibration_data` to take, drawn by `seed`; all by default.
        num_search_samples: How many of these, evenly spread, programs are searched on, which runs hundreds of them.
        measure_time: Whether to measure time.
        seed: Seed of everything random, at least 0.
        model_name: Name for the report. Defaults to the configuration's `name_or_path`.
        dataset_name: Name for the report.
        progress_file: Where to keep the policies that are done. A call with the same arguments, of a model with the
            same configuration, that finds it goes on behind them; policies of your own are known by their names. It
            is removed at the end.

    Raises:
        `TypeError`, `ValueError`: as in [`score_execution_orders`]. Also if a policy is not known, or needs
            calibration data and there is none, or a tenth of that is among the evaluation data, or if a rival does
            not fit.

    ```python
    >>> report = ls.evaluate_budget(model, test, held_out, processing_class=processor, rivals={"6 layers": plain})
    >>> print(report)  # a table
    >>> report.plot()  # accuracy against multiply-adds and time
    ```
    """
    check_integers(seed=(seed, 0), num_search_samples=(num_search_samples, 1))
    parts = as_layerwise(model)
    free: Any = parts.model
    name = model_name or free.config.name_or_path or type(free).__name__
    check_finite(f"'{name}'", free.state_dict().items())
    processor = chosen_processing_class(processing_class, image_processor)
    check_evaluable(free.config, processor)
    named = check_policy_names(policies, free)
    counts = _counts(num_layers_run, parts.num_layers)
    rivals = _checked_rivals(rivals, named, free)
    loading: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    loader = batches_for(parts, data, processor, max_samples=max_samples, **loading)
    held_out = None
    if calibration_data is not None:
        held_out = batches_for(parts, calibration_data, processor, max_samples=max_calibration_samples, **loading)
    digests = _digests(loader, held_out)
    calibration = None if held_out is None else _calibration(free, held_out, counts, num_search_samples, seed)
    chosen = _made(named, calibration) + ([OtherModels(rivals)] if rivals else [])
    settings = digests | {
        "num_layers_run": counts,
        "num_search_samples": num_search_samples,
        "rivals": {rival_name: weights_digest(rival) for rival_name, rival in rivals.items()},
        "runs": how_it_runs(free),
        "rivals_run": {rival_name: how_it_runs(rival) for rival_name, rival in rivals.items()},
    }
    described = describe_model(free) | input_record(free.config) | processing_record(processor, free.config) | settings
    measuring = BudgetMeasurement(parts, loader, measure_time, progress, seed)
    done = FinishedPolicies(
        progress_file, json.dumps([described, str(free.dtype), batch_size, measure_time, seed], sort_keys=True)
    )
    with _evaluating(free, *rivals.values()), torch.no_grad(), configured(free, {}):
        whole, points = measuring.all_points(chosen, done)
    costs = [MULTIPLY_ADDS, *map(time_cost, whole.time_ratio)]
    whole, *points = with_fronts([whole, *points], costs)
    done.remove()
    return BudgetReport(
        model=name,
        dataset=dataset_name,
        num_images=len(rows_of(loader)),
        num_chosen_on=0 if held_out is None else len(rows_of(held_out)),
        num_classes=parts.num_labels,
        num_layers=parts.num_layers,
        seed=seed,
        whole=whole,
        points=points,
        config=described,
        environment=describe_environment(free) | {"threads": torch.get_num_threads()},
    )


def _calibration(
    model: PreTrainedModel, loader: DataLoader, counts: list[int], num_search_samples: int, seed: int
) -> Calibration:
    return Calibration(model, loader, some_of(loader, min(num_search_samples, len(rows_of(loader)))), counts, seed)


def _counts(given: Sequence[int] | None, num_layers: int) -> list[int]:
    if given is None:
        return sorted({max(1, round(num_layers * part)) for part in (1 / 4, 1 / 3, 1 / 2, 3 / 4)})
    allowed = f"integers from 1 to {num_layers}, the model's layers"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"`num_layers_run` is {given!r}; pass a list of {allowed}.")
    counts = list(given)
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= count <= num_layers:
            raise ValueError(f"`num_layers_run` holds {count!r}; it must be a list of {allowed}.")
    if not counts:
        raise ValueError("`num_layers_run` is empty; give at least one number of layers, or leave it out.")
    return sorted({int(count) for count in counts})


def _digests(loader: DataLoader, held_out: DataLoader | None) -> dict[str, str | None]:
    if held_out is None:
        return {"data": data_digest(loader), "calibration": None}
    reported = set(example_digests(loader))
    held = example_digests(held_out)
    both = sum(each in reported for each in held)
    found = f"{both:,} of the {len(held):,} examples of `calibration_data` are among those that are reported on"
    if both > MAX_SHARED * len(held):
        raise ValueError(
            f"{found}, on which what was chosen looks better than it is. Pass other data, such as a part of the "
            "training split that the model was not trained on."
        )
    if both:
        logger.warning("%s. Numbers look a little better so than they are.", found)
    return {"data": data_digest(loader), "calibration": data_digest(held_out)}


def _checked_rivals(given: Any, policies: list[str | Policy], model: Any) -> dict[str, PreTrainedModel]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"`rivals` is a {type(given).__name__}; pass models by name, such as {{'6 layers': plain}}.")
    for name, rival in given.items():
        check_rival(name, rival, model)
    if given and any(not isinstance(each, str) and each.name == OTHER_MODELS for each in policies):
        raise ValueError(f"`policies` holds one named '{OTHER_MODELS}', as `rivals` are called; give it another name.")
    return dict(given)


def check_rival(name: str, rival: Any, model: Any) -> None:
    """Checks that a rival takes the model's inputs and gives its classes.

    Raises:
        `ValueError`: if it does not.
    """
    if not isinstance(name, str):
        raise ValueError(f"`rivals` holds the name {name!r}; names are texts.")
    if not isinstance(rival, PreTrainedModel):
        raise ValueError(f"`rivals` holds a {type(rival).__name__} for '{name}'; pass models of transformers by name.")
    check_evaluable(rival.config)
    if rival.device != model.device:
        raise ValueError(f"The rival '{name}' is on {rival.device} and the model on {model.device}; move it there.")
    channels = [num_channels_of(each.config) for each in (model, rival)]
    if channels[0] != channels[1]:
        raise ValueError(
            f"The rival '{name}' takes images of {channels[1]} channels, and the model of {channels[0]}; take a rival "
            "of the same inputs."
        )
    ours, theirs = ([str(label) for label in (each.config.id2label or {}).values()] for each in (model, rival))
    has_names = not any(label.startswith("LABEL_") for label in (*ours, *theirs))
    if len(ours) != len(theirs) or (has_names and ours != theirs):
        raise ValueError(
            f"The rival '{name}' has the classes {', '.join(theirs[:5])}, ... ({len(theirs)}), and the model "
            f"{', '.join(ours[:5])}, ... ({len(ours)}); take a rival with the same classes in the same sequence."
        )


def check_policy_names(given: Sequence[str | Policy] | None, model: PreTrainedModel) -> list[str | Policy]:
    """Names of policies, or policies; all that the model has where none are given.

    Raises:
        `ValueError`: if a name is not known, or is of one that the model has not.
    """
    if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
        raise ValueError(f"`policies` is {given!r}; pass a list of names or policies.")
    known = {policy.name: policy for policy in POLICIES}
    able = [name for name, policy in known.items() if policy.applies_to(model)]
    for each in given or ():
        if isinstance(each, str) and each not in able:
            lacks = "which this model has not" if each in known else "which is no policy"
            raise ValueError(f"`policies` holds '{each}', {lacks}; this model has {', '.join(able)}.")
        if not isinstance(each, str):
            _check_policy(each)
    found: list[str | Policy] = [*able] if given is None else [*given]
    names = [each if isinstance(each, str) else each.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`policies` holds '{twice}' more than once; give each name once.")
    return found


def _check_policy(policy: Any) -> None:
    if isinstance(policy, type) or not callable(getattr(policy, "settings", None)):
        raise ValueError(
            f"`policies` holds {str(policy)[:60]!r}; each is a name, or an object with a `name` and `settings()`."
        )
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or name == WHOLE:
        raise ValueError(
            f"`policies` holds a policy with the name {name!r}; a name is a text, and '{WHOLE}' is that of the whole "
            "model."
        )


def _made(given: list[str | Policy], calibration: Calibration | None) -> list[Policy]:
    known = {policy.name: policy for policy in POLICIES}
    found: list[Policy] = []
    for each in given:
        if isinstance(each, str) and calibration is None:
            raise ValueError(
                f"The policy '{each}' is made by calibration data, and `calibration_data` is None; pass data other "
                "than that to report on, such as a part of the training split that the model was not trained on."
            )
        found.append(known[each](cast(Calibration, calibration)) if isinstance(each, str) else each)
    return found


@contextmanager
def _evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Context in which models are in evaluation mode."""
    with ExitStack() as stack:
        for model in models:
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
            model.eval()
        yield
