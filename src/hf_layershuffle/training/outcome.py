# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a training command prints at its end: the table and what to do next, or why it ended."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .script_arguments import ARBITRARY_METRICS, DataArguments, ScriptTrainingArguments


def print_table(rows: dict[str, tuple[dict, int]], is_sequential: bool = True, noun: str = "images") -> None:
    """Prints the accuracies of the models.

    Args:
        rows: Metrics of the evaluation and its number of arbitrary orders, by the model's name.
        is_sequential: Whether the models' own evaluation order (`config.execution_order`) is the sequential one.
        noun: What was classified, "images" or "texts".
    """
    table = Table(title=f"Fraction of the evaluation {noun} classified correctly")
    table.add_column("model", overflow="fold")
    # Broken headings leave room for the names of the models in 80 columns
    own = "sequential" if is_sequential else "as\nconfigured"
    for name in (own, "arbitrary:\nmean", "std", "min", "orders"):
        table.add_column(name, justify="right")
    for name, (metrics, num_orders) in rows.items():
        values = [metrics[f"eval_{key}"] for key in ("accuracy", *ARBITRARY_METRICS)]
        table.add_row(Text(name), *(f"{value:.4f}" for value in values), str(num_orders))
    Console().print(table)
    for name, (metrics, _) in rows.items():
        if "eval_half_budget_accuracy" in metrics:
            accuracy = metrics["eval_half_budget_accuracy"]
            print(f"{name} with half of its layers, which its controller chooses for each example: {accuracy:.4f}")


def next_command(data_args: DataArguments, args: ScriptTrainingArguments, config: Any = None) -> str:
    """The command that evaluates what was trained, on the same data: with layers missing too, and with pictures.

    How the data were split, it takes from the model's `training.json`. Of a model that learned to let examples run
    fewer layers, as its `config` says, it is the one that shows how well.
    """
    chooses_layers = getattr(config, "halting_head", False) or getattr(config, "layer_controller", False)
    budget = chooses_layers and not data_args.streaming
    command = ["hf-layershuffle", "budget" if budget else "evaluate", str(args.output_dir)]
    baseline = str(args.folder / "baseline")
    command += [*(["--rivals", f"baseline={baseline}"] if budget else [baseline])] if args.baseline else []
    columns = ("image_column_name", "text_column_name", "text_pair_column_name", "label_column_name")
    for name in ("dataset_name", "dataset_config_name", *columns, "eval_split"):
        value = getattr(data_args, name, None)
        command += [] if value is None else [f"--{name}", str(value)]
    command += ["--streaming"] if data_args.streaming else []
    return shlex.join([*command, "--output_dir", f"{args.output_dir}-{'budget' if budget else 'robustness'}"])


@contextmanager
def short_worker_errors() -> Iterator[None]:
    """Raises what a worker of a DataLoader raised with its own message, from which torch makes a whole traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        worker = re.match(r"Caught (\w+) in .*\nOriginal Traceback", str(error))
        if worker is None:
            raise
        message = re.split(rf"^(?:[\w.]+\.)?{worker[1]}: ", str(error), flags=re.MULTILINE)[-1]
        raise type(error)(message.strip()) from error
