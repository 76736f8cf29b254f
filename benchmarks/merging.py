"""Does merging take more time than copying the result's bytes, or more memory than promised?

    python benchmarks/merging.py                    # about two minutes; needs 3 GB of disk
    python benchmarks/merging.py --hidden_size 384 --num_sources 3 --pairs 20

Five checkpoints of ViT-B/16 (346 MB each) are merged layer by layer, and averaged, in turn with copies of as many
bytes as are written (`shutil.copyfile`), and for the average, which has to read all sources, with reading and with
copies of as many bytes as are read. Peak memory is the resident set of a fresh process, mapped files included, beyond
what it was after the imports. Prints the ratios and writes results/merging.json.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import Pairs, Row, positive, record, timed, width

from hf_layershuffle.hub.merged_folder import merge
from hf_layershuffle.merging.merged_model import prepare_merge
from hf_layershuffle.merging.plan import MergePlan


MEGABYTE = 2**20


def write_sources(folder: Path, num_sources: int, hidden_size: int) -> list[str]:
    """Random weights, the same in each; separate files, so that each source is really read."""
    from hf_layershuffle import LayerShuffleViTConfig, LayerShuffleViTForImageClassification

    heads = {"num_attention_heads": max(1, hidden_size // 64), "intermediate_size": 4 * hidden_size}
    config = LayerShuffleViTConfig(hidden_size=hidden_size, num_labels=1000, **heads)
    LayerShuffleViTForImageClassification(config).save_pretrained(folder / "source-1")
    for number in range(2, num_sources + 1):
        shutil.copytree(folder / "source-1", folder / f"source-{number}")
    return [str(folder / f"source-{number}") for number in range(1, num_sources + 1)]


def copy(files: list[Path], folder: Path) -> None:
    for number, file in enumerate(files):
        shutil.copyfile(file, folder / str(number))


def read(files: list[Path], folder: Path) -> None:
    buffer = bytearray(MEGABYTE)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def measure(peer: Callable, files: list[Path], plan: MergePlan, folder: Path, pairs: int) -> Pairs:
    """A copies or reads files, B merges; what they wrote is removed and the disk waited for before the next starts."""

    def first():
        (folder / "out").mkdir()
        peer(files, folder / "out")

    seconds, cpu_seconds = ([], []), ([], [])
    sides = (first, lambda: merge(plan, folder / "out", progress=False))
    for pair in range(-1, pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            wall, cpu = timed(sides[side])
            shutil.rmtree(folder / "out")
            os.sync()
            if pair >= 0:  # the first is to warm up
                seconds[side].append(wall)
                cpu_seconds[side].append(cpu)
    return Pairs(*seconds, *cpu_seconds)


def peak_growth(plan: MergePlan, folder: Path) -> tuple[int, int]:
    """Bytes of resident memory beyond those after the imports, and the bound; in a child made by [`main`]."""
    prepared = prepare_merge(plan)  # imports what is imported at first use
    largest = max(stored.num_bytes for tensor in prepared.tensors for stored, _ in tensor.inputs)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    merge(plan, folder / "out", progress=False)
    shutil.rmtree(folder / "out")
    return resident_peak() - before, 4 * largest + 300 * MEGABYTE


def resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def memory_row(what: str, plan: MergePlan, folder: Path) -> Row:
    path = plan.save(folder / "plan.yaml")
    child = subprocess.run(
        [sys.executable, __file__, "--child", str(path)], capture_output=True, text=True, check=True
    )
    growth, bound = map(int, child.stdout.split())
    notes = f"{growth / MEGABYTE:.0f} MB of {bound / MEGABYTE:.0f} MB"
    against = "bound: largest tensor × 4 + 300 MB"
    return Row(what, against, growth / bound, unit="peak memory", target="<= 1", notes=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_sources", type=positive, default=5)
    parser.add_argument("--hidden_size", type=width, default=768, help="768 is ViT-B's")
    parser.add_argument("--pairs", type=positive, default=10)
    parser.add_argument("--folder", help="for the checkpoints; defaults to the system's temporary one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        plan = MergePlan.load(args.child, trust_paths=True)
        print(*peak_growth(plan, Path(args.child).parent))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        sources = write_sources(folder, args.num_sources, args.hidden_size)
        files = [Path(source, "model.safetensors") for source in sources]
        size = f"{files[0].stat().st_size / 1e6:.0f} MB"
        all_sizes = f"{len(files)} × {size}"
        random = MergePlan.random(sources, seed=0)
        average = MergePlan.average(sources)
        rows = [
            measure(copy, files[:1], random, folder, args.pairs).row("random merge", f"copy of {size}", "<= 1.3"),
            measure(read, files, average, folder, args.pairs).row("average", f"reading {all_sizes}", "<= 1.5"),
            measure(copy, files, average, folder, args.pairs).row("average", f"copies of {all_sizes}"),
            memory_row("random merge", random, folder),
            memory_row("average", average, folder),
        ]
    settings = {"num_sources": args.num_sources, "hidden_size": args.hidden_size}
    record("Does merging take longer than copying, or more memory than promised?", rows, settings)


if __name__ == "__main__":
    main()
