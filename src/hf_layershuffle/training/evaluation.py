# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a Trainer's evaluation measures beside the loss: accuracy in arbitrary orders, and how many layers ran."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..models.configuration_layershuffle import num_layers_of
from ..models.execution_order import arbitrary_execution_orders
from ..models.free_layers import is_sharded
from .metrics import order_metrics
from .mixed_loss import split_mixture
from .order_reports import report_orders
from .script_arguments import HALF_BUDGET_ACCURACY
from .trainer_part import TrainerPart


def check_best_metric(args: TrainingArguments, config: Any) -> None:
    """Refuses to choose the best of the weights by a metric that a layer controller does not change, or has not.

    Without a budget (`config.layer_budget`), evaluation is of all layers, and the controller is all that is trained.

    Raises:
        `ValueError`: for such a metric.
    """
    lacks_budget = getattr(config, "layer_controller", False) and config.layer_budget is None
    # Of one of several datasets, it has the dataset's name before it
    is_of_half = str(args.metric_for_best_model).endswith(HALF_BUDGET_ACCURACY)
    if args.load_best_model_at_end and lacks_budget and not is_of_half:
        raise ValueError(
            f"`metric_for_best_model` is '{args.metric_for_best_model}', which is of all layers, and a layer "
            f"controller without a budget changes nothing of it; choose 'eval_{HALF_BUDGET_ACCURACY}', or set "
            "`layer_budget`, which sharded models and labels of several classes need."
        )
    if is_of_half and not lacks_budget:
        raise ValueError(
            f"`metric_for_best_model` is '{args.metric_for_best_model}', which is measured of models with a layer "
            "controller and no `layer_budget`; choose another metric, such as 'eval_accuracy'."
        )


class EvaluationMixin(TrainerPart):
    """How [`LayerShuffleTrainer`] evaluates.

    Where layers are chosen by image, as by early exit, the metrics hold `eval_mean_num_layers`: the layers that an
    image ran through, on average over all images, those without a label included. Those of a layer controller hold
    `eval_half_budget_accuracy`, the accuracy with half of the layers, if `config.layer_budget` is None, since all
    other metrics are of all layers then, among which there is no choice.
    """

    _classes_by_order: list[list[torch.Tensor]]
    _classes_by_budget: list[list[torch.Tensor]]
    _layers_run: list[torch.Tensor]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._classes_by_order, self._classes_by_budget, self._layers_run = [], [], []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._layers_run and output.metrics is not None:
            output.metrics[f"{prefix}_mean_num_layers"] = torch.cat(self._layers_run).double().mean().item()
        if self._classes_by_budget and output.metrics is not None:
            classes, labels = _joined(self._classes_by_budget)
            is_right = (classes[:, 0] == labels)[labels != -100]
            output.metrics.update(
                {f"{prefix}_{HALF_BUDGET_ACCURACY}": float(is_right.mean())} if len(is_right) else {}
            )
        if self._classes_by_order and output.metrics is not None:
            classes, labels = _joined(self._classes_by_order)
            output.metrics.update({f"{prefix}_{key}": each for key, each in order_metrics(classes, labels).items()})
            self._report_orders(classes, labels, output.metrics, prefix)
        return output

    def _report_orders(self, classes: np.ndarray, labels: np.ndarray, metrics: dict[str, float], prefix: str) -> None:
        is_labelled = labels != -100
        if not is_labelled.any() or not self.is_world_process_zero():
            return
        accuracies = (classes == labels[:, None])[is_labelled].mean(axis=0).tolist()
        own_accuracy = metrics.get(f"{prefix}_accuracy")
        callbacks = self.callback_handler.callbacks
        report_orders(callbacks, self.state.global_step, accuracies, self._evaluated_orders(), own_accuracy, prefix)

    def _evaluated_orders(self) -> list[list[int]]:
        config = cast(PreTrainedConfig, self._config_of_model())
        num_orders, seed = self._argument("eval_orders"), self._argument("eval_orders_seed")
        return arbitrary_execution_orders(num_layers_of(config), num_orders, seed=seed)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        num_orders = self._argument("eval_orders")
        labels = inputs.get("labels")
        if num_orders > 0 and labels is not None:
            self._check_chooses_one_class(inputs, num_orders)
            orders = [{"execution_order": order} for order in self._evaluated_orders()]
            self._classes_by_order.append(self._classify(model, inputs, orders))
        if labels is not None and self._lacks_a_budget(model) and self._chooses_one_class([inputs]):
            half = {"layer_budget": self._half_budget(), "output_hidden_states": False, "output_attentions": False}
            self._classes_by_budget.append(self._classify(model, inputs, [half]))
        with self._noted_layers(model):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    @contextmanager
    def _noted_layers(self, model: nn.Module) -> Iterator[None]:
        """Notes how many layers each image runs through, where the model chooses them by image."""
        counts: list[torch.Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            count = output.get("num_layers_run") if isinstance(output, dict) else None
            if count is not None:
                counts.append(count)

        handle = model.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()
        if counts:
            self._layers_run.append(self.accelerator.gather_for_metrics(counts[0]).cpu())

    def _lacks_a_budget(self, model: nn.Module) -> bool:
        """Whether there is a layer controller that could choose, and evaluation is of all layers."""
        has_controller = self._config("layer_controller", False) and self._config("layer_budget") is None
        return has_controller and not is_sharded(model)

    def _half_budget(self) -> int:
        config = cast(Any, self._config_of_model())
        is_named = isinstance(config.execution_order, str)
        return max((num_layers_of(config) if is_named else len(config.execution_order)) // 2, 1)

    def _check_chooses_one_class(self, inputs: dict[str, Any], num_orders: int) -> None:
        if not self._chooses_one_class([inputs]):
            raise ValueError(
                f"`eval_orders` is {num_orders}, and counts how often one class is right; this model has "
                f"{self._config('problem_type') or 'other'} labels. Set `eval_orders` to 0."
            )

    @torch.no_grad()
    def _classify(self, model: nn.Module, inputs: dict[str, Any], ways: list[dict[str, Any]]) -> list[torch.Tensor]:
        """Classes of shape `(images of all processes, ways)` and the labels of these images, on the CPU.

        Args:
            ways: Arguments of the forward passes.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        inputs = {name: each for name, each in split_mixture(inputs)[0].items() if name not in self.label_names}
        with self.compute_loss_context_manager():
            classes = [model(**inputs, **way).logits.argmax(-1) for way in ways]
        return [part.cpu() for part in self.accelerator.gather_for_metrics((torch.stack(classes, dim=1), labels))]


def _joined(batches: list[list[torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Classes and labels of all batches."""
    classes, labels = (torch.cat(parts).numpy() for parts in zip(*batches))
    return classes, labels
