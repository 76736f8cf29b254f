# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The layer program: what a forward pass of any encoder finds when it asks its list of layers for the next one.

Every encoder of transformers says `for layer in self.layers`. So the list is the one place that decides which layer
runs next. Its class becomes [`LayerProgram`], which follows the program of the running forward pass. The names of
parameters, hooks, the state dict and gradient checkpointing do not change, and the forward stays transformers' own.

This file travels to the Hub beside the weights, so it imports nothing from this package.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import CompileableContextVar


if TYPE_CHECKING:
    _List = nn.ModuleList
else:
    _List = object

# {id of a list of layers: what it gives to the forward that is running}, for each thread and task by itself
_RUNNING = CompileableContextVar("layershuffle_program")


class _FollowsProgram(_List):
    # Of models of timm: whether the list is as long as the program, by which they count hidden states, and what runs
    # a layer so that its activations are computed again in the backward pass
    follows_length: bool = False
    checkpoint: Callable | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        program = running_program(self)
        return super().__iter__() if program is None else iter(program)

    def __len__(self) -> int:
        program = running_program(self) if self.follows_length else None
        return len(program.order) if isinstance(program, Run) else super().__len__()

    def __getitem__(self, index: int | slice) -> Any:
        # `for layer in self.layers[: config.num_hidden_layers]`
        if isinstance(index, slice) and running_program(self) is not None and index.start in (None, 0):
            if index.step in (None, 1) and (index.stop is None or index.stop >= len(self)):
                return self  # and not a list, which would ask a generator for all layers before one has run
        return super().__getitem__(index)

    @staticmethod
    def mark(layers: nn.Module) -> "LayerProgram":
        """Makes a list of layers follow programs, in place."""
        marked: Any = layers
        if not isinstance(layers, _FollowsProgram):
            marked.__class__ = SequentialProgram if isinstance(layers, nn.Sequential) else LayerProgram
        return marked


class LayerProgram(_FollowsProgram, nn.ModuleList):
    """A list of layers. In a forward pass that runs a program ([`run_program`]), a loop over it gets those of the
    program."""


class SequentialProgram(_FollowsProgram, nn.Sequential):  # type: ignore[misc]
    """A [`LayerProgram`] that is called itself, as in timm's vision transformers."""


def same_kind_of_list(layers: nn.Module, modules: Iterable[nn.Module]) -> nn.Module:
    """A new list of these modules, of the class of `layers`."""
    made: Any = type(layers)
    return made(*modules) if isinstance(layers, nn.Sequential) else made(modules)


def running_program(layers: nn.ModuleList) -> Iterable | None:
    """What the running forward pass gets from `layers`; None where no program runs."""
    if is_torchdynamo_compiling() and not _RUNNING.compiling:
        return None  # dynamo cannot trace `ContextVar.get`
    return (_RUNNING.get() or {}).get(id(layers))


class run_program:
    """Context in which a forward pass finds, in the place of the layers of `layers`, those of `program`.

    Args:
        layers: The model's list of layers.
        program: Layers, or what stands in for them. A generator is asked for the next one after the last one ran.
            Layers with a depth projection or a position head are given by [`Run.at`], which tells them their position.
    """

    def __init__(self, layers: LayerProgram, program: Iterable):
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
        self.checkpoint = layers.checkpoint
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

    def at(self, layer: nn.Module, position: int) -> Any:
        """A layer as the loop shall call it: told its position, if it is one of [`positioned_layer_class`]."""
        called: Any = layer if self.checkpoint is None else CheckpointedCall(layer, self.checkpoint)
        # Not by its class: a compiled layer is of another
        return PositionedCall(called, position, self) if hasattr(layer, "position_head") else called

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

    layer: Any

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """For loops that call a layer's forward."""
        stand_in: Any = self
        return stand_in(*args, **kwargs)


class CheckpointedCall(StandIn):
    """A layer whose activations are computed again in the backward pass of training."""

    def __init__(self, layer: nn.Module, checkpoint: Callable):
        super().__init__(layer)
        self.checkpoint = checkpoint

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.layer.training or not torch.is_grad_enabled():
            return self.layer(*args, **kwargs)
        return self.checkpoint(partial(self.layer, **kwargs), *args)


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


def find_layers(model: nn.Module, any_depth: bool = False) -> str:
    """Path of the list of layers in a model: the list of as many equal modules as the configuration has layers.

    The configuration that counts is that of the nearest module above the list that has one. Where several lists fit,
    the one whose layers support gradient checkpointing is taken. If several do, the one in the model's image tower is.

    Args:
        any_depth: Whether the list may be shorter or longer than the configuration says.

    Raises:
        `ValueError`: if there is no such list, or more than one.
    """
    candidates = [name for name, module in model.named_modules() if _is_list_of_layers(model, name, module, any_depth)]
    candidates = [name for name in candidates if not any(name.startswith(f"{other}.") for other in candidates)]
    for is_better in (
        lambda name: isinstance(next(model.get_submodule(name).children()), GradientCheckpointingLayer),
        lambda name: "vision" in name,
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


def _check_layers_are_alike(model: nn.Module, layers: list[nn.Module]) -> None:
    """Refuses a family whose layers depend on which of them runs first, or at which index."""
    first, *others = ({name for name, _ in layer.named_parameters() if "lora_" not in name} for layer in layers)
    shared = sorted(first - set().union(*others)) if others else []
    if shared:
        raise ValueError(
            f"The first layer of {type(model).__name__} alone holds '{shared[0]}', from which it computes something "
            "for all layers. So they cannot run in any order; take a model of another family."
        )
    if getattr(getattr(model, "config", None), "model_type", None) in ("yolos", "layershuffle_yolos"):
        raise ValueError(
            f"{type(model).__name__} adds position embeddings between its layers, one for each index, so they cannot "
            "run in any order. Take another encoder, such as a ViT."
        )


_DEPTHS = ("num_hidden_layers", "encoder_layers", "num_layers", "n_layers", "n_layer", "depth")


def _is_list_of_layers(model: nn.Module, name: str, module: nn.Module, any_depth: bool) -> bool:
    config = _nearest_config(model, name)
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


def check_places(layers: nn.ModuleList, order: list[int]) -> None:
    """Refuses to build a model whose layers stand in another order, where a layer depends on where it was built.

    Such a layer has other attributes by its index, such as the kind of its attention. It would be another one when
    the model is loaded again.

    Args:
        layers: The layers as they were built.
        order: Index of the layer at each position of the model to build.

    Raises:
        `ValueError`: naming the attribute.
    """
    attributes = [_attributes(layer) for layer in layers.children()]
    for position, index in enumerate(order):
        if position < len(attributes) and attributes[index] != attributes[position]:
            differing = min(name for name, _ in attributes[index].items() ^ attributes[position].items())
            raise ValueError(
                f"Layer {index} cannot stand at position {position}: its '{differing}' is not that of layer "
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


# First words of the names of linear maps that do not write into the residual stream, though they may be as wide as it
_READERS = ("q", "k", "v", "query", "key", "value", "gate", "up", "fc1", "lin1", "wi", "Wi", "w1")


def residual_writers(layer: nn.Module, hidden_size: int) -> list[nn.Linear]:
    """The linear maps of a layer whose output is added to the residual stream: the last of attention and of the MLP.

    They are as wide as the hidden states, and not named as an input of attention or the first map of an MLP.
    """
    return [
        module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == hidden_size
        and not name.startswith(("depth_projection", "position_head"))
        and name.rpartition(".")[2].split("_")[0] not in _READERS
        and "intermediate" not in name
    ]
