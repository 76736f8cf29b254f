"""How fast are ViT-B/16 and ViT-S/16 on a GPU: plain transformers, timm and ours, and what does the card allow?

    pip install timm                                 # optional; without it its rows are left out
    python benchmarks/gpu.py                         # 224 pixels, bfloat16, batch 256; about four minutes on an H100
    python benchmarks/gpu.py --size small --kind training --output_dir out
    python benchmarks/gpu.py --profile               # the operators of our compiled training step
    python benchmarks/gpu.py --tiny --device cpu     # tries the script out

Eager and compiled, training (forward, backward, fused AdamW, bfloat16 autocast over float32 weights) and inference
(bfloat16 weights). timm is compiled as a whole, the others layer by layer, as `--torch_compile` does. Ours runs in
another random order each time. All six take a step in turn, round after round, and the ratios are those of a round.
First of all, one process for each size and library compiles into the cache of torch, all at the same time.

The share of the card's peak counts the operations of the model's own matrix products (3 forwards a training step). The
peak is the dense bfloat16 rate of the maker's data sheet. On a card that this script does not know it is the rate of a
large matrix product, which is measured in any case. Prints the table and writes results/gpu.json.
"""

import argparse
import gc
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate.utils import compile_regions
from harness import Row, peak_bytes, positive, quartiles, record, timed
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from hf_layershuffle import LayerShuffleViTConfig, LayerShuffleViTForImageClassification


SIZES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "small": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
    "tiny": dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256),
}
NAMES = {"base": "ViT-B/16", "small": "ViT-S/16", "tiny": "a tiny ViT"}
# Dense bfloat16 operations a second by the data sheets of NVIDIA; the first name that fits counts
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12,
}  # fmt: skip
LIBRARIES = ("plain", "timm", "ours")
NUM_CLASSES = 1000


def sizes_of(size: str) -> dict:
    images = dict(image_size=32, patch_size=8) if size == "tiny" else dict(image_size=224, patch_size=16)
    return SIZES[size] | images


def build(library: str, size: str):
    torch.manual_seed(0)
    sizes = sizes_of(size)
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


@dataclass
class Contestant:
    """One model that takes steps on the same random images, and how long they took.

    Args:
        library: One of LIBRARIES.
        is_compiled: Whether it is compiled; else it is eager.
        step: Takes a training step or an inference.
        seconds: Of each measured step.
    """

    library: str
    is_compiled: bool
    step: Callable[[], None]
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.library} {'compiled' if self.is_compiled else 'eager'}"


def make_step(library: str, is_compiled: bool, size: str, kind: str, args) -> Callable[[], None]:
    """A function that takes a training step or an inference."""
    training = kind == "training"
    model = build(library, size).to(args.device).train(training)
    model = model if training else model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if training else None
    if is_compiled:
        model = torch.compile(model) if library == "timm" else compile_regions(model)
    generator = torch.Generator(args.device).manual_seed(0)
    pixels = sizes_of(size)["image_size"]
    images = torch.randn(args.batch_size, 3, pixels, pixels, device=args.device, generator=generator)
    images = images if training else images.to(torch.bfloat16)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=args.device, generator=generator)

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


def compile_ahead(args) -> None:
    """Compiles everything into torch's cache on disk: a process for each size and library, all at the same time."""
    shared = ["--device", args.device, "--batch_size", str(args.batch_size), "--kind", *args.kind]
    children = {
        (size, library): subprocess.Popen(
            [sys.executable, __file__, "--child", library, *shared, *(["--tiny"] if args.tiny else ["--size", size])]
        )
        for size in args.size
        for library in args.libraries
    }
    for (size, library), child in children.items():
        if child.wait():
            print(f"Compiling {library} {size} ahead failed; it is compiled when it is measured.", file=sys.stderr)


def compile_here(args) -> None:
    """What a process of [`compile_ahead`] does."""
    for kind in args.kind:
        torch.compiler.reset()
        make_step(args.child, True, args.size[0], kind, args)()
        gc.collect()


def forward_flops(sizes: dict) -> int:
    """Multiplications and additions of one image's forward pass in matrix products."""
    width, depth, patch = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["patch_size"]
    patches = (sizes["image_size"] // patch) ** 2
    tokens = patches + 1
    layer = tokens * (4 * width**2 + 2 * width * sizes["intermediate_size"]) + 2 * tokens**2 * width
    return 2 * (depth * layer + patches * 3 * patch**2 * width + width * NUM_CLASSES)


def matrix_rate(args) -> float:
    """bfloat16 operations a second of a large square matrix product on this machine: the best of ten runs."""
    size = 512 if args.tiny else 8192
    first, second = (torch.randn(size, size, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    repeats = 5
    timed(lambda: first @ second, args.synchronize)
    seconds = min(timed(lambda: [first @ second for _ in range(repeats)], args.synchronize)[0] for _ in range(10))
    return repeats * 2 * size**3 / seconds


def peak_of(card: str) -> float | None:
    """The peak of a card by its name, such as "NVIDIA H100 80GB HBM3"."""
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def measured(size: str, kind: str, args) -> list[Contestant]:
    """All contestants, after `args.rounds` steps each, in turn and in another order each round."""
    torch.compiler.reset()
    contestants = [
        Contestant(library, is_compiled, make_step(library, is_compiled, size, kind, args))
        for library in args.libraries
        for is_compiled in (False, True)
    ]
    for each in contestants:
        for _ in range(args.warm_up):
            each.step()
    order = random.Random(0)
    gc.collect()
    gc.disable()  # a collection would be counted against whoever happens to run
    for _ in range(args.rounds):
        for each in order.sample(contestants, len(contestants)):
            each.seconds.append(timed(each.step, args.synchronize)[0])
    gc.enable()
    return contestants


def rows_of(contestants: list[Contestant], size: str, kind: str, args) -> tuple[list[Row], list[dict]]:
    """The rows of the table, and the absolute numbers of each contestant."""
    case = f"{kind}, {NAMES[size]}"
    ours = contestants[-1]
    work = forward_flops(sizes_of(size)) * args.batch_size * (3 if kind == "training" else 1)
    rows, numbers, memory = [], [], {}
    for each in contestants:
        median = statistics.median(each.seconds)
        memory[each.name] = peak_bytes(each.step, args.device)
        shares = [work / seconds / args.peak for seconds in each.seconds]
        speed = args.batch_size / median
        notes = f"{speed:,.0f} images a second; peak of {memory[each.name] / 2**30:.2f} GiB beyond the weights"
        target = ">= 0.5" if each is ours and kind == "training" else ""
        rows.append(
            Row(
                f"{case}: {each.name}", args.peak_name, statistics.median(shares), quartiles(shares), args.rounds,
                unit="share of peak", target=target, notes=notes,
            )
        )  # fmt: skip
        numbers.append(
            dict(kind=kind, size=size, library=each.library, compiled=each.is_compiled, images_per_second=speed,
                 seconds=median, second_quartiles=quartiles(each.seconds), peak_bytes=memory[each.name],
                 flops_per_second=work / median)
        )  # fmt: skip
    for each in contestants[:-1]:
        ratios = [other / own for own, other in zip(ours.seconds, each.seconds)]
        is_target = each.library == "timm" and each.is_compiled
        row = Row(f"{case}: {each.name}", "ours compiled", statistics.median(ratios), quartiles(ratios), args.rounds)
        row.target = ">= 1" if is_target else ""
        rows.append(row)
        if each.is_compiled:
            share = memory[ours.name] / max(memory[each.name], 1)
            rows.append(Row(f"{case}: ours compiled", each.name, share, unit="peak memory"))
    return rows, numbers


def profile(args) -> None:
    step = make_step("ours", True, args.size[0], "training", args)
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


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", nargs="+", default=["base", "small"], choices=["base", "small"])
    parser.add_argument("--kind", nargs="+", default=["training", "inference"], choices=["training", "inference"])
    parser.add_argument("--batch_size", type=positive, default=256)
    parser.add_argument("--rounds", type=positive, default=12, help="Measured steps of each.")
    parser.add_argument("--warm_up", type=int, default=3, help="Steps of each before; the first one compiles.")
    parser.add_argument("--output_dir", help="Folder for gpu.json; defaults to results/ beside the script.")
    parser.add_argument("--tiny", action="store_true", help="A tiny model and batch.")
    parser.add_argument("--profile", action="store_true", help="Print the operators of our compiled training step.")
    parser.add_argument("--child", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; try the script out with --tiny --device cpu.")
    if args.tiny:
        args.size, args.batch_size = ["tiny"], 8
    return args


def libraries() -> tuple[tuple[str, ...], str]:
    """The libraries that are installed, and a sentence about timm."""
    try:
        import timm
    except ImportError:
        return ("plain", "ours"), "timm is not installed: its rows are missing."
    return LIBRARIES, f"timm {timm.__version__}."


def main() -> None:
    args = parsed_arguments()
    settings = {name: getattr(args, name) for name in ("size", "kind", "batch_size", "rounds", "warm_up", "device")}
    torch.set_float32_matmul_precision("high")
    args.synchronize = torch.cuda.synchronize if args.device == "cuda" else None
    if args.child:
        compile_here(args)
        return
    if args.profile:
        profile(args)
        return
    args.libraries, notes = libraries()
    compile_ahead(args)
    rate = matrix_rate(args)
    peak = peak_of(torch.cuda.get_device_name()) if args.device == "cuda" else None
    args.peak, args.peak_name = (peak, "the data sheet's bf16 rate") if peak else (rate, "bf16 matrix rate")
    notes += f" A large bfloat16 matrix product runs at {rate / 1e12:.3g} TFLOP/s"
    notes += f", {rate / peak:.2f} of the data sheet's {peak / 1e12:.0f}." if peak else "."
    rows, numbers = [], []
    for kind in args.kind:
        for size in args.size:
            more_rows, more_numbers = rows_of(measured(size, kind, args), size, kind, args)
            rows += more_rows
            numbers += more_numbers
            for each in more_numbers:
                print(each, flush=True)
    question = "How fast are ViT-B/16 and ViT-S/16 on a GPU, and what does the card allow?"
    record(question, rows, settings, notes, measurements=numbers, folder=args.output_dir)


if __name__ == "__main__":
    main()
