"""Does the time that early exit and layer budgets save follow the layers that they save?

    python benchmarks/early_exit.py                       # about five minutes on 2 cores
    python benchmarks/early_exit.py --device cuda --batch_size 64

ViT-S/16 at 224 pixels with random weights. B leaves early, by the highest class probability, at thresholds at which
the mean number of layers comes closest to a quarter, half and three quarters of the depth; or its controller chooses
half of the layers for each image. A runs all layers. The images leave the model at many different depths, as real ones
do: each is drawn with a contrast of its own, and so is more or less sure of its class. First checks that each image's
logits are those of the model run to its depth.
"""

import argparse

import torch
from harness import Row, measure_pairs, record

import hf_layershuffle as ls


TOLERANCE = 1e-5  # relative to the largest logit
TARGETS = {0.5: "<= 0.6"}


def build_model(hidden_size: int, device: str) -> ls.LayerShuffleViTForImageClassification:
    torch.manual_seed(0)
    config = ls.LayerShuffleViTConfig(
        hidden_size=hidden_size,
        num_attention_heads=max(1, hidden_size // 64),
        intermediate_size=4 * hidden_size,
        num_labels=10,
        initializer_range=0.1,
        layer_controller=True,
    )
    return ls.LayerShuffleViTForImageClassification(config).to(device).eval()


@torch.no_grad()
def confidence_after_each_layer(model, images: torch.Tensor) -> torch.Tensor:
    """The highest class probability after each layer, of shape `(num_layers, batch_size)`."""
    depth = model.config.num_hidden_layers
    logits = [model(images, execution_order=list(range(length))).logits for length in range(1, depth + 1)]
    return torch.stack(logits).softmax(-1).amax(-1)


def choose_threshold(confidence: torch.Tensor, mean_depth: float) -> float:
    """The threshold at which the mean depth comes closest to `mean_depth`, by the confidence after each layer."""
    candidates = confidence.flatten().unique()
    is_sure = confidence[None] >= candidates[:, None, None]
    is_sure[:, -1] = True
    depths = is_sure.float().argmax(1).float().mean(-1) + 1  # `argmax` gives the first of equal values
    return candidates[(depths - mean_depth).abs().argmin()].item()


@torch.no_grad()
def check_logits(model, images: torch.Tensor, threshold: float) -> list[int]:
    """Compares each image's logits with those of the model run to its depth; returns the numbers of layers."""
    outputs = model(images, exit_threshold=threshold)
    for length in outputs.num_layers_run.unique().tolist():
        chosen = outputs.num_layers_run == length
        expected = model(images[chosen], execution_order=list(range(length))).logits
        error = (outputs.logits[chosen] - expected).abs().max() / expected.abs().max()
        if error > TOLERANCE:
            raise AssertionError(f"After {length} layers the logits differ by {error:.1e} of the largest.")
    return outputs.num_layers_run.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=384, help="384 is ViT-S's")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args.hidden_size, args.device)
    depth = model.config.num_hidden_layers
    contrasts = torch.logspace(-2, 1, args.batch_size)[:, None, None, None]
    images = (torch.randn(args.batch_size, 3, 224, 224) * contrasts).to(args.device)
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else None
    confidence = confidence_after_each_layer(model, images)

    def call(**options):
        with torch.no_grad():
            model(images, **options)

    def row(what: str, notes: str, target: str = "", **options) -> Row:
        pairs = measure_pairs(call, lambda: call(**options), args.pairs, synchronize=synchronize)
        return pairs.row(f"{what}, batch {args.batch_size}", "all layers", target, notes)

    rows = []
    for part in (0.25, 0.5, 0.75):
        threshold = choose_threshold(confidence, part * depth)
        lengths = check_logits(model, images, threshold)
        mean = sum(lengths) / len(lengths)
        notes = f"{mean:.2f} of {depth} layers, {len(set(lengths))} different numbers"
        rows.append(
            row(f"early exit at {part:.0%} of the layers", notes, TARGETS.get(part, ""), exit_threshold=threshold)
        )
    rows.append(row("controller, 50% of the layers", f"{depth // 2} of {depth} layers", layer_budget=depth // 2))
    settings = {"hidden_size": args.hidden_size, "batch_size": args.batch_size, "device": args.device}
    record("Does the time saved follow the layers saved?", rows, settings)


if __name__ == "__main__":
    main()
