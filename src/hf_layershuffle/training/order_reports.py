# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Accuracy in arbitrary orders while a model trains: pictures for `report_to`, and beside the progress bar."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..plotting import plot_accuracy_distribution


ARBITRARY = "_arbitrary_accuracy"


def order_picture(
    accuracies: Sequence[float], orders: Sequence[Sequence[int]], own_accuracy: float | None, step: int
) -> np.ndarray:
    """A picture of the accuracy in each order, with the best and the worst order by name.

    Args:
        accuracies: Fractions in [0, 1], one an order.
        orders: The orders, layer indices each.
        own_accuracy: Accuracy in the model's own evaluation order, if it is known.
        step: Optimizer step, for the title.

    Returns:
        Pixels of shape `(height, width, 3)`, uint8.
    """
    worst, best = int(np.argmin(accuracies)), int(np.argmax(accuracies))
    rows = {"arbitrary orders": list(accuracies)}
    if own_accuracy is not None:
        rows["its own order"] = [own_accuracy]
    title = (
        f"Step {step}: best {_named(accuracies[best], orders[best])}\nworst {_named(accuracies[worst], orders[worst])}"
    )
    figure = plot_accuracy_distribution(rows, title=title, point_label="one order")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return np.asarray(Image.open(buffer).convert("RGB"))


def _named(accuracy: float, order: Sequence[int]) -> str:
    shown = " ".join(map(str, order[:16])) + (" …" if len(order) > 16 else "")
    return f"{accuracy:.4f} in {shown}"


def report_orders(
    callbacks: Iterable[TrainerCallback],
    step: int,
    accuracies: Sequence[float],
    orders: Sequence[Sequence[int]],
    own_accuracy: float | None = None,
    prefix: str = "eval",
) -> None:
    """Sends the picture and a histogram of accuracies over orders to TensorBoard, Weights & Biases and Trackio.

    They go to those that `report_to` has started, as `eval/orders` and `eval/accuracy_by_order`.

    Args:
        callbacks: The callbacks of the Trainer.
        step, accuracies, orders, own_accuracy: As for [`order_picture`].
        prefix: Of the evaluation's metrics.
    """
    reporters = [callback for callback in callbacks if _is_open(callback)]
    if not reporters:
        return
    picture = order_picture(accuracies, orders, own_accuracy, step)
    picture_name, histogram_name = f"{prefix}/orders", f"{prefix}/accuracy_by_order"
    for reporter in reporters:
        if isinstance(reporter, TensorBoardCallback):
            writer: Any = reporter.tb_writer
            writer.add_image(picture_name, picture, step, dataformats="HWC")
            writer.add_histogram(histogram_name, np.asarray(accuracies), step)
            continue
        # Of both, Weights & Biases and Trackio, the calls are the same
        module: Any = reporter._wandb if isinstance(reporter, WandbCallback) else reporter._trackio  # type: ignore[attr-defined]
        values = {picture_name: module.Image(Image.fromarray(picture)), histogram_name: module.Histogram(accuracies)}
        module.log({**values, "train/global_step": step})


def _is_open(callback: TrainerCallback) -> bool:
    if isinstance(callback, TensorBoardCallback):
        return callback.tb_writer is not None
    return isinstance(callback, (WandbCallback, TrackioCallback)) and callback._initialized


class OrderProgressCallback(ProgressCallback):
    """A [`ProgressCallback`] whose bar shows the accuracy in arbitrary orders, as of the last evaluation."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        evaluated = (entry for entry in reversed(state.log_history) if _prefix(entry) is not None)
        self._show(next(evaluated, {}))  # of a run that goes on

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        self._show(metrics or {})

    def _show(self, metrics: dict[str, float]) -> None:
        prefix = _prefix(metrics)
        training_bar: Any = self.training_bar
        if training_bar is not None and prefix is not None:
            training_bar.set_postfix_str(order_line(metrics, prefix))


def order_line(metrics: dict[str, float], prefix: str = "eval") -> str:
    """The accuracies of an evaluation in few words: `arbitrary order 0.8712, worst 0.8650, own order 0.8801`."""
    names = {
        f"{prefix}{ARBITRARY}": "arbitrary order",
        f"{prefix}{ARBITRARY}_min": "worst",
        f"{prefix}_accuracy": "own order",
    }
    return ", ".join(f"{text} {metrics[name]:.4f}" for name, text in names.items() if name in metrics)


def _prefix(metrics: dict[str, float]) -> str | None:
    """The prefix of the metrics of an evaluation in arbitrary orders; None of others."""
    names = (name.removesuffix(ARBITRARY) for name in metrics if name.endswith(ARBITRARY))
    return next(names, None)
