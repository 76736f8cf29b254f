"""What it costs to lose workers: a plain ViT and an order-free one in the same swarm, a worker for each layer.

    python experiments/lost_workers.py digits model_cards/vit-digits-plain model_cards/vit-digits-layershuffle \
        --batch_size 20
    python experiments/lost_workers.py path/to/fashion-mnist path/to/plain model_cards/vit-fashion-mnist-layershuffle \
        --draws 3
    python experiments/lost_workers.py --render      # picture and tables from the records alone

Workers are killed one after the other, in an order drawn by seed, and after each all test images are sent again. An
image without an answer counts as wrong. There are as many requests at a time as workers: only requests that compete
for workers take the layers in other orders, so a batch must be small beside the data. A run takes some minutes, shows
its progress and goes on where it stopped. What it found is kept in experiments/records/lost_workers.json. `--draws 2
--transport local` makes it short. The plain ViT of Fashion-MNIST is the one that `experiments/grid.py --methods
plain-init` trains.
"""

import argparse
import asyncio
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from hf_layershuffle import Swarm
from hf_layershuffle.checkpoints.processing_classes import load_processing_class
from hf_layershuffle.common.files import write_text
from hf_layershuffle.data.dataloading import as_dataloader
from hf_layershuffle.data.datasets import load_image_datasets
from hf_layershuffle.plotting.style import PAGE_WIDTH, save_figure, styled
from hf_layershuffle.swarm.answers import MissingLayersError
from hf_layershuffle.swarm.split_model import SplitModel


REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS = REPOSITORY / "experiments" / "records" / "lost_workers.json"
PICTURE = "lost-workers"
PAGES = [REPOSITORY / "docs" / "swarm.md"]
MARKER = "<!-- {word} lost-workers: rendered by experiments/lost_workers.py -->"
MOST_LOST = 6
# How a request goes through the swarm: the model, the policy, whether layers may be skipped; how it is drawn
CURVES: dict[str, dict[str, Any]] = {
    "order-free": dict(model="free", policy="free", skips=True, color="#0b6e4f", marker="o", linestyle="-"),
    "plain, in its order": dict(
        model="plain", policy="strict", skips=True, color="#b8860b", marker="s", linestyle="--"
    ),
    "plain, any order": dict(model="plain", policy="free", skips=True, color="#a23b2a", marker="D", linestyle=":"),
    "fixed pipeline": dict(model="plain", policy="strict", skips=False, color="0.45", marker="x", linestyle="-."),
}
LABELS = {
    "order-free": "order-free ViT: each request takes the next free worker",
    "plain, in its order": "plain ViT in its own order, lost layers left out",
    "plain, any order": "plain ViT, each request takes the next free worker",
    "fixed pipeline": "plain ViT in a pipeline of fixed order: no answer without each layer",
}


async def accuracies(swarm: Swarm, batches: list[dict], order: list[str]) -> list[float]:
    """Accuracy with 0, 1, ... of the workers in `order` killed."""
    found = [await accuracy(swarm, batches)]
    for worker in order:
        await swarm.kill_worker(worker)
        found.append(await accuracy(swarm, batches))
    return found


async def accuracy(swarm: Swarm, batches: list[dict]) -> float:
    """Fraction of the images of all batches that get the right answer."""
    in_flight = asyncio.Semaphore(len(swarm.model.layers))  # so that requests meet busy workers, and orders differ
    right, total = 0, sum(len(batch["labels"]) for batch in batches)

    async def classify(batch: dict) -> None:
        nonlocal right
        async with in_flight:
            try:
                answer = await swarm.classify(batch["pixel_values"])
            except MissingLayersError:
                return
            right += int((answer.logits.argmax(-1) == batch["labels"]).sum())

    await asyncio.gather(*(classify(batch) for batch in batches))
    return right / total


async def measured(path: str, data: Any, curve: str, draw: int, arguments: argparse.Namespace) -> list[float]:
    """Accuracies of one curve with the workers lost in the order of one draw."""
    settings = CURVES[curve]
    swarm = Swarm.from_pretrained(
        path,
        workers=arguments.num_layers,
        transport=arguments.transport,
        policy=settings["policy"],
        max_skips=arguments.num_layers - 1 if settings["skips"] else 0,
        restart=False,
        max_wait=0.1,  # nobody comes back
        call_timeout=120.0,
    )
    processor = load_processing_class(path, swarm.model.config)
    channels = getattr(swarm.model.config, "num_channels", 3)
    batches = list(as_dataloader(data, processor, batch_size=arguments.batch_size, num_channels=channels))
    async with swarm:
        names = sorted(worker["name"] for worker in swarm.status()["workers"])
        lost = min(MOST_LOST, arguments.num_layers - 1)
        order = np.random.default_rng(draw).permutation(names)[:lost].tolist()
        return await accuracies(swarm, batches, order)


def run(arguments: argparse.Namespace) -> None:
    """Measures all curves on one dataset, and records each swarm as soon as it is done."""
    paths = {"plain": arguments.plain, "free": arguments.free}
    data = load_image_datasets(arguments.dataset_name)["test"]
    if arguments.max_samples is not None:
        data = data.select(range(min(arguments.max_samples, len(data))))
    models = {kind: SplitModel.from_pretrained(path) for kind, path in paths.items()}
    depths = {kind: len(model.layers) for kind, model in models.items()}
    if len(set(depths.values())) > 1:
        raise ValueError(f"The models have {depths} layers; compare models of the same depth.")
    arguments.num_layers = depths["free"]
    settings = dict(
        num_images=len(data),
        num_layers=arguments.num_layers,
        batch_size=arguments.batch_size,
        transport=arguments.transport,
        models={kind: [Path(path).name, digest_of(models[kind])] for kind, path in paths.items()},
    )
    name = Path(arguments.dataset_name).name
    records = read_records(arguments.records)
    earlier = records.get(name, {})
    accuracies = earlier.pop("accuracies", {}) if {**earlier, "accuracies": 0} == {**settings, "accuracies": 0} else {}
    rounds = [(draw, curve) for draw in range(arguments.draws) for curve in CURVES]
    for draw, curve in tqdm(rounds, desc=f"{name}: losing workers", unit="swarm"):
        if len(accuracies.setdefault(curve, [])) <= draw:
            path = paths[CURVES[curve]["model"]]
            accuracies[curve].append(asyncio.run(measured(path, data, curve, draw, arguments)))
            records[name] = settings | {"accuracies": accuracies}
            write_text(arguments.records, json.dumps(records, indent=1) + "\n")


def digest_of(model: SplitModel) -> str:
    """Eight hexadecimal digits of the weights of all layers."""
    return f"{zlib.crc32(json.dumps(sorted(model.digests.values())).encode()):08x}"


def read_records(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@styled
def picture(records: dict[str, dict]) -> Figure:
    """Accuracy against the number of workers lost, a panel for each dataset."""
    figure = Figure(figsize=(PAGE_WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, (dataset, record) in zip(panels, records.items()):
        draw_panel(axes, record)
        axes.set_title(f"{dataset}, {record['num_images']:,} test images, {record['num_layers']} workers")
    panels[0].set_ylabel("right answers\n(fraction of test images)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=1, handlelength=3)
    figure.suptitle("What is left when workers die, each of which holds one layer", x=0.01, horizontalalignment="left")
    return figure


def draw_panel(axes: Axes, record: dict) -> None:
    for curve, settings in CURVES.items():
        values = np.array(record["accuracies"][curve])
        lost = np.arange(values.shape[1])
        style = {name: settings[name] for name in ("color", "marker", "linestyle")}
        axes.fill_between(lost, values.min(0), values.max(0), color=settings["color"], alpha=0.13, linewidth=0)
        axes.plot(lost, values.mean(0), label=LABELS[curve], **style)
    axes.set_xlabel("workers lost")
    axes.set_xticks(range(values.shape[1]))
    axes.set_ylim(-0.03, 1.03)


def table(records: dict[str, dict]) -> str:
    """A Markdown table of the means and the range over the draws."""
    lines = []
    for dataset, record in records.items():
        lost = range(len(record["accuracies"]["order-free"][0]))
        draws = len(record["accuracies"]["order-free"])
        lines += [f"| {dataset}: workers lost of {record['num_layers']} | " + " | ".join(map(str, lost)) + " |"]
        lines += ["|---" * (len(lost) + 1) + "|"]
        for curve in CURVES:
            lines += [f"| {LABELS[curve]} | " + " | ".join(cells(record["accuracies"][curve])) + " |"]
        lines += [
            "",
            f"Fraction of {record['num_images']:,} test images with the right answer; one without an answer counts as "
            f"wrong. In requests of {record['batch_size']} images, as many at a time as workers. "
            f"Mean over {draws} draws of the workers lost, in brackets the worst and the best.",
        ]
        lines += [""]
    return "\n".join(lines).rstrip()


def cells(accuracies: list[list[float]]) -> Iterator[str]:
    for values in zip(*accuracies):
        low, high = min(values), max(values)
        spread = f" ({low:.3f} to {high:.3f})" if high - low >= 0.0005 else ""
        yield f"{np.mean(values):.3f}{spread}"


def render(records: dict[str, dict], pages: list[Path]) -> None:
    """Writes the picture beside the first page, and the tables into the pages that show them."""
    save_figure(picture(records), pages[0].parent / PICTURE)
    begin, end = (MARKER.format(word=word) for word in ("begin", "end"))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        block = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if block.search(text):
            write_text(page, block.sub(lambda _: f"{begin}\n{table(records)}\n{end}", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name", nargs="?", help="digits, a folder, or a Hub dataset id.")
    parser.add_argument("plain", nargs="?", help="Folder or Hub id of the plain model.")
    parser.add_argument("free", nargs="?", help="Folder or Hub id of the order-free model.")
    parser.add_argument("--draws", type=int, default=5, help="Orders in which workers are lost.")
    parser.add_argument("--transport", default="ray", choices=("ray", "local"), help="Processes or threads.")
    parser.add_argument("--batch_size", type=int, default=250, help="Images of one request.")
    parser.add_argument("--max_samples", type=int, help="Only the first test images.")
    parser.add_argument("--records", type=Path, default=RECORDS, help="The file with the results.")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="Pages; the picture goes with the first.")
    parser.add_argument("--render", action="store_true", help="Only write picture and tables from the records.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.render:
        if arguments.free is None:
            parser.error("name a dataset, a plain model and an order-free one, or pass --render.")
        if min(arguments.draws, arguments.batch_size, arguments.max_samples or 1) < 1:
            parser.error("--draws, --batch_size and --max_samples must be at least 1.")
        try:
            run(arguments)
        except (ValueError, OSError) as error:
            parser.error(str(error))
    render(read_records(arguments.records), arguments.pages)
    print(f"Results: {arguments.records}; picture: {arguments.pages[0].parent / PICTURE}.png")


if __name__ == "__main__":
    main()
