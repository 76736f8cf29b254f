# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What the Trainer needs beyond the model: orders that processes agree on, losses, metrics in any order, a card."""

import math
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    default_data_collator,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from transformers.utils import logging

from ..data.augmentation import MIXING, finish_batch, finish_images_together
from ..data.image_dataset import ImageBatch, collate_for_device
from ..data.image_stream import ImageStream
from ..data.text_dataset import padding_collator
from ..models.exit_rule import forget_exits
from ..models.layer_controller import train_controller_only
from .arguments import LayerShuffleTrainingArguments
from .averaging import AveragingMixin
from .callback import LayerShuffleCallback
from .checkpointing import best_checkpoint, read_state
from .distillation import check_teacher
from .evaluation import EvaluationMixin, check_best_metric
from .hub_pushes import HubMixin
from .layer_learning_rates import LearningRateMixin
from .length_sampler import SeededLengthSampler
from .losses import TrainingLossMixin
from .mixed_datasets import check_unmixed, mixes_images
from .nonfinite import NonFiniteWatch, largest_weight
from .order_agreement import TeacherAnswer, check_order_consistency
from .order_reports import OrderProgressCallback
from .precision import check_mixed_precision, use_float32_weights
from .raw_datasets import as_model_inputs, keep_class_names
from .sharding import shard_embeddings_once
from .stream_dataloader import is_empty, stream_dataloader


logger = logging.get_logger(__name__)
# Steps after which numbers are read at the latest, where each reading would make the host wait for the device
CHECK_EVERY = 100


class LayerShuffleTrainer(TrainingLossMixin, EvaluationMixin, HubMixin, AveragingMixin, LearningRateMixin, Trainer):
    """A [`Trainer`] for models whose layers run in any order.

    It draws the execution orders so that every process and every resumed run agrees ([`LayerShuffleCallback`]). It can
    measure accuracy under arbitrary orders in each evaluation (`LayerShuffleTrainingArguments.eval_orders`), and it
    can distill. It writes a card that names the task. And beyond:

    - Weights in half precision are trained in float32, with a warning (see [`use_float32_weights`]).
    - The position loss of `position_predictor` is part of the loss however that is computed: by the model, with
      `label_smoothing_factor`, by `compute_loss_func`, or by the `compute_loss` of a subclass, which must run the
      `model` that it is given. Where the loss does not depend on what the model says of positions, it is added, once.
    - Images that the dataset mixes (see [`Augmentation`]) have two classes, which the loss weighs, also with label
      smoothing. `compute_loss_func` gets their probabilities as labels, of shape `(batch_size, num_labels)`. The
      `compute_loss` of a subclass calls this class's, or weighs `inputs["labels"]` by `inputs["mixing"]` and
      `inputs["mixed_labels"]` by the rest.
    - Training ends with an error at the first loss or gradient norm that is not finite (`stop_on_nonfinite`).
    - With `ema_decay`, or a schedule-free optimizer, averaged weights are evaluated, saved, and left in the model at
      the end ([`AveragingMixin`]).
    - Evaluation takes all images, also with `dataloader_drop_last`.
    - A model with a layer controller (`config.layer_controller`) trains it alone: all other weights are frozen.
    - With `layerdrop`, DistributedDataParallel looks for parameters without gradient, unless
      `ddp_find_unused_parameters` says.

    Args:
        teacher_model:
            A trained classifier with the same classes and inputs, of any architecture, such as the plain ViT. One of
            texts reads the same tokens.
            The model learns from its answers beside the labels (arXiv 1503.02531): see `distillation_weight` and
            `distillation_temperature` of the arguments. The teacher is moved to the device, set to evaluation, and run
            in its own evaluation order. It is not trained, and evaluation losses are without it. With a weight of 1,
            images need no labels. A subclass with a `compute_loss` of its own must call this class's.
        args, kwargs: As for [`Trainer`]. A `datasets.Dataset` of images, or of texts, and labels is prepared by
            `processing_class`, if that is the model's image processor or tokenizer. One with a transform, or one that
            is tokenized, is taken as it is.

    Raises:
        `ValueError`: if the teacher is no classifier of the model's kind, or has other classes, another image size,
            number of channels or vocabulary, or weights that are not finite (how pixels are normalised is the
            dataset's affair: it must suit the teacher too); if a `datasets.Dataset` holds images or texts as they are
            and there is no image processor or tokenizer.
    """

    def __init__(self, *args: Any, teacher_model: PreTrainedModel | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if teacher_model is not None:
            check_teacher(teacher_model, cast(PreTrainedModel, self.model))
            self.teacher_answer = TeacherAnswer(
                teacher_model, self._argument("teacher_orders"), self._argument("teacher_layers"), self.args.seed
            )
            teacher_model = cast(Any, teacher_model).to(self.args.device).eval()  # transformers hides what `to` takes
        elif self._argument("teacher_orders"):
            raise ValueError(
                f"`teacher_orders` is {self._argument('teacher_orders')}, and there is no teacher; pass a "
                "`teacher_model` with free layer order, or set it to 0."
            )
        self.teacher_model = teacher_model
        uses_ddp = self.accelerator.distributed_type.startswith("MULTI_")
        check_order_consistency(self._argument("order_consistency"), cast(PreTrainedModel, self.model), uses_ddp)
        given_collator = kwargs.get("data_collator") or (args[2] if len(args) > 2 else None)
        if self.data_collator is default_data_collator:
            self.data_collator = collate_for_device
        elif given_collator is None and isinstance(self.processing_class, PreTrainedTokenizerBase):
            self.data_collator = padding_collator(self.processing_class)
        self.train_dataset = self._as_model_inputs(self.train_dataset, "train_dataset")
        self.eval_dataset = self._as_model_inputs(self.eval_dataset, "eval_dataset")
        if not any(isinstance(callback, LayerShuffleCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(LayerShuffleCallback())
        callbacks = self.callback_handler.callbacks
        callbacks[:] = [OrderProgressCallback() if type(each) is ProgressCallback else each for each in callbacks]
        self._watch = NonFiniteWatch()

    # Dtype of a frozen base under weights that are trained in float32
    _base_precision: torch.dtype | None = None
    _num_parameters: int | None = None  # of the model that is trained
    _mixes_images = False  # the training dataset, if it is asked to

    def _argument(self, name: str) -> Any:
        """A training argument. The arguments may be transformers' own, which lack ours."""
        return getattr(self.args, name, getattr(LayerShuffleTrainingArguments, name))

    def _config(self, name: str, default: Any = None) -> Any:
        """A field of the model's configuration, if it has one."""
        return getattr(self._config_of_model(), name, default)

    def _config_of_model(self) -> Any:
        # To look for what wraps a model goes through all its modules, and this is asked at each micro-batch
        model = self.model if hasattr(self.model, "config") else self.accelerator.unwrap_model(self.model)
        return getattr(model, "config", None)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # As transformers counts them, but without a count of all parameters at each micro-batch
        main_input = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if main_input is None or not hasattr(self.model, "num_parameters"):
            return 0
        if self._num_parameters is None:
            self._num_parameters = cast(PreTrainedModel, self.model).num_parameters(exclude_embeddings=True)
        return 6 * main_input.numel() * self._num_parameters

    def create_accelerator_and_postprocess(self) -> None:
        drops_layers = getattr(getattr(self.model, "config", None), "layerdrop", 0.0) > 0
        if drops_layers and self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True  # transformers would not, with gradient checkpointing
        super().create_accelerator_and_postprocess()
        shard_embeddings_once(self.accelerator, cast(nn.Module, self.model))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        before = self.model  # None where the Trainer is made
        model = super().call_model_init(trial)
        if self._argument("float32_weights"):
            self._base_precision = use_float32_weights(model)
        if before is not None:
            keep_class_names(getattr(before, "config", None), getattr(model, "config", None))
            self._prepare_model(model)
        return model

    def _prepare_model(self, model: Any) -> None:
        """Makes a model ready for training: without a rule of leaving early, and a layer controller for itself."""
        config = getattr(model, "config", None)
        check_best_metric(self.args, config)
        forget_exits(config)
        if getattr(config, "layer_controller", False):
            train_controller_only(model)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as [`Trainer`] does, with float32 weights, and without a rule of leaving early."""
        # Before a checkpoint is loaded, whose weights would be rounded
        is_ours = not self.is_deepspeed_enabled and not getattr(self, "is_distributed_loading_by_transformers", False)
        if is_ours and self._argument("float32_weights"):
            model = cast(nn.Module, self.model)
            self._base_precision = use_float32_weights(model) or self._base_precision
            check_mixed_precision(model, self.accelerator.mixed_precision)
        self._watch = NonFiniteWatch(self._argument("stop_on_nonfinite"))
        self._num_parameters = None
        if self.model_init is None:  # else of the model that it will make
            self._prepare_model(self.accelerator.unwrap_model(self.model))
        return super().train(*args, **kwargs)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        # transformers compares fractions of the steps with the numbers that a checkpoint made of them, and warns
        given = {name: getattr(self.args, name) for name in ("logging_steps", "eval_steps", "save_steps")}
        fractions = {name: value for name, value in given.items() if value is not None and 0 < value < 1}
        for name, value in fractions.items():
            setattr(self.args, name, math.ceil(max_steps * value))
        try:
            done = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
            )
        finally:
            for name, value in fractions.items():
                setattr(self.args, name, value)
        if resume_from_checkpoint is not None and self.state.global_step > 0:
            # transformers looks for the best checkpoint from the working directory of now
            checkpoint = Path(resume_from_checkpoint)
            best = best_checkpoint(checkpoint, read_state(checkpoint))
            self.state.best_model_checkpoint = None if best is None else str(best)
        return done

    # --- Data ---

    def _as_model_inputs(self, dataset: Any, name: str) -> Any:
        if name != "train_dataset":
            check_unmixed(dataset, name)
        return as_model_inputs(dataset, self.processing_class, self.model, name)

    def get_train_dataloader(self) -> DataLoader:
        self._mixes_images = mixes_images(self.train_dataset)
        if isinstance(self.train_dataset, ImageStream):
            dataloader = stream_dataloader(
                self.train_dataset, self.args, self.accelerator, self._train_batch_size, self.data_collator
            )
        else:
            dataloader = super().get_train_dataloader()
        if is_empty(dataloader):
            raise ValueError(
                f"There is no batch to train on: {len(cast(Sized, self.train_dataset))} images, batches of "
                f"{self._train_batch_size}{' and `dataloader_drop_last`' if self.args.dataloader_drop_last else ''}. "
                "Lower `per_device_train_batch_size`, or give more images."
            )
        return dataloader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededLengthSampler(sampler.batch_size, sampler.lengths, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if not isinstance(eval_dataset, str):
            eval_dataset = self._as_model_inputs(eval_dataset, "eval_dataset")
        with self._of_all_images():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with self._of_all_images():
            return super().get_test_dataloader(self._as_model_inputs(test_dataset, "test_dataset"))

    @contextmanager
    def _of_all_images(self) -> Iterator[None]:
        """Switches `dataloader_drop_last` off, which is for training.

        With it, a result would be of fewer images than it says, or of none.
        """
        drops_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops_last

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        # It would take a batch apart into items, and such a batch holds no unused columns
        removing = super()._get_collator_with_removed_columns(data_collator, description)
        return partial(_collate_batch_or_items, data_collator, removing)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # Items of datasets that were put together say how they are to be mixed
        columns: Any = self._signature_columns  # transformers sets it to None first
        self._signature_columns = list(dict.fromkeys([*columns, *MIXING]))  # type: ignore[assignment]

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and "mixing" not in batches[0] and self._mixes_images:
            logger.warning_once(
                "The training dataset mixes images (mixup or CutMix), and the `data_collator` leaves out how: they "
                "are not mixed. Leave out `data_collator`, or have it stack `mixing` and `mixing_boxes` of the items."
            )
        return finish_images_together(batches), num_items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return finish_batch(super()._prepare_inputs(inputs))

    # --- Numbers that are not finite ---

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        step = self.state.global_step
        control = self.control
        if self.accelerator.mixed_precision != "fp16":  # its loss scaling skips steps whose gradients overflow
            self._watch.note(step, "gradient norm", grad_norm)
        keeps_weights = self._watch.is_on and (control.should_save or control.should_training_stop)
        if keeps_weights:
            self._watch.note(step, "largest weight", largest_weight(model))
        is_due = self._reads_at_once() or step % CHECK_EVERY == 0
        if is_due or keeps_weights or control.should_log or control.should_evaluate:
            self._stop_if_nonfinite()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)

    def _reads_at_once(self) -> bool:
        """Whether numbers can be looked at without a wait for a device or for other processes."""
        return self.args.device.type == "cpu" and self.accelerator.num_processes == 1

    def _stop_if_nonfinite(self) -> None:
        found = self._watch.first(self.accelerator)
        if found is None:
            return
        step, name = found
        folder = str(self.args.output_dir)
        last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        kept = f"the last good checkpoint is '{last}'" if last else "there is no checkpoint to go on from"
        remedy = (
            "Pass a teacher that gives finite numbers for these images"
            if name.startswith("teacher")
            else f"Lower `learning_rate` ({self.args.learning_rate:g}), or raise `warmup_steps`; use `bf16` instead "
            "of `fp16`; see that pixels and weights at the start are finite"
        )
        raise ValueError(
            f"Training stopped: the {name} of step {step} is not finite. Nothing was saved since; {kept}. {remedy}. "
            "`stop_on_nonfinite=False` goes on all the same."
        )


def _collate_batch_or_items(collate_batch: Callable, collate_items: Callable, features: Any) -> Any:
    return (collate_batch if isinstance(features, ImageBatch) else collate_items)(features)
