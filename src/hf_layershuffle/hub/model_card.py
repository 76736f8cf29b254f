# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Model cards: built from what a model's folder records, and brought up to date without touching a person's words.

A card is a function of its folder; see `folder_records.py` for what is read there.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ..common.files import write_text
from ..common.markdown import escape, in_code, in_code_deep, one_line
from ..common.paths import inside
from ..common.tables import markdown_table
from ..evaluation.report import RobustnessReport, pruning_points
from .card_budget import budget_table, describe_exits, describe_skipped_mlps
from .card_files import filled_in, read_card
from .card_tasks import card_task
from .card_text import SOURCE_NAME, mark_published, update_card_text
from .folder_records import BUDGET_PICTURE, METRICS, FolderRecords, hub_id


logger = logging.getLogger(__name__)
SOURCE_URL = "https://github.com/hf-layershuffle/hf-layershuffle"
# Fields of the configuration that are shown beside the training arguments
_METHOD_FIELDS = (
    "shuffle_mode",
    "shuffle_window",
    "layerdrop",
    "drop_path_rate",
    "depth_embedding",
    "position_predictor",
    "halting_head",
    "layer_controller",
    "residual_init_scale",
    "initializer_range",
)
INSTALL_COMMAND = f'pip install "hf-layershuffle @ git+{SOURCE_URL}"'


def write_model_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    config: PreTrainedConfig | None = None,
    records: FolderRecords | None = None,
) -> bool:
    """Writes `README.md` with the Hub's metadata into a model's folder, or brings the one that is there up to date.

    A card consists of sections between comments, which are written anew, and of whatever a person wrote around them,
    which stays. A section whose comments were removed is the person's. Of the metadata, our keys are updated and all
    others stay.

    Args:
        folder: The model's folder.
        repo_id: Where the model will be. Defaults to `your-name/` and the folder's name.
        revision: Branch or tag that the card's examples load.
        license: Licence as the Hub names it, such as `"apache-2.0"`. Defaults to the one that the card that is
            there states.
        tags: Further tags.
        config: The model's configuration, where the folder has no `config.json` yet.
        records: What the folder records, if it was read already: that reads the weights.

    Returns:
        False if the README.md that is there has none of our sections, so that only its metadata was updated.

    Raises:
        `ValueError`: if a file in the folder is not what its name says.
    """
    path = Path(folder) / "README.md"
    text, has_sections = card_text(
        folder, repo_id=repo_id, revision=revision, license=license, tags=tags, config=config, records=records
    )
    if not has_sections:
        logger.warning(
            "'%s' has none of our sections: its text stays as it is, and only its metadata is updated.", path
        )
    write_text(path, text)
    return has_sections


def card_text(folder: str | os.PathLike, **kwargs: Any) -> tuple[str, bool]:
    """The text that [`write_model_card`] writes, and whether the README.md that is there has one of our sections."""
    path = inside(folder, "README.md")
    fresh = str(build_model_card(folder, **kwargs))
    return update_card_text(read_card(path), fresh) if path.exists() else (mark_published(fresh), True)


def build_model_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    config: PreTrainedConfig | None = None,
    records: FolderRecords | None = None,
) -> ModelCard:
    """A new card from what the folder records; see [`write_model_card`]."""
    records = FolderRecords.read(folder, config) if records is None else records
    model_name = one_line((repo_id or Path(folder).resolve().name).split("/")[-1])
    training = records.training
    report = records.report
    described = records.config
    dataset = report.dataset if report else training.get("dataset")
    stated_license = license or records.license
    versions = training.get("versions") or (report.environment.get("versions", {}) if report else {})
    shown = {name: versions[name] for name in ("torch", "transformers") if name in versions}
    size = getattr(described, "image_size", None)
    baseline = training.get("baseline")
    return filled_in(
        ModelCardData(model_name=model_name, **_metadata(records, dataset, tags) | {"license": stated_license}),
        model_name=escape(model_name),
        repo_id=_in_quotes(repo_id or f"your-name/{model_name}"),
        revision=f', revision="{_in_quotes(revision)}"' if revision not in (None, "main") else "",
        config=described,
        image_size=f"{size} × {size}" if isinstance(size, int) else " × ".join(map(str, size or ["their model's"])),
        plain=records.is_plain,
        task=card_task(described),
        install_command=INSTALL_COMMAND,
        method=_describe_training(described),
        dataset=in_code(dataset) if dataset else None,
        report=replace(report, dataset=in_code(report.dataset)) if report else None,
        report_table=_report_table(report, baseline) if report else None,
        budget=replace(records.budget, dataset=in_code(records.budget.dataset)) if records.budget else None,
        budget_table=budget_table(records.budget) if records.budget else None,
        budget_picture=next((name for name, _ in records.pictures if name == BUDGET_PICTURE), None),
        exits=describe_exits(described),
        skipped_mlps=describe_skipped_mlps(described),
        rows=_metric_rows(training.get("metrics", {}), baseline),
        baseline=in_code_deep(baseline),
        license=stated_license,
        base_model=hub_id(training.get("base_model")),
        teacher=hub_id(training.get("teacher")),
        origin=hub_id(records.pruned["model"]) if records.pruned else None,
        settings=in_code_deep(training["arguments"] | _method(described)) if training.get("arguments") else {},
        has_examples=bool(records.widget),
        reversed_order=list(reversed(range(described.num_hidden_layers))),
        training=in_code_deep(training),
        merge=records.merge and _safe_merge(records.merge),
        pruned=in_code_deep(records.pruned),
        export=in_code_deep(records.export),
        pictures=[
            (_in_link(name), escape(caption))
            for name, caption in records.pictures
            if not (records.budget and name == BUDGET_PICTURE)
        ],
        versions=", ".join(escape(f"{name} {version}") for name, version in shown.items()),
    )


def _safe_merge(merge: dict) -> dict:
    """The merge with texts as they may stand in the card: names and revisions in cells, models between backticks."""
    sources = {
        escape(name): {
            "model": source["model"] and in_code(source["model"]),
            "revision": source["revision"] and escape(source["revision"]),
        }
        for name, source in merge["sources"].items()
    }
    return {**merge, "sources": sources}


def _in_quotes(text: str) -> str:
    """A text for a place between quotes, in an example of Python that stands in a card."""
    return json.dumps(in_code(text), ensure_ascii=False)[1:-1]


def _in_link(name: str) -> str:
    """The name of a file as the target of a link."""
    return quote(name)


def _metadata(records: FolderRecords, dataset: str | None, tags: Iterable[str] = ()) -> dict:
    """The Hub's keys, for `ModelCardData`."""
    if records.merge:  # a merge notes the commit of each source that came from the Hub
        sources = [source["model"] for source in records.merge["sources"].values()]
    else:
        pruned_model = records.pruned["model"] if records.pruned else None
        sources = [records.export["source"] if records.export else records.training.get("base_model") or pruned_model]
    # The Hub refuses a base model that is not one of its own
    base_models = list(dict.fromkeys(filter(None, map(hub_id, sources))))
    datasets = list(filter(None, {hub_id(dataset): None, hub_id(records.training.get("dataset")): None}))
    task = card_task(records.config)
    tags = {
        *(["vision-transformer"] if task["kind"] == "image" else []),
        *tags,
        *records.training.get("tags", []),
        *(["merge"] if records.merge else []),
    }
    values = {
        "library_name": "transformers",
        "pipeline_tag": task["pipeline"],
        "tags": sorted(
            tags
            | (
                {f"plain-{'vit' if task['kind'] == 'image' else 'model'}-export"}
                if records.export
                else set()
                if records.is_plain
                else {"layershuffle"}
            )
        ),
        "datasets": datasets or None,
        "base_model": base_models[0] if len(base_models) == 1 else base_models or None,
        "eval_results": (task["pipeline"] and _eval_results(records, dataset)) or None,
    }
    if records.merge:
        values["base_model_relation"] = "merge"
    elif base_models and not records.export and hub_id(records.training.get("base_model")):
        values["base_model_relation"] = "finetune"
    return values | ({"widget": records.widget} if records.widget else {})


def _eval_results(records: FolderRecords, dataset: str | None) -> list[EvalResult]:
    """Results of the report. Without one, those of the evaluation at the end of the training."""
    rows: list[tuple[str, float, dict[str, float] | None]] = []
    if records.report:
        report = records.report
        orders: dict[str, float] = {"num_orders": report.num_orders, "seed": report.seed}
        spread = report.arbitrary.accuracy
        rows += [
            ("sequential order", report.sequential.accuracy, None),
            ("arbitrary orders (mean)", spread.mean, orders | {"std": round(spread.std, 4)}),
            ("arbitrary orders (worst)", spread.min, orders),
        ]
        for k in pruning_points(report.num_layers):
            what = f"{k} of {report.num_layers} layers"
            pruned = {method: report.pruning[method][k - 1].accuracy for method in ("evenly_spaced", "arbitrary")}
            rows.append((f"{what}, evenly spaced", pruned["evenly_spaced"].mean, None))
            std = {"std": round(pruned["arbitrary"].std, 4)}
            rows.append((f"{what}, arbitrary order (mean)", pruned["arbitrary"].mean, orders | std))
    else:
        metrics = records.training.get("metrics", {})
        settings = {"num_orders": metrics["num_orders"]} if "num_orders" in metrics else None
        for name in ("eval_accuracy", "eval_arbitrary_accuracy"):
            if name in metrics:
                rows.append((f"order {METRICS[name]}", metrics[name], settings if "arbitrary" in name else None))
    return [
        EvalResult(
            task_type=card_task(records.config)["pipeline"],
            dataset_type=hub_id(dataset) or "unknown",
            dataset_name=dataset or "unknown",
            metric_type="accuracy",
            metric_name=f"Accuracy, {name}",
            metric_value=round(value, 4),
            metric_args=arguments,
            source_name=SOURCE_NAME,
            source_url=SOURCE_URL,
        )
        for name, value, arguments in rows
    ]


def _metric_rows(metrics: dict, baseline: dict | None = None) -> list[tuple[str, str]]:
    """Rows of the model's metrics and, if there is one, of its baseline's."""
    orders = f" ({metrics['num_orders']} orders)" if "num_orders" in metrics else ""
    rows = [
        (label + (orders if "arbitrary" in name else ""), f"{metrics[name]:.4f}")
        for name, label in METRICS.items()
        if name in metrics
    ]
    if rows and baseline:
        name = escape(baseline["name"])
        rows += [(f"{name}: {label}", value) for label, value in _metric_rows(baseline["metrics"])]
    return rows


def _report_table(report: RobustnessReport, baseline: dict | None) -> str:
    """The report's table with the two rows of a baseline."""
    table = report.table()
    metrics = (baseline or {}).get("metrics", {})
    name = escape(baseline["name"]) if baseline else ""
    if "eval_accuracy" in metrics:
        table.add_row(f"{name}: sequential", f"{metrics['eval_accuracy']:.4f}", *[""] * 5)
    if "eval_arbitrary_accuracy" in metrics:
        names = ("eval_arbitrary_accuracy", "eval_arbitrary_accuracy_std", "eval_arbitrary_accuracy_min")
        cells = [f"{metrics[key]:.4f}" if key in metrics else "" for key in names]
        table.add_row(f"{name}: arbitrary", *cells, "", "", "")
    return markdown_table(table)


def _method(config: SimpleNamespace) -> dict:
    """The settings of the configuration that decide how the model was trained, without those that are off."""
    is_off = {"residual_init_scale": 1.0, "layerdrop": 0.0, "drop_path_rate": 0.0}
    values = {name: getattr(config, name, None) for name in _METHOD_FIELDS}
    return {
        name: value
        for name, value in values.items()
        if value is not None and value is not False and value != is_off.get(name)
    }


def _describe_training(config: SimpleNamespace) -> str:
    """How the model was trained, such as "with arbitrary execution orders and a depth embedding"."""
    if config.shuffle_mode == "window":
        method = f"with execution orders that move each layer by at most {config.shuffle_window} positions"
    else:
        method = {"none": "in sequential order", "arbitrary": "with arbitrary execution orders"}[config.shuffle_mode]
    extras = ["a depth embedding"] if config.depth_embedding else []
    extras += ["a position predictor"] if config.position_predictor else []
    extras += ["trained exits (a halting head)"] if getattr(config, "halting_head", False) else []
    extras += ["a layer controller, with all else frozen"] if getattr(config, "layer_controller", False) else []
    extras += [f"LayerDrop {config.layerdrop}"] if config.layerdrop else []
    return " and ".join([method, *extras])
