# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The layer program: what a forward pass of any encoder finds when it asks its list of layers for the next one.

Every encoder of transformers says `for layer in self.layers`. So the list is the one place that decides which layer
runs next. Its class becomes [`LayerProgram`], which follows the program of the running forward pass. The names of
parameters, hooks, the state dict and gradient checkpointing do not change, and the forward stays transformers' own.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import CompileableContextVar

from .families import check_family


# {id of a list of layers: what it gives to the forward that is running}, for each thread and task by itself
_RUNNING = CompileableContextVar("layershuffle_program")


class LayerProgram(nn.ModuleList):
    """A list of layers. In a forward pass that runs a program ([`run_program`]), a loop over it gets those of the
    program."""

    def __iter__(self) -> Iterator[nn.Module]:
        program = running_program(self)
        return super().__iter__() if program is None else iter(program)

    def __getitem__(self, index: int | slice) -> Any:
        # `for layer in self.layers[: config.num_hidden_layers]`
        if isinstance(index, slice) and running_program(self) is not None and index.start in (None, 0):
            if index.step in (None, 1) and (index.stop is None or index.stop >= len(self)):
                return self  # and not a list, which would ask a generator for all layers before one has run
        return super().__getitem__(index)

    @classmethod
    def mark(cls, layers: nn.ModuleList) -> "LayerProgram":
        """Makes a list of layers follow programs, in place."""
        marked: Any = layers
        if not isinstance(layers, cls):
            marked.__class__ = cls
        return marked


def running_program(layers: nn.ModuleList | list) -> Iterable | None:
    """What the running forward pass gets from `layers`; None where no program runs."""
    if is_torchdynamo_compiling() and not _RUNNING.compiling:
        return None  # dynamo cannot trace `ContextVar.get`
    return (_RUNNING.get() or {}).get(id(layers))


class ByPosition(list):
    """What a configuration says of each layer, as the kind of its attention. Some forwards read it by the position in
    their loop. In one that runs in an execution order, they find what belongs to the layer at that position."""

    def __getitem__(self, index: Any) -> Any:
        order: Any = running_program(self)
        is_position = order is not None and isinstance(index, int) and 0 <= index < len(order)
        return super().__getitem__(order[index] if is_position else index)


def run_by_position(model: Any, order: list[int]) -> AbstractContextManager:
    """Context in which a configuration's list of the kinds of the layers is read in an execution order."""
    if order == list(range(len(model.free_layers))):
        return nullcontext()
    config = _nearest_config(model, model.layers_path)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or isinstance(getattr(type(config), "layer_types", None), property):
        return nullcontext()  # a property says the same of all layers
    if not isinstance(kinds, ByPosition):
        config.layer_types = ByPosition(kinds)
    return run_program(config.layer_types, order)


class run_program:
    """Context in which a forward pass finds, in the place of the layers of `layers`, those of `program`.

    Args:
        layers: The model's list of layers.
        program: Layers, or what stands in for them. A generator is asked for the next one after the last one ran.
            Layers with a depth projection or a position head are given by [`Run.at`], which tells them their position.
    """

    def __init__(self, layers: LayerProgram | ByPosition, program: Iterable):
        self.layers = layers
        self.program = program

    def __enter__(self) -> None:
        is_first = is_torchdynamo_compiling() and not _RUNNING.compiling
        outer = None if is_first else _RUNNING.get()
        self.token = _RUNNING.set({**(outer or {}), id(self.layers): self.program})

    def __exit__(self, *exception: object) -> None:
        _RUNNING.reset(self.token)


class Run:
    """One forward pass in an execution order: the program, and what its layers hand over beside the hidden states.

    Args:
        layers: The model's list of layers.
        order: Index of the layer at each position.
        depth_embedding: The vector of each position, for layers that are told theirs.
    """

    def __init__(self, layers: LayerProgram, order: list[int], depth_embedding: nn.Embedding | None = None):
        self.order = order
        self.num_given = 0  # layers that the forward has taken
        self.position_logits: list[torch.Tensor] = []
        self.depth_embedding = depth_embedding
        self._depth_vectors: tuple[torch.Tensor, ...] | None = None
        by_name: dict[str, Any] = layers._modules
        self.program = [self.at(by_name[str(index)], position) for position, index in enumerate(order)]

    def __iter__(self) -> Iterator:
        if not is_torchdynamo_compiling():
            return self._counted()
        self.num_given = len(self.program)
        return iter(self.program)

    def _counted(self) -> Iterator:
        for layer in self.program:
            self.num_given += 1
            yield layer

    def at(self, layer: nn.Module, position: int) -> "nn.Module | PositionedCall":
        """A layer as the loop shall call it: told its position, if it is one of [`positioned_layer_class`]."""
        # Not by its class: a compiled layer is of another
        return PositionedCall(layer, position, self) if hasattr(layer, "position_head") else layer

    def depth_vector(self, position: int, device: torch.device) -> torch.Tensor | None:
        """The vector of a position, of shape `(depth_embedding_dim,)`. Positions beyond the depth share the last."""
        if self.depth_embedding is None:
            return None
        if self._depth_vectors is None:
            positions = torch.arange(self.depth_embedding.num_embeddings, device=device)
            self._depth_vectors = self.depth_embedding(positions).unbind(0)
        return self._depth_vectors[min(position, len(self._depth_vectors) - 1)]


class StandIn:
    """Stands in for a layer in the loop of a forward. What the loop reads of the layer, it finds here too."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """For loops that call a layer's forward."""
        stand_in: Any = self
        return stand_in(*args, **kwargs)


class PositionedCall(StandIn):
    """A layer at a position. It is told the position's vector, and hands its position logits to the [`Run`]."""

    def __init__(self, layer: nn.Module, position: int, run: Run):
        super().__init__(layer)
        self.position = position
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs.pop("hidden_states")
        # By position: reentrant gradient checkpointing loses the gradient of what comes by keyword
        vector = self.run.depth_vector(self.position, hidden_states.device)
        output = self.layer(hidden_states, vector, *args[1:], **kwargs)
        if self.layer.position_head is None:
            return output
        self.run.position_logits.append(output[-1])
        # A layer that gives one tensor gives two now
        return output[0] if len(output) == 2 else output[:-1]


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
    ):
        candidates = [name for name in candidates if is_better(name)] or candidates
    if len(candidates) != 1:
        found = f"{len(candidates)} lists of layers ({', '.join(candidates)})" if candidates else "no list of layers"
        raise ValueError(
            f"{type(model).__name__} has {found}, of as many equal modules as its configuration has layers; a free "
            "execution order needs exactly one."
        )
    _check_layers_are_alike(model, list(model.get_submodule(candidates[0]).children()))
    return candidates[0]


# As transformers names the parts of models for several kinds of inputs
_PATHS_OF_TOWERS = {"vision": ("vision_",), "text": ("text_", "language_model"), "audio": ("audio_",)}
TOWERS = tuple(_PATHS_OF_TOWERS)


def _in_tower(model: nn.Module, candidates: list[str], tower: str | None) -> list[str]:
    """The lists of one tower, of a model with several."""
    found = {
        name: [path for path in candidates if any(word in path for word in words)]
        for name, words in _PATHS_OF_TOWERS.items()
    }
    found = {name: paths for name, paths in found.items() if paths}
    if tower is None and len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} has several towers ({', '.join(found)}), and only one can run in a free "
            f"execution order; say which by `tower='{next(iter(found))}'`, or take a class of that tower alone."
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
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    layers = list(module.children())
    if len({type(layer) for layer in layers}) != 1 or not list(layers[0].children()):
        return False
    shapes: dict[str, torch.Size] = {}
    for layer in layers:  # stages of a hierarchy are of one class, but of different sizes
        for key, parameter in layer.named_parameters():
            if shapes.setdefault(key, parameter.shape) != parameter.shape:
                return False
    config = _nearest_config(model, name)
    return any_depth or len(layers) in {getattr(config, depth, None) for depth in _DEPTHS}


def _nearest_config(model: nn.Module, name: str) -> Any:
    """The configuration of the nearest module above the one of this name that has one."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            return config
    return None


# Attributes that may differ between layers without making another model of them: of training only, or of caches
_FREE_ATTRIBUTES = ("training", "drop_prob", "layer_idx", "layer_id", "layer_index")


def check_places(layers: nn.ModuleList, order: list[int], kinds: list | None = None) -> None:
    """Refuses to build a model whose layers stand in another order, where a layer depends on where it was built.

    Such a layer has other attributes by its index, such as the kind of its attention. It would be another one when
    the model is loaded again.

    Args:
        layers: The layers as they were built.
        order: Index of the layer at each position of the model to build.
        kinds: What the configuration says of each layer, which it says of the same layer in the model to build.

    Raises:
        `ValueError`: naming the attribute.
    """
    attributes = [_attributes(layer) for layer in layers.children()]
    for position, index in enumerate(order[: len(attributes)]):
        for name in sorted({name for name, _ in attributes[index].items() ^ attributes[position].items()}):
            said = {(str(kind), each.get(name)) for kind, each in zip(kinds or [], attributes)}
            if kinds is not None and len(said) == len({kind for kind, _ in said}):
                continue  # it follows from the kind, which moves with the layer
            raise ValueError(
                f"Layer {index} cannot stand at position {position}: its '{name}' is not that of layer "
                f"{position}, and a saved model gives it by the position. Run the order by `execution_order` instead."
            )


def _attributes(layer: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: True for name, _ in layer.named_parameters()}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            is_kept = isinstance(value, (bool, int, float, str)) and not name.startswith("_")
            if is_kept and name not in _FREE_ATTRIBUTES:
                found[f"{path}.{name}"] = value
    return found
