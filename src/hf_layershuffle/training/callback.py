# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The order stream of a training run: the same on every process and after a resume."""

from transformers import TrainerCallback


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
