# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What the Trainer needs beyond the model: the order stream, accuracy under arbitrary orders, distillation, a model card."""

from functools import partial

import torch
from huggingface_hub import HfApi
from transformers import Trainer, default_data_collator

from ..augmentation import finish_batch
from ..execution_order import arbitrary_execution_orders
from ..folder_records import record_training
from ..image_dataset import ImageBatch, collate_for_device
from ..model_card import write_model_card
from ..publishing import publish
from .arguments import LayerShuffleTrainingArguments
from .callback import LayerShuffleCallback
from .distillation import check_teacher, distillation_loss


class LayerShuffleTrainer(Trainer):
    """A [`Trainer`] that draws the execution orders so that every process and every resumed run agrees
    ([`LayerShuffleCallback`]), can measure accuracy under arbitrary orders in each evaluation
    (`LayerShuffleTrainingArguments.eval_orders`), can distill, and writes a card that names the task.

    Args:
        teacher_model ([`~transformers.PreTrainedModel`], *optional*):
            A trained image classifier with the same classes and images, of any architecture, such as the plain ViT. The model
            learns from its answers beside the labels (arXiv 1503.02531): see `distillation_weight` and
            `distillation_temperature` of the arguments. It is moved to the device, set to evaluation, run in its own evaluation order and not
            trained; evaluation losses are without it.
        args, kwargs: As of [`Trainer`].

    Raises:
        `ValueError`: if the teacher is no image classifier, or has other classes, or another image size or number of channels. (How
            pixels are normalised is the dataset's affair: it must suit the teacher too.)
    """

    def __init__(self, *args, teacher_model=None, **kwargs):
        super().__init__(*args, **kwargs)
        if teacher_model is not None:
            check_teacher(teacher_model, self.model)
            teacher_model = teacher_model.to(self.args.device).eval()
        self.teacher_model = teacher_model
        if self.data_collator is default_data_collator:
            self.data_collator = collate_for_device
        if not any(isinstance(callback, LayerShuffleCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(LayerShuffleCallback())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher_model is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        pixel_values, labels = inputs["pixel_values"], inputs["labels"]  # label smoothing takes labels out of `inputs`
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher_model(pixel_values=pixel_values.to(self.teacher_model.dtype)).logits
        defaults = LayerShuffleTrainingArguments  # where the arguments are transformers' own
        weight = getattr(self.args, "distillation_weight", defaults.distillation_weight)
        temperature = getattr(self.args, "distillation_temperature", defaults.distillation_temperature)
        losses = distillation_loss(outputs.logits, teacher_logits, labels, temperature=temperature)
        loss = (1 - weight) * loss + weight * self._mean_over_step(losses, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _mean_over_step(self, losses, labels, num_items_in_batch) -> torch.Tensor:
        """Of the images' losses, scaled as the Trainer and the model scale the class loss."""
        if num_items_in_batch is None:  # the Trainer divides by the number of micro-batches
            return losses.sum() / (labels != -100).sum()
        averages = self.args.average_tokens_across_devices
        if self.args.n_gpu > 1:  # DataParallel: one entry a GPU, of all images or of a GPU's share
            return losses.sum() / (num_items_in_batch.float().mean() * (1 if averages else self.args.n_gpu))
        # Gradients are averaged over processes, and the count is of all of them
        scale = self.accelerator.num_processes // self.get_tp_size() if averages else 1
        return losses.sum() * scale / num_items_in_batch

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        # It would take a batch apart into items, and such a batch holds no unused columns
        removing = super()._get_collator_with_removed_columns(data_collator, description)
        return partial(_collate_batch_or_items, data_collator, removing)

    def _prepare_inputs(self, inputs):
        return finish_batch(super()._prepare_inputs(inputs))

    def get_eval_dataloader(self, eval_dataset=None):
        # `dataloader_drop_last` is about training; evaluation counts every image
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

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
        teacher = self.teacher_model
        record_training(
            self.args.output_dir,
            arguments=self.args.to_dict(),
            dataset=dataset,
            metrics=metrics,
            base_model=kwargs.get("finetuned_from"),
            teacher=None if teacher is None else teacher.config._name_or_path or type(teacher).__name__,
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
