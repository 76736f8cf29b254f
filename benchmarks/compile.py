"""What does compiling layer by layer cost and bring when the order changes at every step?

    python benchmarks/compile.py                        # three minutes on 2 cores; needs a C++ compiler
    python benchmarks/compile.py --device cuda --size vit-s --batch_size 256 --dtype bfloat16

Counts the graphs compiled over 100 random orders, in training and in inference, by `accelerate.utils.compile_regions`
(what `--torch_compile` of examples/train.py does) and, on a tiny model, by compiling the model as a whole. Then
compares the speed of the compiled model (B) with the same model uncompiled and with the plain ViT compiled the same
way (A), in turn.
"""

import argparse
import os
import tempfile
import time
from contextlib import contextmanager

import torch
from accelerate.utils import compile_regions
from harness import Row, measure_pairs, positive, record
from train_step import MODES, SIZES, build, images

import hf_layershuffle as ls


ALL_FLAGS = {"shuffle_mode": "arbitrary", "depth_embedding": True, "position_predictor": True}


@contextmanager
def count_graphs():
    """Gives a function that says how many graphs were compiled since."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def make_run(model, batch, training: bool, dtype: torch.dtype, order=None):
    """A training pass (forward and backward) or an inference on a batch.

    It runs in the order that is given. Without one, each pass takes the model's next order.
    """
    orders = {} if order is None else {"execution_order": order}
    model.train(training)

    def run():
        with torch.autocast(batch["labels"].device.type, dtype, enabled=dtype != torch.float32):
            if not training:
                with torch.no_grad():
                    return model(**batch, **orders)
            loss = model(**batch, **orders).loss
        loss.backward()
        model.zero_grad()

    return run


def orders_of(size: str, count: int) -> list[list[int]]:
    return ls.arbitrary_execution_orders(SIZES[size]["num_hidden_layers"], count)


def warm_up(model, batch, training: bool, dtype, orders) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and of the slowest of the others."""
    seconds = []
    for order in orders:
        start = time.perf_counter()
        make_run(model, batch, training, dtype, order)()
        seconds.append(time.perf_counter() - start)
    return seconds[0], max(seconds[1:])


def graph_rows(args, device: str, dtype: torch.dtype) -> list[Row]:
    """Graphs over many orders: layer by layer with and without the flags, and the whole model."""
    rows = []
    MODES["all flags"] = ALL_FLAGS
    for mode in ("arbitrary", "all flags"):
        for training in (True, False):
            with count_graphs() as graphs:
                model = compile_regions(build(args.size, mode, device))
                batch = images(args.size, args.batch_size, device)
                first, slowest = warm_up(model, batch, training, dtype, orders_of(args.size, args.orders))
                what = f"{'training' if training else 'inference'}, {mode}: graphs over {args.orders} orders"
                notes = f"the first call {first:.3g} s, the slowest other {slowest:.3g} s"
                rows.append(Row(what, "", graphs(), unit="count", target="<= 5", notes=notes))
    with count_graphs() as graphs:
        model = torch.compile(build("tiny", "arbitrary", device))
        batch = images("tiny", None, device)
        start = time.perf_counter()
        warm_up(model, batch, False, dtype, orders_of("tiny", 20))
        notes = f"{time.perf_counter() - start:.3g} s for 20 orders of a tiny model with 4 layers"
        rows.append(Row("whole model, inference: graphs over 20 orders", "", graphs(), unit="count", notes=notes))
    return rows


def speed_rows(args, device: str, dtype: torch.dtype, synchronize) -> list[Row]:
    rows = []
    batch = images(args.size, args.batch_size, device)
    for training in (True, False):
        torch.compiler.reset()
        kind = "training" if training else "inference"
        eager = make_run(build(args.size, "arbitrary", device), batch, training, dtype)
        plain = make_run(compile_regions(build(args.size, None, device)), batch, training, dtype)
        for mode in ("arbitrary", "depth"):
            model = build(args.size, mode, device)
            model.config.execution_order = "arbitrary"
            compiled = make_run(compile_regions(model), batch, training, dtype)
            peers = [("plain ViT compiled", plain, "<= 1.02" if mode == "arbitrary" else "")]
            peers += [("itself uncompiled", eager, "")] if mode == "arbitrary" else []
            for against, peer, target in peers:
                pairs = measure_pairs(peer, compiled, args.pairs, warm_up=3, synchronize=synchronize)
                rows.append(pairs.row(f"{kind}, {mode}", against, target))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="cifar", choices=list(SIZES))
    parser.add_argument("--batch_size", type=positive, default=8)
    parser.add_argument("--orders", type=positive, default=100)
    parser.add_argument("--pairs", type=positive, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 by autocast.")
    parser.add_argument("--threads", type=positive, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else None
    with tempfile.TemporaryDirectory() as folder:
        # Nothing compiled by an earlier run
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        rows = graph_rows(args, args.device, dtype) + speed_rows(args, args.device, dtype, synchronize)
    record("What does compiling layer by layer cost and bring when the order changes at every step?", rows, vars(args))


if __name__ == "__main__":
    main()
