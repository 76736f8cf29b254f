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

from .exit_rule import ExitRule
from .free_layers import is_sharded
from .layer_program import ConstantCall, Run, StandIn, run_program


_NO_EXIT = "Leave `exit_threshold` and `exit_patience` out, in the configuration too, or"
_LIMITS = ("exit_threshold", "exit_patience")
OFF = "off"  # of a call: the configuration's rule does not count


@contextmanager
def all_layers(model: Any) -> Iterator[None]:
    """Context in which a model's configuration lets no example leave early."""
    config = model.config
    kept = {name: getattr(config, name) for name in _LIMITS if getattr(config, name, None) is not None}
    try:
        for name in kept:
            setattr(config, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def may_exit(model: Any, given: dict[str, Any]) -> bool:
    """Whether examples leave early, by the call or the configuration, or MLPs are left out: then nothing is
    compiled."""
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
    return rule


def _check_model(model: Any, is_classifier: bool) -> None:
    config = model.config
    if not is_classifier:
        raise ValueError(
            f"{type(model).__name__} has no head that classifies, by which examples leave early. {_NO_EXIT} take a "
            "class such as LayerShuffleViTForImageClassification."
        )
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if config.num_labels < 2 or problem != "single_label_classification":
        raise ValueError(
            f"Examples leave early by the probability of one class of several; this model has {config.num_labels} "
            f"outputs and `config.problem_type` {problem!r}. {_NO_EXIT} take another model."
        )
    if is_sharded(model):
        raise ValueError(
            "This model's parameters are sharded over several processes, which would wait for each other where their "
            f"examples leave at different layers. {_NO_EXIT} gather the model in one process."
        )


class ExitingRun(Run):
    """A [`Run`] in which examples leave.

    Args:
        model: The model, a classifier.
        order: Index of the layer at each position.
        rule: When an example leaves.
        inputs: All inputs of the forward by name.
        forward: The plain forward; takes inputs by name.
    """

    def __init__(
        self, model: Any, order: list[int], rule: ExitRule, inputs: dict[str, Any], forward: Callable[..., Any]
    ):
        super().__init__(model.free_layers, order, model._depth_embedding, skipped_mlps=model._skipped_mlps)
        for name in ("output_hidden_states", "output_attentions"):
            if inputs.get(name) or (inputs.get(name) is None and getattr(model.config, name, False)):
                raise ValueError(
                    f"`{name}` is True, and examples that leave early have none. {_NO_EXIT} set it to False."
                )
        if inputs.get("past_key_values") is not None:
            raise ValueError(f"`past_key_values` is given, and a cache is of all layers. {_NO_EXIT} pass no cache.")
        self.model = model
        self.rule = rule
        self.inputs = {name: value for name, value in inputs.items() if name not in _NOT_FOR_CLASSES}
        self.forward = forward
        self.gives_tuple = False  # whether a layer gives a tuple, of which hidden states are the first
        self.staying: torch.Tensor  # indices of the examples that are still there
        self.num_layers_run: torch.Tensor
        self._answers: torch.Tensor
        self._in_a_row: torch.Tensor
        self._calls_of_one: list[tuple] = []
        self.handed: list[torch.Tensor] = []  # what the last layer gave beside hidden states

    def _counted(self) -> Iterator:
        self.num_given = len(self.program)
        for position, layer in enumerate(self.program):
            if position > 0 and len(self.staying) == 0:
                return
            yield _ExitingCall(layer, self, position)

    def begin(self, hidden_states: torch.Tensor) -> None:
        count, device = len(hidden_states), hidden_states.device
        self.batch_size = count
        self.staying = torch.arange(count, device=device)
        self.num_layers_run = torch.zeros(count, dtype=torch.int64, device=device)
        self._answers = torch.full_like(self.num_layers_run, -1)
        self._in_a_row = torch.zeros_like(self.num_layers_run)

    @property
    def are_all_there(self) -> bool:
        return len(self.staying) == self.batch_size

    def note(self, hidden_states: torch.Tensor, position: int) -> None:
        """Lets go those of the examples that ran a layer which are sure enough after it."""
        staying = self.staying
        self.num_layers_run[staying] += 1
        if position == len(self.program) - 1:  # no more layers, so no question
            return
        logits = self._classify(hidden_states)
        if self.rule.patience is None:
            leaves = self.rule.is_sure(logits)
        else:
            answers = logits.argmax(-1)
            in_a_row = torch.where(answers == self._answers[staying], self._in_a_row[staying] + 1, 1)
            self._answers[staying], self._in_a_row[staying] = answers, in_a_row
            leaves = in_a_row >= self.rule.patience
        self.staying = staying[~leaves]

    # --- The answer after a layer: the plain forward, with these hidden states in the place of its layers ---

    def _classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        model = self.model
        if model._reads_inputs_after_layers is None and len(hidden_states) > 1:
            logits = self._logits(hidden_states, self._inputs_of_staying())
            if self._has_one_input:
                with_one = self._logits(hidden_states, self._inputs_of_one(), is_answer=False)
                model._reads_inputs_after_layers = not torch.equal(logits, with_one)
            return logits
        # The embeddings, which are computed again, then cost next to nothing
        needs_all = model._reads_inputs_after_layers is not False or not self._has_one_input  # masks are pooled by
        return self._logits(hidden_states, self._inputs_of_staying() if needs_all else self._inputs_of_one())

    @property
    def _has_one_input(self) -> bool:
        tensors = {name for name, value in self.inputs.items() if isinstance(value, torch.Tensor)}
        return tensors == {self.model.main_input_name}

    def _logits(self, hidden_states: torch.Tensor, inputs: dict[str, Any], is_answer: bool = True) -> torch.Tensor:
        constant = ConstantCall(self.model.free_layers[0], hidden_states, self.gives_tuple)
        with run_program(self.model.free_layers, [constant]):
            logits = self.forward(self.model, **inputs, return_dict=True).logits
        if is_answer and (logits.ndim != 2 or len(logits) != len(hidden_states)):
            raise ValueError(
                f"{type(self.model).__name__} gives logits of shape {tuple(logits.shape)} for {len(hidden_states)} "
                f"examples; an early exit is for classifiers that give one answer an example. {_NO_EXIT} take another."
            )
        return logits

    def _inputs_of_staying(self) -> dict[str, Any]:
        return self.inputs if self.are_all_there else self._inputs_at(self.staying)

    def _inputs_of_one(self) -> dict[str, Any]:
        return self._inputs_at(slice(0, 1))

    def _inputs_at(self, index: Any) -> dict[str, Any]:
        # Every input of a classifier has the examples first
        return {
            name: value[index] if isinstance(value, torch.Tensor) else value for name, value in self.inputs.items()
        }

    # --- What a layer is called with beside its hidden states ---

    def of_staying(self, position: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The further arguments of a layer, of the examples that are still there."""
        if self.are_all_there or not any(isinstance(each, torch.Tensor) for each in _leaves([args, kwargs])):
            return args, kwargs
        if not self._calls_of_one:
            self._call_with_one()
        of_one = self._calls_of_one[position]
        return self._kept(args, of_one[0]), self._kept(kwargs, of_one[1])

    def _call_with_one(self) -> None:
        """Notes how the layers are called for one example, which tells the dimension of the examples from others that
        are as long."""
        calls = self._calls_of_one
        recorders = [_Recorder(self.model.free_layers[0], calls, self.gives_tuple) for _ in self.program]
        with run_program(self.model.free_layers, recorders):
            self.forward(self.model, **self._inputs_of_one(), return_dict=True)

    def _kept(self, value: Any, one: Any) -> Any:
        if isinstance(value, dict):
            known = one if isinstance(one, dict) else {}
            return {name: self._kept(part, known.get(name)) for name, part in value.items()}
        if isinstance(value, (tuple, list)):
            ones = one if isinstance(one, (tuple, list)) and len(one) == len(value) else [None] * len(value)
            return type(value)([self._kept(part, each) for part, each in zip(value, ones)])
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != self.batch_size:
            return value
        # A mask may be missing for one example, which alone has no padding
        is_same_for_all = isinstance(one, torch.Tensor) and one.shape == value.shape
        return value if is_same_for_all else value[self.staying]


# Inputs that the answer does not depend on
_NOT_FOR_CLASSES = ("labels", "num_items_in_batch", "output_hidden_states", "output_attentions", "return_dict")


def _leaves(value: Any) -> list:
    """What nested arguments hold, in a fixed order."""
    parts = list(value.values()) if isinstance(value, dict) else value
    return [leaf for part in parts for leaf in _leaves(part)] if isinstance(parts, (tuple, list)) else [value]


def _hidden_states_of(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple, dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


class _ExitingCall(StandIn):
    """Runs a layer on the examples that are still there. The hidden states of the others stay as they are."""

    def __init__(self, layer: Any, run: ExitingRun, position: int):
        super().__init__(layer)
        self.run = run
        self.position = position

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        hidden_states, args, kwargs = _hidden_states_of(args, kwargs)
        if self.position == 0:
            run.begin(hidden_states)
        if len(run.staying) == 0:  # of a forward that takes all layers before it runs one
            return (hidden_states, None) if run.gives_tuple else hidden_states
        if any(given is handed for given in _leaves([args, kwargs]) for handed in run.handed):
            raise ValueError(
                f"The layers of {type(run.model).__name__} give more than hidden states to each other, so examples "
                f"cannot leave early. {_NO_EXIT} take another family."
            )
        args, kwargs = run.of_staying(self.position, args, kwargs)
        are_all_there, staying = run.are_all_there, run.staying
        output = self.layer(hidden_states if are_all_there else hidden_states[staying], *args, **kwargs)
        run.position_logits.clear()  # those of fewer and fewer examples
        run.gives_tuple = isinstance(output, (tuple, list))
        after, rest = (output[0], output[1:]) if run.gives_tuple else (output, ())
        run.handed = [each for each in _leaves(rest) if isinstance(each, torch.Tensor)]
        run.note(after, self.position)
        after = after if are_all_there else hidden_states.index_copy(0, staying, after)
        return (after, *rest) if run.gives_tuple else after


class _Recorder(StandIn):
    """Notes what a layer is called with beside its hidden states."""

    def __init__(self, layer: Any, calls: list[tuple], gives_tuple: bool):
        super().__init__(layer)
        self.calls = calls
        self.gives_tuple = gives_tuple

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states, args, kwargs = _hidden_states_of(args, kwargs)
        self.calls.append((args, kwargs))
        return (hidden_states, None) if self.gives_tuple else hidden_states
