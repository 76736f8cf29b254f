# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Accuracy against cost for every way that a model has to run fewer layers, beside other models."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from ..evaluation.fingerprint import data_digest, processing_record
from ..layerwise import LayerwiseClassifier, as_layerwise, batches_for
from ..models.configuration_layershuffle import num_channels_of
from .budget_measurement import BudgetMeasurement, FinishedPolicies
from .budget_report import MULTIPLY_ADDS, BudgetReport, time_cost, with_fronts
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
OTHER_MODELS = "other models"


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
        progress_file: Where to keep the policies that are done. A call with the same arguments that finds it goes on
            behind them. It is removed at the end.

    Raises:
        `TypeError`, `ValueError`: as in [`score_execution_orders`]. Also if a policy is not known, or needs
            calibration data and there is none, or that is the evaluation data itself, or if a rival does not fit.

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
    rivals = dict(rivals or {})
    for rival_name, rival in rivals.items():
        check_rival(rival_name, rival, free)
    loading: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    loader = batches_for(parts, data, processor, max_samples=max_samples, **loading)
    held_out = None
    if calibration_data is not None:
        held_out = batches_for(parts, calibration_data, processor, max_samples=max_calibration_samples, **loading)
    digests = _digests(loader, held_out)
    calibration = held_out and Calibration(
        free, held_out, some_of(held_out, min(num_search_samples, _size(held_out))), counts, seed
    )
    chosen = _made(named, calibration) + ([OtherModels(rivals, OTHER_MODELS)] if rivals else [])
    settings = digests | {
        "num_layers_run": counts,
        "num_search_samples": num_search_samples,
        "rivals": {rival_name: weights_digest(rival) for rival_name, rival in rivals.items()},
    }
    described = describe_model(free) | input_record(free.config) | processing_record(processor, free.config) | settings
    measuring = BudgetMeasurement(parts, loader, measure_time, progress)
    done = FinishedPolicies(
        progress_file, json.dumps([described, str(free.dtype), batch_size, measure_time, seed], sort_keys=True)
    )
    with _evaluating(free, *rivals.values()), torch.inference_mode(), configured(free, {}):
        whole, points = measuring.all_points(chosen, done)
    costs = [MULTIPLY_ADDS, *map(time_cost, whole.time_ratio)]
    whole, *points = with_fronts([whole, *points], costs)
    done.remove()
    return BudgetReport(
        model=name,
        dataset=dataset_name,
        num_images=_size(loader),
        num_chosen_on=0 if held_out is None else _size(held_out),
        num_classes=parts.num_labels,
        num_layers=parts.num_layers,
        seed=seed,
        whole=whole,
        points=points,
        config=described,
        environment=describe_environment(free) | {"threads": torch.get_num_threads()},
    )


def _size(loader: DataLoader) -> int:
    dataset: Any = loader.dataset
    return len(dataset)


def _counts(given: Sequence[int] | None, num_layers: int) -> list[int]:
    if given is None:
        return sorted({max(1, round(num_layers * part)) for part in (1 / 4, 1 / 3, 1 / 2, 3 / 4)})
    counts = sorted(set(given))
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= num_layers:
            raise ValueError(
                f"`num_layers_run` holds {count!r}; each is an integer from 1 to {num_layers}, the model's layers."
            )
    if not counts:
        raise ValueError("`num_layers_run` is empty; give at least one number of layers, or leave it out.")
    return counts


def _digests(loader: DataLoader, held_out: DataLoader | None) -> dict[str, str | None]:
    digests = {"data": data_digest(loader), "calibration": None if held_out is None else data_digest(held_out)}
    if digests["data"] == digests["calibration"]:
        raise ValueError(
            "`calibration_data` is the data that is reported on, on which what was chosen looks better than it is. "
            "Pass other data, such as a part of the training split that the model was not trained on."
        )
    return digests


def check_rival(name: str, rival: Any, model: Any) -> None:
    """Checks that a rival takes the model's inputs and gives its classes.

    Raises:
        `ValueError`: if it does not.
    """
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
    ours, theirs = ([str(label) for label in each.config.id2label.values()] for each in (model, rival))
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
    if isinstance(given, str):
        raise ValueError(f"`policies` is '{given}'; pass a list of names or policies.")
    known = {policy.name: policy for policy in POLICIES}
    able = [name for name, policy in known.items() if policy.applies_to(model)]
    for each in given or ():
        if isinstance(each, str) and each not in able:
            lacks = "which this model has not" if each in known else "which is none"
            raise ValueError(f"`policies` holds '{each}', {lacks}; it has {', '.join(able)}.")
    found: list[str | Policy] = [*able] if given is None else [*given]
    names = [each if isinstance(each, str) else each.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`policies` holds '{twice}' more than once; give each name once.")
    return found


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
