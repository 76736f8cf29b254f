# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Where a model's list of layers is, and whether its layers can change places.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from .families import check_family


def find_layers(model: nn.Module, any_depth: bool = False, tower: str | None = None) -> str:
    """Path of the list of layers in a model: the list of as many equal modules as the configuration has layers.

    The configuration that counts is that of the nearest module above the list that has one. Where several lists fit,
    the one whose layers support gradient checkpointing is taken. If several do, the one in the model's encoder is. Of
    a model with several towers, `tower` or `config.tower` says which.

    Args:
        any_depth: Whether the list may be shorter or longer than the configuration says.
        tower: Name of the tower, such as "vision".

    Raises:
        `ValueError`: if there is no such list, or more than one; or if the family is known to have no free order.
    """
    config = getattr(model, "config", None)
    check_family(getattr(config, "model_type", None), type(model).__name__)
    candidates = [name for name, module in model.named_modules() if _is_list_of_layers(model, name, module, any_depth)]
    candidates = [name for name in candidates if not any(name.startswith(f"{other}.") for other in candidates)]
    candidates = _in_tower(model, candidates, tower or getattr(config, "tower", None))
    for is_better in (
        lambda name: isinstance(next(model.get_submodule(name).children()), GradientCheckpointingLayer),
        lambda name: "encoder" in name,
        lambda name: name == "timm_model.blocks",
    ):
        candidates = [name for name in candidates if is_better(name)] or candidates
    if len(candidates) != 1:
        found = f"{len(candidates)} lists of layers ({', '.join(candidates)})" if candidates else "no list of layers"
        of_timm = getattr(getattr(model, "timm_model", None), "default_cfg", {}).get("architecture")
        name = f"{type(model).__name__} ('{of_timm}')" if of_timm else type(model).__name__
        raise ValueError(
            f"{name} has {found}, of as many equal modules as its configuration has layers; a free "
            "execution order needs exactly one. Take another encoder, such as a ViT."
        )
    _check_layers_are_alike(model, list(model.get_submodule(candidates[0]).children()))
    return candidates[0]


# As transformers names the parts of models for several kinds of inputs
_PATHS_OF_TOWERS = {"vision": ("vision_", "visual."), "text": ("text_", "language_model"), "audio": ("audio_",)}
TOWERS = tuple(_PATHS_OF_TOWERS)


def _in_tower(model: nn.Module, candidates: list[str], tower: str | None) -> list[str]:
    """The lists of one tower, of a model with several."""
    found = {
        name: [path for path in candidates if any(word in path for word in words)]
        for name, words in _PATHS_OF_TOWERS.items()
    }
    found = {name: paths for name, paths in found.items() if paths}
    if tower is None and len(found) > 1:
        choices = " or ".join(f"`tower='{name}'`" for name in found)
        raise ValueError(
            f"{type(model).__name__} has several towers ({', '.join(found)}), and only one can run in a free "
            f"execution order; say which by {choices}, or take a class of that tower alone."
        )
    if tower is not None and tower not in found:
        raise ValueError(
            f"`tower` is '{tower}', and {type(model).__name__} has {', '.join(map(repr, found)) or 'no towers'}; set "
            f"it to {'one of these' if found else 'None'}."
        )
    return candidates if tower is None else found[tower]


def _check_layers_are_alike(model: nn.Module, layers: list[nn.Module]) -> None:
    """Refuses a family whose layers depend on which of them runs first, or at which index."""
    first, *others = ({name for name, _ in layer.named_parameters() if "lora_" not in name} for layer in layers)
    rest = set().union(*others)
    shared = sorted(first - rest) if others else []
    if shared and rest <= first:  # else it is of another kind, such as one MLP before layers of several experts
        raise ValueError(
            f"The first layer of {type(model).__name__} alone holds '{shared[0]}', from which it computes something "
            "for all layers. So they cannot run in any order; take a model of another family."
        )
    num_shared = getattr(getattr(model, "config", None), "num_kv_shared_layers", None)
    if num_shared:
        raise ValueError(
            f"The last {num_shared} layers of {type(model).__name__} take the keys and values of earlier ones "
            "(`num_kv_shared_layers`), so they cannot run in any order. Take a model whose layers have their own."
        )


_DEPTHS = ("num_hidden_layers", "encoder_layers", "num_layers", "n_layers", "n_layer", "depth")


def _is_list_of_layers(model: nn.Module, name: str, module: nn.Module, any_depth: bool) -> bool:
    config = nearest_config(model, name)
    is_timm = str(getattr(config, "model_type", "")).endswith("timm_wrapper")  # whose configuration says no depth
    if not isinstance(module, (nn.ModuleList, nn.Sequential) if is_timm else nn.ModuleList) or len(module) == 0:
        return False
    layers = list(module.children())
    if len({type(layer) for layer in layers}) != 1 or not list(layers[0].children()):
        return False
    shapes: dict[str, torch.Size] = {}
    for layer in layers:  # stages of a hierarchy are of one class, but of different sizes
        for key, parameter in layer.named_parameters():
            if shapes.setdefault(key, parameter.shape) != parameter.shape:
                return False
    return any_depth or is_timm or len(layers) in {getattr(config, depth, None) for depth in _DEPTHS}


def nearest_config(model: nn.Module, name: str) -> Any:
    """The configuration of the nearest module above the one of this name that has one."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            return config
    return None


def number_layers(layers: nn.Module) -> None:
    """Tells each layer its index, which is its place in a cache of keys and values."""
    for index, layer in enumerate(layers.children()):
        for module in layer.modules():
            for name in ("layer_idx", "layer_id"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, index)


# Attributes that may differ between layers without making another model of them: of training only, or of caches
_FREE_ATTRIBUTES = ("training", "gradient_checkpointing", "drop_prob", "layer_idx", "layer_id", "layer_index")


def layers_of_config(model_class: Any, config: PreTrainedConfig, path: str) -> nn.Module:
    """The list of layers of the model that loads by a configuration once it is saved, on the meta device.

    Args:
        model_class: Class of the model.
        config: Configuration of the class.
        path: Path of the list of layers.

    Raises:
        `ValueError`: if no model can be built, with the reason.
    """
    try:
        # Some parts draw random numbers on the CPU even if the model is built on the meta device
        with torch.random.fork_rng(devices=[]), torch.device("meta"), no_init_weights():
            model = model_class(type(config).from_dict(config.to_dict()))
    except Exception as error:  # whatever a configuration of this depth breaks
        raise ValueError(
            f"A {model_class.__name__} of these layers could not be loaded ({type(error).__name__}: {error}). Run the "
            "order by `execution_order` instead."
        ) from error
    return model.get_submodule(path)


def check_places(layers: nn.Module, places: Iterable[tuple[int, int]], rebuilt: nn.Module) -> None:
    """Refuses to build a model whose layers stand in another order, where a layer depends on where it was built.

    Such a layer has other attributes by its index, such as the kind of its attention. It would be another one when
    the model is loaded again.

    Args:
        layers: The layers as they were built.
        places: Positions in the new model, each with the index of the layer that stands there.
        rebuilt: The layers of the new model as its configuration builds them.

    Raises:
        `ValueError`: naming the attribute.
    """
    old, new = ([_attributes(layer) for layer in each.children()] for each in (layers, rebuilt))
    # What is equal in all layers may have been set by hand, such as activation checkpointing
    differing = {name for each in (old, new) for found in each for name, _ in found.items() ^ each[0].items()}
    for position, index in places:
        for name in sorted(differing):
            if old[index].get(name) != new[position].get(name):
                raise ValueError(
                    f"Layer {index} cannot stand at position {position}: its '{name}' is not that of layer "
                    f"{position} of a saved model. Run the order by `execution_order` instead."
                )


def _attributes(layer: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: True for name, _ in layer.named_parameters()}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            is_kept = isinstance(value, (bool, int, float, str)) and not name.startswith("_")
            if is_kept and name not in _FREE_ATTRIBUTES:
                found[f"{path}.{name}".removeprefix(".")] = value
    return found
