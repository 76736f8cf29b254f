"""How fast is ViT-B/16 on a GPU, in plain transformers, in timm and here, and what does the hardware allow?

    pip install timm                                 # optional; without it its rows are left out
    python benchmarks/gpu.py                         # ViT-B/16, 224 pixels, bfloat16, batch 256; about ten minutes
    python benchmarks/gpu.py --profile               # the operators of our compiled training step
    python benchmarks/gpu.py --tiny --device cpu     # tries the script out

Eager and compiled, training (forward, backward, fused AdamW, bfloat16 autocast over float32 weights) and inference
(bfloat16 weights). timm is compiled as a whole, the others layer by layer, as `--torch_compile` does. Ours runs in
another random order each time. Images a second and peak memory are absolute numbers of this machine; MFU is the share
of its bfloat16 matrix rate, measured here, that the model's own arithmetic takes (3 forwards a training step).
"""

import argparse
import statistics

import torch
from accelerate.utils import compile_regions
from harness import Row, measure_pairs, peak_bytes, quartiles, record, timed
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from hf_layershuffle import LayerShuffleViTConfig, LayerShuffleViTForImageClassification


BASE = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    image_size=224,
    patch_size=16,
)
TINY = dict(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, image_size=32, patch_size=8
)
NUM_CLASSES = 1000


def build(library: str, sizes: dict):
    torch.manual_seed(0)
    if library == "timm":
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=sizes["image_size"], patch_size=sizes["patch_size"], embed_dim=sizes["hidden_size"],
            depth=sizes["num_hidden_layers"], num_heads=sizes["num_attention_heads"], num_classes=NUM_CLASSES,
        )  # fmt: skip
    if library == "plain":
        return ViTForImageClassification(ViTConfig(**sizes, num_labels=NUM_CLASSES))
    config = LayerShuffleViTConfig(
        **sizes, num_labels=NUM_CLASSES, shuffle_mode="arbitrary", execution_order="arbitrary"
    )
    model = LayerShuffleViTForImageClassification(config)
    model.vit.seed_execution_order(0)
    return model


def compiled(library: str, model):
    return torch.compile(model) if library == "timm" else compile_regions(model)


def make_run(library: str, is_compiled: bool, training: bool, args):
    """A function that takes a training step or an inference on the same random images."""
    model = build(library, args.sizes).to(args.device).train(training)
    model = model if training else model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if training else None
    model = compiled(library, model) if is_compiled else model
    size = args.sizes["image_size"]
    images = torch.randn(args.batch_size, 3, size, size, device=args.device)
    images = images if training else images.to(torch.bfloat16)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=args.device)

    def logits():
        output = model(images)
        return output if library == "timm" else output.logits

    def infer():
        with torch.inference_mode():
            logits()

    def train():
        with torch.autocast(args.device, torch.bfloat16):
            loss = cross_entropy(logits().float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train if training else infer


def forward_flops(sizes: dict) -> int:
    """Multiplications and additions of one image's forward pass in matrix products."""
    width, depth, patch = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["patch_size"]
    patches = (sizes["image_size"] // patch) ** 2
    tokens = patches + 1
    layer = tokens * (4 * width**2 + 2 * width * sizes["intermediate_size"]) + 2 * tokens**2 * width
    return 2 * (depth * layer + patches * 3 * patch**2 * width + width * NUM_CLASSES)


def matrix_rate(args, synchronize) -> float:
    """bfloat16 operations a second of a large square matrix product on this machine: the best of ten runs."""
    size = 512 if args.tiny else 8192
    first, second = (torch.randn(size, size, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    repeats = 5
    timed(lambda: first @ second, synchronize)
    seconds = min(timed(lambda: [first @ second for _ in range(repeats)], synchronize)[0] for _ in range(10))
    return repeats * 2 * size**3 / seconds


def compare(training: bool, libraries: list[str], rate: float, args, synchronize) -> list[Row]:
    """Ours compiled against each of the others, and the share of the matrix rate of each."""
    kind = "training" if training else "inference"
    rows = []
    work = forward_flops(args.sizes) * args.batch_size * (3 if training else 1)
    others = [(library, is_compiled) for library in libraries for is_compiled in (False, True)]
    for library, is_compiled in others:
        if (library, is_compiled) == ("ours", True):
            continue
        torch.compiler.reset()
        ours, other = make_run("ours", True, training, args), make_run(library, is_compiled, training, args)
        pairs = measure_pairs(ours, other, args.pairs, warm_up=args.warm_up, synchronize=synchronize)
        name = f"{library} {'compiled' if is_compiled else 'eager'}"
        target = ">= 1" if library == "timm" and is_compiled else ""
        row = pairs.row(f"{kind}: {name}", "ours compiled", target)
        row.cpu_ratio = None  # the host's time says nothing here
        entries = [(name, other, pairs.second)]
        entries += [("ours compiled", ours, pairs.first)] if (library, is_compiled) == others[0] else []
        rows.append(row)
        for entry, run, seconds in entries:
            rows.append(share_row(f"{kind}: {entry}", run, seconds, work, rate, training, args))
    return rows


def share_row(what: str, run, seconds: list[float], work: int, rate: float, training: bool, args) -> Row:
    shares = [work / each / rate for each in seconds]
    speed = args.batch_size / statistics.median(seconds)
    notes = f"{speed:,.0f} images a second; peak of {peak_bytes(run, args.device) / 2**30:.2f} GiB beyond the weights"
    target = ">= 0.5" if training and what.endswith("ours compiled") else ""
    return Row(
        what, "bf16 matrix rate", statistics.median(shares), quartiles(shares), len(shares),
        unit="MFU", target=target, notes=notes,
    )  # fmt: skip


def profile(args) -> None:
    step = make_run("ours", True, True, args)
    for _ in range(args.warm_up):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = args.device == "cuda"
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            step()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument(
        "--warm_up", type=int, default=8, help="Steps of each before measuring; the first ones compile."
    )
    parser.add_argument("--tiny", action="store_true", help="A tiny model and batch.")
    parser.add_argument("--profile", action="store_true", help="Print the operators of our compiled training step.")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; try the script out with --tiny --device cpu.")
    args.sizes = TINY if args.tiny else BASE
    args.batch_size = 8 if args.tiny else args.batch_size
    torch.set_float32_matmul_precision("high")
    if args.profile:
        profile(args)
        return
    try:
        import timm

        notes = f"timm {timm.__version__}."
        libraries = ["plain", "timm", "ours"]
    except ImportError:
        notes = "timm is not installed: its rows are missing."
        libraries = ["plain", "ours"]
    synchronize = torch.cuda.synchronize if args.device == "cuda" else None
    rate = matrix_rate(args, synchronize)
    notes += f" The bfloat16 matrix rate measured is {rate / 1e12:.3g} TFLOP/s."
    rows = [row for training in (True, False) for row in compare(training, libraries, rate, args, synchronize)]
    record("How fast is ViT-B/16 on a GPU, and what does the hardware allow?", rows, vars(args), notes)


if __name__ == "__main__":
    main()
