# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Forward passes in which each example runs as many layers as the budget allows: those that the layer controller finds
best for it (ADMN, NeurIPS 2025).

Examples that chose a layer run it together. In training all run all layers, and those that an example did not choose
change nothing in it; so the controller learns what they would have changed.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .early_exit import OFF
from .free_layers import is_sharded
from .layer_controller import choose_layers, draw_budget, gumbel_noise, straight_through_gates
from .layer_program import Run, StandIn
from .row_subsets import RowSubsetRun, hidden_states_of


_NO_BUDGET = "Leave `layer_budget` out, in the configuration too, or"


def learns_to_choose(model: Any, given: Any) -> bool:
    """Whether a forward pass trains the layer controller."""
    return model.training and given != OFF and getattr(model, "layer_controller", None) is not None


def may_have_budget(model: Any, given: Any) -> bool:
    """Whether the call, the configuration or training says that examples choose their layers."""
    return given is not None or model.config.layer_budget is not None or learns_to_choose(model, given)


def layer_budget(model: Any, given: Any, exits: dict[str, Any], order: list[int], is_classifier: bool) -> int | None:
    """How many layers each example runs in a forward pass: what the call says, else in evaluation the configuration.

    Args:
        model: The model.
        given: The call's `layer_budget`: an integer, "off", or None where it does not say.
        exits: The call's rule of leaving early, which counts instead of the configuration's budget.
        order: The execution order.
        is_classifier: Whether the model has a head that classifies.

    Returns:
        None where no example chooses: all run all layers, or leave early, or in training the budget is to be drawn.

    Raises:
        `ValueError`: if the budget is not valid, or the model cannot choose.
    """
    threshold, patience = exits["exit_threshold"], exits["exit_patience"]
    is_off = isinstance(threshold, str) and threshold == OFF
    exits_early = patience is not None or (threshold is not None and not is_off)
    if given == OFF and isinstance(given, str):
        return None
    if given is not None and exits_early:
        raise ValueError(
            f"`layer_budget` is {given}, and the call also says when examples leave early; give one of them."
        )
    budget = given
    if budget is None and is_classifier and not exits_early and not model.training:
        budget = model.config.layer_budget
    if budget is None:
        return None
    if exits["exit_criterion"] is not None:
        raise ValueError(
            f"`exit_criterion` is {exits['exit_criterion']!r} without a rule to leave by, and `layer_budget` is "
            f"{budget!r}; leave `exit_criterion` out, or pass `exit_threshold` instead of a budget."
        )
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= len(order):
        raise ValueError(
            f"`layer_budget` is {budget!r}; it must be an integer from 1 to {len(order)}, the number of layers of the "
            f"execution order, or '{OFF}' for all of them."
        )
    _check_model(model, is_classifier)
    return budget


def _check_model(model: Any, is_classifier: bool) -> None:
    name = type(model).__name__
    if not is_classifier:
        raise ValueError(
            f"{name} has no head that classifies, and a layer controller belongs to a classifier. {_NO_BUDGET} take a "
            "class such as LayerShuffleViTForImageClassification."
        )
    if getattr(model, "layer_controller", None) is None:
        raise ValueError(
            f"This {name} has no layer controller to choose layers by. {_NO_BUDGET} train one: load the model with "
            "`layer_controller=True`, and train it with LayerShuffleTrainer (--layer_controller True)."
        )
    if is_sharded(model):
        raise ValueError(
            "This model's parameters are sharded over several processes, which would wait for each other where their "
            f"examples choose different layers. {_NO_BUDGET} gather the model in one process."
        )


if TYPE_CHECKING:
    _Run = Run
else:
    _Run = object


class _ChoosingRun(_Run):
    """What runs share in which the layer controller chooses."""

    model: Any
    inputs: dict[str, Any]
    is_chosen: torch.Tensor  # booleans of shape `(batch_size, positions)`
    rows: torch.Tensor | None = None  # the examples that run the layer which is called; None for all

    def scores_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores of the positions, of shape `(batch_size, positions)`."""
        if hidden_states.ndim != 3:
            raise ValueError(
                f"{type(self.model).__name__} has hidden states of shape {tuple(hidden_states.shape)}, and a layer "
                f"controller reads `(batch_size, tokens, hidden_size)`. {_NO_BUDGET} take another family."
            )
        scores = self.model.layer_controller(hidden_states, self.inputs.get("attention_mask"))
        return scores[:, self.order]

    def depth_vector(self, position: int, device: torch.device) -> torch.Tensor | None:
        """The vectors of the examples that run a layer, of shape `(rows, 1, depth_embedding_dim)`: for each example,
        the layers that it ran count."""
        if self.depth_embedding is None:
            return None
        ranks = self.is_chosen[:, :position].sum(dim=1)
        ranks = ranks if self.rows is None else ranks[self.rows]
        return self.depth_embedding(ranks.clamp(max=self.depth_embedding.num_embeddings - 1))[:, None]


class BudgetRun(_ChoosingRun, RowSubsetRun):
    """A run in evaluation: each example runs the best layers for it, in the execution order's sequence.

    Args:
        model: The model, a classifier with a layer controller.
        order: Index of the layer at each position.
        budget: How many layers each example runs, from 1 to the length of the order. Where the order holds a layer
            twice, both have its score, and the first is taken first.
        inputs: All inputs of the forward by name.
        forward: The plain forward; takes inputs by name.
    """

    what = "examples that choose their layers"
    way_out = _NO_BUDGET

    def __init__(self, model: Any, order: list[int], budget: int, inputs: dict[str, Any], forward: Callable[..., Any]):
        super().__init__(model, order, inputs, forward)
        self.budget = budget
        self._rows: tuple[torch.Tensor, ...]

    def begin(self, hidden_states: torch.Tensor) -> None:
        super().begin(hidden_states)
        self.is_chosen = choose_layers(self.scores_of(hidden_states), self.budget)
        counts = self.is_chosen.sum(dim=0).tolist()
        self._rows = self.is_chosen.T.nonzero()[:, 1].split(counts)

    def rows_at(self, position: int) -> torch.Tensor | None:
        rows = self._rows[position]
        self.rows = None if len(rows) == self.batch_size else rows
        return self.rows

    def learn_form(self, *called: Any) -> None:
        self.rows, rows = None, self.rows
        super().learn_form(*called)
        self.rows = rows


class BudgetTrainingRun(_ChoosingRun, Run):
    """A run in which the layer controller learns, and nothing else: layers run as in evaluation, without dropout.

    Its budget and its noise are drawn by the model's stream, as execution orders are.

    Args:
        model: The model, a classifier with a layer controller.
        order: Index of the layer at each position.
        budget: How many layers each example runs; None to draw it.
        inputs: All inputs of the forward by name.
    """

    def __init__(self, model: Any, order: list[int], budget: int | None, inputs: dict[str, Any]):
        super().__init__(model.free_layers, order, model._depth_embedding)
        _check_model(model, is_classifier=True)
        self.model = model
        self.inputs = inputs
        self._rng = model.execution_order_stream.next_generator(True)
        self.budget = draw_budget(self._rng, len(order)) if budget is None else budget
        self.gates: torch.Tensor
        self.program = [_GatedCall(layer, self, position) for position, layer in enumerate(self.program)]

    def begin(self, hidden_states: torch.Tensor) -> None:
        scores = self.scores_of(hidden_states)
        noise = gumbel_noise(self._rng, *scores.shape)
        self.gates = straight_through_gates(scores + noise.to(scores.device), self.budget)
        self.is_chosen = self.gates.detach() > 0.5
        self.num_layers_run = self.is_chosen.sum(dim=1)

    @contextmanager
    def mode(self, model: Any) -> Iterator[None]:
        """Context in which all modules inside the model are in evaluation mode."""
        modules = [module for module in model.modules() if module is not model and module.training]
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module in modules:
                module.training = True


class _GatedCall(StandIn):
    """A layer that changes the examples which chose it, and has a gradient for all."""

    def __init__(self, layer: Any, run: BudgetTrainingRun, position: int):
        super().__init__(layer)
        self.run = run
        self.position = position

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states, args, kwargs = hidden_states_of(args, kwargs)
        if self.position == 0:
            self.run.begin(hidden_states)
        output = self.layer(hidden_states, *args, **kwargs)
        self.run.position_logits.clear()  # positions are those of the examples, each its own
        after = output[0] if isinstance(output, (tuple, list)) else output
        gate = self.run.gates[:, self.position].view(-1, *[1] * (after.ndim - 1))
        # With a gate of 0 or 1 it gives its first or second argument, bit for bit
        after = torch.lerp(hidden_states.to(after.dtype), after, gate.to(after.dtype))
        return (after, *output[1:]) if isinstance(output, (tuple, list)) else after
