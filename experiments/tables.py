"""The tables of the results page, as Markdown, from the recorded runs."""

import numpy as np
from intervals import Estimate, images_half_width, mean_std, ratio, seeds_half_width
from methods import LABELS, TARGETS, needed_method, twice_as_long
from runs import Group


MARGINS = "± half of the 95 % interval over seeds (t) ± half of that over test images (binomial)"


def markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table, without columns that no row fills."""
    filled = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    lines = [[row[number] for number in filled] for row in (columns, *rows)]
    return [
        f"| {' | '.join(lines[0])} |",
        "|---" * len(filled) + "|",
        *(f"| {' | '.join(row)} |" for row in lines[1:]),
    ]


def three_points(groups: list[Group]) -> tuple[int, list[int]]:
    """Layers of the deepest model, and three quarters, a half and a quarter of them."""
    depth = max(group.first_report.num_layers for group in groups)
    return depth, [depth * quarter // 4 for quarter in (3, 2, 1)]


def dataset_section(dataset: str, groups: list[Group]) -> str:
    first = groups[0].runs[0]
    seen = " or ".join(f"{count:,}" for count in sorted({group.images_seen for group in groups}))
    parts = [
        f"Fraction of {groups[0].first_report.num_images:,} test images classified correctly; mean ± sample standard "
        "deviation over seeds (of arbitrary orders: over the seeds' means), or the one seed's value. Over orders: "
        f"population standard deviation over the {first['num_orders']} arbitrary orders of a seed, mean over seeds. "
        f"Worst order: of all seeds. {seen} training images seen.{_notes(groups)} The first run (the others: "
        f"[commands](../experiments/records/README.md#{dataset})):",
        f"`{first['command']}`",
        "",
        *method_table(groups),
        "",
        *cost_table(dataset, groups),
        f"![Accuracy over orders]({dataset}-orders.png)",
        "",
        "With fewer layers, the first seed of each method:",
        "",
        f"![Accuracy with fewer layers]({dataset}-pruning.png)",
    ]
    return "\n".join(parts)


def _notes(groups: list[Group]) -> str:
    """On methods that only some datasets have."""
    notes = ""
    if any(needed_method(group.method) for group in groups):
        notes += " Fine-tuned and distilled: from the plain ViT with the preset's initial weights and the same seed."
    if any(group.merges for group in groups):
        notes += " Merged: random merges of the seeds' models, each layer at its own position; mean ± sample standard "
        notes += "deviation over merges."
    return notes


def method_table(groups: list[Group]) -> list[str]:
    depth, points = three_points(groups)
    columns = ["method", "seeds", "sequential", "arbitrary", "over orders", "worst order"]
    columns += [f"{k} of {depth}, arbitrary" for k in points] + [f"{k} of {depth}, evenly spaced" for k in points]
    columns += ["merged", "position known"]
    rows = []
    for group in groups:
        fewer = group.runs[0]["num_orders"] != groups[0].runs[0]["num_orders"]
        cells = [
            group.label,
            f"{len(group.runs)} ({group.runs[0]['num_orders']} orders)" if fewer else str(len(group.runs)),
        ]
        cells += [mean_std([*group.sequential().values()]), mean_std([*group.arbitrary().values()])]
        cells += [f"{group.spread_over_orders():.4f}", f"{min(group.all_orders()):.4f}"]
        for kind in ("arbitrary", "evenly_spaced"):
            cells += [mean_std([*group.pruned(kind, k).values()]) for k in points]
        rows.append([*cells, mean_std(group.merges.get("in_place", [])), mean_std(group.position_known())])
    return markdown_table(columns, rows)


def baselines(dataset: str, groups: list[Group], train_arguments: str) -> dict[str, Group | None]:
    """The plain models to compare with, by what they are called: of the same further training arguments."""
    by_key = {(group.method, group.train_arguments): group for group in groups}
    found = {LABELS[plain]: by_key.get((plain, train_arguments)) for plain in ("plain", "plain-init")}
    longer = twice_as_long(dataset) if not train_arguments else ""
    found[f"{LABELS['plain-init']}, trained twice as long"] = by_key.get(("plain-init", longer)) if longer else None
    distilled = ("plain-init-distilled", "plain-init-finetuned-distilled", "plain-init-again")
    return found | {LABELS[plain]: by_key.get((plain, train_arguments)) for plain in distilled}


def ratio_to(group: Group, plain: Group | None) -> Estimate | None:
    """Accuracy in arbitrary order to the plain model's in its own; None without seeds that both have."""
    if plain is None or not group.reports.keys() & plain.reports.keys():
        return None
    return ratio(group.arbitrary(), plain.sequential(), group.first_report.num_images)


def worst_below_mean(group: Group) -> Estimate:
    return Estimate(float(np.mean(group.gaps())), seeds_half_width(group.gaps()))


def kept(group: Group, kind: str, num_kept: int) -> Estimate:
    """What `num_kept` layers keep of the accuracy of all, chosen and ordered alike."""
    whole = group.arbitrary() if kind == "arbitrary" else group.sequential()
    return ratio(group.pruned(kind, num_kept), whole, group.first_report.num_images)


def cost_table(dataset: str, groups: list[Group]) -> list[str]:
    """What freedom of order costs, beside the plain models."""
    depth, (num_kept, *_) = three_points(groups)
    rows = []
    for group in groups:
        if group.method.startswith("plain") or group.method == "layerdrop":
            continue
        ratios = [ratio_to(group, plain) for plain in baselines(dataset, groups, group.train_arguments).values()]
        cells = [group.label, f"{group.images_seen:,}", *(each.text() if each else "" for each in ratios)]
        cells += [worst_below_mean(group).text(digits=2), f"{group.gap_of_all():.2f}"]
        rows.append([*cells, *(kept(group, kind, num_kept).text() for kind in ("arbitrary", "evenly_spaced"))])
    if not rows:
        return []
    columns = ["method", "images seen", *(f"/ {name}" for name in baselines(dataset, groups, ""))]
    columns += ["worst order below mean, points: mean of the seeds", "the worst of all seeds"]
    columns += [f"{num_kept} of {depth} / all, {kind}" for kind in ("arbitrary", "evenly spaced")]
    introduction = f"What freedom of order costs: accuracy in arbitrary order / a plain model's in its own, {MARGINS}:"
    return [introduction, "", *markdown_table(columns, rows), ""]


def target_table(groups_of: dict[str, list[Group]]) -> str:
    """What the preset's methods reach of `TARGETS`, and what the intervals say of it; "" without such records."""
    methods = [method for method in LABELS if method.startswith("order-free")]
    rows = []
    for dataset, targets in TARGETS.items():
        groups = groups_of.get(dataset, [])
        mine = {group.method: group for group in groups if group.method in methods and not group.train_arguments}
        if mine:
            rows += _target_rows(dataset, groups, [mine.get(method) for method in methods], targets)
    columns = ["", "target", *(LABELS[method].removeprefix("preset order-free, ") for method in methods)]
    return "\n".join(markdown_table(columns, rows)) if rows else ""


def _target_rows(dataset: str, groups: list[Group], mine: list[Group | None], targets: dict) -> list[list[str]]:
    depth, (num_kept, *_) = three_points(groups)
    rows = []
    for name, plain in baselines(dataset, groups, "").items():
        if plain is not None:
            cells = [_decided(ratio_to(group, plain), targets["ratio"]) if group else "" for group in mine]
            accuracy = np.mean([*plain.sequential().values()])
            rows.append([f"{dataset}: / {name} ({accuracy:.4f})", f"≥ {targets['ratio']}", *cells])
    cells = [_decided_worst(group, targets["worst"]) if group else "" for group in mine]
    rows.append([f"{dataset}: worst order below the mean, points", f"≤ {targets['worst']}", *cells])
    cells = [_decided(kept(group, "arbitrary", num_kept), targets["kept"]) if group else "" for group in mine]
    name = f"{dataset}: {num_kept} of {depth} layers / all, in arbitrary order"
    return [*rows, [name, f"≥ {targets['kept']}", *cells]]


def _decided(estimate: Estimate | None, target: float) -> str:
    return f"{estimate.text()}: {estimate.verdict(target)}" if estimate else ""


def _decided_worst(group: Group, target: float) -> str:
    gap = worst_below_mean(group)
    return f"{gap.text(digits=2)}; of all seeds {group.gap_of_all():.2f}: {gap.verdict(target, at_most=True)}"


def short_table(groups: list[Group]) -> str:
    """The methods beside each other, as on the first page of the README."""
    depth, (_, num_kept, _) = three_points(groups)
    num_orders = groups[0].runs[0]["num_orders"]
    num_images = groups[0].first_report.num_images
    seeds = sorted({len(group.runs) for group in groups})
    columns = [
        [
            group.label,
            mean_std([*group.sequential().values()]),
            mean_std([*group.arbitrary().values()]),
            f"{group.spread_over_orders():.4f}",
            f"{min(group.all_orders()):.4f}",
            mean_std([*group.pruned("arbitrary", num_kept).values()]),
        ]
        for group in groups
    ]
    names = ["", "sequential", f"arbitrary, mean of {num_orders} orders", "arbitrary, standard deviation over orders"]
    names += ["arbitrary, worst of all seeds and orders", f"{num_kept} of {depth} layers, in arbitrary order"]
    header, *rows = zip(names, *columns)
    best = max(np.mean([*group.sequential().values()]) for group in groups)
    caption = (
        f"Fraction of {num_images} test images, mean ± sample standard deviation over {' or '.join(map(str, seeds))} "
        f"seeds. One image is {1 / num_images:.4f}; half of the 95 % interval over test images is "
        f"{images_half_width(best, num_images):.4f} for {best:.3f}."
    )
    return "\n".join([*markdown_table([*header], [[*row] for row in rows]), "", caption])


def length_table(groups: list[Group]) -> str:
    """How the preset and the plain models gain from longer training; "" where all were trained equally long."""
    methods = {"plain": "sequential", "plain-init": "sequential", "order-free": "arbitrary"}
    by_length = {}
    for group in groups:
        if group.method in methods and group.train_arguments.split()[:1] in ([], ["--num_train_epochs"]):
            by_length.setdefault(group.images_seen, {})[group.method] = group
    rows = []
    for seen, found in sorted(by_length.items()):
        cells = [f"{seen:,}"]
        for method, kind in methods.items():
            group = found.get(method)
            cells.append(f"{mean_std([*getattr(group, kind)().values()])} ({len(group.runs)})" if group else "")
        mine = found.get("order-free")
        ratios = [ratio_to(mine, found.get(plain)) if mine else None for plain in ("plain", "plain-init")]
        rows.append([*cells, *(each.text() if each else "" for each in ratios)])
    columns = ["images seen", *(f"{LABELS[method]}, {kind}" for method, kind in methods.items())]
    columns += ["/ the first", "/ the second"]
    return "\n".join(markdown_table(columns, rows)) if len(rows) > 1 else ""


def held_out_table(records: list[dict]) -> str:
    """Runs on images held out of a training split, by which learning rates and the like are chosen. Records hold the
    full report, or only what train.py measures."""
    rows = []
    for record in records:
        report, results = record.get("report"), record.get("results")
        if report:
            accuracies = (
                report["num_images"],
                report["sequential"]["accuracy"],
                report["arbitrary"]["accuracy"]["mean"],
            )
        else:
            accuracies = (results[f"eval_{name}"] for name in ("samples", "accuracy", "arbitrary_accuracy"))
        num_images, sequential, arbitrary = accuracies
        arguments = record["train_arguments"] or "as the preset"
        cells = [record["dataset"], LABELS[record["method"]], arguments, str(record["seed"]), f"{num_images:,}"]
        sequential = f"{sequential:.4f} ± {images_half_width(sequential, num_images):.4f}"
        rows.append([*cells, sequential, f"{arbitrary:.4f}"])
    columns = ["dataset", "method", "further arguments", "seed", "held-out images"]
    columns += ["sequential ± half of the 95 % interval over images (binomial)", "arbitrary"]
    return "\n".join(markdown_table(columns, rows)) if rows else ""


def left_out_table(records: list[dict]) -> str:
    """Runs on test images that no other table counts, and why."""
    rows = []
    for record in records:
        report = record["report"]
        arbitrary = report["arbitrary"]["accuracy"]
        accuracies = [report["sequential"]["accuracy"], arbitrary["mean"], arbitrary["min"]]
        name = [record["dataset"], LABELS[record["method"]], str(record["seed"]), record["date"][:10]]
        rows.append([*name, *(f"{accuracy:.4f}" for accuracy in accuracies), record["left_out"]])
    columns = ["dataset", "method", "seed", "date", "sequential", "arbitrary", "worst order", "why it is left out"]
    return "\n".join(markdown_table(columns, rows)) if rows else ""
