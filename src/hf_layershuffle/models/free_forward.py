# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The forward of a class of transformers, run in an execution order.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.utils import ModelOutput

from .early_exit import ExitingRun, check_chooses_one_class, chooses_by_configuration, exit_rule, may_exit
from .exit_rule import EXIT_FIELDS
from .free_generation import check_cache, leave_out_of_cache
from .halting_head import HaltingRun
from .layer_budget import (
    BudgetRun,
    BudgetTrainingRun,
    layer_budget,
    learns_to_choose,
    may_have_budget,
)
from .layer_program import LayerProgram, Run, run_by_position, run_program, running_program
from .row_subsets import RowSubsetRun


# Arguments of a call that say by what examples run through fewer layers
_CHOICES = (*EXIT_FIELDS, "layer_budget")


def free_forward(plain_class: type[PreTrainedModel]) -> Callable[..., Any]:
    """The forward of a plain class with the argument `execution_order`."""
    plain_forward: Any = plain_class.forward
    signature = inspect.signature(plain_forward)
    names = list(signature.parameters)[1:]
    is_classifier = "labels" in names and "Classification" in plain_class.__name__

    @wraps(plain_forward)
    def forward(self: Any, *args: Any, execution_order: Any = None, **kwargs: Any) -> Any:
        choice = {name: kwargs.pop(name, None) for name in _CHOICES}
        if torch.compiler.is_compiling() and _may_choose(self, choice):  # which examples run is known as they run
            return torch.compiler.disable(forward)(self, *args, execution_order=execution_order, **kwargs, **choice)
        layers = LayerProgram.mark(self.free_layers)  # accelerate's `compile_regions` makes a new, plain list
        running = None if execution_order is not None else running_program(layers)
        if running is not None:  # the encoder of a classifier, or a model that is taken apart
            outputs = plain_forward(self, *args, **kwargs)
            return self._finish(outputs, running) if isinstance(running, Run) else outputs
        if execution_order is None and learns_to_choose(self, choice["layer_budget"]):
            execution_order = self.config.execution_order  # the controller learns for evaluation
        order = self.resolve_execution_order(execution_order)
        return_dict = _value_or(kwargs.pop("return_dict", None), self.config.return_dict)
        inputs = {**dict(zip(names, args)), **kwargs}
        labels, cache = inputs.get("labels"), inputs.get("past_key_values")
        _check_images(self, inputs.get("pixel_values"))
        _check_feature_maps(self, order)
        if is_classifier:
            _check_labels(labels, self.config)
        in_cache = order if self.config.tower in (None, "text") else list(range(len(layers)))  # a cache is of texts
        if "use_cache" in names:
            _cache_no_repeats(in_cache, inputs.get("use_cache"), cache, kwargs)
        check_cache(cache, in_cache)
        run = _run_of(self, plain_class, order, choice, {**inputs, **kwargs})
        if isinstance(run, (RowSubsetRun, HaltingRun)) and "use_cache" in names:
            run.inputs["use_cache"] = kwargs["use_cache"] = False
        with run_program(layers, run), run_by_position(self, order), explained_length(self, order), run.mode(self):
            outputs = plain_forward(self, *args, **kwargs, return_dict=True)
        if run.num_given > 0 or _concern_the_tower(inputs, self.config.tower):
            check_run(self, run)
        if isinstance(run, HaltingRun):
            run.finish(outputs.logits)
        kept = getattr(outputs, "past_key_values", None) if cache is None else cache
        leave_out_of_cache(kept, in_cache, len(layers))
        outputs = self._finish(outputs, run, labels, kwargs.get("num_items_in_batch"))
        return outputs if return_dict or not isinstance(outputs, ModelOutput) else outputs.to_tuple()

    documented: Any = forward
    documented.__doc__ = (plain_forward.__doc__ or "") + _EXECUTION_ORDER_DOC
    documented.__signature__ = _with_execution_order(signature)
    return forward


def _run_of(
    model: Any, plain_class: type[PreTrainedModel], order: list[int], choice: dict[str, Any], inputs: dict[str, Any]
) -> Run:
    """What a forward with these inputs runs."""
    is_classifier = "Classification" in plain_class.__name__
    if not model.training and chooses_by_configuration(model.config):
        model.config.check_layershuffle()  # its fields may have been set one by one
    budget = layer_budget(model, choice["layer_budget"], choice, order, is_classifier)
    rule = None if budget is not None else exit_rule(model, choice, is_classifier)
    if learns_to_choose(model, choice["layer_budget"]):
        return BudgetTrainingRun(model, order, budget, inputs)
    if budget is not None:
        return BudgetRun(model, order, budget, inputs, plain_class.forward)
    if rule is not None:
        return ExitingRun(model, order, rule, inputs, plain_class.forward)
    run: Run
    if _learns_to_halt(model):
        check_chooses_one_class(model, "Set `halting_head` to False, or")
        run = HaltingRun(model, order, inputs, plain_class.forward)
    else:
        run = Run(model.free_layers, order, model._depth_embedding, model._dropped_paths, model._skipped_mlps)
    run.num_examples = _num_examples(inputs.get(model.main_input_name))
    return run


def _may_choose(model: Any, choice: dict[str, Any]) -> bool:
    return may_exit(model, choice) or may_have_budget(model, choice["layer_budget"]) or _learns_to_halt(model)


def _learns_to_halt(model: Any) -> bool:
    return model.training and getattr(model, "halting_head", None) is not None


def _check_feature_maps(model: Any, order: list[int]) -> None:
    """Refuses an order in which a backbone's feature maps, which go by the position, would be others."""
    is_backbone = isinstance(model, BackboneMixin)
    if is_backbone and len(order) != len(model.free_layers):
        raise ValueError(
            f"`execution_order` has {len(order)} layers, and {type(model).__name__} gives feature maps by the "
            f"position; its order has {len(model.free_layers)}. Set `layerdrop` to 0, and for fewer layers prune the "
            "model by `hf_layershuffle.prune_layers`."
        )


# The beginnings of the names of a tower's inputs
_INPUTS_OF_TOWERS = {
    "vision": ("pixel_values",),
    "text": ("input_ids", "inputs_embeds"),
    "audio": ("input_features", "input_values"),
}


def _concern_the_tower(inputs: dict[str, Any], tower: str | None) -> bool:
    """Whether inputs run the layers in free order. Texts alone do not, where these are of images."""
    begins = "" if tower is None else _INPUTS_OF_TOWERS[tower]
    return any(value is not None and name.startswith(begins) for name, value in inputs.items())


def _check_images(model: Any, images: Any) -> None:
    if model.main_input_name == "pixel_values" and images is None:
        raise ValueError("`pixel_values` is None; pass images of shape `(batch_size, num_channels, height, width)`.")


def _cache_no_repeats(order: list[int], use_cache: bool | None, cache: Any, kwargs: dict[str, Any]) -> None:
    """Switches the cache off for an order with repeats, or refuses one that was asked for."""
    if len(set(order)) == len(order):
        return
    if use_cache or cache is not None:
        raise ValueError(_REPEAT_IN_CACHE.format(order=order))
    if use_cache is None:
        kwargs["use_cache"] = False


def _value_or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _num_examples(inputs: Any) -> int | None:
    return len(inputs) if isinstance(inputs, torch.Tensor) else None


_REPEAT_IN_CACHE = (
    "`execution_order` is {order}, which holds a layer more than once, and a cache has one place for the keys and "
    "values of a layer. Pass `use_cache=False` and no `past_key_values`, to `generate` too."
)


def averages_loss_itself(plain_class: type[PreTrainedModel]) -> bool:
    """Whether a forward divides its loss by the Trainer's count of labels.

    transformers' Trainer believes it of every forward that takes more arguments than it names. Where it is not so, a
    step of several micro-batches would add up their losses instead of averaging them.
    """
    try:
        source = inspect.getsource(inspect.unwrap(plain_class.forward))
    except OSError:  # no source at hand
        return True
    return re.search(r"loss_function\((?:[^()]|\([^()]*\))*\*\*\w+", source) is not None


_EXECUTION_ORDER_DOC = """
        execution_order (`str`, `list[int]` or `torch.LongTensor` of shape `(positions,)`, *optional*):
            Overrides the order for this call, in training too: `"sequential"`, `"arbitrary"` or layer indices. The
            outputs hold the order that ran.

        exit_threshold (`float`), exit_criterion (`str`), exit_patience (`int`), *optional*:
            Of a classifier in evaluation: override the configuration's fields of these names for this call. Examples
            whose answer is sure enough leave the batch (with `exit_threshold="off"` none does); the outputs hold
            `num_layers_run`. Logits, and the loss if there are labels, are of the hidden states with which each
            example left.

        layer_budget (`int` or `"off"`, *optional*):
            Of a classifier with a layer controller: how many layers each example runs, from 1 to the length of the
            execution order: those that the controller finds best for it, in the order's sequence. It overrides the
            configuration's field, and with `"off"` none chooses. The outputs hold `num_layers_run`. In training mode
            the controller learns, from a budget that is drawn unless it is given.

        Raises:
            `ValueError`: if the order is not valid, the layers were cut by hand, or a label is outside the classes.
                Labels on an accelerator are not checked. Also if examples are to leave early or
                choose layers where they cannot.
"""


def _with_execution_order(signature: inspect.Signature) -> inspect.Signature:
    """A signature with the argument: the Trainer keeps the columns of a dataset that a forward's signature names."""
    parameters = list(signature.parameters.values())
    names = ("execution_order", *_CHOICES)
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    has_kwargs = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    at = len(parameters) - has_kwargs
    return signature.replace(parameters=[*parameters[:at], *added, *parameters[at:]])


@contextmanager
def explained_length(model: Any, order: list[int]) -> Iterator[None]:
    """Says of some families that they run no more layers than they have: they note something by the position.

    Of a tower, some models take hidden states by the position. Where there are more or fewer, they find none.
    """
    num_layers, tower = len(model.free_layers), model.config.tower
    try:
        yield
    except (IndexError, TypeError) as error:
        is_longer = isinstance(error, IndexError) and len(order) > num_layers
        is_other = tower is not None and len(order) != num_layers and (is_longer or "'NoneType'" in str(error))
        if torch.compiler.is_compiling() or not (is_longer or is_other):
            raise
        most = f"no more than these ({error}). Shorten the order"
        if is_other:
            most = (
                f"neither more nor fewer ({error}), since it takes hidden states of its {tower} tower by the position."
                " Pass an order of as many"
            )
        raise ValueError(
            f"`execution_order` has {len(order)} layers, and {type(model).__name__}, which has {num_layers}, can run "
            f"{most}."
        ) from error


def check_run(model: PreTrainedModel, run: Run) -> None:
    """Whether the forward took all layers of the order from its list, and in this way."""
    if run.num_given != len(run.order):
        took = "no layer" if run.num_given == 0 else f"{run.num_given} of the {len(run.order)} layers of the order"
        raise ValueError(
            f"The forward of {type(model).__name__} took {took} by iterating its list of layers, so it does not "
            "follow the execution order. The layers of this model cannot run in any order; take another family."
        )


def _check_labels(labels: torch.Tensor | None, config: Any) -> None:
    if labels is None:
        return
    num_labels, problem_type = config.num_labels, config.problem_type
    # On an accelerator, reading the labels would make every step wait. In a graph or under torch.func it cannot be
    # done
    if labels.device.type != "cpu" or num_labels < 2 or labels.numel() == 0 or torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(labels):
        return
    kinds = {True: "multi_label_classification", False: "single_label_classification"}
    kind = problem_type or kinds[labels.is_floating_point()]  # as transformers takes them
    if kind == "multi_label_classification" and (labels == -100).any():
        raise ValueError(
            "`labels` of several classes an example hold -100, which would count as a target like any other; each "
            "is a number from 0 to 1. Leave examples without labels out of the dataset."
        )
    if kind != "single_label_classification":
        return
    outside = labels[((labels < 0) | (labels >= num_labels)) & (labels != -100)]
    if len(outside) > 0:
        raise ValueError(
            f"`labels` holds {outside[0].item()}, but this model has {num_labels} classes; labels are integers "
            f"from 0 to {num_labels - 1}, or -100 to be ignored. Set `num_labels` to the dataset's."
        )
