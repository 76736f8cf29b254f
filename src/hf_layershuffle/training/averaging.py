# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""How [`LayerShuffleTrainer`] evaluates, saves and resumes where the weights to evaluate are not those of training."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .evaluated_weights import EvaluatedWeights, MovingAverage, ScheduleFreeWeights, switches_itself
from .trainer_part import TrainerPart


# A checkpoint's model has the weights that were evaluated. Those of training lie beside it
TRAINING_WEIGHTS = "training_weights"


class AveragingMixin(TrainerPart):
    """Puts averaged weights into the model for each evaluation and for saving (`ema_decay`, schedule-free optimizers).

    A checkpoint's model is then the one that was evaluated. The weights of training lie in `training_weights.pt`, or
    in one such file for each process if they are sharded, so that a resumed run goes on exactly.
    """

    _evaluated_weights: EvaluatedWeights | None = None

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        self._evaluated_weights = None
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._evaluated_weights = self._new_evaluated_weights()
        if resume_from_checkpoint is not None:
            self._load_training_weights(Path(resume_from_checkpoint))
        return prepared

    def _new_evaluated_weights(self) -> EvaluatedWeights | None:
        model = cast(nn.Module, self.model)
        decay = self._argument("ema_decay")
        if switches_itself(self.optimizer):
            if decay > 0:
                raise ValueError(
                    f"`ema_decay` is {decay}, and {type(self.optimizer).__name__} averages the weights by itself; "
                    "leave out `ema_decay`, or take another optimizer."
                )
            return ScheduleFreeWeights(model, self.optimizer)
        if decay == 0:
            return None
        is_flat = any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())
        if self.is_deepspeed_enabled or is_flat:
            raise ValueError(
                f"`ema_decay` is {decay}, and the weights are kept by {'the first FSDP' if is_flat else 'DeepSpeed'}, "
                "where they cannot be averaged. Use FSDP2 (`fsdp_version: 2`) or DistributedDataParallel."
            )
        return MovingAverage(model, decay, self.state.global_step)

    def _with_evaluated_weights(self) -> AbstractContextManager:
        return nullcontext() if self._evaluated_weights is None else self._evaluated_weights.applied()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._evaluated_weights is not None:
            self._evaluated_weights.update(self.state.global_step)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        # A DataLoader draws a random number of each pass, and training goes on as if there had been none
        with self._with_evaluated_weights(), torch.random.fork_rng(devices=[], enabled=self.is_in_train):
            return super().evaluation_loop(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self._evaluated_weights is not None:
            self._evaluated_weights.finish()
            self._evaluated_weights = None
        return super()._finalize_training(*args, **kwargs)

    # --- Checkpoints ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._with_evaluated_weights():
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._with_evaluated_weights():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Before the Trainer's state, which marks a whole checkpoint
        if self._evaluated_weights is not None:
            name = self._training_weights_file()
            if self.args.should_save or name != f"{TRAINING_WEIGHTS}.pt":
                torch.save(self._evaluated_weights.training_values(), Path(output_dir) / name)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_training_weights(self, checkpoint: Path) -> None:
        if self._evaluated_weights is None:
            return
        path = checkpoint / self._training_weights_file()
        if not path.exists():
            raise ValueError(
                f"'{checkpoint}' holds no {path.name}: it is of another number of processes, or was sharded in "
                "another way. Resume as that run was started."
            )
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise ValueError(f"'{path}' is not whole ({error}); resume from an earlier checkpoint.") from None
        try:
            self._evaluated_weights.resume(values)
        except ValueError as error:
            raise ValueError(f"'{path}' cannot be resumed from: {error}.") from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._check_resumable(Path(checkpoint))  # not before: the optimizer may be made by anything
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        before = [set(group) for group in optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            is_same = all(names <= set(group) for names, group in zip(before, optimizer.param_groups, strict=True))
        except ValueError:  # other groups, as of another `layer_lr_decay`
            is_same = False
        if not is_same:
            raise ValueError(
                f"The optimizer's state in '{checkpoint}' is of another optimizer than {self.args.optim}, or of other "
                "groups of parameters. Resume with the same `optim` and `layer_lr_decay`, or start a new run from the "
                "checkpoint."
            )

    def _check_resumable(self, checkpoint: Path) -> None:
        """Refuses a checkpoint of a run that averaged where this one does not, or the other way round."""
        averages = self._argument("ema_decay") > 0 or switches_itself(self.optimizer)
        is_there = any(checkpoint.glob(f"{TRAINING_WEIGHTS}*.pt"))
        if is_there and not averages:
            raise ValueError(
                f"The model in '{checkpoint}' has averaged weights (`ema_decay`, or a schedule-free optimizer), and "
                "training would go on from them. Resume with the same `ema_decay` and `optim`, or start a new run "
                "from the checkpoint."
            )
        if averages and not is_there:
            raise ValueError(
                f"'{checkpoint}' holds no {TRAINING_WEIGHTS}.pt: it is of a run without averaged weights "
                "(`ema_decay`, schedule-free optimizers), or of `save_only_model`. Resume as that run was started, or "
                "start a new run from the checkpoint."
            )

    def _training_weights_file(self) -> str:
        model = cast(nn.Module, self.model)
        is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        return f"{TRAINING_WEIGHTS}_{self.args.process_index}.pt" if is_sharded else f"{TRAINING_WEIGHTS}.pt"
