"""Is a training step slower, or larger in memory, than that of the plain model?

    python benchmarks/train_step.py                      # about two minutes on 2 cores
    python benchmarks/train_step.py --sizes cifar --modes depth --pairs 40
    python benchmarks/train_step.py --sizes cifar --modes depth --profile   # which operators take the time

One step is forward, backward and AdamW on the same images. `ViTForImageClassification` of transformers (A) and each
mode of the LayerShuffle model (B) run in turn in one process. Prints the ratio of the times and of the peak memory
(tensors held during a step: weights, gradients, optimizer, activations), and writes results/train_step.json.
"""

import argparse
from functools import partial

import torch
from harness import Row, measure_pairs, peak_bytes, positive, record
from transformers import ViTConfig, ViTForImageClassification

from hf_layershuffle import LayerShuffleViTConfig, LayerShuffleViTForImageClassification
from hf_layershuffle.training.distillation import distillation_loss


SIZES = {
    "vit-s": dict(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=224,
        patch_size=16,
    ),
    "cifar": dict(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
    ),
    "tiny": dict(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4
    ),
}
BATCH_SIZES = {"vit-s": 4, "cifar": 16, "tiny": 8}
MODES = {
    "none": {},
    "arbitrary": {"shuffle_mode": "arbitrary"},
    "predictor": {"shuffle_mode": "arbitrary", "position_predictor": True},
    "depth": {"shuffle_mode": "arbitrary", "depth_embedding": True},
    "layerdrop": {"shuffle_mode": "arbitrary", "layerdrop": 0.2},
    "distilled": {"shuffle_mode": "arbitrary"},  # from a plain model of the same size
}
TARGETS = {
    "none": "<= 1.02",
    "arbitrary": "<= 1.02",
    "predictor": "<= 1.03",
    "depth": "<= 1.12",
    "layerdrop": "<= 1.02",
    "distilled": "<= 1.40",  # a forward pass of three
}

NOTES = (
    "The depth path cannot stay within 2 % of memory. For its backward pass each layer keeps the joined tokens, the "
    "normalised ones and the input of GELU: three tensors of about the tokens' size, beside about 16 of the layer "
    "itself. Of its time, 7 % of a step are matrix products and GELU."
)


def build(size: str, mode: str | None, device: str = "cpu"):
    """The plain model for `mode=None`; its twin with the same weights otherwise."""
    torch.manual_seed(0)
    if mode is None:
        model = ViTForImageClassification(ViTConfig(**SIZES[size], num_labels=10))
    else:
        model = LayerShuffleViTForImageClassification(
            LayerShuffleViTConfig(**SIZES[size], num_labels=10, **MODES[mode])
        )
        model.vit.seed_execution_order(0)
    return model.to(device).train()


def images(size: str, batch_size: int | None = None, device: str = "cpu") -> dict[str, torch.Tensor]:
    pixels = SIZES[size]["image_size"]
    generator = torch.Generator().manual_seed(0)
    count = batch_size or BATCH_SIZES[size]
    batch = {
        "pixel_values": torch.randn(count, 3, pixels, pixels, generator=generator),
        "labels": torch.randint(10, (count,), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def train_step(model, batch, optimizer, teacher=None) -> None:
    outputs = model(**batch)
    loss = outputs.loss
    if teacher is not None:
        with torch.no_grad():
            teacher_logits = teacher(batch["pixel_values"]).logits
        losses = distillation_loss(outputs.logits, teacher_logits, batch["labels"], temperature=4.0)
        loss = 0.1 * loss + 0.9 * losses.mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def make_step(size: str, mode: str | None, batch_size: int | None):
    """A function that takes one step, and how many bytes lie there between steps."""
    model = build(size, mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    teacher = build(size, None).eval() if mode == "distilled" else None
    step = partial(train_step, model, images(size, batch_size), optimizer, teacher)
    step()  # the optimizer's state
    states = [value for state in optimizer.state.values() for value in state.values()]
    states += teacher.parameters() if teacher is not None else []
    return step, sum(tensor.nbytes for tensor in (*model.parameters(), *states))


def compare(size: str, mode: str, pairs: int, batch_size: int | None) -> list[Row]:
    plain, plain_bytes = make_step(size, None, batch_size)
    ours, our_bytes = make_step(size, mode, batch_size)
    time_row = measure_pairs(plain, ours, pairs).row(f"{size}: {mode}", "plain ViT", TARGETS[mode])
    plain_peak, our_peak = plain_bytes + peak_bytes(plain), our_bytes + peak_bytes(ours)
    memory_target = "" if mode == "distilled" else "<= 1.02"  # which holds the teacher's weights too
    notes = f"{plain_peak / 2**20:.1f} MiB against {our_peak / 2**20:.1f} MiB"
    return [
        time_row,
        Row(time_row.what, "plain ViT", our_peak / plain_peak, unit="peak memory", target=memory_target, notes=notes),
    ]


def profile(size: str, mode: str, batch_size: int | None) -> None:
    for name, each in (("plain ViT", None), (mode, mode)):
        step, _ = make_step(size, each, batch_size)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(3):
                step()
        print(f"{size}: {name}")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["vit-s", "cifar"], choices=list(SIZES))
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["arbitrary", "predictor", "depth", "layerdrop", "distilled"],
        choices=list(MODES),
    )
    parser.add_argument("--pairs", type=positive, default=12, help="At least 10 for the record.")
    parser.add_argument(
        "--batch_size", type=positive, default=None, help="Images a step; defaults to 4 at 224 pixels, 16 at 32."
    )
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--profile", action="store_true", help="Print the operators of a step instead.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.profile:
        for size in args.sizes:
            for mode in args.modes:
                profile(size, mode, args.batch_size)
        return
    rows = [
        row for size in args.sizes for mode in args.modes for row in compare(size, mode, args.pairs, args.batch_size)
    ]
    record("Is a training step slower, or larger in memory, than that of the plain model?", rows, vars(args), NOTES)


if __name__ == "__main__":
    main()
