# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The layer program: what a forward pass of any encoder finds when it asks its list of layers for the next one.

Every encoder of transformers says `for layer in self.layers`. So the list is the one place that decides which layer
runs next. Its class becomes [`LayerProgram`], which follows the program of the running forward pass. The names of
parameters, hooks, the state dict and gradient checkpointing do not change, and the forward stays transformers' own.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import CompileableContextVar

from .layer_lists import nearest_config
from .mlp_skipping import without_mlp


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
    kinds = None if order == list(range(len(model.free_layers))) else mark_kinds(model)
    return nullcontext() if kinds is None else run_program(kinds, order)


def mark_kinds(model: Any) -> ByPosition | None:
    """The configuration's list of the kinds of the layers, made to follow execution orders; None if there is none."""
    config = nearest_config(model, model.layers_path)
    kinds = getattr(config, "layer_types", None)
    # A property says the same of all layers
    if not isinstance(kinds, list) or isinstance(getattr(type(config), "layer_types", None), property):
        return None
    if not isinstance(kinds, ByPosition):
        kinds = config.layer_types = ByPosition(kinds)
    return kinds


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
        drop_path_rate: Probability in `[0, 1)` with which an example skips a layer.
        skipped_mlps: Positions at which a layer runs without its MLP.
    """

    def __init__(
        self,
        layers: LayerProgram,
        order: list[int],
        depth_embedding: nn.Embedding | None = None,
        drop_path_rate: float = 0.0,
        skipped_mlps: Collection[int] = (),
    ):
        self.order = order
        self.drop_path_rate = drop_path_rate
        self.skipped_mlps = skipped_mlps
        self.num_examples: int | None = None  # of the batch, where it is known
        self._path_weights: tuple[torch.Tensor, ...] = ()
        self.num_given = 0  # layers that the forward has taken
        self.position_logits: list[torch.Tensor] = []
        self.depth_embedding = depth_embedding
        self.checkpoint = layers.checkpoint
        self._depth_vectors: tuple[torch.Tensor, ...] | None = None
        by_name: dict[str, Any] = layers._modules
        self.program = [self.at(by_name[str(index)], position) for position, index in enumerate(order)]

    def mode(self, model: Any) -> AbstractContextManager:
        """Context for the forward of the model, for runs that need its modules in another mode."""
        return nullcontext()

    def __iter__(self) -> Iterator:
        if not is_torchdynamo_compiling():
            return self._counted()
        self.num_given = len(self.program)
        return iter(self.program)

    def _counted(self) -> Iterator:
        self.num_given = 0  # BigBird goes through its layers before it runs them
        for layer in self.program:
            self.num_given += 1
            yield layer

    def at(self, layer: nn.Module, position: int) -> Any:
        """A layer as the loop shall call it: told its position, if it is one of [`positioned_layer_class`]."""
        layer = without_mlp(layer) if position in self.skipped_mlps else layer
        called: Any = layer if self.checkpoint is None else CheckpointedCall(layer, self.checkpoint)
        # Not by its class: a compiled layer is of another
        called = PositionedCall(called, position, self) if hasattr(layer, "position_head") else called
        return called if self.drop_path_rate == 0 else DroppedPathCall(called, position, self)

    def path_weight(self, position: int, output: torch.Tensor) -> torch.Tensor:
        """The weight of a layer's output at a position, as from [`path_weights`], of shape `(batch_size, 1, ...)`."""
        if not self._path_weights:  # of all positions at once, which costs a device no more than of one
            self._path_weights = path_weights(self.drop_path_rate, len(self.order), len(output), output.device)
        return self._path_weights[position].view(-1, *[1] * (output.ndim - 1)).to(output.dtype)

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


class ConstantCall(StandIn):
    """Gives the same hidden states to whatever it is called with.

    As the only one of a program it makes a forward go on behind its layers with these.
    """

    def __init__(self, layer: nn.Module, hidden_states: torch.Tensor, gives_tuple: bool):
        super().__init__(layer)
        self.output = (hidden_states, None) if gives_tuple else hidden_states

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


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


def path_weights(
    rate: float, num_layers: int, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """Which examples skip which layers (stochastic depth, arXiv 1603.09382).

    Args:
        rate: The probability in `[0, 1)` with which an example skips a layer.
        num_layers: Number of layers that run.
        batch_size: Number of examples.
        device: Where to draw.

    Returns:
        A float32 tensor of shape `(batch_size,)` for each layer: 0 for an example that skips it, and `1 / (1 - rate)`
        for the others, by which the change of their hidden states is multiplied. So the mean change is the layer's.
    """
    return torch.empty(num_layers, batch_size, device=device).bernoulli_(1 - rate).div_(1 - rate).unbind(0)


class DroppedPathCall(StandIn):
    """A layer that some examples skip. What it gives beside the hidden states is of all of them, and so are the
    hidden states that a model collects, which it takes from the layer itself."""

    def __init__(self, layer: nn.Module, position: int, run: Run):
        super().__init__(layer)
        self.position = position
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        output = self.layer(*args, **kwargs)
        first = output[0] if isinstance(output, (tuple, list)) else output
        if self.run.num_examples not in (None, len(first)) or first.shape != hidden_states.shape:
            raise ValueError(
                f"`drop_path_rate` is {self.run.drop_path_rate}, by which examples skip layers, and this model has "
                f"{self.run.num_examples} examples and hidden states of shape {tuple(first.shape)}, which are not one "
                "row an example. Set it to 0."
            )
        # With a weight of 0 it gives its first argument, bit for bit
        first = torch.lerp(hidden_states.to(first.dtype), first, self.run.path_weight(self.position, first))
        return (first, *output[1:]) if isinstance(output, (tuple, list)) else first
