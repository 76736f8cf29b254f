# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Early exit: a forward pass in which each example stops at the first layer whose answer is sure enough.

A model with free layer order has an answer after every layer, by its own head. The program of the pass gives layers
that run on the examples that are still in it alone, so time is saved and not only counted.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .exit_rule import HALTING, ExitRule
from .free_layers import is_sharded
from .halting_head import mean_and_first_token
from .layer_program import ConstantCall, run_program
from .row_subsets import RowSubsetRun


_NO_EXIT = "Leave `exit_threshold` and `exit_patience` out, in the configuration too, or"
_LIMITS = ("exit_threshold", "exit_patience")
_OF_CONFIGURATION = (*_LIMITS, "layer_budget")  # by each of which examples run through fewer layers
FEWER_FIELDS = (*_OF_CONFIGURATION, "skipped_mlps")  # of a configuration, by each of which fewer layers or MLPs run
OFF = "off"  # of a call: the configuration's rule does not count


def chooses_by_configuration(config: Any) -> bool:
    """Whether a configuration says that fewer layers or MLPs run."""
    return any(getattr(config, name, None) is not None for name in FEWER_FIELDS)


@contextmanager
def all_layers(model: Any, with_mlps: bool = False) -> Iterator[None]:
    """Context in which a model's configuration lets no example leave early or choose layers.

    Args:
        model: The model.
        with_mlps: Whether no MLP is left out either.
    """
    config = model.config
    names = FEWER_FIELDS if with_mlps else _OF_CONFIGURATION
    kept = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    try:
        for name in kept:
            setattr(config, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def may_exit(model: Any, given: dict[str, Any]) -> bool:
    """Whether examples leave early or MLPs are left out, by the call or the configuration: a call not to compile."""
    config = {} if model.training else vars(model.config)
    return bool(model._skipped_mlps) or any(
        given[name] is not None or config.get(name) is not None for name in _LIMITS
    )


def exit_rule(model: Any, given: dict[str, Any], is_classifier: bool) -> ExitRule | None:
    """The rule of a forward pass: what the call gives, else the configuration's, which is for evaluation only.

    Args:
        model: The model.
        given: `exit_threshold`, `exit_criterion` and `exit_patience` of the call, None where it does not say.
        is_classifier: Whether the model has a head that classifies.

    Returns:
        None where all examples run through all layers.

    Raises:
        `ValueError`: if a call in training mode asks for it, the model does not choose one class of several, its
            parameters are sharded, or a value is not valid.
    """
    config = model.config
    says = any(given[name] is not None for name in _LIMITS)
    threshold, patience = (given[name] if says else getattr(config, name) for name in _LIMITS)
    has_threshold = threshold is not None and threshold != OFF and (says or not model.training)
    if given["exit_criterion"] is not None and not has_threshold:
        raise ValueError("`exit_criterion` is given without `exit_threshold`; pass that too, a number in [0, 1].")
    if threshold == OFF and patience is not None:
        raise ValueError(f"`exit_threshold` is '{OFF}' and `exit_patience` is {patience}; leave one of them out.")
    is_of_others = not says and (model.training or not is_classifier)  # an encoder shares a classifier's configuration
    if is_of_others or threshold == OFF or (threshold is None and patience is None):
        return None
    rule = ExitRule(threshold, given["exit_criterion"] or config.exit_criterion, patience)
    if model.training:
        raise ValueError("Examples leave early in evaluation only, and the model is in training mode: `model.eval()`.")
    _check_model(model, is_classifier)
    if threshold is not None and rule.criterion == HALTING and getattr(model, "halting_head", None) is None:
        raise ValueError(
            f"`exit_criterion` is '{HALTING}', and this {type(model).__name__} has no halting head. Train one "
            "(`halting_head=True`, --early_exit pondernet), or take another criterion."
        )
    return rule


def _check_model(model: Any, is_classifier: bool) -> None:
    if not is_classifier:
        raise ValueError(
            f"{type(model).__name__} has no head that classifies, by which examples leave early. {_NO_EXIT} take a "
            "class such as LayerShuffleViTForImageClassification."
        )
    check_chooses_one_class(model, _NO_EXIT)
    if is_sharded(model):
        raise ValueError(
            "This model's parameters are sharded over several processes, which would wait for each other where their "
            f"examples leave at different layers. {_NO_EXIT} gather the model in one process."
        )


def check_chooses_one_class(model: Any, remedy: str) -> None:
    """Raises a `ValueError`, which ends in a remedy, unless a model chooses one class of several."""
    config = model.config
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if config.num_labels < 2 or problem != "single_label_classification":
        raise ValueError(
            f"Examples leave early by the probability of one class of several; this model has {config.num_labels} "
            f"outputs and `config.problem_type` {problem!r}. {remedy} take another model."
        )


class ExitingRun(RowSubsetRun):
    """A run in which examples leave: each layer runs on those that are still there.

    Args:
        model: The model, a classifier.
        order: Index of the layer at each position.
        rule: When an example leaves.
        inputs: All inputs of the forward by name.
        forward: The plain forward; takes inputs by name.
    """

    what = "examples that leave early"
    way_out = _NO_EXIT

    def __init__(
        self, model: Any, order: list[int], rule: ExitRule, inputs: dict[str, Any], forward: Callable[..., Any]
    ):
        super().__init__(model, order, inputs, forward)
        self.rule = rule
        self.staying: torch.Tensor  # indices of the examples that are still there
        self._answers: torch.Tensor
        self._in_a_row: torch.Tensor
        self._pooled: torch.Tensor  # of the last hidden states of each example, for a halting head
        self._log_stays: torch.Tensor  # logarithm of the probability of not having left

    def begin(self, hidden_states: torch.Tensor) -> None:
        super().begin(hidden_states)
        self.staying = torch.arange(self.batch_size, device=hidden_states.device)
        self._answers = torch.full_like(self.num_layers_run, -1)
        self._in_a_row = torch.zeros_like(self.num_layers_run)
        if self._asks_head:
            self._pooled = mean_and_first_token(hidden_states, self.inputs.get("attention_mask"))
            self._log_stays = torch.zeros(self.batch_size, device=hidden_states.device)

    @property
    def _asks_head(self) -> bool:
        return self.rule.patience is None and self.rule.criterion == HALTING

    def rows_at(self, position: int) -> torch.Tensor | None:
        return None if len(self.staying) == self.batch_size else self.staying

    def is_over(self, position: int) -> bool:
        return len(self.staying) == 0

    def note(self, hidden_states: torch.Tensor, rows: torch.Tensor | None, position: int) -> None:
        """Lets go those of the examples that ran a layer which are sure enough after it."""
        super().note(hidden_states, rows, position)
        if position == len(self.program) - 1:  # no more layers, so no question
            return
        if self._asks_head:
            leaves = self._is_halted(hidden_states, rows)
        elif self.rule.patience is None:
            leaves = self.rule.is_sure(self._classify(hidden_states, rows))
        else:
            leaves = self._is_repeated(self._classify(hidden_states, rows).argmax(-1))
        self.staying = self.staying[~leaves]

    def _is_halted(self, hidden_states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        staying, before = self.staying, self._pooled[self.staying]
        self._pooled[staying] = mean_and_first_token(hidden_states, self.inputs_at(rows).get("attention_mask"))
        self._log_stays[staying] += self.model.halting_head.log_stays(before, self._pooled[staying])
        return -self._log_stays[staying].expm1() > (self.rule.threshold or 0.0)

    def _is_repeated(self, answers: torch.Tensor) -> torch.Tensor:
        staying = self.staying
        in_a_row = torch.where(answers == self._answers[staying], self._in_a_row[staying] + 1, 1)
        self._answers[staying], self._in_a_row[staying] = answers, in_a_row
        return in_a_row >= (self.rule.patience or 1)

    # --- The answer after a layer: the plain forward, with these hidden states in the place of its layers ---

    def _classify(self, hidden_states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        model = self.model
        if model._reads_inputs_after_layers is None and len(hidden_states) > 1:
            logits = self._logits(hidden_states, self.inputs_at(rows))
            if self._has_one_input:
                with_one = self._logits(hidden_states, self.inputs_at(slice(0, 1)), is_answer=False)
                model._reads_inputs_after_layers = not torch.equal(logits, with_one)
            return logits
        # The embeddings, which are computed again, then cost next to nothing
        needs_all = model._reads_inputs_after_layers is not False or not self._has_one_input  # masks are pooled by
        return self._logits(hidden_states, self.inputs_at(rows if needs_all else slice(0, 1)))

    @property
    def _has_one_input(self) -> bool:
        tensors = {name for name, value in self.inputs.items() if isinstance(value, torch.Tensor)}
        return tensors == {self.model.main_input_name}

    def _logits(self, hidden_states: torch.Tensor, inputs: dict[str, Any], is_answer: bool = True) -> torch.Tensor:
        constant = ConstantCall(self.model.free_layers[0], hidden_states, bool(self.gives_tuple))
        with run_program(self.model.free_layers, [constant]):
            logits = self.forward(self.model, **inputs, return_dict=True).logits
        if is_answer and (logits.ndim != 2 or len(logits) != len(hidden_states)):
            raise ValueError(
                f"{type(self.model).__name__} gives logits of shape {tuple(logits.shape)} for {len(hidden_states)} "
                f"examples; an early exit is for classifiers that give one answer an example. {_NO_EXIT} take another."
            )
        return logits
