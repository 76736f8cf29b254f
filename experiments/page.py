"""Writes tables and pictures into the pages that show them, between markers; what a person wrote around them stays.

A block of a page begins with `<!-- begin NAME: rendered by experiments/grid.py -->` and ends with the same and `end`.
"""

import re
from datetime import datetime
from pathlib import Path

from methods import LABELS, PICTURED
from runs import Group, counted, group_records, read_records
from tables import dataset_section, held_out_table, left_out_table, length_table, short_table, target_table

from hf_layershuffle.common.files import write_text


MARKER = "<!-- {word} {name}: rendered by experiments/grid.py -->"
SHORT_TABLES = {"digits": ("plain", "layerdrop", "layershuffle")}  # dataset: methods


def groups_by_dataset(records: list[dict]) -> dict[str, list[Group]]:
    """The groups of each dataset, from the runs on test images that count."""
    records = counted(records)
    datasets = dict.fromkeys(record["dataset"] for record in records)
    groups = {name: group_records([record for record in records if record["dataset"] == name]) for name in datasets}
    return {name: found for name, found in groups.items() if found}


def blocks_of(records: list[dict]) -> dict[str, str]:
    """All that can be rendered, by the name of the block: the datasets first."""
    groups = groups_by_dataset(records)
    blocks = {dataset: dataset_section(dataset, found) for dataset, found in groups.items()}
    for dataset, methods in SHORT_TABLES.items():
        found = [group for group in groups.get(dataset, []) if group.method in methods and not group.train_arguments]
        if found:
            blocks[f"{dataset}-table"] = short_table(found)
    blocks |= {f"{dataset}-length": length_table(found) for dataset, found in groups.items()}
    blocks["targets"] = target_table(groups)
    blocks["held-out"] = held_out_table(counted(records, "held_out"))
    blocks["left-out"] = left_out_table([record for record in records if "left_out" in record])
    blocks["commands"] = command_list(records)
    return blocks


def command_list(records: list[dict]) -> str:
    """The command of each record as it was run, by dataset."""
    lines = []
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        lines += ["", f"### {dataset}", ""]
        for record in records:
            if record["dataset"] == dataset:
                lines += [f"- {describe(record)}:", f"  `{record.get('command') or merge_command(record, dataset)}`"]
    return "\n".join(lines[1:])


def describe(record: dict) -> str:
    parts = [LABELS[record["method"]], record["train_arguments"]]
    parts += ["random merges" if "merges" in record else f"seed {record['seed']}"]
    parts += ["held-out images" if record["split"] == "held_out" else "", record.get("left_out", "")]
    if "date" in record:
        parts.append(datetime.fromisoformat(record["date"]).strftime("%Y-%m-%d %H:%M"))
    elif "command" not in record:
        parts.append("put together from the record's fields, since the command was not recorded")
    return ", ".join(part for part in parts if part)


def merge_command(record: dict, dataset_name: str) -> str:
    """The command of a record of random merges, whose models are those of the runs of the same seeds."""
    seeds = " ".join(map(str, record["merged_seeds"]))
    extra = f' --train_arguments "{record["train_arguments"]}"' if record["train_arguments"] else ""
    return (
        f"python experiments/grid.py --dataset_name {dataset_name} --preset {record['dataset']} --merges "
        f"--methods {record['method']} --seeds {seeds} --num_merges {len(record['merges']['in_place'])}{extra}"
    )


def fill(text: str, blocks: dict[str, str], name: str = "the page") -> str:
    """The text with each of its blocks rendered anew.

    Raises:
        `ValueError`: if the text has a block that is not rendered, or one without an end.
    """
    pattern = re.escape(MARKER).replace(r"\{word\}", "begin").replace(r"\{name\}", "(.+?)")
    for block in re.findall(pattern, text):
        begin, end = (MARKER.format(word=word, name=block) for word in ("begin", "end"))
        if not blocks.get(block):
            raise ValueError(
                f"{name} shows '{block}', of which there are no records; remove the block, or record such runs. "
                f"There are: {', '.join(each for each in blocks if blocks[each])}."
            )
        if text.count(begin) != 1 or end not in text.split(begin)[1]:
            raise ValueError(f"{name} must have '{begin}' once, and '{end}' after it.")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{blocks[block]}\n{end}{rest.split(end, 1)[1]}"
    return text


def with_all_datasets(text: str, datasets) -> str:
    """The page with an empty block for each dataset that has none."""
    for dataset in datasets:
        begin, end = (MARKER.format(word=word, name=dataset) for word in ("begin", "end"))
        if begin not in text:
            text += f"\n## {dataset}\n\n{begin}\n{end}\n"
    return text


def draw_pictures(dataset: str, groups: list[Group], folder: Path) -> None:
    from hf_layershuffle.plotting import plot_accuracy_distribution, plot_pruning_curves, save_figure

    alike = [group for group in groups if group.train_arguments == groups[0].train_arguments]
    plain = "plain" if any(group.method == "plain" for group in alike) else "plain-init"
    pictured = [group for group in alike if group.method in (plain, *PICTURED)] or alike
    by_order = {LABELS[group.method]: group.all_orders() for group in pictured}
    further = f" with {groups[0].train_arguments}" if groups[0].train_arguments else ""
    title = f"Accuracy in arbitrary order on {dataset}{further}, all seeds"
    save_figure(plot_accuracy_distribution(by_order, title=title), folder / f"{dataset}-orders")
    save_figure(
        plot_pruning_curves({LABELS[group.method]: group.first_report for group in pictured}),
        folder / f"{dataset}-pruning",
    )


def render_pages(records_file: str, pages: list[str]) -> None:
    """Renders all pages, and beside the first, which is made if it is missing, the pictures.

    Raises:
        `ValueError`: if there are no runs on test images, or a page has a block that is not rendered.
        `OSError`: if a page but the first is missing.
    """
    records = read_records(records_file)
    groups = groups_by_dataset(records)
    if not groups:
        raise ValueError(f"'{records_file}' holds no run on a test split; run some first.")
    first, *others = map(Path, pages)
    blocks = blocks_of(records)
    text = first.read_text(encoding="utf-8") if first.exists() else "# Results\n"
    texts = {first: fill(with_all_datasets(text, groups), blocks, f"'{first}'")}
    texts |= {path: fill(path.read_text(encoding="utf-8"), blocks, f"'{path}'") for path in others}
    first.parent.mkdir(parents=True, exist_ok=True)
    for dataset, found in groups.items():
        draw_pictures(dataset, found, first.parent)
    for path, rendered in texts.items():
        write_text(path, rendered)
        print(f"Rendered {path}")
