"""How much faster is evaluating many orders at once than one after the other?

    python benchmarks/evaluation.py                       # half a minute on 2 cores
    python benchmarks/evaluation.py --device cuda --hidden_size 384 --images 1024

Depth 12, 16 arbitrary orders and every prefix of each (192 orders). A is `score_execution_orders`, which computes
shared beginnings once; B calls `model(pixel_values, execution_order=order)` for each. First checks that the
predictions of both are equal, image by image, and that the memory does not grow with the number of orders.
"""

import argparse

import torch
from harness import Row, measure_pairs, peak_bytes, positive, record

import hf_layershuffle as ls
from hf_layershuffle.layerwise import LayerwiseClassifier


class Recorder(LayerwiseClassifier):
    """Also keeps the predicted classes of every order, which is classified by itself."""

    classifies_any_batch = False

    def __init__(self, model):
        super().__init__(model)
        self.path = []
        self.classes = {}

    def run_layer(self, hidden_states, index, position, **kwargs):
        self.path[position:] = [index]
        return super().run_layer(hidden_states, index, position, **kwargs)

    def classify(self, hidden_states):
        logits = super().classify(hidden_states)
        self.classes.setdefault(tuple(self.path), []).append(logits.argmax(-1))
        return logits


def naive_predictions(model, batches, orders) -> dict[tuple, torch.Tensor]:
    """Classes by order, of shape `(num_images,)`, by one call of the model for each order and batch."""
    with torch.no_grad():
        return {
            tuple(order): torch.cat(
                [model(batch["pixel_values"], execution_order=order).logits.argmax(-1) for batch in batches]
            )
            for order in orders
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=positive, default=128)
    parser.add_argument("--num_orders", type=positive, default=16)
    parser.add_argument("--images", type=positive, default=32)
    parser.add_argument("--batch_size", type=positive, default=16)
    parser.add_argument("--pairs", type=positive, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, default=2)
    args = parser.parse_args()
    if args.hidden_size % 4:
        parser.error(f"argument --hidden_size: {args.hidden_size} is not a multiple of 4, the number of heads")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = ls.LayerShuffleViTConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=4 * args.hidden_size,
        image_size=32,
        patch_size=8,
        num_labels=10,
        initializer_range=0.2,
    )
    model = ls.LayerShuffleViTForImageClassification(config).to(args.device).eval()
    items = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 10} for index in range(args.images)]
    loader = torch.utils.data.DataLoader(items, args.batch_size)
    batches = [{name: value.to(args.device) for name, value in batch.items()} for batch in loader]
    orders = ls.arbitrary_execution_orders(12, args.num_orders)
    prefixes = [order[:length] for order in orders for length in range(1, 13)]

    recorder = Recorder(model)
    ls.score_execution_orders(recorder, loader, prefixes, progress=False)
    expected = naive_predictions(model, batches, prefixes)
    equal = sum(int((torch.cat(recorder.classes[order]) == classes).sum()) for order, classes in expected.items())
    total = len(expected) * args.images

    def at_once(count: int | None = None):
        ls.score_execution_orders(model, loader, prefixes[:count], progress=False)

    row = measure_pairs(at_once, lambda: naive_predictions(model, batches, prefixes), args.pairs).row(
        f"{len(prefixes)} orders, one after the other", "score_execution_orders", ">= 5"
    )
    few = 12
    growth = peak_bytes(at_once, args.device) / peak_bytes(lambda: at_once(few), args.device)
    rows = [
        row,
        Row(
            "predictions equal to the naive loop's",
            "all",
            equal / total,
            unit="share",
            target=">= 1",
            notes=f"{equal} of {total}",
        ),
        Row(f"{len(prefixes)} orders", f"{few} orders", growth, unit="peak memory", target="<= 1.02"),
    ]
    record("How much faster is evaluating many orders at once than one after the other?", rows, vars(args))


if __name__ == "__main__":
    main()
