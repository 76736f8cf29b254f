"""The FSDP2 column of docs/encoders.md, which needs two processes. experiments/encoder_table.py runs it:

    torchrun --nproc_per_node 2 tests/support/encoder_sharding.py RESULTS.json [names of encoders]

Writes `{name of an encoder: null, or what went wrong}`.
"""

import copy
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from support.encoder_checks import PERMUTATION, SHORT_REPEAT, free_model, labelled, loss_of, one_line, tell_positions
from support.encoders import ENCODERS, Encoder
from support.models import EXTRAS


def shard(model: Any) -> Any:
    for layer in model.free_layers.children():
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "parameters are not sharded"
    return model


def half(inputs: dict[str, Any], rank: int) -> dict[str, Any]:
    return {name: value[rank : rank + 1] if torch.is_tensor(value) else value for name, value in inputs.items()}


def check_sharded(encoder: Encoder, rank: int) -> None:
    """Two processes with one example each have, in any order, the gradients of one process with both; orders that
    are drawn agree between them."""
    inputs = labelled(encoder)
    reference = tell_positions(free_model(encoder, shuffle_mode="arbitrary", **EXTRAS))  # no dropout: examples apart
    model = shard(copy.deepcopy(reference))
    for order in (PERMUTATION, SHORT_REPEAT):
        loss_of(model(**half(inputs, rank), execution_order=order)).backward()
        losses = [loss_of(reference(**half(inputs, each), execution_order=order)) for each in (0, 1)]
        (sum(losses) / 2).backward()
        for (name, parameter), expected in zip(model.named_parameters(), reference.parameters()):
            assert (parameter.grad is None) == (expected.grad is None), name
            if expected.grad is not None:
                actual = parameter.grad.full_tensor()
                torch.testing.assert_close(actual, expected.grad, rtol=1e-3, atol=1e-4, msg=f"gradient of {name}")
        model.zero_grad()
        reference.zero_grad()
    model.train().seed_execution_order(seed=9)
    torch.rand(5 * rank)  # processes need not have drawn as many random numbers
    orders = [model(**half(inputs, rank)).execution_order.tolist() for _ in range(3)]
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, orders)
    assert gathered[0] == gathered[1] and len(set(map(tuple, orders))) > 1, gathered


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    results: dict[str, str | None] = {}
    for name in sys.argv[2:] or ENCODERS:
        try:
            check_sharded(ENCODERS[name], rank)
            results[name] = None
        except Exception as error:
            results[name] = one_line(error)
        if rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()
    # On a busy machine torch 2.13 aborts now and then while the interpreter ends, after FSDP2 on the CPU
    os._exit(0)


if __name__ == "__main__":
    main()
