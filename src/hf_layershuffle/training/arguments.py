# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The arguments that [`LayerShuffleTrainer`] adds to transformers' own."""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class LayerShuffleTrainingArguments(TrainingArguments):
    r"""
    [`TrainingArguments`] with what [`LayerShuffleTrainer`] adds.

    `torch_compile` compiles layer by layer, as execution orders need. Compiling the whole model would compile anew for
    each order, and give up after eight.

    Args:
        eval_orders:
            Number of arbitrary execution orders over which each evaluation also measures the accuracy
            (`eval_arbitrary_accuracy`, `..._std`, `..._min`), at least 0. It needs no `compute_metrics`. Images with
            the label -100 are left out. It is for models that choose one class an image.
        eval_orders_seed:
            Seed of these orders, at least 0. They are the same in every evaluation.
        distillation_weight: With a `teacher_model`, the share in [0, 1] of the distillation loss. The loss is `1 -
            distillation_weight` times what it is without a teacher, plus `distillation_weight` times the distillation
            loss. That loss holds the temperature's square, so logged training losses are on another scale than
            evaluation's, which are without a teacher.
        distillation_temperature:
            Number by which the logits of both models are divided in the distillation loss, above 0.
        teacher_orders:
            Number of arbitrary execution orders in which a teacher with free layer order answers, at least 0. The
            model learns from the mean of its probabilities. With 0, the teacher runs in its own order. The orders are
            drawn once by the seed. Each costs a forward pass of the teacher.
        teacher_layers: Layers of each of these orders, at least 1. Defaults to all of the teacher's.
        order_consistency:
            Weight of the divergence between the answers of two execution orders, at least 0. Above 0, each batch runs
            in two orders, which costs twice the time and memory. The loss is the mean of those of the two orders, plus
            this weight times the divergence. It is for models that choose one class an image.
        float32_weights:
            Whether weights in half precision are trained in float32, as they should be. Small steps of training are
            lost in half precision.
        stop_on_nonfinite:
            Whether training ends with an error at the first loss or gradient norm that is not finite, or if weights
            about to be saved are not. One process on the CPU looks at each step. Otherwise the numbers wait on the
            device until the Trainer logs, evaluates, saves or ends, and for 100 steps at most. So the error, which
            names the step, may come that much later. No checkpoint is saved in between. Steps that `fp16` skips to
            scale the loss anew do not count. With it, `logging_nan_inf_filter` is off: it would make the host wait for
            the device at each micro-batch, to leave losses out of the log at which training stops anyway.
        ema_decay:
            Share in [0, 1) that an exponential moving average of the weights keeps of itself in a step, such as
            0.9999; 0 for no average. In the first steps it keeps less: after step n at most (1 + n) / (10 + n).
            The average is what is evaluated, saved and left in the model at the end. Not with schedule-free
            optimizers, which average the weights by themselves.
        layer_lr_decay:
            Factor in (0, 1] of the learning rate from each layer of the checkpoint to the one before it: the
            classifier, and what stands behind the layers, has `learning_rate`, the last layer `layer_lr_decay` times
            as much, the embeddings the least ([`layer_depths`]). For fine-tuning, such as 0.75 (BEiT, arXiv
            2106.08254). 1 for one learning rate.
    """

    eval_orders: int = field(
        default=0,
        metadata={"help": "Arbitrary execution orders over which each evaluation also measures accuracy; at least 0."},
    )
    eval_orders_seed: int = field(default=0, metadata={"help": "Seed of the evaluation's arbitrary orders."})
    distillation_weight: float = field(
        default=0.9, metadata={"help": "With a teacher: share of the distillation loss in the loss, in [0, 1]."}
    )
    distillation_temperature: float = field(
        default=4.0,
        metadata={"help": "With a teacher: number by which the logits of both models are divided, above 0."},
    )
    teacher_orders: int = field(
        default=0,
        metadata={"help": "With a teacher of free order: arbitrary orders over which its answer is averaged (0)."},
    )
    teacher_layers: int | None = field(
        default=None, metadata={"help": "Layers of each of --teacher_orders. Defaults to all of the teacher's."}
    )
    order_consistency: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the divergence between the answers of two execution orders of each batch, at least 0. "
            "Above 0, a step costs twice as much."
        },
    )
    float32_weights: bool = field(
        default=True, metadata={"help": "Train weights that are stored in half precision in float32."}
    )
    stop_on_nonfinite: bool = field(
        default=True, metadata={"help": "End at the first loss or gradient norm that is not finite, with an error."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Evaluate and save an exponential moving average of the weights, which keeps this share of itself "
            "in a step, below 1: over 1 / (1 - d) steps, a few percent of all. 0 for none."
        },
    )
    layer_lr_decay: float = field(
        default=1.0,
        metadata={
            "help": "Factor in (0, 1] of the learning rate from each layer of the checkpoint to the one before it, "
            "for fine-tuning: 0.9 or more in free order. 1 for one learning rate."
        },
    )

    def __post_init__(self):
        for name in ("eval_orders", "eval_orders_seed", "teacher_orders"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be an integer of at least 0.")
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"`distillation_weight` is {self.distillation_weight}; it must lie in [0, 1].")
        if not 0 < self.distillation_temperature < float("inf"):
            raise ValueError(
                f"`distillation_temperature` is {self.distillation_temperature}; it must be a finite number above 0."
            )
        if self.teacher_layers is not None and (not isinstance(self.teacher_layers, int) or self.teacher_layers < 1):
            raise ValueError(f"`teacher_layers` is {self.teacher_layers!r}; it must be an integer of at least 1.")
        if not 0 <= self.order_consistency < float("inf"):
            raise ValueError(f"`order_consistency` is {self.order_consistency}; it must be a finite number from 0.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}; it must be a fraction in [0, 1), 0 for no average.")
        if self.ema_decay > 0 and str(getattr(self.optim, "value", self.optim)).startswith("schedule_free"):
            raise ValueError(
                f"`ema_decay` is {self.ema_decay}, and the optimizer (`optim`) averages the weights by itself; leave "
                "out `ema_decay`, or take another optimizer."
            )
        if not 0 <= self.label_smoothing_factor <= 1:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}; it must lie in [0, 1], 0 for none."
            )
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("_std"):
            self.greater_is_better = False  # a spread
        if not 0 < self.layer_lr_decay <= 1:
            raise ValueError(
                f"`layer_lr_decay` is {self.layer_lr_decay}; it must be a fraction in (0, 1], 1 for one learning rate."
            )
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
        if self.stop_on_nonfinite:
            self.logging_nan_inf_filter = False
        super().__post_init__()
