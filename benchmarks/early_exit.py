"""Does the time that early exit and layer budgets save follow the layers that they save?

    python benchmarks/early_exit.py                       # about four minutes on 2 cores

ViT-S/16 at 224 pixels with random weights. B leaves early, by the highest class probability, at thresholds at which
the mean number of layers comes closest to a quarter, half and three quarters of the depth; or its controller, with
random weights too, chooses half of the layers for each image. A runs all layers. Images are patches of colour in a
contrast of their own, so they leave at many different depths, as real ones do, and choose different layers. First
checks that each image's logits are those of the model run by itself through the layers that it ran.
"""

import argparse

import torch
from harness import Row, measure_pairs, positive, record, width

import hf_layershuffle as ls
from hf_layershuffle.models.layer_controller import choose_layers


TOLERANCE = 1e-5  # relative to the largest logit
TARGETS = {0.5: "<= 0.6"}


def build_model(hidden_size: int) -> ls.LayerShuffleViTForImageClassification:
    torch.manual_seed(0)
    config = ls.LayerShuffleViTConfig(
        hidden_size=hidden_size,
        num_attention_heads=max(1, hidden_size // 64),
        intermediate_size=4 * hidden_size,
        num_labels=10,
        initializer_range=0.1,
        layer_controller=True,
    )
    model = ls.LayerShuffleViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.layer_controller.parameters():  # a new one scores all layers alike
            parameter.normal_()
    return model.eval()


def draw_images(count: int) -> torch.Tensor:
    """Of shape `(count, 3, 224, 224)`."""
    colours = torch.randn(count, 3, 4, 4) * torch.logspace(-1, 1, count)[:, None, None, None]
    return torch.nn.functional.interpolate(colours, size=224, mode="bilinear")


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
def layers_by_threshold(model, images: torch.Tensor, threshold: float) -> list[tuple[int, ...]]:
    """The layers that each image runs until it leaves."""
    return [tuple(range(length)) for length in model(images, exit_threshold=threshold).num_layers_run.tolist()]


@torch.no_grad()
def layers_by_controller(model, images: torch.Tensor, budget: int) -> list[tuple[int, ...]]:
    """The layers that each image chooses."""
    is_chosen = choose_layers(model.layer_controller(model.vit.embeddings(images), None), budget)
    return [tuple(row.nonzero().flatten().tolist()) for row in is_chosen]


@torch.no_grad()
def check_logits(model, images: torch.Tensor, layers: list[tuple[int, ...]], **options) -> None:
    """Compares each image's logits with those of the model run through the image's layers."""
    logits = model(images, **options).logits
    for order in set(layers):
        chosen = torch.tensor([each == order for each in layers])
        expected = model(images[chosen], execution_order=list(order)).logits
        error = (logits[chosen] - expected).abs().max() / expected.abs().max()
        if error > TOLERANCE:
            raise AssertionError(f"Through the layers {order} the logits differ by {error:.1e} of the largest.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=width, default=384, help="384 is ViT-S's")
    parser.add_argument("--batch_size", type=positive, default=64)
    parser.add_argument("--pairs", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args.hidden_size)
    depth = model.config.num_hidden_layers
    images = draw_images(args.batch_size)

    def call(**options):
        with torch.no_grad():
            model(images, **options)

    def row(what: str, layers: list[tuple[int, ...]], target: str = "", **options) -> Row:
        check_logits(model, images, layers, **options)
        mean = sum(map(len, layers)) / len(layers)
        notes = f"{mean:.2f} of {depth} layers, {len(set(layers))} different choices"
        pairs = measure_pairs(call, lambda: call(**options), args.pairs)
        return pairs.row(f"{what}, batch {args.batch_size}", "all layers", target, notes)

    confidence = confidence_after_each_layer(model, images)
    rows = []
    for part in (0.25, 0.5, 0.75):
        threshold = choose_threshold(confidence, part * depth)
        layers = layers_by_threshold(model, images, threshold)
        what = f"early exit at {part:.0%} of the layers"
        rows.append(row(what, layers, TARGETS.get(part, ""), exit_threshold=threshold))
    layers = layers_by_controller(model, images, depth // 2)
    rows.append(row("controller, 50% of the layers", layers, layer_budget=depth // 2))
    settings = {"hidden_size": args.hidden_size, "batch_size": args.batch_size}
    record("Does the time saved follow the layers saved?", rows, settings)


if __name__ == "__main__":
    main()
