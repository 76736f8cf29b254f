# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Tries out on a small copy what a family's layers do: whether orders work, and which maps write into the stream.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .families import TESTED_FAMILIES
from .layer_lists import find_layers
from .layer_program import LayerProgram, run_program, same_kind_of_list
from .small_copy import on_small_copy


logger = logging.get_logger(__name__)
SWITCH = "HF_LAYERSHUFFLE_CHECK_FAMILIES"


# --- Whether a family follows execution orders ---


_TRIED: set[str] = set()


def check_untested_family(plain_class: type[PreTrainedModel], config: Any) -> None:
    """Tries out execution orders on a small copy of a model whose family the tests do not cover, once a process.

    `HF_LAYERSHUFFLE_CHECK_FAMILIES=0` in the environment skips it.

    Raises:
        `ValueError`: if the layers do not follow an execution order.
    """
    family = str(config.plain_model_type)
    if family in TESTED_FAMILIES or family in _TRIED or os.environ.get(SWITCH) == "0":
        return
    name = plain_class.__name__
    try:
        fault = on_small_copy(plain_class, config, order_fault)
        found = "A small copy of it followed two execution orders exactly."
    except ValueError as error:
        fault = None
        found = f"It could not be tried out: {error}. Compare an order with a model whose layers stand so."
    if fault is not None:
        raise ValueError(
            f"{name} cannot run its layers in any order: {fault}. Take a model of another family, or set {SWITCH}=0 "
            "to use it all the same."
        )
    _TRIED.add(family)
    logger.warning("'%s' is a family that was not tested with free layer order. %s", family, found)


def order_fault(model: Any, inputs: dict) -> str | None:
    """What is wrong with a plain model whose layers run as a program, beside one whose list was rebuilt.

    None if nothing is.
    """
    path = find_layers(model)
    layers = list(model.get_submodule(path).children())
    like = model.get_submodule(path)
    sequential = list(range(len(layers)))
    _outputs(model, inputs)  # what fails here has nothing to do with orders
    for order in (sequential, sequential[::-1]):
        try:
            model.set_submodule(path, same_kind_of_list(like, [layers[index] for index in order]))
            expected = _outputs(model, inputs)
            program = LayerProgram.mark(same_kind_of_list(like, layers))
            model.set_submodule(path, program)
            taken: list[nn.Module] = []
            with run_program(program, _noted((layers[index] for index in order), taken)):
                actual = _outputs(model, inputs)
        except Exception as error:
            return f"in the execution order {order} it fails ({type(error).__name__}: {error})"
        if len(taken) != len(order):
            return f"its forward takes {len(taken) or 'none'} of {len(order)} layers by iterating their list"
        if not _are_same(expected, actual):
            return f"in the execution order {order} it computes something else than with layers that stand so"
    return None


def _noted(layers: Iterable[nn.Module], taken: list[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        taken.append(layer)
        yield layer


def _outputs(model: PreTrainedModel, inputs: dict) -> list[torch.Tensor]:
    options = {"use_cache": False} if getattr(model.config, "use_cache", None) else {}
    # For whatever draws random numbers, such as masks. `torch.manual_seed` would seed accelerators too
    torch.default_generator.manual_seed(0)
    return _tensors(model(**inputs, **options))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for each in values for tensor in _tensors(each)]


def _are_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


# --- Which maps write into the residual stream ---


class _LayerSeen(Exception):
    """Ends a forward when its first layer was called."""


_FOUND: dict[Any, tuple[str, ...]] = {}


def residual_writers(plain_class: type[PreTrainedModel], config: Any) -> tuple[str, ...]:
    """Names, within a layer, of the linear maps, convolutions too, whose output is added to the residual stream.

    They are found on a small copy. All maps as wide as the stream are set to zero, and given back their weights one by
    one in the order in which they run. One that changes the layer's output then writes into the stream, and is set to
    zero again. In a layer with normalisation before its parts, what is left is the identity; with normalisation after
    them, two normalisations of the input.

    Raises:
        `ValueError`: if none are found, or something else writes into the stream too, with the reason.
    """
    kinds = {name: value for name, value in config.to_dict().items() if isinstance(value, (bool, str))}
    key = (plain_class, tuple(sorted(kinds.items())))
    if key not in _FOUND:
        _FOUND[key] = on_small_copy(plain_class, config, _writers_in)
    if not _FOUND[key]:
        raise ValueError("no linear map of its layers is added to the residual stream, or not such maps alone")
    return _FOUND[key]


def _writers_in(model: Any, inputs: dict) -> tuple[str, ...]:
    layer = next(model.get_submodule(find_layers(model)).children())
    return _writers_of(layer, *_first_call(model, inputs, layer))


def _first_call(model: PreTrainedModel, inputs: dict, layer: nn.Module) -> tuple[tuple, dict]:
    """How the model calls a layer: with which arguments."""
    seen: list[tuple[tuple, dict]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args, kwargs))
        raise _LayerSeen

    hook = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        _outputs(model, inputs)
    except _LayerSeen:
        pass
    finally:
        hook.remove()
    if not seen:
        raise ValueError("the forward does not call its layers")
    return seen[0]


def _writers_of(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[str, ...]:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    width = hidden_states.shape[-1]
    maps: dict[str, nn.Module] = {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, Conv1D)) and _width(module) == width
    }
    called = _order_of_calls(layer, maps, args, kwargs)
    weights = {name: [each.clone() for each in maps[name].parameters()] for name in called}

    def set_to_zero(name: str) -> None:
        for parameter in maps[name].parameters():
            parameter.zero_()

    def output() -> torch.Tensor:
        value = layer(*args, **kwargs)
        return value[0] if isinstance(value, tuple) else value

    for name in called:
        set_to_zero(name)
    without, writers = output(), []
    if not _adds_nothing(layer, hidden_states, without, args, kwargs):
        return ()
    for name in called:
        for parameter, weight in zip(maps[name].parameters(), weights[name]):
            parameter.copy_(weight)
        if not torch.allclose(output(), without, atol=1e-5):
            writers.append(name)
            set_to_zero(name)
    return tuple(writers)


def _adds_nothing(
    layer: nn.Module, hidden_states: torch.Tensor, output: torch.Tensor, args: tuple, kwargs: dict
) -> bool:
    """Whether a layer is the identity, or normalises each token by itself as layers do that normalise afterwards."""
    if torch.allclose(output, hidden_states, atol=1e-5):
        return True
    changed = 2 * hidden_states
    changed[:, -1] = changed[:, -1].roll(1, dims=-1)  # another token does not concern the first
    value = layer(changed, *args[1:], **kwargs) if args else layer(**{**kwargs, "hidden_states": changed})
    value = value[0] if isinstance(value, (tuple, list)) else value
    return torch.allclose(value[:, 0], output[:, 0], atol=1e-3)


def _width(module: Any) -> int:
    names = ("out_features", "out_channels", "nf")
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _order_of_calls(layer: nn.Module, maps: dict[str, nn.Module], args: tuple, kwargs: dict) -> list[str]:
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
        for name, module in maps.items()
    ]
    layer(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(called))
