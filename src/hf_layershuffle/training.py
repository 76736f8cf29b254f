# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What the Trainer needs beyond the model: the order stream, accuracy under arbitrary orders, metrics, a model card."""

import os
from dataclasses import dataclass, field
from functools import partial

import torch
from huggingface_hub import HfApi
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from .augmentation import finish_batch
from .execution_order import arbitrary_execution_orders
from .folder_records import record_training
from .image_dataset import ImageBatch, collate_for_device
from .metrics import Accuracy, OrderAccuracy
from .model_card import write_model_card
from .publishing import publish


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics for the `compute_metrics` of a `Trainer` or [`LayerShuffleTrainer`].

    Returns:
        `accuracy`: fraction in [0, 1] in the model's evaluation order. With `eval_orders`, also
        `arbitrary_accuracy`, `arbitrary_accuracy_std`, `arbitrary_accuracy_min`: mean, population standard deviation and
        minimum of the accuracy over the arbitrary orders.
    """
    logits, labels, classes_by_order = prediction.predictions, prediction.label_ids, None
    if isinstance(logits, tuple):
        logits, classes_by_order = logits
    metrics = Accuracy(keep_in_memory=True).compute(predictions=logits.argmax(-1), references=labels)
    if classes_by_order is not None:
        over_orders = OrderAccuracy(keep_in_memory=True).compute(predictions=classes_by_order, references=labels)
        metrics |= {
            f"arbitrary_accuracy{name}": over_orders[f"arbitrary_accuracy{name}"] for name in ("", "_std", "_min")
        }
    return metrics


class LayerShuffleCallback(TrainerCallback):
    """Gives a model's random execution orders to it as a function of the seed, the step and the micro-batch.

    So they are the same on every process, as sharded training needs, and the same after a resume. It also tells the
    training dataset its epoch, if that has `set_epoch`, since accelerate does so on one process only. [`LayerShuffleTrainer`]
    adds it; add it yourself to another `Trainer`.

    Args:
        seed (`int`, *optional*): Seed of the orders, at least 0. Defaults to the training arguments' `seed`.
    """

    def __init__(self, seed: int | None = None):
        self.seed = seed
        self._streams = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._streams = [
            module.execution_order_stream for module in model.modules() if hasattr(module, "execution_order_stream")
        ]
        if not self._streams:
            raise ValueError(
                f"LayerShuffleCallback found no LayerShuffle model in {type(model).__name__}; train a LayerShuffleViT* or "
                "LayerShuffleDeiT* model, or remove the callback."
            )
        self._seek(args, state)

    def on_step_begin(self, args, state, control, **kwargs):
        self._seek(args, state)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int((state.epoch or 0) + 1e-6))  # the fraction of a resumed epoch may lack a last bit

    def _seek(self, args, state) -> None:
        for stream in self._streams:
            stream.seek(args.seed if self.seed is None else self.seed, state.global_step)


@dataclass
class LayerShuffleTrainingArguments(TrainingArguments):
    r"""
    [`TrainingArguments`] with what [`LayerShuffleTrainer`] adds. `torch_compile` compiles layer by layer, as execution
    orders need: whole-model compilation would compile anew for each order and give up after eight.

    Args:
        eval_orders (`int`, *optional*, defaults to 0):
            Number of arbitrary execution orders over which each evaluation also measures the accuracy
            (`eval_arbitrary_accuracy`, `..._std`, `..._min`), at least 0.
        eval_orders_seed (`int`, *optional*, defaults to 0):
            Seed of these orders, at least 0: the same in every evaluation.
    """

    eval_orders: int = field(
        default=0,
        metadata={"help": "Arbitrary execution orders over which each evaluation also measures accuracy; at least 0."},
    )
    eval_orders_seed: int = field(default=0, metadata={"help": "Seed of the evaluation's arbitrary orders."})

    def __post_init__(self):
        for name in ("eval_orders", "eval_orders_seed"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be an integer of at least 0.")
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
        super().__post_init__()


class LayerShuffleTrainer(Trainer):
    """A [`Trainer`] that draws the execution orders so that every process and every resumed run agrees
    ([`LayerShuffleCallback`]), can measure accuracy under arbitrary orders in each evaluation
    (`LayerShuffleTrainingArguments.eval_orders`) and writes a card that names the task."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.data_collator is default_data_collator:
            self.data_collator = collate_for_device
        if not any(isinstance(callback, LayerShuffleCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(LayerShuffleCallback())

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        # It would take a batch apart into items, and such a batch holds no unused columns
        removing = super()._get_collator_with_removed_columns(data_collator, description)
        return partial(_collate_batch_or_items, data_collator, removing)

    def _prepare_inputs(self, inputs):
        return finish_batch(super()._prepare_inputs(inputs))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        num_orders = getattr(self.args, "eval_orders", 0)
        if prediction_loss_only or num_orders == 0:
            return loss, logits, labels
        num_layers = self.accelerator.unwrap_model(model).config.num_hidden_layers
        orders = arbitrary_execution_orders(num_layers, num_orders, seed=self.args.eval_orders_seed)
        inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name not in self.label_names})
        with torch.no_grad(), self.compute_loss_context_manager():
            classes = [model(**inputs, execution_order=order).logits.argmax(-1) for order in orders]
        return loss, (logits, torch.stack(classes, dim=1)), labels  # classes: (batch_size, num_orders)

    def create_model_card(self, dataset=None, metrics=None, **kwargs) -> None:
        """Writes `README.md` into the output folder, or brings the one that is there up to date, and `training.json`, which
        records what the card says of the training. `push_to_hub` calls it; training alone does not.

        Args:
            dataset (`str`, *optional*): Name of the dataset.
            metrics (`dict[str, float]`, *optional*): Evaluation metrics. Default to those of the last evaluation.
            finetuned_from (`str`, *optional*): Hub id, or folder, of the model that was fine-tuned.
            tags (`list[str]`, *optional*): Further tags.
        """
        if not self.is_world_process_zero():
            return
        if metrics is None:
            metrics = next((entry for entry in reversed(self.state.log_history) if "eval_accuracy" in entry), {})
            metrics = (
                metrics | {"num_orders": self.args.eval_orders} if getattr(self.args, "eval_orders", 0) else metrics
            )
        record_training(
            self.args.output_dir,
            arguments=self.args.to_dict(),
            dataset=dataset,
            metrics=metrics,
            base_model=kwargs.get("finetuned_from"),
            tags=kwargs.get("tags") or (),
        )
        write_model_card(
            self.args.output_dir,
            repo_id=self.args.hub_model_id,
            license=kwargs.get("license"),
            config=self.accelerator.unwrap_model(self.model).config,
        )

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """As in transformers, but in one commit, and without the pickled arguments, the logs and the checkpoints."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            if private is not None:
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)  # on all processes, as sharded models need
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        options = {"commit_message": commit_message, "token": token, "private": private}
        options["revision"] = revision or self.args.hub_revision
        if blocking:
            return publish(self.args.output_dir, self.hub_model_id, **options)
        return HfApi().run_as_future(publish, self.args.output_dir, self.hub_model_id, **options)


def _collate_batch_or_items(collate_batch, collate_items, features):
    return (collate_batch if isinstance(features, ImageBatch) else collate_items)(features)
