# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A forward pass in which a layer runs on some of the examples of the batch only.

The hidden states of the others stay as they are. So time is saved, and not only counted.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

from .layer_program import Run, StandIn, run_program


class RowSubsetRun(Run):
    """A [`Run`] whose layers run on some of the examples. A subclass says on which.

    Args:
        model: The model.
        order: Index of the layer at each position.
        inputs: All inputs of the forward by name.
        forward: The plain forward; takes inputs by name.

    Attributes:
        batch_size: Number of examples, once the first layer is called.
        num_layers_run: How many layers each example ran through so far, int64 of shape `(batch_size,)`.
        gives_tuple: Whether a layer gives a tuple, of which the hidden states are the first; None: not known yet.

    Raises:
        `ValueError`: if the inputs ask for what layers that run on some examples cannot give, and if the layers give
            more than hidden states to each other.
    """

    # For messages: what examples do, and what to do instead
    what: ClassVar[str] = "examples that skip layers"
    way_out: ClassVar[str] = "Run all layers, or"

    def __init__(self, model: Any, order: list[int], inputs: dict[str, Any], forward: Callable[..., Any]):
        super().__init__(model.free_layers, order, model._depth_embedding, skipped_mlps=model._skipped_mlps)
        for name in ("output_hidden_states", "output_attentions"):
            if inputs.get(name) or (inputs.get(name) is None and getattr(model.config, name, False)):
                raise ValueError(f"`{name}` is True, and {self.what} have none. {self.way_out} set it to False.")
        if inputs.get("past_key_values") is not None:
            raise ValueError(
                f"`past_key_values` is given, and a cache is of all layers. {self.way_out} pass no cache."
            )
        self.model = model
        self.inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_CLASSES}
        self.forward = forward
        self.gives_tuple: bool | None = model._layers_give_tuple
        self.batch_size: int
        self.num_layers_run: torch.Tensor
        self._calls_of_one: list[tuple] = []
        self._handed: list[torch.Tensor] = []  # what the last layer gave beside hidden states

    # --- What a subclass says ---

    def begin(self, hidden_states: torch.Tensor) -> None:
        """Called once, with what the first layer gets, of shape `(batch_size, tokens, hidden_size)`."""
        self.batch_size = len(hidden_states)
        self.num_layers_run = torch.zeros(self.batch_size, dtype=torch.int64, device=hidden_states.device)

    def rows_at(self, position: int) -> torch.Tensor | None:
        """Indices of the examples that run the layer at a position, in ascending order; None for all."""
        raise NotImplementedError

    def note(self, hidden_states: torch.Tensor, rows: torch.Tensor | None, position: int) -> None:
        """Told what the layer at a position gave the examples that ran it, of shape `(rows, tokens, hidden_size)`."""
        self.num_layers_run[slice(None) if rows is None else rows] += 1

    def is_over(self, position: int) -> bool:
        """Whether no example will run a layer from this position on; asked once the layer before has run."""
        return False

    # --- The program ---

    def _counted(self) -> Iterator:
        self.num_given = len(self.program)
        for position, layer in enumerate(self.program):
            if position > 0 and self.is_over(position):
                return
            yield _RowsCall(layer, self, position)

    def run_rows(self, call: "_RowsCall", hidden_states: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the layer at a position gives: of the examples that do not run it, what it got."""
        rows = self.rows_at(call.position)
        if rows is not None and self.gives_tuple is None:
            self.learn_form(call, hidden_states, args, kwargs)
        if rows is not None and len(rows) == 0:
            return (hidden_states, None) if self.gives_tuple else hidden_states
        if any(given is handed for given in _leaves([args, kwargs]) for handed in self._handed):
            raise ValueError(
                f"The layers of {type(self.model).__name__} give more than hidden states to each other, so there can "
                f"be no {self.what}. {self.way_out} take another family."
            )
        args, kwargs = self.arguments_of(rows, call.position, args, kwargs)
        output = call.layer(hidden_states if rows is None else hidden_states[rows], *args, **kwargs)
        self.position_logits.clear()  # those of some examples
        self.gives_tuple = self.model._layers_give_tuple = isinstance(output, (tuple, list))
        after, rest = (output[0], output[1:]) if self.gives_tuple else (output, ())
        self._handed = [each for each in _leaves(rest) if isinstance(each, torch.Tensor)]
        self.note(after, rows, call.position)
        after = after if rows is None else hidden_states.index_copy(0, rows, after)
        return (after, *rest) if self.gives_tuple else after

    def learn_form(self, call: "_RowsCall", hidden_states: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        """Runs the first layer for all, once a model, to see what its layers give: the first may have no examples."""
        output = call.layer(hidden_states, *args, **kwargs)
        self.gives_tuple = self.model._layers_give_tuple = isinstance(output, (tuple, list))

    # --- What a layer is called with beside its hidden states ---

    def inputs_at(self, rows: torch.Tensor | slice | None) -> dict[str, Any]:
        """The inputs of some examples."""
        return self.inputs if rows is None else inputs_of_rows(self.inputs, rows, self.batch_size)

    def arguments_of(
        self, rows: torch.Tensor | None, position: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """The further arguments of a layer, of some examples."""
        if rows is None or not any(isinstance(each, torch.Tensor) for each in _leaves([args, kwargs])):
            return args, kwargs
        if not self._calls_of_one:
            self._call_with_one()
        of_one = self._calls_of_one[position]
        return self._kept(rows, args, of_one[0]), self._kept(rows, kwargs, of_one[1])

    def _call_with_one(self) -> None:
        """Notes how the layers are called for one example, which tells the dimension of the examples from others that
        are as long."""
        calls = self._calls_of_one
        recorders = [_Recorder(self.model.free_layers[0], calls, self.gives_tuple) for _ in self.program]
        with run_program(self.model.free_layers, recorders):
            self.forward(self.model, **self.inputs_at(slice(0, 1)), return_dict=True)

    def _kept(self, rows: torch.Tensor, value: Any, one: Any) -> Any:
        if isinstance(value, dict):
            known = one if isinstance(one, dict) else {}
            return {name: self._kept(rows, part, known.get(name)) for name, part in value.items()}
        if isinstance(value, (tuple, list)):
            ones = one if isinstance(one, (tuple, list)) and len(one) == len(value) else [None] * len(value)
            return type(value)([self._kept(rows, part, each) for part, each in zip(value, ones)])
        is_tensor = isinstance(value, torch.Tensor) and value.ndim > 0
        if not is_tensor or len(value) == 1 or (isinstance(one, torch.Tensor) and one.shape == value.shape):
            return value
        # A mask may be missing for one example, which alone has no padding
        repeats = len(one) if isinstance(one, torch.Tensor) and one.ndim > 0 else 1
        if len(value) != self.batch_size * repeats:
            raise ValueError(self._not_by_example(value))
        if repeats == 1:
            return value[rows]
        by_example = value.unflatten(0, (self.batch_size, repeats))  # heads behind the examples, as in BLOOM
        if not torch.equal(by_example[0], one):
            raise ValueError(self._not_by_example(value))
        return by_example[rows].flatten(0, 1)

    def _not_by_example(self, value: torch.Tensor) -> str:
        return (
            f"The layers of {type(self.model).__name__} get a tensor of shape {tuple(value.shape)} for "
            f"{self.batch_size} examples, which is not known to be of which, so there can be no {self.what}. "
            f"{self.way_out} take another family."
        )


# Inputs that the answer does not depend on
NOT_FOR_CLASSES = ("labels", "num_items_in_batch", "output_hidden_states", "output_attentions", "return_dict")


def inputs_of_rows(inputs: dict[str, Any], rows: torch.Tensor | slice, batch_size: int) -> dict[str, Any]:
    """The inputs of some examples of a batch, or of some several times. What is one row for all stays as it is.

    Args:
        inputs: By name. Tensors have the examples first, or one row, such as positions of shape `(1, tokens)`.
        rows: Indices of the examples.
        batch_size: Number of examples.

    Raises:
        `ValueError`: if a tensor has another number of rows.
    """
    chosen = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or (len(value) == 1 and batch_size != 1):
            continue
        if len(value) != batch_size:
            raise ValueError(
                f"`{name}` has the shape {tuple(value.shape)}, and there are {batch_size} examples; where examples "
                "leave early, choose layers or learn when to leave, it must have a row for each, or one for all."
            )
        chosen[name] = value[rows]
    return chosen


def _leaves(value: Any) -> list:
    """What nested arguments hold, in a fixed order."""
    parts = list(value.values()) if isinstance(value, dict) else value
    return [leaf for part in parts for leaf in _leaves(part)] if isinstance(parts, (tuple, list)) else [value]


def hidden_states_of(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple, dict[str, Any]]:
    """The hidden states that a layer is called with, and its further arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


class _RowsCall(StandIn):
    """Runs a layer on the examples that run it."""

    def __init__(self, layer: Any, run: RowSubsetRun, position: int):
        super().__init__(layer)
        self.run = run
        self.position = position

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states, args, kwargs = hidden_states_of(args, kwargs)
        if self.position == 0:
            self.run.begin(hidden_states)
        return self.run.run_rows(self, hidden_states, args, kwargs)


class _Recorder(StandIn):
    """Notes how a layer is called, and gives its input on."""

    def __init__(self, layer: Any, calls: list[tuple], gives_tuple: bool | None):
        super().__init__(layer)
        self.calls = calls
        self.gives_tuple = gives_tuple

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states, args, kwargs = hidden_states_of(args, kwargs)
        self.calls.append((args, kwargs))
        return (hidden_states, None) if self.gives_tuple else hidden_states
