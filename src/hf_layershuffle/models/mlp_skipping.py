# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Layers without their MLP (FFN-SkipLLM, arXiv 2404.03865): attention runs, and the MLP adds nothing.

This file travels to the Hub beside the weights, so it imports nothing from this package.
"""

import copy
import inspect
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn


# The MLP of a layer, by the names that families give it
MLP_NAMES = ("mlp", "ffn", "feed_forward")


class _Same(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if any(isinstance(each, torch.Tensor) for each in (*args, *kwargs.values())):
            raise ValueError("its MLP gets more than hidden states")  # what else it does with these is not known
        return hidden_states


class _Zeros(_Same):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(super().forward(hidden_states, *args, **kwargs))


def check_positions(positions: Any) -> bool:
    """Whether a value is None or a collection of distinct positions."""
    if positions is None:
        return True
    if not isinstance(positions, (list, tuple)) or len(set(map(str, positions))) != len(positions):
        return False
    return all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in positions)


def without_mlp(layer: nn.Module) -> nn.Module:
    """A layer whose MLP adds zero to the hidden states. It shares all else with `layer`, which stays as it is.

    What a family does after adding, such as the norm of BERT, still happens. A compiled layer runs uncompiled.

    Raises:
        `ValueError`: if the layer has no MLP by a name that is known, its MLP gets more than hidden states, as in
            BLOOM, or its forward was replaced. Also, when it first runs, if the MLP gives more, or adds them itself.
    """
    whole: Any = getattr(layer, "_orig_mod", layer)
    if vars(whole).get("_is_without_mlp", False):
        return whole
    if "forward" in vars(whole):
        raise ValueError(
            f"The forward of this {type(whole).__name__} was replaced, as by `device_map`, so its MLP cannot be left "
            "out. Load the model without `device_map`, or set `config.skipped_mlps` to None."
        )
    found = next((name for name in MLP_NAMES if isinstance(getattr(whole, name, None), nn.Module)), None)
    if found is not None:
        _check_mlp(whole, getattr(whole, found), found)
        return _checked(whole, _with_modules(whole, {found: _Zeros()}))
    inner, outer = (getattr(whole, name, None) for name in ("intermediate", "output"))
    if isinstance(inner, nn.Module) and isinstance(getattr(outer, "dense", None), nn.Module):
        # The last map of the MLP is in the module that adds it, as in BERT
        _check_mlp(whole, inner, "intermediate")
        parts = {"intermediate": _Same(), "output": _with_modules(outer, {"dense": _Zeros()})}
        return _checked(whole, _with_modules(whole, parts))
    names = ", ".join(name for name, _ in whole.named_children())
    raise ValueError(
        f"A {type(whole).__name__} has no MLP by the name of {', '.join(MLP_NAMES)} or `intermediate` and `output`, "
        f"but {names}. Set `config.skipped_mlps` to None."
    )


def _with_modules(module: Any, modules: dict[str, nn.Module]) -> Any:
    """A shallow copy of a module in which some of its modules are others."""
    changed = copy.copy(module)
    changed.__dict__["_modules"] = {**module._modules, **modules}
    return changed


_CANNOT = "A {layer} does not run without its MLP: {why}. Set `config.skipped_mlps` to None."


def _check_mlp(layer: Any, mlp: nn.Module, name: str) -> None:
    """Refuses an MLP of which is known, before it runs, that it does more than map hidden states."""
    if isinstance(mlp, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(_CANNOT.format(layer=type(layer).__name__, why=f"its `{name}` is several modules"))
    needed = [
        each
        for each in inspect.signature(mlp.forward).parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise ValueError(_CANNOT.format(layer=type(layer).__name__, why="its MLP gets more than hidden states"))


def _checked(whole: Any, changed: Any) -> Any:
    """The layer without its MLP, which looks at what it gives until this is known to be more than nothing."""
    changed._is_without_mlp = True
    if not getattr(whole, "_runs_without_mlp", False):
        changed.forward = partial(_checked_forward, whole, changed)
    return changed


def _checked_forward(whole: Any, changed: Any, *args: Any, **kwargs: Any) -> Any:
    name = type(whole).__name__
    try:
        output = type(whole).forward(changed, *args, **kwargs)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(_CANNOT.format(layer=name, why=error)) from error
    before = args[0] if args else kwargs.get("hidden_states")
    after = output[0] if isinstance(output, (tuple, list)) else output
    if _differ(before):  # else there is nothing to be seen
        if not _differ(after):
            why = "it then gives the same for all tokens, since its MLP adds the hidden states itself"
            raise ValueError(_CANNOT.format(layer=name, why=why))
        whole._runs_without_mlp = True
    return output


def _differ(hidden_states: Any) -> bool:
    """Whether not all tokens are the same."""
    if not isinstance(hidden_states, torch.Tensor) or hidden_states.numel() == 0:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(hidden_states):  # whose values cannot be read
        return False
    tokens = hidden_states.flatten(0, -2)
    return not bool((tokens == tokens[0]).all())


def check_against_order(positions: Collection[int] | None, num_layers_run: int) -> None:
    """Checks that MLPs to leave out are of positions that there are.

    Raises:
        `ValueError`: if one is beyond the last.
    """
    beyond = [each for each in positions or () if each >= num_layers_run]
    if beyond:
        raise ValueError(
            f"`skipped_mlps` holds position {beyond[0]}, and the execution order has the positions 0 to "
            f"{num_layers_run - 1}. Leave it out."
        )
