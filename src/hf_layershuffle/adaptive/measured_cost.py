# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What running a batch costs: multiply-adds that are counted as they run, and seconds."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from ..layerwise import rows_of


Run = Callable[[dict[str, torch.Tensor]], Any]
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts the attention of an accelerator, and not that of the CPU
_NOT_COUNTED_BY_TORCH = {} if _CPU_ATTENTION in flop_registry else {_CPU_ATTENTION: _cpu_attention}


def counted_multiply_adds(run: Run, inputs: dict[str, torch.Tensor]) -> tuple[Any, int]:
    """Outputs of a batch, and the multiply-adds of its matrix products, convolutions and attention.

    They are what torch's `FlopCounterMode` counts, halved. So layers that run on some of the examples, and heads that
    are asked between layers, count with what they really do.
    """
    with FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED_BY_TORCH) as counter:
        outputs = run(inputs)
    return outputs, counter.get_total_flops() // 2


def spread_batches(loader: DataLoader, batch_size: int, num_batches: int) -> list[dict[str, Any]]:
    """Batches of examples that are evenly spread over a loader's data, since that may be sorted by class."""
    return list(some_of(loader, batch_size * num_batches, batch_size))


def some_of(loader: DataLoader, number: int, batch_size: int | None = None) -> DataLoader:
    """A loader of `number` of the examples that another reads, evenly spread. Of fewer, some come repeatedly."""
    rows = rows_of(loader)
    chosen = [rows[place] for place in np.linspace(0, len(rows) - 1, number).round().astype(int)]
    return DataLoader(
        Subset(loader.dataset, chosen), batch_size=batch_size or loader.batch_size or 64, collate_fn=loader.collate_fn
    )


def seconds_of_all(runs: Sequence[Run], batches: Sequence[dict[str, torch.Tensor]], num_rounds: int) -> list[float]:
    """Seconds that each of some runs takes for all batches.

    For each batch, the runs take turns, so that what else the machine does slows them alike; the median of the rounds
    counts. Each run has seen the first batch before.
    """
    totals = [0.0] * len(runs)
    for run in runs:
        _seconds(run, batches[0])
    for batch in batches:
        rounds = [[_seconds(run, batch) for run in runs] for _ in range(num_rounds)]
        for index, taken in enumerate(zip(*rounds)):
            totals[index] += statistics.median(taken)
    return totals


def _seconds(run: Run, inputs: dict[str, torch.Tensor]) -> float:
    device = next(iter(inputs.values())).device
    _wait_for(device)
    start = time.perf_counter()
    run(inputs)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
