# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The loss of a training step: of the classes, of the layers' positions, and of a teacher's answers."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.halting_head import halting_losses
from ..models.position_modules import position_loss
from .auxiliary_loss import depends_on
from .distillation import distillation_loss
from .layer_losses import losses_by_layer
from .mixed_loss import mixed_loss, mixed_targets, split_mixture
from .order_agreement import order_divergence
from .trainer_part import TrainerPart


logger = logging.get_logger(__name__)


class TrainingLossMixin(TrainerPart):
    """How [`LayerShuffleTrainer`] computes its loss."""

    _took_mixture = True  # whether the loss of this step takes both classes of mixed images into account
    _took_halting = True  # whether it is the expected loss over all layers

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        # Wraps whatever a subclass, or a script on this object, made of `compute_loss`
        was_set = vars(self).get("compute_loss")
        whole_loss = partial(self._compute_whole_loss, self.compute_loss)
        self.compute_loss = whole_loss  # type: ignore[method-assign]  # for this step only
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            del self.compute_loss
            if was_set is not None:
                self.compute_loss = was_set  # type: ignore[method-assign]
        self._watch.note(self.state.global_step + 1, "loss", loss)
        if self._reads_at_once():  # before the weights take a step
            self._stop_if_nonfinite()
        return loss

    def _compute_whole_loss(
        self, compute_loss: Callable, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        self._took_mixture = "mixed_labels" not in inputs
        self._took_halting = False
        result = self._compute_loss_with_positions(compute_loss, model, inputs, *args, **kwargs)
        if not self._took_mixture:
            logger.warning_once(
                "Images are mixed (mixup or CutMix), and the `compute_loss` of this Trainer does not call "
                "LayerShuffleTrainer's. It must weigh both classes of an image itself: inputs['labels'] by "
                "inputs['mixing'], and inputs['mixed_labels'] by the rest to 1."
            )
        return result

    def _compute_loss_with_positions(
        self, compute_loss: Callable, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`compute_loss`, which may be a subclass's, and the position loss of the forwards that it made without it."""
        if not self._config("position_predictor", False) and not self._has_halting_head:
            return compute_loss(model, inputs, *args, **kwargs)
        labels = inputs.get("labels")
        outputs: list[Any] = []
        # Hooked to the outermost module, whose results are the ones that the loss is made of
        handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            result = compute_loss(model, inputs, *args, **kwargs)
        finally:
            handle.remove()
        loss, *rest = result if isinstance(result, tuple) else (result,)
        loss = self._with_position_loss(loss, outputs, labels, kwargs.get("num_items_in_batch"))
        if self._has_halting_head and not self._took_halting:  # by a subclass, which may take the model's own loss
            given = [output for output in outputs if isinstance(output, dict)]
            said = [output.get("halting_log_probabilities") for output in given]
            if not depends_on(loss, said, stop_at=[output.get("logits") for output in given]):
                raise ValueError(_NO_HALTING)
        return (loss, *rest) if rest else loss

    def _with_position_loss(
        self,
        loss: torch.Tensor,
        outputs: Sequence[Any],
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Adds the position loss, as the mean over those outputs on whose positions the loss does not depend."""
        losses: list[torch.Tensor] = []
        for output in outputs:
            position_logits = output.get("position_logits") if isinstance(output, dict) else None
            if position_logits is None or not position_logits.requires_grad:
                continue
            if not depends_on(loss, [position_logits, output.get("loss")], stop_at=[output.get("logits")]):
                mean_over = partial(position_loss, position_logits, labels)
                losses.append(self._share_of_step(mean_over, num_items_in_batch))
        return loss + self._config("position_loss_weight", 1.0) * sum(losses) / len(losses) if losses else loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        inputs, mixture = split_mixture(inputs)
        labels = inputs.get("labels")  # label smoothing takes them out of `inputs`
        teacher_logits = None
        if self.teacher_model is not None and model.training:
            teacher_logits = self._teacher_logits(inputs, labels)
        consistency = self._argument("order_consistency") if model.training else 0.0
        for_second_order = dict(inputs) if consistency else {}
        loss, outputs = self._loss_in_one_order(model, inputs, mixture, teacher_logits, num_items_in_batch)
        if consistency:
            second = self._loss_in_one_order(model, for_second_order, mixture, teacher_logits, num_items_in_batch)
            losses = order_divergence(outputs.logits, second[1].logits, labels)
            divergence = self._mean_over_images(losses, labels, num_items_in_batch)
            loss = (loss + second[0]) / 2 + consistency * divergence
        return (loss, outputs) if return_outputs else loss

    def _loss_in_one_order(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        mixture: dict[str, torch.Tensor],
        teacher_logits: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, Any]:
        """The loss of one forward pass, which draws its execution order, and the outputs."""
        labels = inputs.get("labels")
        is_labelled = labels is not None
        if teacher_logits is not None and not is_labelled:
            self._check_teacher_is_enough()
        if model.training and self._has_halting_head and (is_labelled or teacher_logits is not None):
            loss, outputs = self._halting_loss(model, inputs, mixture, teacher_logits, num_items_in_batch)
            return self._with_position_loss(loss, [outputs], labels, num_items_in_batch), outputs
        if teacher_logits is not None and not is_labelled:
            loss, outputs = torch.zeros((), device=self.args.device), model(**inputs)
        elif mixture:
            loss, outputs = self._mixed_loss(model, inputs, mixture, num_items_in_batch)
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = self._with_position_loss(loss, [outputs], labels, num_items_in_batch)
        if teacher_logits is not None:
            weight = self._argument("distillation_weight")
            temperature = self._argument("distillation_temperature")
            losses = distillation_loss(outputs.logits, teacher_logits, labels, temperature=temperature)
            loss = (1 - weight) * loss + weight * self._mean_over_images(losses, labels, num_items_in_batch)
        return loss, outputs

    def _mixed_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        mixture: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, Any]:
        """The loss of images that are mixtures of two, and the model's outputs."""
        if not self._chooses_one_class([inputs]):
            raise ValueError(
                "Images are mixed (mixup or CutMix), which is defined for one class an image; this model has "
                f"`problem_type` {self._config('problem_type')!r} and {self._config('num_labels')} labels. Set "
                "`mixup_alpha` and `cutmix_alpha` of the augmentation to 0."
            )
        self._took_mixture = True
        labels, mixed_labels, weights = inputs["labels"], mixture["mixed_labels"], mixture["mixing"]
        if self.compute_loss_func is not None:
            targets = mixed_targets(labels, mixed_labels, weights, self._config("num_labels"))
            inputs = {**inputs, "labels": targets}
            return cast(tuple, super().compute_loss(model, inputs, True, num_items_in_batch))
        outputs = model(**{name: each for name, each in inputs.items() if name != "labels"})
        losses = mixed_loss(outputs.logits, labels, mixed_labels, weights, self.args.label_smoothing_factor)
        return self._mean_over_images(losses, labels, num_items_in_batch), outputs

    def _halting_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        mixture: dict[str, torch.Tensor],
        teacher_logits: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, Any]:
        """PonderNet's expected loss over all layers, that of a teacher among them, and the model's outputs."""
        if self.compute_loss_func is not None:
            raise ValueError(_NO_HALTING)
        self._took_mixture = self._took_halting = True
        labels = inputs.get("labels")
        outputs = model(**{name: each for name, each in inputs.items() if name != "labels"})
        losses = losses_by_layer(
            outputs.layer_logits,
            labels,
            **mixture,
            smoothing=self.args.label_smoothing_factor,
            teacher_logits=teacher_logits,
            teacher_weight=self._argument("distillation_weight"),
            temperature=self._argument("distillation_temperature"),
        )
        prior, weight = self._config("halting_prior"), self._config("halting_loss_weight")
        losses = halting_losses(losses, outputs.halting_log_probabilities, prior, weight)
        if labels is not None:
            losses = torch.where(labels != -100, losses, 0.0)
        return self._mean_over_images(losses, labels, num_items_in_batch), outputs

    @property
    def _has_halting_head(self) -> bool:
        # A layer controller is trained alone
        return getattr(self.model, "halting_head", None) is not None and not self._config("layer_controller", False)

    def _check_teacher_is_enough(self) -> None:
        weight = self._argument("distillation_weight")
        if weight != 1:
            raise ValueError(
                f"The images have no labels, of which the loss consists in part: `distillation_weight` is {weight}. "
                "Set it to 1 to learn from the teacher alone, or give `labels`."
            )

    def _teacher_logits(self, inputs: dict[str, Any], labels: torch.Tensor | None) -> torch.Tensor:
        teacher = cast(PreTrainedModel, self.teacher_model)
        with torch.no_grad(), self.accelerator.autocast():
            logits = self.teacher_answer(teacher, _inputs_of(teacher, inputs))
        if labels is not None:  # nothing is learnt of the others
            logits = torch.where((labels != -100)[:, None], logits, 0.0)
        self._watch.note(self.state.global_step + 1, "teacher's answer", logits.abs().max())
        return logits

    def _mean_over_images(
        self, losses: torch.Tensor, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The mean of one loss an image, as the share of a step's loss. Images that are left out have a loss of 0."""
        num_images = len(losses) if labels is None else (labels != -100).sum().clamp(min=1)
        return self._share_of_step(
            lambda count: losses.sum() / (num_images if count is None else count), num_items_in_batch
        )

    def _share_of_step(
        self,
        mean_over: Callable[[torch.Tensor | float | None], torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """A micro-batch's share of a mean over the step's images, scaled as the Trainer expects it of the class loss.

        Args:
            mean_over: Takes the number of images to divide by, or None for the mean over the micro-batch.
            num_items_in_batch: Number of images of the step, as the Trainer counts them.
        """
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.17 has no such attribute
        if is_scaled is None:
            is_scaled = num_items_in_batch is not None or self.compute_loss_func is not None
        if not is_scaled:  # the Trainer divides by the number of micro-batches
            return mean_over(None)
        if num_items_in_batch is None:
            return mean_over(None) / self.current_gradient_accumulation_steps
        averages = self.args.average_tokens_across_devices
        if self.args.n_gpu > 1:  # DataParallel: one entry a GPU, of all images or of a GPU's share
            return mean_over(torch.as_tensor(num_items_in_batch).float().mean() * (1 if averages else self.args.n_gpu))
        # Gradients are averaged over processes, and the count is of all of them
        scale = self.accelerator.num_processes // self.get_tp_size() if averages else 1
        return mean_over(num_items_in_batch / scale)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        # The losses of several labels an image and of regression are means over a micro-batch, which no count scales
        if self.compute_loss_func is None and not self._chooses_one_class(batch_samples):
            return None
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count + (count == 0) if isinstance(count, torch.Tensor) else count  # no image counts: 0, not 0 / 0

    def _chooses_one_class(self, batches: Sequence[dict[str, Any]] = ()) -> bool:
        """Whether the model chooses one class an image.

        The configuration tells it, or else the labels, as in transformers.
        """
        problem_type = self._config("problem_type")
        if problem_type is not None:
            return problem_type == "single_label_classification"
        labels = batches[0].get("labels") if batches else None
        has_fractions = isinstance(labels, torch.Tensor) and labels.is_floating_point()
        return self._config("num_labels", 2) > 1 and not has_fractions

    def compute_loss_context_manager(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        if self._base_precision is not None and self.accelerator.mixed_precision == "no":
            stack.enter_context(torch.autocast(self.args.device.type, self._base_precision))
        return stack


_NO_HALTING = (
    "This model has a halting head, which learns by the losses of the answers after all layers, and the loss of this "
    "Trainer (`compute_loss_func`, or its own `compute_loss`) is of the last answer alone. Leave it out, take the "
    "model's own loss (`outputs.loss`, given labels), or set `halting_head` to False when the model is loaded."
)


def _inputs_of(teacher: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a teacher takes of the model's inputs: images in its dtype, or all that it knows of texts."""
    if teacher.main_input_name == "pixel_values":
        return {"pixel_values": inputs["pixel_values"].to(teacher.dtype)}
    known = inspect.signature(teacher.forward).parameters
    return {name: value for name, value in inputs.items() if name in known and name != "labels"}
